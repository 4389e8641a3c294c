// The requests of a rank, by uid: what each command does to them. Checks depend only on what is equal on all ranks, so
// that all ranks refuse alike.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "worker/command.h"
#include "worker/decode_batch.h"
#include "worker/generate.h"
#include "worker/kv_memory.h"
#include "worker/model.h"

namespace refocus {

class Sequences {
 public:
  // Both outlive this.
  Sequences(Model& model, KvMemory& memory) : model_(model), memory_(memory), batches_(model) {}

  // After the tokens of `context`, with `delta` on the queries (none: base). For open.parent == 0.
  Status Open(const OpenSequence& open, const KvChain& context, const QueryDelta& delta, int64_t free_bytes);
  // After the rows that open.parent has.
  Status Fork(const OpenSequence& open, int64_t free_bytes);
  Status Extend(const ExtendSequence& extend, Result& result);
  // `cancelled` is asked on rank 0 before each step, `emit` gets each step's tokens and ends there.
  Status Decode(const DecodeSteps& decode, const std::function<bool(uint64_t job)>& cancelled,
                const std::function<void(std::vector<Token>, std::vector<SequenceEnd>)>& emit);
  // `emit` (rank 0) gets the masses in pieces.
  Status Probe(const ProbeAttention& probe, const std::function<void(std::vector<float>)>& emit);
  Status Close(uint64_t sequence);
  void CloseContext(uint64_t context);
  // `delta` was replaced or dropped: only the sequences that were opened with it keep it.
  void Retire(const QueryDelta& delta);
  // Its ExtendSequence was skipped on all ranks: later commands that name it skip it.
  void Skip(uint64_t sequence);

 private:
  // Recorded passes keep no delta that nobody reads.
  void ForgetRetired();
  Status Add(const OpenSequence& open, const KvChain& context, const KvChain& prompt,
             const std::vector<int32_t>& prompt_ids, const QueryDelta& delta, int64_t free_bytes);

  Model& model_;
  KvMemory& memory_;
  DecodeBatches batches_;
  std::map<uint64_t, Sequence> sequences_;
  std::vector<QueryDelta> retired_;  // that a sequence still reads
};

}  // namespace refocus
