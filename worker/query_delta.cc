#include "worker/query_delta.h"

#include <ATen/TensorOperators.h>

#include "base/check.h"

namespace refocus {
namespace {

QueryDelta LoraOver(const at::Tensor& numbers, int64_t hidden, double scale) {
  QueryDelta delta;
  const int64_t layers = numbers.size(0), rank = numbers.size(2);
  delta.a = numbers.narrow(1, 0, hidden).view({layers, rank, hidden});
  delta.b = numbers.narrow(1, hidden, numbers.size(1) - hidden);
  delta.scale = scale;
  return delta;
}

}  // namespace

QueryDelta QueryDelta::Over(const at::Tensor& numbers) const {
  return lora() ? LoraOver(numbers, a.size(2), scale) : QueryDelta(numbers);
}

std::vector<int64_t> DeltaSizes(const ModelConfig& model, const DeltaConfig& config) {
  if (config.lora_rank == 0) return {model.layers, model.q_dim(), model.hidden};
  return {model.layers, model.hidden + model.q_dim(), config.lora_rank};
}

QueryDelta DeltaOver(const ModelConfig& model, const DeltaConfig& config, const at::Tensor& numbers) {
  REFOCUS_CHECK(numbers.is_contiguous());
  REFOCUS_CHECK_EQ(numbers.sizes().vec(), DeltaSizes(model, config));
  if (config.lora_rank == 0) return numbers;
  return LoraOver(numbers, model.hidden, static_cast<double>(config.lora_alpha) / config.lora_rank);
}

at::Tensor ProjectQueries(Backend& backend, const at::Tensor& h, const at::Tensor& wq,
                          const std::vector<AdapterRows>& adapters, int64_t layer, const KeyValueWeights* beside,
                          KeyValueRows* keys) {
  const auto project = [&](const at::Tensor& delta) {
    return beside == nullptr ? backend.LinearSum(h, wq, delta) : backend.ProjectRows(h, wq, delta, *beside, keys);
  };
  if (adapters.size() == 1 && adapters[0].count == h.size(0) && adapters[0].delta.full.defined()) {
    return project(adapters[0].delta.full.select(0, layer));
  }
  const at::Tensor q = project(at::Tensor());
  std::vector<AddedProduct> added;
  for (const AdapterRows& rows : adapters) {
    const QueryDelta& delta = rows.delta;
    if (!delta.defined() || rows.count == 0) continue;
    const at::Tensor x = h.narrow(0, rows.first, rows.count), sum = q.narrow(0, rows.first, rows.count);
    if (delta.lora()) {
      added.push_back({x, delta.a.select(0, layer), delta.b.select(0, layer), delta.scale, sum});
    } else {
      added.push_back({x, at::Tensor(), delta.full.select(0, layer), 1.0, sum});
    }
  }
  if (!added.empty()) backend.AddLinears(added);
  return q;
}

void DeltaGrad(Backend& backend, const at::Tensor& dq, const at::Tensor& h, const QueryDelta& delta, int64_t layer,
               bool add, const QueryDelta& grad) {
  if (!grad.lora()) {
    at::Tensor whole = grad.full.select(0, layer);
    return backend.WeightGrad(dq, h, add, whole);
  }
  // With z = h . A^T: dB = dq^T . (scale * z) and dA = (scale * dq . B)^T . h.
  at::Tensor grad_a = grad.a.select(0, layer), grad_b = grad.b.select(0, layer);
  const at::Tensor z = backend.LinearSum(h, delta.a.select(0, layer), at::Tensor()).mul_(delta.scale);
  backend.WeightGrad(dq, backend.Rounded(z), add, grad_b);
  const at::Tensor dz = backend.LinearGrad(dq, delta.b.select(0, layer), at::Tensor()).mul_(delta.scale);
  backend.WeightGrad(dz, h, add, grad_a);
}

at::Tensor QueriesGrad(Backend& backend, const at::Tensor& dq, const at::Tensor& wq, const QueryDelta& delta,
                       int64_t layer) {
  if (!delta.lora()) return backend.LinearGrad(dq, wq, delta.defined() ? delta.full.select(0, layer) : at::Tensor());
  at::Tensor dh = backend.LinearGrad(dq, wq, at::Tensor());
  const at::Tensor dz = backend.LinearGrad(dq, delta.b.select(0, layer), at::Tensor());
  return dh.addmm_(dz, delta.a.select(0, layer), /*beta=*/1, delta.scale);
}

}  // namespace refocus
