#include "worker/adapt.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/uniform.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "base/check.h"

namespace refocus {
namespace {

static_assert(std::endian::native == std::endian::little, "deltas travel as they lie in memory");

// Rows are put through the output matrix in slices: [slice, vocab] is the largest tensor of a step.
constexpr int64_t kLogitRows = 128;

// Adds the own rows' losses to `sum` [1] fp64; with `dhidden` also their gradient, of the mean over all ranks' `total`.
void AddOwnLoss(Model& model, const at::Tensor& hidden, const at::Tensor& targets, int64_t total, at::Tensor& sum,
                Gradient* dhidden) {
  Backend& backend = model.backend();
  for (int64_t begin = 0; begin < hidden.size(0); begin += kLogitRows) {
    const int64_t count = std::min(kLogitRows, hidden.size(0) - begin);
    const at::Tensor slice = hidden.narrow(0, begin, count);
    const Losses losses = backend.CrossEntropy(model.Logits(slice), targets.narrow(0, begin, count),
                                               dhidden != nullptr, 1.0 / static_cast<double>(total));
    sum.add_(losses.loss.sum(at::kDouble));
    if (dhidden == nullptr) continue;
    const Gradient part = model.LogitsGrad(slice, losses.dlogits);
    if (count == hidden.size(0)) {
      *dhidden = part;
      return;
    }
    dhidden->sum.narrow(0, begin, count).copy_(part.sum);
    dhidden->rounded.narrow(0, begin, count).copy_(part.rounded);
  }
}

// The mean loss of all rows to `loss` [1] fp64, the same on every rank; with `grad` its gradient, likewise, or with
// `factors` that of a full delta in factors, of rows that are one batch and not split.
void EnqueueLoss(Model& model, const StepRows& rows, at::Tensor loss, at::Tensor* grad,
                 GradFactors* factors = nullptr) {
  const bool backward = grad != nullptr || factors != nullptr;
  loss.zero_();
  bool add = false;
  for (const std::unique_ptr<SpanRows>& batch : rows.batches) {
    batch->table.copy_(batch->host, /*non_blocking=*/true);
    std::vector<LayerTrace> trace;
    const at::Tensor hidden = model.Forward(batch->input, backward ? &trace : nullptr);
    Gradient dhidden;
    if (backward && hidden.size(0) > kLogitRows) {
      dhidden = {at::empty(hidden.sizes(), hidden.options()),
                 at::empty(hidden.sizes(), hidden.options().dtype(model.backend().dtype()))};
    } else if (backward && hidden.size(0) == 0) {
      dhidden = {hidden, model.backend().Rounded(hidden)};
    }
    AddOwnLoss(model, hidden, batch->targets, rows.total, loss, backward ? &dhidden : nullptr);
    if (backward) {
      model.Backward(batch->input, trace, dhidden, add, grad != nullptr ? rows.delta.Over(*grad) : QueryDelta(),
                     factors);
    }
    add = true;
  }
  loss.div_(static_cast<double>(rows.total));
  if (!rows.split) return;
  const int64_t ranks = model.collective().size();
  at::Tensor all = at::empty({ranks}, loss.options());
  model.collective().AllGatherRows(loss, std::vector<int64_t>(ranks, 1), all);
  loss.copy_(all.sum(0, /*keepdim=*/true));
  if (grad != nullptr) model.collective().AllReduceSum(*grad);
}

double OnHost(Model& model, const at::Tensor& loss) {
  model.collective().Check();
  return loss.cpu().item<double>();
}

// See Adapter::Begin. One stream of numbers over all layers, always from the CPU's generator.
void DrawLora(const ModelConfig& model, const DeltaConfig& config, uint64_t seed, const at::Tensor& numbers) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(model.hidden));
  at::Tensor drawn = at::empty({model.layers, config.lora_rank, model.hidden}, at::kFloat);
  drawn.uniform_(-bound, bound, at::make_generator<at::CPUGeneratorImpl>(seed));
  DeltaOver(model, config, numbers).a.copy_(drawn);
}

// Whether a recorded step over `a` does `b` when it is refilled.
bool Alike(const StepRows& a, const StepRows& b) {
  return std::equal(a.batches.begin(), a.batches.end(), b.batches.begin(), b.batches.end(),
                    [](const auto& x, const auto& y) {
                      return x->plan.rows() == y->plan.rows() && x->input.own_mask.defined() == y->input.own_mask.defined();
                    });
}

// The views of `table`, laid out as it is on the device.
struct Fields {
  at::Tensor ids, own_pos, targets;  // [n] int64
  at::Tensor pos;                    // [rows] int64; own_pos where all rows are own
  at::Tensor mask;                   // [n, n] fp32; undefined: none
};

// Where the fp32 numbers of a mask lie, in words.
int64_t MaskWords(int64_t own) { return (own * own + 1) / 2; }

int64_t TableWords(const RowPlan& plan, bool masked) {
  const int64_t own = plan.own_rows();
  return 3 * own + (plan.split() ? plan.rows() : 0) + (masked ? MaskWords(own) : 0);
}

Fields FieldsOf(const at::Tensor& table, const RowPlan& plan, bool masked) {
  const int64_t own = plan.own_rows();
  int64_t used = 0;
  const auto next = [&](int64_t words) { return table.narrow(0, std::exchange(used, used + words), words); };
  Fields fields;
  fields.ids = next(own);
  fields.own_pos = next(own);
  fields.targets = next(own);
  fields.pos = plan.split() ? next(plan.rows()) : fields.own_pos;
  if (masked) fields.mask = next(MaskWords(own)).view(at::kFloat).narrow(0, 0, own * own).view({own, own});
  return fields;
}

void Put(const std::vector<int64_t>& values, const at::Tensor& to) {
  std::copy(values.begin(), values.end(), to.data_ptr<int64_t>());
}

// Makes the tables and what reads them, and fills in all but ids and targets.
void Place(const Model& model, const at::Tensor& mask, SpanRows& rows) {
  const at::Device device = model.backend().device();
  const auto options = at::TensorOptions(at::kLong);
  const bool masked = mask.defined();
  const int64_t words = TableWords(rows.plan, masked);
  rows.host = at::empty({words}, options.pinned_memory(!device.is_cpu()));
  rows.table = at::empty({words}, options.device(device));
  const Fields host = FieldsOf(rows.host, rows.plan, masked), fields = FieldsOf(rows.table, rows.plan, masked);
  Put(rows.plan.own_positions(), host.own_pos);
  if (rows.plan.split()) Put(rows.plan.positions(), host.pos);
  if (masked) host.mask.copy_(mask);
  rows.input.rows = &rows.plan;
  rows.input.ids = fields.ids;
  rows.input.own_pos = fields.own_pos;
  rows.input.pos = fields.pos;
  rows.input.own_mask = fields.mask;
  rows.targets = fields.targets;
}

}  // namespace

int64_t TotalRows(const std::vector<Span>& spans) {
  int64_t rows = 0;
  for (const Span& span : spans) rows += span.rows();
  return rows;
}

// The end of a micro-batch from row `first` on, where a span begins, that cuts none of at most kMicroBatchRows rows.
int64_t EndOfWholeSpans(const std::vector<Span>& spans, int64_t first) {
  int64_t end = 0;
  for (const Span& span : spans) {
    if (end > first && end + span.rows() > first + kMicroBatchRows) break;
    end += span.rows();
  }
  return end;
}

// [rows, rows] of the spans' rows [first, end) laid end to end: those behind the context see the rows of their span up to
// themselves. Undefined where there are none.
at::Tensor OwnMask(const std::vector<Span>& spans, int64_t first, int64_t end) {
  const int64_t rows = end - first;
  at::Tensor mask;
  int64_t begin = 0;
  for (const Span& span : spans) {
    if (span.behind != 0 && begin >= first && begin < end) {
      if (!mask.defined()) mask = at::full({rows, rows}, -std::numeric_limits<float>::infinity(), at::kFloat);
      at::Tensor block = mask.narrow(0, begin - first, span.rows()).narrow(1, begin - first, span.rows());
      block.triu_(1);  // -inf stays above the diagonal, 0 from it on
    }
    begin += span.rows();
  }
  return mask;
}

StepRows MakeStepRows(const Model& model, const KvChain& context, const QueryDelta& delta,
                      const std::vector<Span>& spans) {
  StepRows step;
  std::vector<int64_t> positions;
  std::vector<int64_t> ids, targets;
  for (const Span& span : spans) {
    for (int64_t row = 0; row < span.rows(); ++row) {
      positions.push_back(span.first() + row);
      ids.push_back(span.ids[row]);
      targets.push_back(span.ids[row + 1]);
    }
  }
  step.delta = delta;
  step.total = static_cast<int64_t>(positions.size());
  REFOCUS_CHECK_GT(step.total, 0);
  const ShardPlan& plan = model.plan();
  const bool behind = std::any_of(spans.begin(), spans.end(), [](const Span& span) { return span.behind != 0; });
  step.split = plan.shards > 1 && !behind && step.total >= plan.shards * model.backend().min_split_rows();
  for (int64_t first = 0, end = 0; first < step.total; first = end) {
    end = behind ? EndOfWholeSpans(spans, first) : std::min(first + kMicroBatchRows, step.total);
    const std::vector<int64_t> at(positions.begin() + first, positions.begin() + end);
    auto batch = std::make_unique<SpanRows>();
    batch->plan = step.split ? RowPlan::Even(at, plan) : RowPlan::Replicated(at, plan);
    Place(model, OwnMask(spans, first, end), *batch);
    std::vector<int64_t> own_ids, own_targets;
    for (const int64_t index : batch->plan.own_order()) {
      own_ids.push_back(ids[first + index]);
      own_targets.push_back(targets[first + index]);
    }
    const Fields fields = FieldsOf(batch->host, batch->plan, batch->input.own_mask.defined());
    Put(own_ids, fields.ids);
    Put(own_targets, fields.targets);
    batch->input.extents = context.shares();
    batch->input.SetDelta(delta);
    step.batches.push_back(std::move(batch));
  }
  return step;
}

double SpanLoss(Model& model, const KvChain& context, const QueryDelta& delta, const std::vector<Span>& spans) {
  const at::Tensor loss = at::empty({1}, at::TensorOptions(model.backend().device()).dtype(at::kDouble));
  EnqueueLoss(model, MakeStepRows(model, context, delta, spans), loss, nullptr);
  return OnHost(model, loss);
}

double SpanGradient(Model& model, const KvChain& context, const QueryDelta& delta, const std::vector<Span>& spans,
                    at::Tensor& grad) {
  const at::Tensor loss = at::empty({1}, grad.options().dtype(at::kDouble));
  EnqueueLoss(model, MakeStepRows(model, context, delta, spans), loss, &grad);
  return OnHost(model, loss);
}

Adapter::Delta Adapter::MakeDelta(Model& model, const DeltaConfig& config, at::Tensor master) {
  Delta delta;
  delta.config = config;
  delta.rounded = model.backend().Rounded(master);
  delta.master = std::move(master);
  delta.view = DeltaOver(model.config(), config, delta.rounded);
  return delta;
}

int64_t Adapter::BytesOf(const Delta& delta) {
  if (!delta.master.defined()) return 0;
  const bool shared = delta.rounded.is_same(delta.master);
  return static_cast<int64_t>(delta.master.nbytes() + (shared ? 0 : delta.rounded.nbytes()));
}

int64_t Adapter::bytes() const {
  int64_t bytes = BytesOf(committed_);
  if (work_ == nullptr) return bytes;
  bytes += BytesOf(work_->delta);
  if (!importing()) bytes += (1 + work_->moments) * static_cast<int64_t>(work_->delta.master.nbytes());
  if (work_->kept.defined()) bytes += static_cast<int64_t>(work_->kept.nbytes());
  return bytes;
}

void Adapter::Begin(Model& model, const DeltaConfig& config, const OptimizerConfig& optimizer, uint64_t seed,
                    const Adapter* from, bool keep_best) {
  const auto options = at::TensorOptions(model.backend().device()).dtype(at::kFloat);
  const std::vector<int64_t> sizes = DeltaSizes(model.config(), config);
  auto work = std::make_unique<Work>();
  work->delta = MakeDelta(model, config, at::zeros(sizes, options));
  work->seed = seed;
  if (from != nullptr) {
    REFOCUS_CHECK(from->committed_.config == config);
    work->start = from->committed_.master;
  }
  if (keep_best) work->kept = at::empty(sizes, options);
  work->stats = at::zeros({2}, options.dtype(at::kDouble));
  work->optimizer = std::make_unique<Optimizer>(optimizer, work->delta.master, work->delta.rounded);
  work->moments = optimizer.moments();
  work_ = std::move(work);
  Restart(model);
}

void Adapter::Restart(const Model& model) {
  Delta& delta = work_->delta;
  if (work_->start.defined()) {
    delta.master.copy_(work_->start);
  } else {
    delta.master.zero_();
    if (delta.config.lora_rank > 0) DrawLora(model.config(), delta.config, work_->seed, delta.master);
  }
  if (!delta.rounded.is_same(delta.master)) delta.rounded.copy_(delta.master);
  work_->optimizer->Reset();
  steps_ = 0;
}

bool Adapter::InFactors(const Model& model) const {
  const StepRows& rows = work_->rows;
  return !work_->delta.view.lora() && !rows.split && rows.batches.size() == 1 &&
         work_->optimizer->TakesFactors(model.backend(), rows.total);
}

void Adapter::EnqueueStep(Model& model) {
  Work& work = *work_;
  const at::Tensor loss = work.stats.narrow(0, 0, 1), norm = work.stats.narrow(0, 1, 1);
  GradFactors factors;
  if (InFactors(model)) {
    EnqueueLoss(model, work.rows, loss, nullptr, &factors);
    model.backend().FactorNorm(factors, norm);
  } else {
    EnqueueLoss(model, work.rows, loss, &work.grad);
    norm.copy_(at::linalg_vector_norm(work.grad, 2));
  }
  // Rank 0's word counts, so that all ranks clip and skip by the same bits.
  model.collective().Broadcast(work.stats, 0);
  if (InFactors(model)) {
    work.optimizer->Step(model.backend(), work.stats, factors);
  } else {
    work.optimizer->Step(work.stats, work.grad);
  }
}

Adapter::StepResult Adapter::Step(Model& model, const KvChain& context, const std::vector<Span>& spans,
                                  float learning_rate) {
  ++steps_;
  Work& work = *work_;
  StepRows rows = MakeStepRows(model, context, work.delta.view, spans);
  if (work.repeat != nullptr && Alike(work.rows, rows)) {
    for (size_t i = 0; i < rows.batches.size(); ++i) work.rows.batches[i]->host.copy_(rows.batches[i]->host);
  } else {
    work.repeat.reset();  // reads the old rows
    work.rows = std::move(rows);
    if (!InFactors(model) && !work.grad.defined()) work.grad = at::empty_like(work.delta.master);
    work.repeat = model.backend().Repeated([this, &model] { EnqueueStep(model); });
  }
  work.optimizer->SetRate(learning_rate);
  model.collective().BeforeReplay();
  work.repeat->Run();
  model.collective().Check();
  const at::Tensor stats = work.stats.cpu();
  return {stats.const_data_ptr<double>()[0], stats.const_data_ptr<double>()[1]};
}

void Adapter::BeginImport(Model& model, const DeltaConfig& config) {
  const auto options = at::TensorOptions(model.backend().device()).dtype(at::kFloat);
  auto work = std::make_unique<Work>();
  work->delta = MakeDelta(model, config, at::zeros(DeltaSizes(model.config(), config), options));
  written_ = 0;
  work_ = std::move(work);
}

Status Adapter::Write(int64_t offset, const std::string& data) {
  const int64_t count = static_cast<int64_t>(data.size() / sizeof(float));
  Delta& delta = work_->delta;
  if (offset != written_ || count > delta.master.numel() - written_) {
    return FieldError("offset", std::to_string(offset) + " + " + std::to_string(count),
                      std::to_string(written_) + ", and at most " + std::to_string(delta.master.numel()) + " in all");
  }
  const at::Tensor piece = at::empty({count}, at::kFloat);
  std::memcpy(piece.data_ptr(), data.data(), data.size());
  for (int64_t i = 0; i < count; ++i) {
    if (std::isfinite(piece.const_data_ptr<float>()[i])) continue;
    return Error(StatusCode::kInvalidArgument, "ADAPTER_FILE_INVALID",
                 "number " + std::to_string(offset + i) + " of the delta: got NaN or infinity, allowed finite values",
                 {{"index", std::to_string(offset + i)}});
  }
  delta.master.view({-1}).narrow(0, offset, count).copy_(piece);
  if (!delta.rounded.is_same(delta.master)) delta.rounded.view({-1}).narrow(0, offset, count).copy_(piece);
  written_ += count;
  return absl::OkStatus();
}

Status Adapter::Read(int64_t offset, int64_t count, std::string* data) const {
  const at::Tensor numbers = committed_.master.view({-1});
  if (offset > numbers.numel() || count > numbers.numel() - offset) {
    return FieldError("offset", std::to_string(offset) + " + " + std::to_string(count),
                      "at most " + std::to_string(numbers.numel()));
  }
  const at::Tensor piece = numbers.narrow(0, offset, count).cpu();
  data->assign(static_cast<const char*>(piece.const_data_ptr()), piece.nbytes());
  return absl::OkStatus();
}

void Adapter::Keep(double loss) {
  if (work_->kept_loss && !(loss < *work_->kept_loss)) return;
  work_->kept_loss = loss;
  work_->kept.copy_(work_->delta.master);
}

void Adapter::Commit(int64_t revision, bool kept) {
  Delta& delta = work_->delta;
  if (kept) {
    REFOCUS_CHECK(work_->kept_loss.has_value());
    delta.master.copy_(work_->kept);
    if (!delta.rounded.is_same(delta.master)) delta.rounded.copy_(delta.master);
  }
  committed_ = delta;
  revision_ = revision;
  work_.reset();
}

void Adapter::Rollback() { work_.reset(); }

}  // namespace refocus
