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
  // `context` outlives the sequence; `delta` is none for base queries and is kept alive here.
  Sequence(const OpenSequence& open, const KvExtent& context, std::unique_ptr<KvExtent> tail, QueryDelta delta);

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
  // Samples on rank 0 from hidden [1, hidden] and tells everybody: state_.token, and what Publish reads.
  void EnqueueSample(Model& model, const at::Tensor& hidden);
  // One decode step: the pending token's row, and the next token.
  void EnqueueStep(Model& model);
  // Waits for what was enqueued and takes the token over. False when rank 0 wanted all to leave, or (status) when the
  // logits were not finite.
  bool TakeToken(Model& model, Result& result);
  void Score(Model& model, const RowPlan& plan, const at::Tensor& hidden, const ExtendSequence& command,
             Result& result);

  OpenSequence open_;
  const KvExtent& context_;
  std::unique_ptr<KvExtent> tail_;
  QueryDelta delta_;
  int64_t next_position_;
  bool has_pending_ = false;
  bool finished_ = false;

  // For decode steps, which are recorded once and repeated; made with the first sampled token.
  DecodeState state_;
  at::Tensor sampler_;  // worker/sampler.h
  at::Tensor sampler_address_;  // [1] int64 on the device
  at::Tensor leave_;    // [1] int64 on the device: not 0 when rank 0 wants all to stop
  at::Tensor word_;     // [2] fp64 on the host, page-locked for a GPU: token (or why there is none), log-probability
  at::Tensor logits_;   // [1, vocab] fp32 of the last token, on rank 0
  RowPlan step_plan_;
  ForwardInput step_input_;
  std::unique_ptr<Repeat> step_;
};

}  // namespace refocus
