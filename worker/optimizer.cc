#include "worker/optimizer.h"

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace refocus {

AdamW::AdamW(const AdamWConfig& config, const at::Tensor& parameter)
    : config_(config),
      first_moment_(at::zeros_like(parameter)),
      second_moment_(at::zeros_like(parameter)),
      steps_(at::zeros({}, at::kFloat)) {}

void AdamW::Step(at::Tensor& parameter, at::Tensor& grad, double norm) {
  const double factor = static_cast<double>(config_.clip_norm) / (norm + 1e-6);
  if (factor < 1.0) grad.mul_(factor);
  steps_.add_(1);
  at::_fused_adamw_({parameter}, {grad}, {first_moment_}, {second_moment_}, /*max_exp_avg_sqs=*/{}, {steps_},
                    config_.learning_rate, config_.beta1, config_.beta2, config_.weight_decay, config_.epsilon,
                    /*amsgrad=*/false, /*maximize=*/false);
}

}  // namespace refocus
