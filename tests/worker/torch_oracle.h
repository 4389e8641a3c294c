// The model and its query gradients in plain LibTorch operators with autograd, in any precision on any device: the
// fp64 oracle, and "plain torch in the same precision" whose error ours may at most double. Shares no code with worker/
// but the weights' struct.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "worker/command.h"
#include "worker/weights.h"

namespace refocus {

class TorchOracle {
 public:
  // Keeps converted copies of the weights.
  TorchOracle(const Weights& weights, at::Device device, at::ScalarType dtype);
  virtual ~TorchOracle() = default;

  // Base pass over the whole context: keeps K and V of every layer.
  void Prefill(const std::vector<int32_t>& ids);

  // log softmax [rows, vocab] fp64 on the CPU of rows at these positions of the context, with the frozen K/V; delta
  // [layers, H * d, hidden] or undefined.
  at::Tensor Logprobs(const std::vector<int32_t>& ids, const std::vector<int64_t>& positions, const at::Tensor& delta);
  // The same for a question behind the context: its rows write and see K/V of their own.
  at::Tensor TailLogprobs(const std::vector<int32_t>& ids, const at::Tensor& delta);

  struct Gradient {
    double loss = 0.0;
    at::Tensor grad;  // [layers, H * d, hidden] fp64 on the CPU
  };
  // Mean next-token cross-entropy of the spans' rows and its gradient with respect to the delta. K and V take no gradient,
  // those of spans that are read again behind the context neither.
  Gradient SpanGradient(const std::vector<Span>& spans, const at::Tensor& delta);

 protected:
  // Logits [rows, vocab] of rows with these ids and positions, which see the first seen[i] + 1 keys. `write`: their K/V are
  // appended to `keys` and `values` [Hk, T, d] a layer, before attention.
  at::Tensor Forward(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& seen,
                     const std::vector<at::Tensor>& delta, bool write, std::vector<at::Tensor>& keys,
                     std::vector<at::Tensor>& values) const;
  // q [H, n, d] after RoPE, keys and values [Hk, T, d] of positions 0, 1, ... -> [H, n, d]
  virtual at::Tensor Attention(int64_t layer, const at::Tensor& q, const at::Tensor& positions, const at::Tensor& keys,
                               const at::Tensor& values) const;
  // What the cache holds of K or V [Hk, n, d]: as much as they say, or less.
  virtual at::Tensor Kept(const at::Tensor& numbers) const { return numbers; }
  at::Tensor Ids(const std::vector<int64_t>& values) const;
  std::vector<at::Tensor> Layers(const at::Tensor& delta) const;

  at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor Rope(const at::Tensor& x, const at::Tensor& positions) const;

  Weights weights_;
  at::Device device_;
  at::ScalarType dtype_;

 private:
  int64_t tokens_ = 0;
  std::vector<at::Tensor> keys_, values_;  // [Hk, T, d] a layer
};

}  // namespace refocus
