// Answers and scores: a request's own tail of tokens after a context, encoded with base or adapted queries.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "worker/command.h"
#include "worker/model.h"

namespace refocus {

// The K/V of question and answer belong to the request alone; the context's are shared and never written.
class Sequence {
 public:
  // `context` outlives the sequence; delta is undefined for base queries and is kept alive here.
  Sequence(const OpenSequence& open, const KvExtent& context, std::unique_ptr<KvExtent> tail, at::Tensor delta);

  uint64_t context_id() const { return open_.context; }
  int64_t bytes() const { return tail_->bytes(); }
  // Position of the next token that writes K/V.
  int64_t next_position() const { return next_position_; }
  int64_t end_position() const { return context_.capacity() + open_.capacity; }
  bool finished() const { return finished_; }
  // A token was sampled that no row has been computed for yet.
  bool has_pending_token() const { return has_pending_; }

  // Rows for command.ids; then the scores and the sampled token it asks for. Fills result's tokens, scores, finished.
  void Extend(Model& model, const ExtendSequence& command, Result& result);

  // Up to `steps` tokens. `cancelled` is asked on rank 0 before each; `emit` (rank 0) gets each token as it comes. All
  // ranks leave together: after a stop token, when cancelled (-> true), when the logits are not finite
  // (NON_FINITE_LOGITS in result.status).
  bool Decode(Model& model, int64_t steps, const std::function<bool()>& cancelled,
              const std::function<void(const Token&)>& emit, Result& result);

 private:
  at::Tensor Rows(Model& model, const RowPlan& plan, const std::vector<int32_t>& ids);
  // Samples on rank 0 from the hidden row and tells everybody. `leave`: rank 0 wants all to stop instead.
  bool SampleNext(Model& model, const at::Tensor& hidden, bool leave, Result& result);
  void Score(Model& model, const RowPlan& plan, const at::Tensor& hidden, const ExtendSequence& command,
             Result& result);

  OpenSequence open_;
  const KvExtent& context_;
  std::unique_ptr<KvExtent> tail_;
  at::Tensor delta_;
  int64_t next_position_;
  int64_t sampled_ = 0;
  int32_t pending_token_ = 0;
  bool has_pending_ = false;
  bool finished_ = false;
};

}  // namespace refocus
