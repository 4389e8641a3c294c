// The optimizers of one fp32 parameter, a query delta, as torch.optim computes them. AdamW (Loshchilov and Hutter,
// arXiv 1711.05101): decoupled decay p -= rate * decay * p, bias-corrected moments, epsilon outside the root. SGD:
// decay is added to the gradient, momentum m = momentum * m + g, p -= rate * m. Either way decay pulls towards the base
// weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "worker/command.h"

namespace refocus {

class Optimizer {
 public:
  // Moments of the parameter's shape [layers, ...], zero, where it lives. `parameter` and `grad` are kept and belong to
  // the caller.
  Optimizer(const OptimizerConfig& config, const at::Tensor& parameter, const at::Tensor& grad);

  // Forgets the moments and the steps made; only enqueues.
  void Reset();

  // Of the next steps. Lies in the parameter's memory, so that a recorded Step follows it; only enqueues.
  void SetRate(float learning_rate) { rate_.fill_(learning_rate); }

  // One update of the parameter in place by grad clipped to the global norm `clip_norm` as
  // torch.nn.utils.clip_grad_norm_ does (factor min(1, clip / (norm + 1e-6))). stats [2] fp64, on the same device: loss
  // and gradient norm, of all layers and ranks; when either is not finite nothing changes. Only enqueues; `grad` holds
  // anything afterwards.
  void Step(const at::Tensor& stats);

 private:
  OptimizerConfig config_;
  at::Tensor rate_;   // [] fp32
  at::Tensor steps_;  // [] fp32, as the fused operator wants it
  // One entry a layer: the fused operator counts a tensor's elements in 32 bits in places.
  std::vector<at::Tensor> parameters_, grads_, first_moments_, second_moments_, step_counts_;
};

}  // namespace refocus
