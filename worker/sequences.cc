#include "worker/sequences.h"

#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "base/limits.h"
#include "worker/agreement.h"

namespace refocus {

Status Sequences::Add(const OpenSequence& open, const KvChain& context, const KvChain& prompt,
                      const std::vector<int32_t>& prompt_ids, const QueryDelta& delta, int64_t free_bytes) {
  if (sequences_.count(open.sequence) != 0)
    return Precondition("sequence uid", std::to_string(open.sequence), "a new one");
  if (open.capacity < 0 || open.capacity > kMaxContextTokens) {
    return FieldError("capacity", std::to_string(open.capacity), "0 to " + std::to_string(kMaxContextTokens));
  }
  std::shared_ptr<KvExtent> tail;
  REFOCUS_RETURN_IF_ERROR(memory_.Reserve(std::max(context.end(), prompt.end()), open.capacity, free_bytes, &tail));
  sequences_.try_emplace(open.sequence, open, context, prompt, prompt_ids, std::move(tail), delta);
  return {};
}

Status Sequences::Open(const OpenSequence& open, const KvChain& context, const QueryDelta& delta, int64_t free_bytes) {
  return Add(open, context, KvChain(), {}, delta, free_bytes);
}

Status Sequences::Fork(const OpenSequence& open, int64_t free_bytes) {
  const auto found = sequences_.find(open.parent);
  if (found == sequences_.end()) return Absent("parent sequence", open.parent);
  const Sequence& parent = found->second;
  if (parent.open().context != open.context || parent.open().adapter != open.adapter ||
      parent.open().revision != open.revision) {
    return FieldError("parent", std::to_string(open.parent), "a sequence of the same context, adapter and revision");
  }
  const KvChain prompt = parent.Prompt();
  const int64_t depth = static_cast<int64_t>(prompt.shares().size());
  if (depth >= kMaxTailExtents) {
    return Precondition("parent " + std::to_string(open.parent), "forked from " + std::to_string(depth) + " prompts",
                        "fewer than " + std::to_string(kMaxTailExtents));
  }
  return Add(open, parent.context(), prompt, parent.ids(), parent.delta(), free_bytes);
}

Status Sequences::Extend(const ExtendSequence& extend, Result& result) {
  const auto found = sequences_.find(extend.sequence);
  if (found == sequences_.end()) return Absent("sequence", extend.sequence);
  Sequence& sequence = found->second;
  const int64_t rows = static_cast<int64_t>(extend.ids.size());
  const int64_t begin = sequence.first_position();
  const bool starts_inside = sequence.next_position() == begin && extend.first_pos < begin;
  if (sequence.has_pending_token() && !extend.ids.empty() && extend.ids[0] != sequence.last_token()) {
    return Precondition("ids[0]", std::to_string(extend.ids[0]),
                        std::to_string(sequence.last_token()) + ", which was sampled last");
  }
  if (extend.first_pos < 0 ||
      !(extend.first_pos == sequence.next_position() || (starts_inside && extend.first_pos >= begin - rows))) {
    return Precondition("first_pos", std::to_string(extend.first_pos), std::to_string(sequence.next_position()));
  }
  if (rows < 1 || rows > kMaxChunkRows || extend.first_pos > sequence.end_position() - rows) {
    return FieldError("ids", std::to_string(rows),
                      "1 to " + std::to_string(kMaxChunkRows) + " within the sequence's capacity");
  }
  const int64_t scored = rows - (extend.sample ? 1 : 0);
  if (static_cast<int64_t>(extend.score_ids.size()) > scored) {
    return FieldError("score_ids", std::to_string(extend.score_ids.size()), "at most " + std::to_string(scored));
  }
  REFOCUS_RETURN_IF_ERROR(CheckTokenIds(extend.ids, model_.config().vocab));
  REFOCUS_RETURN_IF_ERROR(CheckTokenIds(extend.score_ids, model_.config().vocab));
  sequence.Extend(model_, extend, result);
  return {};
}

Status Sequences::Decode(const DecodeSteps& decode, const std::function<bool(uint64_t)>& cancelled,
                         const std::function<void(std::vector<Token>, std::vector<SequenceEnd>)>& emit) {
  const int64_t count = static_cast<int64_t>(decode.sequences.size());
  if (count < 1 || count > kMaxDecodeRows) {
    return FieldError("sequences", std::to_string(count), "1 to " + std::to_string(kMaxDecodeRows));
  }
  std::set<uint64_t> named;
  std::vector<Sequence*> rows;
  for (const uint64_t uid : decode.sequences) {
    const auto found = sequences_.find(uid);
    if (found == sequences_.end()) return Absent("sequence", uid);
    if (!named.insert(uid).second) return FieldError("sequences", std::to_string(uid) + " twice", "different uids");
    if (found->second.left()) continue;
    if (!found->second.has_pending_token()) {
      return Precondition("sequence " + std::to_string(uid), "no sampled token", "ExtendSequence with sample first");
    }
    rows.push_back(&found->second);
  }
  const bool first_rank = model_.collective().rank() == 0;
  for (int64_t step = 0; step < decode.steps && !rows.empty(); ++step) {
    Result done;
    std::vector<BatchRow> batch;
    for (Sequence* row : rows) {
      const uint64_t job = row->open().job;
      batch.push_back({row, first_rank && job != 0 && cancelled(job)});
    }
    batches_.Step(std::move(batch), done);
    if (first_rank) emit(std::move(done.tokens), std::move(done.ended));
    std::erase_if(rows, [](const Sequence* row) { return row->left(); });
  }
  return {};
}

Status Sequences::Probe(const ProbeAttention& probe, const std::function<void(std::vector<float>)>& emit) {
  const auto found = sequences_.find(probe.sequence);
  if (found == sequences_.end()) return Absent("sequence", probe.sequence);
  REFOCUS_RETURN_IF_ERROR(CheckTokenIds(probe.ids, model_.config().vocab));
  return found->second.Probe(model_, probe, emit);
}

Status Sequences::Close(uint64_t sequence) {
  if (sequences_.erase(sequence) == 0) return Absent("sequence", sequence);
  ForgetRetired();
  return {};
}

void Sequences::CloseContext(uint64_t context) {
  std::erase_if(sequences_, [&](const auto& entry) { return entry.second.open().context == context; });
  batches_.ForgetContext(context);
  ForgetRetired();
}

void Sequences::Retire(const QueryDelta& delta) {
  if (!delta.defined()) return;
  retired_.push_back(delta);
  ForgetRetired();
}

void Sequences::ForgetRetired() {
  std::erase_if(retired_, [&](const QueryDelta& delta) {
    const auto reads = [&](const auto& entry) { return entry.second.delta().identity() == delta.identity(); };
    if (std::any_of(sequences_.begin(), sequences_.end(), reads)) return false;
    batches_.ForgetDelta(delta);
    return true;
  });
}

void Sequences::Skip(uint64_t sequence) {
  const auto found = sequences_.find(sequence);
  if (found != sequences_.end()) found->second.Leave();
}

}  // namespace refocus
