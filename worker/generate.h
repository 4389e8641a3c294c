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
  // Its rows come after `context` and `shared` (rows of the request it forked from, of the tokens `shared_ids`; may be
  // empty). `delta` is none for base queries and is kept alive here.
  Sequence(const OpenSequence& open, KvChain context, KvChain shared, std::vector<int32_t> shared_ids,
           std::shared_ptr<KvExtent> tail, QueryDelta delta);

  const OpenSequence& open() const { return open_; }
  const KvChain& context() const { return context_; }
  const KvExtent& tail() const { return *tail_; }
  const QueryDelta& delta() const { return delta_; }
  const at::Tensor& sampler() const { return sampler_; }  // worker/sampler.h; after the first sampled token
  // Of all rows behind the context, shared ones first. Those before the first sampled token are what penalties count as
  // the prompt.
  const std::vector<int32_t>& ids() const { return ids_; }
  // Position of its first own row, of the next row that writes K/V, and behind its last.
  int64_t first_position() const { return tail_->first_position(); }
  int64_t next_position() const { return next_position_; }
  int64_t end_position() const { return tail_->first_position() + tail_->capacity(); }
  // The rows so far, behind the context: what a fork shares.
  KvChain Prompt() const;
  // Where its own rows lie, then the shared ones, for one row of a decode pass: [kMaxTailExtents, kTailWords].
  void WriteTails(int64_t* words) const;
  // A token was sampled that no row has been computed for yet.
  bool has_pending_token() const { return has_pending_; }
  int32_t last_token() const { return last_token_; }  // sampled last
  // Takes no part in decode steps any more.
  bool left() const { return left_; }
  void Leave() { left_ = true; }

  // Rows for command.ids; then the scores and the sampled token it asks for. Fills result's tokens, scores, ended.
  void Extend(Model& model, const ExtendSequence& command, Result& result);

  // The row of the token that was sampled last has been computed.
  void Advance();
  // The next token, or (id < 0) that its logits are not finite. `logits` [vocab] fp32 are asked for on rank 0, where
  // top_logprobs want them.
  void Take(const Model& model, int64_t id, float logprob, const std::function<at::Tensor()>& logits, Result& result);
  // It leaves.
  void End(SequenceEnd::Why why, Result& result, Status status = {});

  // Attention mass of command.rows, layer by layer; `emit` (rank 0) gets pieces of at most kProbeValuesAtOnce. The sequence
  // stays as it was. FIELD_OUT_OF_RANGE, or NON_FINITE_ATTENTION when a mass is no number, on all ranks alike.
  Status Probe(Model& model, const ProbeAttention& command, const std::function<void(std::vector<float>)>& emit);

 private:
  Status CheckProbe(const ModelConfig& config, const ProbeAttention& command) const;
  at::Tensor Rows(Model& model, const RowPlan& plan, const std::vector<int32_t>& ids);
  // The first token after `hidden` [1, hidden]: drawn on rank 0, told to everybody.
  void Sample(Model& model, const at::Tensor& hidden, Result& result);
  void Score(Model& model, const RowPlan& plan, const at::Tensor& hidden, const ExtendSequence& command,
             Result& result);

  OpenSequence open_;
  KvChain context_;
  KvChain shared_;  // the rows of requests it forked from
  std::shared_ptr<KvExtent> tail_;
  QueryDelta delta_;
  std::vector<int32_t> ids_;
  at::Tensor sampler_;
  int64_t next_position_;
  bool has_pending_ = false;
  int32_t last_token_ = 0;
  bool left_ = false;
};

}  // namespace refocus
