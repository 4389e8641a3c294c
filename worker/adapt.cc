#include "worker/adapt.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"

namespace refocus {
namespace {

// Rows are put through the output matrix in slices: [slice, vocab] is the largest tensor of a step.
constexpr int64_t kLogitRows = 128;

// Adds every rank's value in rank order: the same double everywhere.
double SumOverRanks(Collective& collective, double value) {
  const at::Tensor own = at::tensor({value}, at::kDouble);
  at::Tensor all = at::empty({collective.size()}, at::kDouble);
  collective.AllGatherRows(own, std::vector<int64_t>(collective.size(), 1), all);
  const double* values = all.const_data_ptr<double>();
  return std::accumulate(values, values + collective.size(), 0.0);
}

// Sum of the own rows' losses; with `dhidden` also its gradient divided by `rows` (the mean over all ranks' rows).
double OwnLoss(Model& model, const at::Tensor& hidden, const at::Tensor& targets, int64_t rows, at::Tensor* dhidden) {
  double sum = 0.0;
  for (int64_t begin = 0; begin < hidden.size(0); begin += kLogitRows) {
    const int64_t count = std::min(kLogitRows, hidden.size(0) - begin);
    const at::Tensor slice = hidden.narrow(0, begin, count);
    const at::Tensor target = targets.narrow(0, begin, count).unsqueeze(1);
    at::Tensor logits = model.Logits(slice);
    const at::Tensor lse = at::logsumexp(logits, {1}, /*keepdim=*/true);
    sum += (lse - logits.gather(1, target)).sum(at::kDouble).item<double>();
    if (dhidden == nullptr) continue;
    logits.sub_(lse).exp_();
    logits.scatter_add_(1, target, at::zeros({count, 1}, at::kFloat).sub_(1.0));
    logits.div_(static_cast<double>(rows));
    dhidden->narrow(0, begin, count).copy_(model.LogitsGrad(slice, logits));
  }
  return sum;
}

ForwardInput SpanInput(const SpanRows& rows, const KvExtent& extent, const at::Tensor& delta) {
  ForwardInput input;
  input.rows = &rows.plan;
  input.ids = rows.ids;
  input.extents = {&extent};
  input.delta = delta;
  return input;
}

// Mean over all rows of what `own_loss(rows, total rows)` sums up over this rank's.
template <typename OwnLossOf>
double OverMicroBatches(Model& model, const std::vector<Span>& spans, const OwnLossOf& own_loss) {
  const int64_t total = TotalRows(spans);
  double own = 0.0;
  for (int64_t first = 0; first < total; first += kMicroBatchRows) {
    own += own_loss(MakeSpanRows(spans, first, std::min(kMicroBatchRows, total - first), model.plan()), total);
  }
  return SumOverRanks(model.collective(), own) / static_cast<double>(total);
}

}  // namespace

int64_t TotalRows(const std::vector<Span>& spans) {
  int64_t rows = 0;
  for (const Span& span : spans) rows += span.rows();
  return rows;
}

SpanRows MakeSpanRows(const std::vector<Span>& spans, int64_t first, int64_t count, const ShardPlan& plan) {
  REFOCUS_CHECK_GT(count, 0);
  std::vector<int64_t> positions, ids, targets;
  int64_t before = 0;  // rows of the spans so far
  for (const Span& span : spans) {
    const int64_t begin = std::max<int64_t>(first - before, 0);
    const int64_t end = std::min(first + count - before, span.rows());
    for (int64_t row = begin; row < end; ++row) {
      positions.push_back(span.start + row);
      ids.push_back(span.ids[row]);
      targets.push_back(span.ids[row + 1]);
    }
    before += span.rows();
  }
  REFOCUS_CHECK_EQ(static_cast<int64_t>(positions.size()), count);
  SpanRows rows{RowPlan::Even(positions, plan), {}, {}};
  std::vector<int64_t> own_ids, own_targets;
  for (const int64_t index : rows.plan.own_order()) {
    own_ids.push_back(ids[index]);
    own_targets.push_back(targets[index]);
  }
  rows.ids = at::tensor(own_ids, at::kLong);
  rows.targets = at::tensor(own_targets, at::kLong);
  return rows;
}

double SpanLoss(Model& model, const KvExtent& extent, const at::Tensor& delta, const std::vector<Span>& spans) {
  return OverMicroBatches(model, spans, [&](const SpanRows& rows, int64_t total) {
    const at::Tensor hidden = model.Forward(SpanInput(rows, extent, delta));
    return OwnLoss(model, hidden, rows.targets, total, nullptr);
  });
}

double SpanGradient(Model& model, const KvExtent& extent, const at::Tensor& delta, const std::vector<Span>& spans,
                    at::Tensor& grad) {
  grad.zero_();
  const double loss = OverMicroBatches(model, spans, [&](const SpanRows& rows, int64_t total) {
    const ForwardInput input = SpanInput(rows, extent, delta);
    std::vector<LayerTrace> trace;
    const at::Tensor hidden = model.Forward(input, &trace);
    at::Tensor dhidden = at::empty(hidden.sizes(), hidden.options());
    const double own = OwnLoss(model, hidden, rows.targets, total, &dhidden);
    model.Backward(input, trace, dhidden, grad);
    return own;
  });
  model.collective().AllReduceSum(grad);
  return loss;
}

void Adapter::Begin(const ModelConfig& config, const AdamWConfig& optimizer, bool from_committed) {
  const std::vector<int64_t> shape = {config.layers, config.q_dim(), config.hidden};
  at::Tensor delta = from_committed && committed_.defined() ? committed_.clone() : at::zeros(shape, at::kFloat);
  at::Tensor grad = at::empty(shape, at::kFloat);
  AdamW adamw(optimizer, delta);
  steps_ = 0;
  work_.emplace(Work{std::move(delta), std::move(grad), std::move(adamw)});
}

Adapter::StepResult Adapter::Step(Model& model, const KvExtent& extent, const std::vector<Span>& spans) {
  ++steps_;
  StepResult result;
  result.loss = SpanGradient(model, extent, work_->delta, spans, work_->grad);
  // Rank 0's norm counts, so that a rank with another number of threads clips by the same bits.
  at::Tensor norm = at::linalg_vector_norm(work_->grad, 2).to(at::kDouble);
  model.collective().Broadcast(norm, 0);
  result.grad_norm = norm.item<double>();
  if (std::isfinite(result.loss) && std::isfinite(result.grad_norm)) {
    work_->optimizer.Step(work_->delta, work_->grad, result.grad_norm);
  }
  return result;
}

void Adapter::Commit(int64_t revision) {
  committed_ = work_->delta;
  revision_ = revision;
  work_.reset();
}

void Adapter::Rollback() { work_.reset(); }

}  // namespace refocus
