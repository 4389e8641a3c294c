// Query-only test-time training (Bansal et al., arXiv 2512.13898) of one context against its frozen, sharded K/V.
//
// An adapter is a delta [layers, heads * head_dim, hidden] fp32 of every W_Q, with a revision. Gradient steps work on a
// copy that becomes the next revision on commit; until then, and after a rollback, answers see the committed one. The
// loss of a span is the mean next-token cross-entropy of its rows, each attending to the cached K/V of the whole prefix
// and of the span itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "worker/command.h"
#include "worker/model.h"
#include "worker/optimizer.h"

namespace refocus {

// At most so many rows of all ranks go through the model at once: a step's memory does not grow with its spans.
inline constexpr int64_t kMicroBatchRows = 512;

// Rows [first, first + count) of the spans laid end to end, with their targets.
struct SpanRows {
  RowPlan plan;
  ForwardInput input;  // points to `plan`
  at::Tensor targets;  // [n] int64, own rows
};

// All rows of a step in micro-batches. Split evenly over the ranks where that leaves each enough of them, else every
// rank computes them all and no gradient needs to travel. `context` is what the rows read.
struct StepRows {
  int64_t total = 0;  // of all ranks
  bool split = false;
  QueryDelta delta;  // rounded
  std::vector<std::unique_ptr<SpanRows>> batches;
};
StepRows MakeStepRows(const Model& model, const KvChain& context, const QueryDelta& delta,
                      const std::vector<Span>& spans);

int64_t TotalRows(const std::vector<Span>& spans);

// Mean loss over all ranks' rows, nats. The same double on every rank. `delta` as queries read it (dtype).
double SpanLoss(Model& model, const KvChain& context, const QueryDelta& delta, const std::vector<Span>& spans);

// The same, and the gradient with respect to the delta summed over ranks: `grad`, fp32, laid out by DeltaSizes (of a full
// delta where `delta` is none), is overwritten with the same bits on every rank.
double SpanGradient(Model& model, const KvChain& context, const QueryDelta& delta, const std::vector<Span>& spans,
                    at::Tensor& grad);

class Adapter {
 public:
  explicit Adapter(uint64_t context) : context_(context) {}

  uint64_t context() const { return context_; }
  int64_t revision() const { return revision_; }
  int64_t steps() const { return steps_; }  // of the adaptation under way
  bool adapting() const { return work_ != nullptr; }
  // Committed delta as queries read it (dtype); none before the first commit. Never written again: a request keeps
  // the one it was opened with.
  QueryDelta committed() const { return committed_.rounded; }
  // The delta under adaptation, [layers, heads * head_dim, hidden]: fp32, and as queries read it.
  const at::Tensor& working() const { return work_->delta.master; }
  QueryDelta working_rounded() const { return work_->delta.rounded; }
  // Global norm of the last gradient before clipping, loss of the last step.
  struct StepResult {
    double loss = 0.0;
    double grad_norm = 0.0;
  };

  void Begin(Model& model, const AdamWConfig& optimizer, bool from_committed);
  // One gradient step. A loss or norm that is not finite leaves the delta as it was. `model` and `context` are the
  // same in all steps between Begin and Commit or Rollback; the model outlives them: a step is recorded and repeated.
  StepResult Step(Model& model, const KvChain& context, const std::vector<Span>& spans);

  // Bytes that a delta takes: committed, and under adaptation with gradient and moments.
  static int64_t CommittedBytes(const ModelConfig& config, at::ScalarType dtype);
  static int64_t AdaptingBytes(const ModelConfig& config, at::ScalarType dtype);
  void Commit(int64_t revision);
  void Rollback();

 private:
  struct Delta {
    at::Tensor master;   // fp32
    at::Tensor rounded;  // dtype; the same tensor where that is fp32
  };
  struct Work {
    Delta delta;
    at::Tensor grad;   // fp32
    at::Tensor stats;  // [2] fp64: loss, gradient norm
    AdamW optimizer;
    StepRows rows;                   // what `step` reads
    std::unique_ptr<Repeat> repeat;  // a step over `rows`
  };
  void EnqueueStep(Model& model);

  uint64_t context_;
  int64_t revision_ = 0;
  int64_t steps_ = 0;
  Delta committed_;
  std::unique_ptr<Work> work_;
};

}  // namespace refocus
