// Decode steps of many requests at once: a row each, contexts and adapters mixed. Rows of one context lie side by side, so
// that its keys are read once for all of them; within a context those of one adapter do.
//
// What a row is (token, position, sampler, where its own keys lie) the host writes into one table before every step; a
// pass that is recorded reads it from there. So requests join, leave and grow without another recording: that depends only
// on which contexts and adapters take part, with how many rows each, rounded up where the backend says so. Rows that are
// nobody's see no key and sample nothing.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "worker/command.h"
#include "worker/generate.h"
#include "worker/model.h"

namespace refocus {

struct BatchRow {
  Sequence* sequence = nullptr;
  bool leave = false;  // rank 0: its job is cancelled
};

class DecodeBatches {
 public:
  // The model outlives this.
  explicit DecodeBatches(Model& model);
  ~DecodeBatches();

  // One step: a token of each row to result.tokens, or none; why a sequence left, if it did, to result.ended.
  void Step(std::vector<BatchRow> rows, Result& result);

  // No pass keeps K/V of this context, or this delta, any longer.
  void ForgetContext(uint64_t context);
  void ForgetDelta(const QueryDelta& delta);

 private:
  struct Group;
  class Pass;
  Pass& PassFor(const std::vector<BatchRow>& rows);

  Model& model_;
  std::list<std::unique_ptr<Pass>> passes_;  // the one used last first
};

}  // namespace refocus
