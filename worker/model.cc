#include "worker/model.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tensor.h>

#include <cmath>

#include "base/check.h"

namespace refocus {
namespace {

// Own rows that write K/V: their indices among the own rows, in rising position.
at::Tensor AppendIndex(const ForwardInput& input, const ShardPlan& plan) {
  std::vector<int64_t> index;
  const std::vector<int64_t> positions = input.rows->own_positions();
  if (input.append != nullptr) {
    for (size_t i = 0; i < positions.size(); ++i) {
      if (positions[i] >= input.append->first_position() && plan.Owns(positions[i]))
        index.push_back(static_cast<int64_t>(i));
    }
  }
  return at::tensor(index, at::kLong);
}

at::Tensor Select(const at::Tensor& rows, const at::Tensor& index) {
  return index.size(0) == rows.size(0) ? rows : at::index_select(rows, 0, index);
}

at::Tensor SwapHalves(const at::Tensor& x) {
  const int64_t half = x.size(-1) / 2;
  return at::cat({x.narrow(-1, half, half), x.narrow(-1, 0, half)}, -1);
}

}  // namespace

Model::Model(const Weights& weights, Backend& backend, Collective& collective, std::atomic<int64_t>& progress)
    : weights_(weights),
      backend_(backend),
      collective_(collective),
      progress_(progress),
      plan_{collective.size(), collective.rank()} {
  const ModelConfig& c = config();
  for (int64_t i = 0; i < c.head_dim / 2; ++i) {
    inverse_frequencies_.push_back(
        static_cast<float>(std::pow(c.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(c.head_dim))));
  }
}

// Frequencies are rounded to fp32 as every implementation of these models does; the angle is formed in fp64, because at
// a position of a million an fp32 product is off by several hundredths of a radian.
Model::Rotation Model::RotationAt(const std::vector<int64_t>& positions) const {
  const int64_t rows = static_cast<int64_t>(positions.size());
  const int64_t half = config().head_dim / 2;
  Rotation rotation{at::empty({rows, 1, 2 * half}, at::kFloat), at::empty({rows, 1, 2 * half}, at::kFloat)};
  float* cos = rotation.cos.data_ptr<float>();
  float* sin = rotation.sin.data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row, cos += 2 * half, sin += 2 * half) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(positions[row]) * static_cast<double>(inverse_frequencies_[i]);
      cos[i] = cos[half + i] = static_cast<float>(std::cos(angle));
      sin[half + i] = static_cast<float>(std::sin(angle));
      sin[i] = -sin[half + i];
    }
  }
  return rotation;
}

// RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * weight.
at::Tensor Model::Norm(const at::Tensor& x, const at::Tensor& weight) const {
  return x * at::rsqrt(x.square().mean({-1}, /*keepdim=*/true) + config().rms_eps) * weight;
}

// With r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight: dx = r * (g - x * r^2 * mean(g * x)).
at::Tensor Model::NormGrad(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dy) const {
  const at::Tensor r = at::rsqrt(x.square().mean({-1}, /*keepdim=*/true) + config().rms_eps);
  const at::Tensor g = dy * weight;
  return r * (g - x * (r.square() * (g * x).mean({-1}, /*keepdim=*/true)));
}

// q = h . W_Q^T + h . delta^T: the delta is never added into the base weights.
at::Tensor Model::QueryRows(const LayerWeights& w, const at::Tensor& h, const at::Tensor& delta) {
  at::Tensor q = backend_.Linear(h, w.wq);
  if (delta.defined()) q.add_(backend_.Linear(h, delta));
  return q.view({h.size(0), config().heads, config().head_dim});
}

at::Tensor Model::GatherRows(const RowPlan& rows, const at::Tensor& own) {
  if (!rows.split() || collective_.size() == 1) return own;
  std::vector<int64_t> shape = own.sizes().vec();
  shape[0] = rows.rows();
  at::Tensor all = at::empty(shape, own.options());
  collective_.AllGatherRows(own, rows.counts(), all);
  return all;
}

Partial Model::Exchange(const RowPlan& rows, const Partial& partial) {
  const int64_t ranks = collective_.size();
  if (ranks == 1) return partial;
  const int64_t n = rows.own_rows();
  const int64_t heads = config().heads;
  const int64_t d = config().head_dim;
  Partial parts{at::empty({ranks * n, heads, d}, at::kFloat), at::empty({ranks * n, heads}, at::kFloat)};
  const std::vector<int64_t> own(ranks, n);
  if (rows.split()) {
    collective_.AllToAllRows(partial.out, rows.counts(), parts.out, own);
    collective_.AllToAllRows(partial.lse, rows.counts(), parts.lse, own);
  } else {
    collective_.AllGatherRows(partial.out, own, parts.out);
    collective_.AllGatherRows(partial.lse, own, parts.lse);
  }
  return backend_.Combine(parts.out.view({ranks, n, heads, d}), parts.lse.view({ranks, n, heads}));
}

std::vector<KvView> Model::Views(const ForwardInput& input, int64_t layer, int64_t pending) const {
  std::vector<KvView> views;
  for (const KvExtent* extent : input.extents) views.push_back(extent->View(layer, 0));
  if (input.append != nullptr) views.push_back(input.append->View(layer, pending));
  return views;
}

at::Tensor Model::Forward(const ForwardInput& input, std::vector<LayerTrace>* trace) {
  const ModelConfig& c = config();
  const RowPlan& rows = *input.rows;
  const int64_t n = rows.own_rows();
  REFOCUS_CHECK_EQ(input.ids.size(0), n);
  const Rotation rotation = RotationAt(rows.own_positions());
  const at::Tensor pos = at::tensor(rows.positions(), at::kLong);
  const at::Tensor append = AppendIndex(input, plan_);
  const int64_t pending = append.size(0);
  const auto rotate = [&](const at::Tensor& x) { return x * rotation.cos + SwapHalves(x) * rotation.sin; };

  at::Tensor x = at::index_select(weights_.embedding, 0, input.ids);
  for (int64_t layer = 0; layer < c.layers; ++layer, ++progress_) {
    const LayerWeights& w = weights_.layers[layer];
    const at::Tensor h = Norm(x, w.attn_norm);
    if (pending > 0) {
      const at::Tensor writing = Select(h, append);
      at::Tensor k = backend_.Linear(writing, w.wk).view({pending, c.kv_heads, c.head_dim});
      const at::Tensor v = backend_.Linear(writing, w.wv).view({pending, c.kv_heads, c.head_dim});
      if (c.qk_norm) k = Norm(k, w.k_norm);
      k = k * Select(rotation.cos, append) + SwapHalves(k) * Select(rotation.sin, append);
      input.append->Append(layer, k, v);
    }
    if (input.keys_only && layer + 1 == c.layers) {
      x = at::Tensor();
      break;
    }
    const at::Tensor q_raw = QueryRows(w, h, input.delta.defined() ? input.delta.select(0, layer) : at::Tensor());
    const at::Tensor q = rotate(c.qk_norm ? Norm(q_raw, w.q_norm) : q_raw);
    const at::Tensor q_all = GatherRows(rows, q);
    const Partial attention = Exchange(rows, backend_.Attend(q_all, pos, Views(input, layer, pending)));
    const at::Tensor x_mid = x + backend_.Linear(attention.out.view({n, c.q_dim()}), w.wo);
    const at::Tensor h_mid = Norm(x_mid, w.mlp_norm);
    const at::Tensor gate = backend_.Linear(h_mid, w.gate);
    const at::Tensor up = backend_.Linear(h_mid, w.up);
    if (trace != nullptr)
      trace->push_back({x, h, c.qk_norm ? q_raw : at::Tensor(), q_all, attention.out, attention.lse, x_mid, gate, up});
    x = x_mid + backend_.Linear(at::silu(gate).mul_(up), w.down);
  }
  if (input.append != nullptr) input.append->Advance(pending);
  return x;
}

at::Tensor Model::Logits(const at::Tensor& hidden) {
  return backend_.Linear(Norm(hidden, weights_.final_norm), weights_.output);
}

at::Tensor Model::LogitsGrad(const at::Tensor& hidden, const at::Tensor& dlogits) {
  return NormGrad(hidden, weights_.final_norm, at::mm(dlogits, weights_.output));
}

void Model::Backward(const ForwardInput& input, const std::vector<LayerTrace>& trace, at::Tensor dx, at::Tensor& grad) {
  const ModelConfig& c = config();
  const RowPlan& rows = *input.rows;
  REFOCUS_CHECK(rows.split());  // replicated rows would count their gradient once per rank
  const int64_t n = rows.own_rows();
  const Rotation rotation = RotationAt(rows.own_positions());
  const at::Tensor pos = at::tensor(rows.positions(), at::kLong);
  for (int64_t layer = c.layers - 1; layer >= 0; --layer, ++progress_) {
    const LayerWeights& w = weights_.layers[layer];
    const LayerTrace& t = trace[layer];
    // MLP: x_out = x_mid + down(silu(gate) * up)
    const at::Tensor dact = at::mm(dx, w.down);
    at::Tensor dh_mid = at::mm(at::silu_backward(dact * t.up, t.gate), w.gate);
    dh_mid.addmm_(dact * at::silu(t.gate), w.up);
    const at::Tensor dx_mid = dx + NormGrad(t.x_mid, w.mlp_norm, dh_mid);
    // Attention, with K and V frozen: only dQ.
    const at::Tensor dout = at::mm(dx_mid, w.wo).view({n, c.heads, c.head_dim});
    const at::Tensor row_dot = (dout * t.out).sum(-1);
    const at::Tensor dq_all = backend_.QueryGrad(t.q_all, pos, Views(input, layer, 0), GatherRows(rows, dout),
                                                 GatherRows(rows, t.lse), GatherRows(rows, row_dot));
    at::Tensor dq = dq_all;
    if (collective_.size() > 1) {
      dq = at::empty({n, c.heads, c.head_dim}, at::kFloat);
      collective_.ReduceScatterRows(dq_all, rows.counts(), dq);
    }
    dq = dq * rotation.cos - SwapHalves(dq) * rotation.sin;  // the inverse rotation
    if (c.qk_norm) dq = NormGrad(t.q_raw, w.q_norm, dq);
    const at::Tensor dq_rows = dq.contiguous().view({n, c.q_dim()});
    at::Tensor grad_layer = grad.select(0, layer);
    grad_layer.addmm_(dq_rows.t(), t.h);
    if (layer == 0) break;  // nothing below is trained
    at::Tensor dh = at::mm(dq_rows, w.wq);
    if (input.delta.defined()) dh.addmm_(dq_rows, input.delta.select(0, layer));
    dx = dx_mid + NormGrad(t.x, w.attn_norm, dh);
  }
}

}  // namespace refocus
