#include "worker/model.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include "base/check.h"

namespace refocus {
namespace {

KeyValueWeights KeyValues(const LayerWeights& w) { return {w.wk, w.wv, {w.k_bias, w.k_norm}, w.v_bias}; }

}  // namespace

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

at::Tensor Model::RoomForAll(const RowPlan& rows, const at::Tensor& own) const {
  std::vector<int64_t> shape = own.sizes().vec();
  shape[0] = rows.rows();
  return at::empty(shape, own.options());
}

at::Tensor Model::GatherRows(const RowPlan& rows, const at::Tensor& own) {
  if (!Travels(rows)) return own;
  at::Tensor all = RoomForAll(rows, own);
  collective_.AllGatherRows(own, rows.counts(), all);
  return all;
}

const kernels::PeerMemory* Model::PeersFor(const RowPlan& rows, const char* what) {
  return rows.split() || collective_.size() == 1 ? nullptr : collective_.NextPeerExchange(what);
}

Partial Model::Exchange(const RowPlan& rows, const Partial& partial) {
  const int64_t ranks = collective_.size();
  if (ranks == 1) return partial;
  const kernels::PeerMemory* peers = PeersFor(rows, "exchange of partials");
  if (peers != nullptr) return backend_.CombineOverPeers(partial, *peers);
  const ModelConfig& c = config();
  const int64_t n = rows.own_rows();
  const std::vector<int64_t> own(ranks, n);
  at::Tensor out = at::empty({ranks * n, c.heads, c.head_dim}, partial.out.options());
  at::Tensor lse = at::empty({ranks * n, c.heads}, partial.lse.options());
  if (rows.split()) {
    collective_.AllToAllRows(partial.out, rows.counts(), out, own);
    collective_.AllToAllRows(partial.lse, rows.counts(), lse, own);
  } else {
    collective_.AllGatherRows(partial.out, own, out);
    collective_.AllGatherRows(partial.lse, own, lse);
  }
  return backend_.Combine(out.view({ranks, n, c.heads, c.head_dim}), lse.view({ranks, n, c.heads}));
}

void Model::Append(const ForwardInput& input, int64_t layer, const at::Tensor& h, const Rotation& rotation) {
  if (!input.slots.defined()) return;
  backend_.Append(h, KeyValues(weights_.layers[layer]), rotation, input.slots, input.append->View(layer));
}

Partial Model::Attention(const ForwardInput& input, int64_t layer, const at::Tensor& q, const at::Tensor& h,
                         const Rotation& rotation, at::Tensor* all, OwnKeys* own) {
  const RowPlan& rows = *input.rows;
  if (Travels(rows) && input.slots.defined()) {
    *all = RoomForAll(rows, q);
    const int64_t gathered = backend_.Aside([&] { collective_.AllGatherRows(q, rows.counts(), *all); });
    Append(input, layer, h, rotation);
    backend_.Await(gathered);
  } else {
    Append(input, layer, h, rotation);
    *all = GatherRows(rows, q);
  }
  const Partial cached = Exchange(rows, backend_.Attend(*all, input.pos, Views(input, layer)));
  if (!input.own_mask.defined()) return cached;
  REFOCUS_CHECK(!rows.split());
  *own = MakeOwnKeys(backend_, h, KeyValues(weights_.layers[layer]), rotation, config().head_dim);
  const Partial beside = OwnAttend(q, *own, input.own_mask);
  return backend_.Combine(at::stack({cached.out, beside.out}), at::stack({cached.lse, beside.lse}));
}

Partial Model::DecodeAttention(const ForwardInput& input, int64_t layer, const at::Tensor& q_raw, const at::Tensor& h,
                               const KeyValueRows& keys, const Rotation& rotation, at::Tensor* q) {
  const LayerWeights& w = weights_.layers[layer];
  *q = backend_.RotateAndAppendRows(q_raw, {w.q_bias, w.q_norm}, h, KeyValues(w), keys, rotation, input.slots,
                                    input.tails, layer);
  std::vector<RowSweep> sweeps;
  for (const ForwardInput::Sweep& sweep : input.sweeps) {
    RowSweep& to = sweeps.emplace_back(RowSweep{sweep.first, sweep.rows, {}});
    for (const KvShare& share : sweep.extents) to.extents.push_back(share.View(layer));
  }
  const RowPlan& rows = *input.rows;
  const kernels::PeerMemory* peers = PeersFor(rows, "exchange of partials");
  const Partial attention = backend_.AttendRows(*q, input.pos, sweeps, input.tails, layer, plan_, peers);
  return peers != nullptr ? attention : Exchange(rows, attention);
}

at::Tensor Model::SumOverRanks(const RowPlan& rows, const at::Tensor& terms) {
  const int64_t ranks = collective_.size();
  if (ranks == 1) return terms;
  std::vector<int64_t> shape = terms.sizes().vec();
  if (rows.split()) {
    shape[0] = rows.own_rows();
    at::Tensor own = at::empty(shape, terms.options());
    collective_.ReduceScatterRows(terms, rows.counts(), own);
    return own;
  }
  const kernels::PeerMemory* peers = PeersFor(rows, "sum over ranks");
  if (peers != nullptr) return backend_.SumOverPeers(terms, at::kFloat, *peers);
  const int64_t count = shape[0];
  shape[0] *= ranks;
  at::Tensor parts = at::empty(shape, terms.options());
  collective_.AllGatherRows(terms, std::vector<int64_t>(ranks, count), parts);
  const auto part = [&](int64_t rank) { return parts.narrow(0, rank * count, count); };
  at::Tensor sum = part(0) + part(1);
  for (int64_t rank = 2; rank < ranks; ++rank) sum.add_(part(rank));
  return sum;
}

at::Tensor Model::RoundedSumOverRanks(const RowPlan& rows, const at::Tensor& terms) {
  const kernels::PeerMemory* peers = PeersFor(rows, "sum over ranks");
  return peers != nullptr ? backend_.SumOverPeers(terms, backend_.dtype(), *peers)
                          : backend_.Rounded(SumOverRanks(rows, terms));
}

Model::Mlp Model::MlpOf(const RowPlan& rows, const LayerWeights& w) const {
  const int64_t ranks = collective_.size(), inner = w.gate.size(0);
  constexpr int64_t kAligned = 8;  // columns: 16 bytes of bf16
  // Through NCCL an exchange takes about as long as the reading that it saves.
  const bool quick = backend_.device().is_cpu() || collective_.has_peer_exchange();
  if (ranks == 1 || rows.split() || !quick || inner % (ranks * kAligned) != 0) return {w.gate, w.up, w.down};
  const int64_t part = inner / ranks, first = collective_.rank() * part;
  return {w.gate.narrow(0, first, part), w.up.narrow(0, first, part), w.down.narrow(1, first, part), true};
}

at::Tensor Model::MlpOut(const RowPlan& rows, const Mlp& mlp, const at::Tensor& act) {
  if (!mlp.part) return backend_.Linear(act, mlp.down);
  return RoundedSumOverRanks(rows, backend_.LinearSum(act, mlp.down, at::Tensor()));
}

at::Tensor Model::MlpGrad(const RowPlan& rows, const Mlp& mlp, const at::Tensor& dy, const LayerTrace& t) {
  const Backend::SiluGrads inner = backend_.SiluMulGrad(backend_.LinearGrad(dy, mlp.down, {}), t.gate, t.up);
  const at::Tensor dh = backend_.LinearPairGrad(inner.gate, mlp.gate, inner.up, mlp.up, mlp.part);
  return mlp.part ? RoundedSumOverRanks(rows, dh) : dh;
}

std::vector<KvView> Model::Views(const ForwardInput& input, int64_t layer) const {
  std::vector<KvView> views;
  for (const KvShare& share : input.extents) views.push_back(share.View(layer));
  if (input.append != nullptr) views.push_back(input.append->View(layer));
  return views;
}

at::Tensor Model::Forward(const ForwardInput& input, std::vector<LayerTrace>* trace) {
  const ModelConfig& c = config();
  const RowPlan& rows = *input.rows;
  const int64_t n = rows.own_rows();
  REFOCUS_CHECK_EQ(input.ids.size(0), n);
  REFOCUS_CHECK(trace == nullptr || !input.tails.defined());  // there is no way back through a decode pass
  const Rotation rotation = backend_.RotationAt(input.own_pos);
  at::Tensor x = backend_.Embed(weights_.embedding, input.ids);
  at::Tensor h = backend_.Norm(x, weights_.layers[0].attn_norm);
  for (int64_t layer = 0; layer < c.layers; ++layer, ++progress_) {
    const LayerWeights& w = weights_.layers[layer];
    if (input.keys_only && layer + 1 == c.layers) {
      Append(input, layer, h, rotation);
      return at::Tensor();
    }
    const bool decodes = input.tails.defined();
    const KeyValueWeights key_values = KeyValues(w);
    KeyValueRows keys;
    const at::Tensor q_raw =
        ProjectQueries(backend_, h, w.wq, input.adapters, layer, decodes ? &key_values : nullptr, &keys)
            .view({n, c.heads, c.head_dim});
    at::Tensor q_all;
    OwnKeys own;
    const Partial attention =
        decodes
            ? DecodeAttention(input, layer, q_raw, h, keys, rotation, &q_all)
            : Attention(input, layer, backend_.Rotate(q_raw, {w.q_bias, w.q_norm}, rotation), h, rotation, &q_all, &own);
    if (input.observe && !input.observe(layer, q_all, GatherRows(rows, attention.lse))) return at::Tensor();
    const at::Tensor rounded = attention.rounded.defined() ? attention.rounded : backend_.Rounded(attention.out);
    const at::Tensor mixed = backend_.Linear(rounded.view({n, c.q_dim()}), w.wo);
    const Normed mid = backend_.AddNorm(x, mixed, w.mlp_norm);
    const Mlp mlp = MlpOf(rows, w);
    at::Tensor act;
    if (trace == nullptr) {
      act = backend_.GatedLinear(mid.h, mlp.gate, mlp.up);
    } else {
      const auto [gate, up] = backend_.LinearPair(mid.h, mlp.gate, mlp.up);
      trace->push_back({x, h, q_raw, q_all, attention.out, attention.lse, mid.sum, gate, up, own});
      act = backend_.SiluMul(gate, up);
    }
    const at::Tensor y = MlpOut(rows, mlp, act);
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

at::Tensor Model::RangeLse(const RowPlan& rows, const at::Tensor& q, const at::Tensor& pos, const KvChain& chain,
                           int64_t layer, int64_t begin, int64_t end) {
  REFOCUS_CHECK(!rows.split());
  std::vector<KvView> views;
  for (const KvShare& share : chain.shares()) views.push_back(share.View(layer, begin, end));
  return Exchange(rows, backend_.Attend(q, pos, views)).lse;
}

at::Tensor Model::Logits(const at::Tensor& hidden) {
  return backend_.LinearSum(backend_.Norm(hidden, weights_.final_norm), weights_.output, at::Tensor());
}

at::Tensor Model::LogitsTogether(const at::Tensor& hidden) {
  const int64_t ranks = collective_.size(), rows = hidden.size(0), vocab = weights_.output.size(0);
  if (ranks == 1 || vocab % ranks != 0) return collective_.rank() == 0 ? Logits(hidden) : at::Tensor();
  const int64_t part = vocab / ranks;
  const at::Tensor own = backend_.LinearSum(backend_.Norm(hidden, weights_.final_norm),
                                            weights_.output.narrow(0, collective_.rank() * part, part), at::Tensor());
  at::Tensor parts = at::empty({ranks * rows, part}, own.options());
  collective_.AllGatherRows(own, std::vector<int64_t>(ranks, rows), parts);
  if (collective_.rank() != 0) return at::Tensor();
  return parts.view({ranks, rows, part}).transpose(0, 1).reshape({rows, vocab});
}

Gradient Model::LogitsGrad(const at::Tensor& hidden, const at::Tensor& dlogits) {
  const at::Tensor dh = backend_.LinearGrad(dlogits, weights_.output, at::Tensor());
  return backend_.NormGrad(hidden, weights_.final_norm, dh, at::Tensor());
}

void Model::Backward(const ForwardInput& input, const std::vector<LayerTrace>& trace, Gradient dx, bool add,
                     const QueryDelta& grad, GradFactors* factors) {
  const ModelConfig& c = config();
  const RowPlan& rows = *input.rows;
  const int64_t n = rows.own_rows();
  REFOCUS_CHECK(input.adapters.empty() || (input.adapters.size() == 1 && input.adapters[0].count == n));
  const QueryDelta delta = input.adapters.empty() ? QueryDelta() : input.adapters[0].delta;
  const Rotation rotation = backend_.RotationAt(input.own_pos);
  if (factors != nullptr) {
    factors->dq.resize(c.layers);
    factors->h.resize(c.layers);
  }
  for (int64_t layer = c.layers - 1; layer >= 0; --layer, ++progress_) {
    const LayerWeights& w = weights_.layers[layer];
    const LayerTrace& t = trace[layer];
    // MLP: x_out = x_mid + down(silu(gate) * up)
    const at::Tensor dh_mid = MlpGrad(rows, MlpOf(rows, w), dx.rounded, t);
    const Gradient dx_mid = backend_.NormGrad(t.x_mid, w.mlp_norm, dh_mid, dx.sum);
    // Attention, with K and V frozen: only dQ.
    const at::Tensor dout = backend_.LinearGrad(dx_mid.rounded, w.wo, {}).view({n, c.heads, c.head_dim});
    const at::Tensor row_dot = backend_.RowDot(dout, t.out);
    const at::Tensor dq_all = backend_.QueryGrad(t.q_all, input.pos, Views(input, layer), GatherRows(rows, dout),
                                                 GatherRows(rows, t.lse), GatherRows(rows, row_dot));
    at::Tensor dq_sum = SumOverRanks(rows, dq_all);
    if (input.own_mask.defined())
      dq_sum = dq_sum + OwnQueryGrad(t.q_all, t.own, input.own_mask, dout, t.lse, row_dot);
    const at::Tensor dq =
        backend_.RotateGrad(dq_sum, t.q_raw, {w.q_bias, w.q_norm}, rotation).view({n, c.q_dim()});
    if (factors != nullptr) {
      factors->dq[layer] = dq;
      factors->h[layer] = t.h;
    } else {
      DeltaGrad(backend_, dq, t.h, delta, layer, add, grad);
    }
    if (layer == 0) break;  // nothing below is trained
    dx = backend_.NormGrad(t.x, w.attn_norm, QueriesGrad(backend_, dq, w.wq, delta, layer), dx_mid.sum);
  }
}

}  // namespace refocus
