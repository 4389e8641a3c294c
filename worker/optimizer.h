// The optimizers of one fp32 parameter, a query delta, as torch.optim computes them. AdamW (Loshchilov and Hutter,
// arXiv 1711.05101): decoupled decay p -= rate * decay * p, bias-corrected moments, epsilon outside the root. SGD:
// decay is added to the gradient, momentum m = momentum * m + g, p -= rate * m. Either way decay pulls towards the base
// weights.
#pragma once

#include <ATen/core/Tensor.h>

#include "worker/backend.h"
#include "worker/command.h"

namespace refocus {

class Optimizer {
 public:
  // Moments of the parameter's shape [layers, ...], zero, where it lives. `parameter`, and `rounded`, which is it as
  // matrix products read it, are kept and belong to the caller; they are the same tensor where nothing is rounded.
  Optimizer(const OptimizerConfig& config, const at::Tensor& parameter, const at::Tensor& rounded);

  // Forgets the moments and the steps made; only enqueues.
  void Reset();

  // Of the next steps. Lies in the parameter's memory, so that a recorded Step follows it; only enqueues.
  void SetRate(float learning_rate) { rate_.fill_(learning_rate); }

  // One update of the parameter in place, and of what is rounded, by grad clipped to the global norm `clip_norm` as
  // torch.nn.utils.clip_grad_norm_ does (factor min(1, clip / (norm + 1e-6))). stats [2] fp64, on the same device: loss
  // and gradient norm, of all layers and ranks; when either is not finite nothing changes. Only enqueues; `grad` holds
  // anything afterwards.
  void Step(const at::Tensor& stats, const at::Tensor& grad);

  // The same by a gradient of so few rows that it stays in factors; of a full delta and with AdamW alone.
  bool TakesFactors(const Backend& backend, int64_t rows) const {
    return !config_.sgd && rows <= backend.factor_rows();
  }
  void Step(Backend& backend, const at::Tensor& stats, const GradFactors& grad);

 private:
  struct Clip {
    at::Tensor divisor, skip;  // [] fp32
  };
  // Counts the step.
  Clip Begin(const at::Tensor& stats);

  OptimizerConfig config_;
  at::Tensor rate_;   // [] fp32
  at::Tensor steps_;  // [] fp32, as the fused operator wants it
  at::Tensor parameter_, rounded_, first_moment_, second_moment_;
};

}  // namespace refocus
