// Byte pair encoding of one piece: the pair of neighbours with the lowest rank is merged, leftmost first, until none
// has a rank.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "coordinator/tokenizer_spec.h"

namespace refocus {

// What one thread keeps between pieces: buffers and the last tokens of short pieces. About 2 MB.
class BpeScratch {
 public:
  BpeScratch();

 private:
  friend class Bpe;
  static constexpr size_t kSlots = 1 << 15;
  static constexpr size_t kKeyBytes = 30;
  static constexpr size_t kSlotTokens = 8;

  // One cache line. A piece has one place; whoever comes last owns it, so nothing grows.
  struct alignas(64) Slot {
    uint8_t key_size;  // 0: free
    uint8_t count;
    char key[kKeyBytes];
    int32_t tokens[kSlotTokens];
  };
  static_assert(sizeof(Slot) == 64);

  std::vector<Slot> slots_;
  std::vector<int32_t> ids_;
  std::vector<uint32_t> ranks_;
  std::vector<int32_t> previous_;
  std::vector<int32_t> next_;
};

// Immutable, thread-safe with one scratch per thread.
class Bpe {
 public:
  explicit Bpe(const TokenizerSpec& spec);

  // Appends the tokens of `piece`. A byte without a token is left out, as in the reference. n log n in the piece's
  // bytes; long pieces take about 24 bytes of memory per byte.
  void Encode(std::string_view piece, BpeScratch* scratch, std::vector<int32_t>* out) const;

  // A bound from below on the tokens of `piece`, much cheaper than encoding it; 0 for short pieces.
  int64_t Fewest(std::string_view piece) const;

 private:
  static constexpr uint32_t kNoRank = UINT32_MAX;

  uint32_t Rank(int32_t left, int32_t right) const;
  void EncodeUncached(std::string_view piece, BpeScratch* scratch, std::vector<int32_t>* out) const;
  void MergeShort(BpeScratch* scratch) const;
  void MergeLong(BpeScratch* scratch) const;

  std::array<int32_t, 256> byte_tokens_;                  // -1: none
  absl::flat_hash_map<uint64_t, uint32_t> ranks_;         // by left << 32 | right
  std::vector<int32_t> results_;                          // by rank
  absl::flat_hash_map<std::string_view, int32_t> whole_;  // with ignore_merges: every token, by bytes owned by the spec
  int64_t longest_token_bytes_ = 1;
};

}  // namespace refocus
