#include "worker/optimizer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace refocus {

Optimizer::Optimizer(const OptimizerConfig& config, const at::Tensor& parameter, const at::Tensor& grad)
    : config_(config),
      rate_(at::zeros({}, parameter.options().dtype(at::kFloat))),
      steps_(at::zeros({}, parameter.options().dtype(at::kFloat))),
      parameters_(parameter.unbind(0)),
      grads_(grad.unbind(0)),
      step_counts_(parameters_.size(), steps_) {
  if (config.moments() > 0) first_moments_ = at::zeros_like(parameter).unbind(0);
  if (config.moments() > 1) second_moments_ = at::zeros_like(parameter).unbind(0);
}

void Optimizer::Reset() {
  steps_.zero_();
  for (at::Tensor& moment : first_moments_) moment.zero_();
  for (at::Tensor& moment : second_moments_) moment.zero_();
}

void Optimizer::Step(const at::Tensor& stats) {
  const at::Tensor finite = at::isfinite(stats).all().to(at::kFloat);
  const at::Tensor skip = 1.0 - finite;
  const at::Tensor divisor =
      ((stats.select(0, 1) + 1e-6) / static_cast<double>(config_.clip_norm)).clamp_min(1.0).to(at::kFloat);
  if (config_.sgd) {
    // The first step finds zeros in the moments, which is what torch.optim.SGD starts from without dampening.
    at::_fused_sgd_(parameters_, grads_, first_moments_, config_.weight_decay, config_.momentum, rate_,
                    /*dampening=*/0.0, /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false, divisor, skip);
    return;
  }
  steps_.add_(finite);
  at::_fused_adamw_(parameters_, grads_, first_moments_, second_moments_, /*max_exp_avg_sqs=*/{}, step_counts_, rate_,
                    config_.beta1, config_.beta2, config_.weight_decay, config_.epsilon, /*amsgrad=*/false,
                    /*maximize=*/false, divisor, skip);
}

}  // namespace refocus
