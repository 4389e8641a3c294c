#include "worker/own_keys.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>

#include <cmath>

namespace refocus {
namespace {

// [n, Hk * G, m] -> [Hk, G, n, m] fp32, by KV head.
at::Tensor ByKvHead(const at::Tensor& x, int64_t kv_heads) {
  const int64_t n = x.size(0), group = x.size(1) / kv_heads;
  return x.to(at::kFloat).reshape({n, kv_heads, group, -1}).permute({1, 2, 0, 3});
}

// And back, [Hk, G, n, d] -> [n, H, d].
at::Tensor ByRow(const at::Tensor& x) {
  return x.permute({2, 0, 1, 3}).reshape({x.size(2), x.size(0) * x.size(1), x.size(3)}).contiguous();
}

// [n, Hk, d] -> [Hk, 1, n, d] fp32
at::Tensor Keys(const at::Tensor& x) { return x.to(at::kFloat).transpose(0, 1).unsqueeze(1); }

double Scale(const at::Tensor& q) { return 1.0 / std::sqrt(static_cast<double>(q.size(2))); }

// [Hk, G, n, n]
at::Tensor Scores(const at::Tensor& q, const OwnKeys& own, const at::Tensor& mask) {
  return at::matmul(ByKvHead(q, own.k.size(1)), Keys(own.k).transpose(2, 3)).mul_(Scale(q)).add_(mask);
}

// exp(scores - lse) in their place, 0 where lse is -inf.
at::Tensor Weights(at::Tensor scores, const at::Tensor& lse) {
  return scores.sub_(at::where(lse.isinf(), 0.0, lse)).exp_();
}

}  // namespace

OwnKeys MakeOwnKeys(Backend& backend, const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation,
                    int64_t head_dim) {
  const auto heads = [&](const at::Tensor& rows) { return rows.view({h.size(0), -1, head_dim}); };
  at::Tensor v = backend.LinearSum(h, weights.wv, at::Tensor());
  if (weights.v_bias.defined()) v = v + weights.v_bias;
  return {backend.Rotate(heads(backend.LinearSum(h, weights.wk, at::Tensor())), weights.k, rotation),
          backend.Rounded(heads(v))};
}

Partial OwnAttend(const at::Tensor& q, const OwnKeys& own, const at::Tensor& mask) {
  const at::Tensor scores = Scores(q, own, mask);
  const at::Tensor lse = at::logsumexp(scores, {3}, /*keepdim=*/true);  // [Hk, G, n, 1]
  return {ByRow(at::matmul(Weights(scores, lse), Keys(own.v))), ByRow(lse).squeeze(2)};
}

at::Tensor OwnQueryGrad(const at::Tensor& q, const OwnKeys& own, const at::Tensor& mask, const at::Tensor& dout,
                        const at::Tensor& lse, const at::Tensor& row_dot) {
  const int64_t kv_heads = own.k.size(1);
  const at::Tensor weights = Weights(Scores(q, own, mask), ByKvHead(lse.unsqueeze(2), kv_heads));
  at::Tensor dscores = at::matmul(ByKvHead(dout, kv_heads), Keys(own.v).transpose(2, 3));
  dscores.sub_(ByKvHead(row_dot.unsqueeze(2), kv_heads)).mul_(weights);
  return ByRow(at::matmul(dscores, Keys(own.k)) * Scale(q));
}

}  // namespace refocus
