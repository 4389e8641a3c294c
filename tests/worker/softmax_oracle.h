// TorchOracle that remembers its softmax weights: what attention masses are compared with.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tests/worker/torch_oracle.h"

namespace refocus {

class SoftmaxOracle : public TorchOracle {
 public:
  using TorchOracle::TorchOracle;

  // [layers, H, rows, keys] fp64 on the CPU, of rows as in Logprobs and TailLogprobs.
  at::Tensor Softmax(const std::vector<int32_t>& ids, const std::vector<int64_t>& positions, const at::Tensor& delta) {
    layers_.clear();
    Logprobs(ids, positions, delta);
    return at::stack(layers_);
  }
  at::Tensor TailSoftmax(const std::vector<int32_t>& ids, const at::Tensor& delta) {
    layers_.clear();
    TailLogprobs(ids, delta);
    return at::stack(layers_);
  }

 protected:
  at::Tensor Attention(int64_t, const at::Tensor& q, const at::Tensor& positions, const at::Tensor& keys,
                       const at::Tensor& values) const override {
    const int64_t group = weights_.config.heads / weights_.config.kv_heads;
    const at::Tensor k = keys.repeat_interleave(group, 0), v = values.repeat_interleave(group, 0);
    const at::Tensor later = at::arange(k.size(1), positions.options()).unsqueeze(0) > positions.unsqueeze(1);
    const at::Tensor scores = at::matmul(q, k.transpose(1, 2)) / std::sqrt(static_cast<double>(q.size(2)));
    const at::Tensor p = at::softmax(scores.masked_fill(later.unsqueeze(0), -std::numeric_limits<double>::infinity()),
                                     -1, dtype_ == at::kDouble ? at::kDouble : at::kFloat);
    layers_.push_back(p.to(at::kDouble).cpu());
    return at::matmul(p.to(dtype_), v);
  }

 private:
  mutable std::vector<at::Tensor> layers_;
};

}  // namespace refocus
