#include "tests/worker/backend_oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

namespace refocus {

OracleResult Oracle(const OracleInput& input) {
  const at::Tensor q = input.q.to(at::kDouble), k = input.k.to(at::kDouble), v = input.v.to(at::kDouble);
  const at::Tensor dout = input.dout.to(at::kDouble);
  const int64_t rows = q.size(0), heads = q.size(1), depth = q.size(2), group = heads / k.size(0);
  OracleResult result{at::zeros({rows, heads, depth}, q.options()), at::zeros({rows, heads}, q.options()),
                      at::zeros({rows, heads}, q.options()), at::zeros({rows, heads, depth}, q.options())};
  const auto qa = q.accessor<double, 3>(), ka = k.accessor<double, 3>(), va = v.accessor<double, 3>();
  const auto da = dout.accessor<double, 3>();
  auto out = result.out.accessor<double, 3>(), dq = result.dq.accessor<double, 3>();
  auto lse = result.lse.accessor<double, 2>(), row_dot = result.row_dot.accessor<double, 2>();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t keys = std::clamp<int64_t>(input.pos[row].item<int64_t>() + 1, 0, k.size(1));
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t kv = head / group;
      lse[row][head] = -std::numeric_limits<double>::infinity();
      if (keys == 0) continue;
      std::vector<double> score(keys), slope(keys);
      double most = -std::numeric_limits<double>::infinity(), total = 0;
      for (int64_t key = 0; key < keys; ++key) {
        for (int64_t c = 0; c < depth; ++c) {
          score[key] += qa[row][head][c] * ka[kv][key][c];
          slope[key] += da[row][head][c] * va[kv][key][c];
        }
        score[key] /= std::sqrt(static_cast<double>(depth));
        most = std::max(most, score[key]);
      }
      for (const double s : score) total += std::exp(s - most);
      lse[row][head] = most + std::log(total);
      for (int64_t key = 0; key < keys; ++key) {
        score[key] = std::exp(score[key] - lse[row][head]);
        row_dot[row][head] += score[key] * slope[key];
        for (int64_t c = 0; c < depth; ++c) out[row][head][c] += score[key] * va[kv][key][c];
      }
      for (int64_t key = 0; key < keys; ++key) {
        const double ds = score[key] * (slope[key] - row_dot[row][head]) / std::sqrt(static_cast<double>(depth));
        for (int64_t c = 0; c < depth; ++c) dq[row][head][c] += ds * ka[kv][key][c];
      }
    }
  }
  return result;
}

PlainResult PlainTorch(const OracleInput& input, const at::Tensor& lse, const at::Tensor& row_dot) {
  const int64_t rows = input.q.size(0), heads = input.q.size(1), depth = input.q.size(2);
  const int64_t kv_heads = input.k.size(0), keys = input.k.size(1), group = heads / kv_heads;
  const auto by_head = [&](const at::Tensor& x) { return x.transpose(0, 1).contiguous(); };
  const auto expand = [&](const at::Tensor& x) {
    return x.unsqueeze(1).expand({kv_heads, group, keys, depth}).reshape({heads, keys, depth});
  };
  const float infinity = std::numeric_limits<float>::infinity();
  const at::Tensor q = by_head(input.q), dout = by_head(input.dout), k = expand(input.k), v = expand(input.v);
  const at::Tensor hidden = at::arange(keys, at::kLong).unsqueeze(0).gt(input.pos.unsqueeze(1)).unsqueeze(0);
  const double scale = 1.0 / std::sqrt(static_cast<double>(depth));
  const at::Tensor scores = q.matmul(k.transpose(1, 2)).mul(scale).masked_fill(hidden, -infinity);
  const at::Tensor weights = scores.softmax(-1).masked_fill(hidden, 0);
  const at::Tensor p = scores.sub(by_head(lse).unsqueeze(-1)).exp().masked_fill(hidden, 0);
  const at::Tensor ds = p.mul(dout.matmul(v.transpose(1, 2)).sub(by_head(row_dot).unsqueeze(-1)));
  return {weights.matmul(v).transpose(0, 1).reshape({rows, heads, depth}),
          scores.logsumexp({-1}).transpose(0, 1).reshape({rows, heads}),
          ds.matmul(k).mul(scale).transpose(0, 1).reshape({rows, heads, depth})};
}

}  // namespace refocus
