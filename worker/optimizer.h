// AdamW (Loshchilov and Hutter, arXiv 1711.05101) on one flat fp32 parameter, as torch.optim.AdamW computes it:
// decoupled decay p -= lr * decay * p, bias-corrected moments, epsilon outside the root. The parameter is a query
// delta, so that decay pulls towards the base weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/command.h"

namespace refocus {

class AdamW {
 public:
  // Moments of the parameter's shape, zero.
  AdamW(const AdamWConfig& config, const at::Tensor& parameter);

  // Clips `grad` in place to the global norm `clip_norm` as torch.nn.utils.clip_grad_norm_ does (factor
  // min(1, clip / (norm + 1e-6)); `norm` is that of all layers and ranks, measured before) and updates `parameter` in
  // place.
  void Step(at::Tensor& parameter, at::Tensor& grad, double norm);

 private:
  AdamWConfig config_;
  at::Tensor first_moment_;
  at::Tensor second_moment_;
  at::Tensor steps_;  // [] fp32, as the fused operator wants it
};

}  // namespace refocus
