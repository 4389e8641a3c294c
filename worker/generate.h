// Answers, scores and probes: a request's own tail of tokens after a context, encoded with base or adapted queries.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "worker/command.h"
#include "worker/model.h"

namespace refocus {

// The K/V of question and answer belong to the request alone; the context's, and those of a prompt it forked from, are
// shared and never written.
class Sequence {
 public:
  // `before`: what its rows come after, the context first. delta is none for base queries and is kept alive here.
  Sequence(const OpenSequence& open, KvChain before, std::shared_ptr<KvExtent> tail, QueryDelta delta);

  const OpenSequence& open() const { return open_; }
  const QueryDelta& delta() const { return delta_; }
  // Position of its first own row, of the next row that writes K/V, and behind its last.
  int64_t first_position() const { return before_.end(); }
  int64_t next_position() const { return next_position_; }
  int64_t end_position() const { return before_.end() + open_.capacity; }
  // All rows so far, for a fork.
  KvChain Written() const;
  // A token was sampled that no row has been computed for yet.
  bool has_pending_token() const { return has_pending_; }
  int32_t last_token() const { return last_token_; }  // sampled last
  // Takes no part in decode steps any more.
  bool left() const { return left_; }
  void Leave() { left_ = true; }

  // Rows for command.ids; then the scores and the sampled token it asks for. Fills result's tokens, scores, ended.
  void Extend(Model& model, const ExtendSequence& command, Result& result);

  // One decode step: a token to result.tokens, or none; why it left, if it did, to result.ended. `leave` counts on rank 0.
  void Step(Model& model, bool leave, Result& result);

  // Attention mass of command.rows, layer by layer; `emit` (rank 0) gets pieces of at most kProbeValuesAtOnce. The sequence
  // stays as it was. FIELD_OUT_OF_RANGE, or NON_FINITE_ATTENTION when a mass is no number, on all ranks alike.
  Status Probe(Model& model, const ProbeAttention& command, const std::function<void(std::vector<float>)>& emit);

 private:
  Status CheckProbe(const ModelConfig& config, const ProbeAttention& command) const;
  at::Tensor Rows(Model& model, const RowPlan& plan, const std::vector<int32_t>& ids);
  // Samples on rank 0 from hidden [1, hidden] and tells everybody: state_.token, and what Publish reads.
  void EnqueueSample(Model& model, const at::Tensor& hidden);
  // One decode step: the pending token's row, and the next token.
  void EnqueueStep(Model& model);
  // Waits for what was enqueued and takes the token over.
  void TakeToken(Model& model, Result& result);
  void End(SequenceEnd::Why why, Result& result, Status status = {});
  void Score(Model& model, const RowPlan& plan, const at::Tensor& hidden, const ExtendSequence& command,
             Result& result);

  OpenSequence open_;
  KvChain before_;
  std::shared_ptr<KvExtent> tail_;
  QueryDelta delta_;
  int64_t next_position_;
  bool has_pending_ = false;
  int32_t last_token_ = 0;
  bool left_ = false;

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
