// Query-only test-time training (Bansal et al., arXiv 2512.13898) of one context against its frozen, sharded K/V.
//
// An adapter is a delta of every W_Q (worker/query_delta.h) with an fp32 master and a revision. Gradient steps work on a
// copy that becomes the next revision on commit; until then, and after a rollback, answers see the committed one. The
// loss of a span is the mean next-token cross-entropy of its rows, each attending to the cached K/V of the whole prefix
// and of the span itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "worker/command.h"
#include "worker/model.h"
#include "worker/optimizer.h"

namespace refocus {

// At most so many rows of all ranks go through the model at once: a step's memory does not grow with its spans.
inline constexpr int64_t kMicroBatchRows = 512;

// Rows [first, first + count) of the spans laid end to end, with their targets. What the device reads of them are views
// of one table, which gets all of it from the host in one copy, anew in every pass.
struct SpanRows {
  RowPlan plan;
  ForwardInput input;  // points to `plan`
  at::Tensor targets;  // [n] int64, own rows
  at::Tensor host, table;  // [words] int64, page-locked for a GPU; on the device
};

// All rows of a step in micro-batches, which cut no span that is read behind the context. Split evenly over the ranks
// where that leaves each enough of them and none is read there, else every rank computes them all and no gradient needs to
// travel. `context` is what the rows read.
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

// The same, and the gradient with respect to the delta summed over ranks: `grad`, fp32, laid out by DeltaSizes (of a
// full delta where `delta` is none), is overwritten with the same bits on every rank.
double SpanGradient(Model& model, const KvChain& context, const QueryDelta& delta, const std::vector<Span>& spans,
                    at::Tensor& grad);

class Adapter {
 public:
  explicit Adapter(uint64_t context) : context_(context) {}

  uint64_t context() const { return context_; }
  int64_t revision() const { return revision_; }
  int64_t steps() const { return steps_; }  // of the adaptation under way
  bool adapting() const { return work_ != nullptr; }  // or importing
  bool importing() const { return adapting() && work_->optimizer == nullptr; }
  // Committed delta as queries read it (dtype); none before the first commit. Never written again: a request keeps
  // the one it was opened with.
  const QueryDelta& committed() const { return committed_.view; }
  const DeltaConfig& committed_config() const { return committed_.config; }
  // The delta under adaptation: all its numbers (fp32, laid out by DeltaSizes), and as queries read it.
  const at::Tensor& working() const { return work_->delta.master; }
  const QueryDelta& working_rounded() const { return work_->delta.view; }
  // Bytes of both, with gradient and moments: AdapterBytes and AdaptationBytes of base/memory_plan.h. The gradient
  // counts whether it exists or not: the next step may need it.
  int64_t bytes() const;
  // Global norm of the last gradient before clipping, loss of the last step.
  struct StepResult {
    double loss = 0.0;
    double grad_norm = 0.0;
  };

  // From the committed delta of `from` (which may be this adapter, and has this `config`), or from nothing where that
  // is null: a full delta begins at zero; a LoRA with B = 0 and A uniform within +-1 / sqrt(hidden), drawn by `seed`,
  // as PEFT does it: the same on every rank, device and number of ranks.
  // With `keep_best` there is room for Keep.
  void Begin(Model& model, const DeltaConfig& config, const OptimizerConfig& optimizer, uint64_t seed = 0,
             const Adapter* from = nullptr, bool keep_best = false);
  // Back to where Begin began, with new moments; what was kept stays kept.
  void Restart(const Model& model);
  // One gradient step. A loss or norm that is not finite leaves the delta as it was. `model` and `context` are the
  // same in all steps between Begin and Commit or Rollback; the model outlives them: a step is recorded and repeated.
  StepResult Step(Model& model, const KvChain& context, const std::vector<Span>& spans, float learning_rate);

  // A delta whose numbers come from outside: in order, whole fp32 numbers, little-endian. Not OK changes nothing.
  void BeginImport(Model& model, const DeltaConfig& config);
  Status Write(int64_t offset, const std::string& data);
  bool complete() const { return written_ == work_->delta.master.numel(); }
  // `count` committed numbers from `offset`.
  Status Read(int64_t offset, int64_t count, std::string* data) const;

  // Keeps the delta as it is now if `loss` is the lowest so far (NaN never is), or the first.
  void Keep(double loss);
  bool may_keep() const { return adapting() && work_->kept.defined(); }
  bool has_kept() const { return adapting() && work_->kept_loss.has_value(); }
  // With `kept` what Keep kept, else the delta as it is.
  void Commit(int64_t revision, bool kept = false);
  void Rollback();

 private:
  struct Delta {
    DeltaConfig config;
    at::Tensor master;   // fp32
    at::Tensor rounded;  // dtype; the same tensor where that is fp32
    QueryDelta view;     // of rounded
  };
  struct Work {
    Delta delta;
    at::Tensor start;  // fp32, another adapter's committed delta; undefined: from nothing
    uint64_t seed = 0;
    at::Tensor grad;   // fp32; made by the first step that does not go by factors
    at::Tensor kept;   // fp32, the delta with the lowest loss so far; undefined without keep_best
    std::optional<double> kept_loss;
    at::Tensor stats;  // [2] fp64: loss, gradient norm
    std::unique_ptr<Optimizer> optimizer;  // null: an import
    int64_t moments = 0;
    StepRows rows;                   // what `step` reads
    std::unique_ptr<Repeat> repeat;  // a step over `rows`
  };
  static Delta MakeDelta(Model& model, const DeltaConfig& config, at::Tensor master);
  static int64_t BytesOf(const Delta& delta);
  // Whether the step's gradient stays in factors: every rank has all rows, and they are few.
  bool InFactors(const Model& model) const;
  void EnqueueStep(Model& model);

  uint64_t context_;
  int64_t revision_ = 0;
  int64_t steps_ = 0;
  int64_t written_ = 0;  // numbers of an import
  Delta committed_;
  std::unique_ptr<Work> work_;
};

}  // namespace refocus
