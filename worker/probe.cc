// Attention mass: the share of their softmax that rows give to ranges of the context's keys, exp(lse over the range - lse
// over all keys), with the partial attention of every other pass over views that are cut to the range.
#include <ATen/TensorOperators.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>

#include "base/limits.h"
#include "worker/generate.h"

namespace refocus {
namespace {

Status NonFinite(int64_t layer) {
  return Error(StatusCode::kInternal, "NON_FINITE_ATTENTION",
               "attention of layer " + std::to_string(layer) +
                   ": got NaN or infinity, allowed finite values; the context and its adapters are unchanged: drop the "
                   "adapter or check the weights with --check-finite",
               {{"layer", std::to_string(layer)}});
}

// Not empty, rising, below `limit`.
Status CheckRising(const char* field, const std::vector<int64_t>& values, int64_t limit) {
  int64_t least = 0;
  for (const int64_t value : values) {
    if (value < least || value >= limit) {
      return FieldError(field, std::to_string(value), "rising numbers below " + std::to_string(limit));
    }
    least = value + 1;
  }
  return values.empty() ? FieldError(field, "0 entries", "at least 1") : Status();
}

}  // namespace

Status Sequence::CheckProbe(const ModelConfig& config, const ProbeAttention& command) const {
  const int64_t context_end = context_.end();
  const int64_t rows = static_cast<int64_t>(command.ids.size());
  if (rows < 1 || rows > kMaxChunkRows || command.positions.size() != command.ids.size()) {
    return FieldError("ids", std::to_string(rows) + " for " + std::to_string(command.positions.size()) + " positions",
                      "as many as positions, 1 to " + std::to_string(kMaxChunkRows));
  }
  const bool behind = command.positions[0] >= context_end;
  if (behind && (next_position_ != context_end || has_pending_)) {
    return FieldError("positions", std::to_string(command.positions[0]), "inside the context: the sequence has tokens");
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t pos = command.positions[i];
    if (behind ? pos == context_end + i && pos < end_position() : pos >= 0 && pos < context_end) continue;
    return FieldError("positions", std::to_string(pos),
                      "all inside the context, or consecutive from its end on within the sequence's capacity");
  }
  if (command.ranges.empty()) return FieldError("ranges", "0 entries", "at least 1");
  for (const KeyRange& range : command.ranges) {
    if (range.begin >= 0 && range.begin <= range.end && range.end <= context_end) continue;
    return FieldError("ranges", std::to_string(range.begin) + " to " + std::to_string(range.end),
                      "begin <= end, 0 to " + std::to_string(context_end));
  }
  REFOCUS_RETURN_IF_ERROR(CheckRising("rows", command.rows, rows));
  REFOCUS_RETURN_IF_ERROR(CheckRising("layers", command.layers, config.layers));
  return CheckRising("heads", command.heads, config.heads);
}

Status Sequence::Probe(Model& model, const ProbeAttention& command,
                       const std::function<void(std::vector<float>)>& emit) {
  REFOCUS_RETURN_IF_ERROR(CheckProbe(model.config(), command));
  const RowPlan plan = command.positions.size() > kBlockTokens ? RowPlan::ByOwner(command.positions, model.plan())
                                                               : RowPlan::Replicated(command.positions, model.plan());
  const auto on_device = [&](const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).to(model.backend().device());
  };
  std::vector<int64_t> place(command.positions.size()), places, positions;  // in attention's order
  for (size_t i = 0; i < plan.order().size(); ++i) place[plan.order()[i]] = static_cast<int64_t>(i);
  for (const int64_t row : command.rows) {
    places.push_back(place[row]);
    positions.push_back(command.positions[row]);
  }
  const RowPlan reported = RowPlan::Replicated(positions, model.plan());
  const at::Tensor index = on_device(places), pos = on_device(positions), heads = on_device(command.heads);

  Status status;
  ForwardInput input = model.MakeInput(plan, command.ids, tail_.get());
  input.extents = context_.shares();
  input.SetDelta(delta_);
  input.observe = [&](int64_t layer, const at::Tensor& q_all, const at::Tensor& lse_all) {
    if (!std::binary_search(command.layers.begin(), command.layers.end(), layer)) return true;
    const at::Tensor q = at::index_select(q_all, 0, index), lse = at::index_select(lse_all, 0, index);
    std::vector<at::Tensor> masses;
    for (const KeyRange& range : command.ranges) {
      const at::Tensor part = model.RangeLse(reported, q, pos, context_, layer, range.begin, range.end);
      masses.push_back(at::index_select(at::exp(part - lse), 1, heads));
    }
    model.collective().Check();
    // [rows, ranges, heads]; the same bits on every rank, and so the same verdict.
    const at::Tensor layer_masses = at::stack(masses, 1).clamp_max_(1.0).cpu();
    const float* const begin = layer_masses.const_data_ptr<float>();
    const float* const end = begin + layer_masses.numel();
    if (!std::all_of(begin, end, [](float mass) { return std::isfinite(mass); })) {
      status = NonFinite(layer);
      return false;
    }
    for (const float* from = begin; model.collective().rank() == 0 && from < end; from += kProbeValuesAtOnce) {
      emit({from, std::min(end, from + kProbeValuesAtOnce)});
    }
    return layer != command.layers.back();
  };
  model.Forward(input);
  return status;
}

}  // namespace refocus
