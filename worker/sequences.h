// The requests of a rank, by uid: what each command does to them. Checks depend only on what is equal on all ranks, so
// that all ranks refuse alike.
#pragma once

#include <cstdint>
#include <functional>
#include <map>

#include "worker/command.h"
#include "worker/generate.h"
#include "worker/kv_memory.h"
#include "worker/model.h"

namespace refocus {

class Sequences {
 public:
  // Both outlive this.
  Sequences(Model& model, KvMemory& memory) : model_(model), memory_(memory) {}

  // After the tokens of `context`, with `delta` on the queries (none: base). For open.parent == 0.
  Status Open(const OpenSequence& open, const KvChain& context, const QueryDelta& delta, int64_t free_bytes);
  // After the rows that open.parent has, its context's first.
  Status Fork(const OpenSequence& open, const KvChain& context, int64_t free_bytes);
  Status Extend(const ExtendSequence& extend, Result& result);
  // `cancelled` is asked on rank 0 before each step, `emit` gets each step's tokens and ends there.
  Status Decode(const DecodeSteps& decode, const std::function<bool(uint64_t job)>& cancelled,
                const std::function<void(std::vector<Token>, std::vector<SequenceEnd>)>& emit);
  // `emit` (rank 0) gets the masses in pieces.
  Status Probe(const ProbeAttention& probe, const std::function<void(std::vector<float>)>& emit);
  Status Close(uint64_t sequence);
  void CloseContext(uint64_t context);
  // Its ExtendSequence was skipped on all ranks: later commands that name it skip it.
  void Skip(uint64_t sequence);

 private:
  Status Add(const OpenSequence& open, KvChain before, const QueryDelta& delta, int64_t free_bytes);

  Model& model_;
  KvMemory& memory_;
  std::map<uint64_t, Sequence> sequences_;
};

}  // namespace refocus
