#include "coordinator/tokenizer_bpe.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "coordinator/tokenizer_queue.h"

namespace refocus {
namespace {

constexpr size_t kShortPiece = 64;  // below, looking at every rank again is faster than a queue

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

BpeScratch::BpeScratch() : slots_(kSlots) {}

Bpe::Bpe(const TokenizerSpec& spec) {
  byte_tokens_.fill(-1);
  for (size_t id = 0; id < spec.tokens.size(); ++id) {
    if (!spec.plain[id]) continue;
    const std::string& token = spec.tokens[id];
    longest_token_bytes_ = std::max<int64_t>(longest_token_bytes_, static_cast<int64_t>(token.size()));
    if (token.size() == 1) byte_tokens_[static_cast<unsigned char>(token[0])] = static_cast<int32_t>(id);
    if (spec.ignore_merges) whole_.emplace(token, static_cast<int32_t>(id));
  }
  ranks_.reserve(spec.merges.size());
  results_.reserve(spec.merges.size());
  for (size_t rank = 0; rank < spec.merges.size(); ++rank) {
    const MergeRule& rule = spec.merges[rank];
    // A pair given twice counts with its last rank, as in the reference.
    ranks_.insert_or_assign(PairKey(rule.left, rule.right), static_cast<uint32_t>(rank));
    results_.push_back(rule.result);
  }
}

uint32_t Bpe::Rank(int32_t left, int32_t right) const {
  const auto it = ranks_.find(PairKey(left, right));
  return it == ranks_.end() ? kNoRank : it->second;
}

void Bpe::Encode(std::string_view piece, BpeScratch* scratch, std::vector<int32_t>* out) const {
  if (piece.empty()) return;
  if (piece.size() > BpeScratch::kKeyBytes) return EncodeUncached(piece, scratch, out);
  const uint64_t hash = XXH3_64bits(piece.data(), piece.size());
  BpeScratch::Slot& slot = scratch->slots_[hash % BpeScratch::kSlots];
  if (slot.key_size == piece.size() && std::memcmp(slot.key, piece.data(), piece.size()) == 0) {
    out->insert(out->end(), slot.tokens, slot.tokens + slot.count);
    return;
  }
  const size_t before = out->size();
  EncodeUncached(piece, scratch, out);
  const size_t count = out->size() - before;
  if (count > BpeScratch::kSlotTokens) return;
  slot.key_size = static_cast<uint8_t>(piece.size());
  slot.count = static_cast<uint8_t>(count);
  std::memcpy(slot.key, piece.data(), piece.size());
  std::copy(out->begin() + static_cast<ptrdiff_t>(before), out->end(), slot.tokens);
}

int64_t Bpe::Fewest(std::string_view piece) const {
  if (static_cast<int64_t>(piece.size()) <= longest_token_bytes_) return 0;
  int64_t bytes = 0;
  for (const char byte : piece) bytes += byte_tokens_[static_cast<unsigned char>(byte)] >= 0;
  return (bytes + longest_token_bytes_ - 1) / longest_token_bytes_;
}

void Bpe::EncodeUncached(std::string_view piece, BpeScratch* scratch, std::vector<int32_t>* out) const {
  if (const auto it = whole_.find(piece); it != whole_.end()) {
    out->push_back(it->second);
    return;
  }
  std::vector<int32_t>& ids = scratch->ids_;
  ids.clear();
  for (const char byte : piece) {
    const int32_t id = byte_tokens_[static_cast<unsigned char>(byte)];
    if (id >= 0) ids.push_back(id);
  }
  if (ids.size() <= kShortPiece) {
    MergeShort(scratch);
  } else {
    MergeLong(scratch);
  }
  out->insert(out->end(), ids.begin(), ids.end());
  if (ids.capacity() > (1 << 16)) *scratch = BpeScratch();  // one huge piece must not hold its memory for good
}

void Bpe::MergeShort(BpeScratch* scratch) const {
  std::vector<int32_t>& ids = scratch->ids_;
  uint32_t ranks[kShortPiece];  // of ids[i], ids[i + 1]
  size_t count = ids.size();
  for (size_t i = 0; i + 1 < count; ++i) ranks[i] = Rank(ids[i], ids[i + 1]);
  while (count > 1) {
    const size_t best = static_cast<size_t>(std::min_element(ranks, ranks + count - 1) - ranks);  // the first of equals
    if (ranks[best] == kNoRank) break;
    ids[best] = results_[ranks[best]];
    --count;
    for (size_t i = best + 1; i < count; ++i) ids[i] = ids[i + 1];
    for (size_t i = best + 1; i + 1 < count; ++i) ranks[i] = ranks[i + 1];
    if (best + 1 < count) ranks[best] = Rank(ids[best], ids[best + 1]);
    if (best > 0) ranks[best - 1] = Rank(ids[best - 1], ids[best]);
  }
  ids.resize(count);
}

void Bpe::MergeLong(BpeScratch* scratch) const {
  std::vector<int32_t>& ids = scratch->ids_;
  std::vector<uint32_t>& ranks =
      scratch->ranks_;  // of the symbol here and the next one; kNoRank for merged-away symbols
  std::vector<int32_t>& previous = scratch->previous_;
  std::vector<int32_t>& next = scratch->next_;
  REFOCUS_CHECK_LT(ids.size(), size_t{1} << 31);
  const auto count = static_cast<int32_t>(ids.size());
  ranks.assign(ids.size(), kNoRank);
  previous.resize(ids.size());
  next.resize(ids.size());
  PairQueue queue;
  const auto refresh = [&](int32_t i) {
    ranks[i] = next[i] < count ? Rank(ids[i], ids[next[i]]) : kNoRank;
    if (ranks[i] != kNoRank) queue.Push(ranks[i], i);
  };
  for (int32_t i = 0; i < count; ++i) {
    previous[i] = i - 1;
    next[i] = i + 1;
    refresh(i);
  }
  uint32_t rank = 0;
  for (int32_t i = 0; queue.Pop(&rank, &i);) {
    if (ranks[i] != rank) continue;  // the pair has changed since
    const int32_t gone = next[i];
    ids[i] = results_[rank];
    ids[gone] = -1;
    ranks[gone] = kNoRank;
    next[i] = next[gone];
    if (next[i] < count) previous[next[i]] = i;
    refresh(i);
    if (previous[i] >= 0) refresh(previous[i]);
  }
  ids.erase(std::remove(ids.begin(), ids.end(), -1), ids.end());
}

}  // namespace refocus
