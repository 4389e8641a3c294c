#include "worker/model.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include "base/check.h"

namespace refocus {

Model::Model(const Weights& weights, Backend& backend, Collective& collective, std::atomic<int64_t>& progress)
    : weights_(weights),
      backend_(backend),
      collective_(collective),
      progress_(progress),
      plan_{collective.size(), collective.rank()} {}

ForwardInput Model::MakeInput(const RowPlan& rows, const std::vector<int32_t>& ids, KvExtent* append,
                              int64_t* writing) const {
  std::vector<int64_t> own_ids, slots;
  for (const int64_t index : rows.own_order()) own_ids.push_back(ids[index]);
  const auto on_device = [&](const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).to(backend_.device());
  };
  ForwardInput input;
  input.rows = &rows;
  input.ids = on_device(own_ids);
  input.own_pos = on_device(rows.own_positions());
  input.pos = rows.split() ? on_device(rows.positions()) : input.own_pos;
  input.parts = MakeParts(rows);
  if (append == nullptr) return input;
  input.append = append;
  int64_t count = 0;
  for (const int64_t position : rows.own_positions()) {
    slots.push_back(append->SlotOf(position));
    count += slots.back() >= 0 ? 1 : 0;
  }
  if (writing != nullptr) *writing = count;
  if (count > 0) input.slots = on_device(slots);
  return input;
}

at::Tensor Model::GatherRows(const RowPlan& rows, const at::Tensor& own) {
  if (!rows.split() || collective_.size() == 1) return own;
  std::vector<int64_t> shape = own.sizes().vec();
  shape[0] = rows.rows();
  at::Tensor all = at::empty(shape, own.options());
  collective_.AllGatherRows(own, rows.counts(), all);
  return all;
}

void Model::ExchangeInto(bool split, const std::vector<int64_t>& counts, const Partial& partial, Partial& parts) {
  const std::vector<int64_t> own(collective_.size(), parts.out.size(0) / collective_.size());
  if (split) {
    collective_.AllToAllRows(partial.out, counts, parts.out, own);
    collective_.AllToAllRows(partial.lse, counts, parts.lse, own);
  } else {
    collective_.AllGatherRows(partial.out, own, parts.out);
    collective_.AllGatherRows(partial.lse, own, parts.lse);
  }
}

Partial Model::NewParts(const Partial& like, int64_t own_rows) const {
  const ModelConfig& c = config();
  const int64_t rows = collective_.size() * own_rows;
  return {at::empty({rows, c.heads, c.head_dim}, like.out.options()), at::empty({rows, c.heads}, like.lse.options())};
}

Partial Model::CombineParts(const Partial& parts) {
  const ModelConfig& c = config();
  const int64_t ranks = collective_.size();
  const int64_t n = parts.out.size(0) / ranks;
  return backend_.Combine(parts.out.view({ranks, n, c.heads, c.head_dim}), parts.lse.view({ranks, n, c.heads}));
}

Partial Model::Exchange(const RowPlan& rows, const Partial& partial) {
  if (collective_.size() == 1) return partial;
  Partial parts = NewParts(partial, rows.own_rows());
  ExchangeInto(rows.split(), rows.counts(), partial, parts);
  return CombineParts(parts);
}

// Halves of every rank's rows, where all of them have enough.
std::vector<RowPart> Model::MakeParts(const RowPlan& rows) const {
  if (!rows.split() || collective_.size() == 1) return {};
  for (const int64_t count : rows.counts()) {
    if (count < backend_.min_overlap_rows()) return {};
  }
  std::vector<RowPart> parts(2);
  std::vector<int64_t> positions[2];
  int64_t first = 0;
  for (const int64_t count : rows.counts()) {
    const int64_t cut[] = {0, count / 2, count};
    for (int half = 0; half < 2; ++half) {
      parts[half].counts.push_back(cut[half + 1] - cut[half]);
      const auto begin = rows.positions().begin() + first;
      positions[half].insert(positions[half].end(), begin + cut[half], begin + cut[half + 1]);
    }
    first += count;
  }
  for (int half = 0; half < 2; ++half) {
    parts[half].pos = at::tensor(positions[half], at::kLong).to(backend_.device());
  }
  parts[1].first = rows.own_rows() / 2;
  return parts;
}

void Model::Append(const ForwardInput& input, int64_t layer, const at::Tensor& h, const Rotation& rotation) {
  if (!input.slots.defined()) return;
  const LayerWeights& w = weights_.layers[layer];
  backend_.Append(h, w.wk, w.wv, w.k_norm, rotation, input.slots, input.append->View(layer));
}

Partial Model::Attention(const ForwardInput& input, int64_t layer, const at::Tensor& q, const at::Tensor& h,
                         const Rotation& rotation, at::Tensor* all) {
  if (input.parts.empty()) {
    Append(input, layer, h, rotation);
    *all = GatherRows(*input.rows, q);
    return Exchange(*input.rows, backend_.Attend(*all, input.pos, Views(input, layer)));
  }
  // Queries travel while K and V are computed; one half's partials travel while the other half attends.
  const ModelConfig& c = config();
  const int rank = collective_.rank();
  struct Half {
    at::Tensor own, all;
    Partial partial, parts;
    int64_t gathered = 0, exchanged = 0;
  };
  std::vector<Half> halves(input.parts.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    const RowPart& part = input.parts[i];
    halves[i].own = q.narrow(0, part.first, part.counts[rank]);
    halves[i].all = at::empty({part.pos.size(0), c.heads, c.head_dim}, q.options());
    halves[i].gathered =
        backend_.Aside([&] { collective_.AllGatherRows(halves[i].own, part.counts, halves[i].all); });
  }
  Append(input, layer, h, rotation);
  for (size_t i = 0; i < halves.size(); ++i) {
    const RowPart& part = input.parts[i];
    backend_.Await(halves[i].gathered);
    halves[i].partial = backend_.Attend(halves[i].all, part.pos, Views(input, layer));
    halves[i].parts = NewParts(halves[i].partial, part.counts[rank]);
    halves[i].exchanged =
        backend_.Aside([&] { ExchangeInto(/*split=*/true, part.counts, halves[i].partial, halves[i].parts); });
  }
  std::vector<at::Tensor> out, lse;
  for (const Half& half : halves) {
    backend_.Await(half.exchanged);
    const Partial whole = CombineParts(half.parts);
    out.push_back(whole.out);
    lse.push_back(whole.lse);
  }
  return {at::cat(out), at::cat(lse)};
}

at::Tensor Model::SumOverRanks(const RowPlan& rows, const at::Tensor& dq) {
  const int64_t ranks = collective_.size();
  if (ranks == 1) return dq;
  std::vector<int64_t> shape = dq.sizes().vec();
  if (rows.split()) {
    shape[0] = rows.own_rows();
    at::Tensor own = at::empty(shape, dq.options());
    collective_.ReduceScatterRows(dq, rows.counts(), own);
    return own;
  }
  shape[0] *= ranks;
  at::Tensor parts = at::empty(shape, dq.options());
  collective_.AllGatherRows(dq, std::vector<int64_t>(ranks, dq.size(0)), parts);
  return parts.view({ranks, dq.size(0), dq.size(1), dq.size(2)}).sum(0);
}

std::vector<KvView> Model::Views(const ForwardInput& input, int64_t layer) const {
  std::vector<KvView> views;
  for (const KvExtent* extent : input.extents) views.push_back(extent->View(layer));
  if (input.append != nullptr) views.push_back(input.append->View(layer));
  return views;
}

at::Tensor Model::Forward(const ForwardInput& input, std::vector<LayerTrace>* trace) {
  const ModelConfig& c = config();
  const RowPlan& rows = *input.rows;
  const int64_t n = rows.own_rows();
  REFOCUS_CHECK_EQ(input.ids.size(0), n);
  REFOCUS_CHECK(trace == nullptr || input.parts.empty());  // the backward pass wants all rows' queries in one piece
  const Rotation rotation = backend_.RotationAt(input.own_pos);
  at::Tensor x = backend_.Embed(weights_.embedding, input.ids);
  at::Tensor h = backend_.Norm(x, weights_.layers[0].attn_norm);
  for (int64_t layer = 0; layer < c.layers; ++layer, ++progress_) {
    const LayerWeights& w = weights_.layers[layer];
    if (input.keys_only && layer + 1 == c.layers) {
      Append(input, layer, h, rotation);
      return at::Tensor();
    }
    const at::Tensor q_raw = ProjectQueries(backend_, h, w.wq, input.adapters, layer).view({n, c.heads, c.head_dim});
    at::Tensor q_all;
    const Partial attention =
        Attention(input, layer, backend_.Rotate(q_raw, w.q_norm, rotation), h, rotation, &q_all);
    const at::Tensor mixed = backend_.Linear(backend_.Rounded(attention.out).view({n, c.q_dim()}), w.wo);
    const Normed mid = backend_.AddNorm(x, mixed, w.mlp_norm);
    const at::Tensor gate = backend_.Linear(mid.h, w.gate);
    const at::Tensor up = backend_.Linear(mid.h, w.up);
    if (trace != nullptr) trace->push_back({x, h, q_raw, q_all, attention.out, attention.lse, mid.sum, gate, up});
    const at::Tensor y = backend_.Linear(backend_.SiluMul(gate, up), w.down);
    if (layer + 1 == c.layers) {
      x = backend_.Add(mid.sum, y);
    } else {
      const Normed next = backend_.AddNorm(mid.sum, y, weights_.layers[layer + 1].attn_norm);
      x = next.sum;
      h = next.h;
    }
  }
  return x;
}

at::Tensor Model::Logits(const at::Tensor& hidden) {
  return backend_.LinearSum(backend_.Norm(hidden, weights_.final_norm), weights_.output, at::Tensor());
}

Gradient Model::LogitsGrad(const at::Tensor& hidden, const at::Tensor& dlogits) {
  const at::Tensor dh = backend_.LinearGrad(dlogits, weights_.output, at::Tensor());
  return backend_.NormGrad(hidden, weights_.final_norm, dh, at::Tensor());
}

void Model::Backward(const ForwardInput& input, const std::vector<LayerTrace>& trace, Gradient dx, bool add,
                     const QueryDelta& grad) {
  const ModelConfig& c = config();
  const RowPlan& rows = *input.rows;
  const int64_t n = rows.own_rows();
  REFOCUS_CHECK(input.adapters.empty() || (input.adapters.size() == 1 && input.adapters[0].count == n));
  const QueryDelta delta = input.adapters.empty() ? QueryDelta() : input.adapters[0].delta;
  const Rotation rotation = backend_.RotationAt(input.own_pos);
  for (int64_t layer = c.layers - 1; layer >= 0; --layer, ++progress_) {
    const LayerWeights& w = weights_.layers[layer];
    const LayerTrace& t = trace[layer];
    // MLP: x_out = x_mid + down(silu(gate) * up)
    const Backend::SiluGrads mlp = backend_.SiluMulGrad(backend_.LinearGrad(dx.rounded, w.down, {}), t.gate, t.up);
    at::Tensor dh_mid = backend_.LinearGrad(mlp.gate, w.gate, {});
    dh_mid.addmm_(mlp.up, w.up);
    const Gradient dx_mid = backend_.NormGrad(t.x_mid, w.mlp_norm, dh_mid, dx.sum);
    // Attention, with K and V frozen: only dQ.
    const at::Tensor dout = backend_.LinearGrad(dx_mid.rounded, w.wo, {}).view({n, c.heads, c.head_dim});
    const at::Tensor dq_all =
        backend_.QueryGrad(t.q_all, input.pos, Views(input, layer), GatherRows(rows, dout), GatherRows(rows, t.lse),
                           GatherRows(rows, backend_.RowDot(dout, t.out)));
    const at::Tensor dq =
        backend_.RotateGrad(SumOverRanks(rows, dq_all), t.q_raw, w.q_norm, rotation).view({n, c.q_dim()});
    DeltaGrad(backend_, dq, t.h, delta, layer, add, grad);
    if (layer == 0) break;  // nothing below is trained
    dx = backend_.NormGrad(t.x, w.attn_norm, QueriesGrad(backend_, dq, w.wq, delta, layer), dx_mid.sum);
  }
}

}  // namespace refocus
