#include "worker/optimizer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace refocus {

AdamW::AdamW(const AdamWConfig& config, const at::Tensor& parameter, const at::Tensor& grad)
    : config_(config),
      steps_(at::zeros({}, parameter.options().dtype(at::kFloat))),
      parameters_(parameter.unbind(0)),
      grads_(grad.unbind(0)),
      first_moments_(at::zeros_like(parameter).unbind(0)),
      second_moments_(at::zeros_like(parameter).unbind(0)),
      step_counts_(parameters_.size(), steps_) {}

void AdamW::Step(const at::Tensor& stats) {
  const at::Tensor finite = at::isfinite(stats).all().to(at::kFloat);
  const at::Tensor skip = 1.0 - finite;
  const at::Tensor divisor = ((stats.select(0, 1) + 1e-6) / static_cast<double>(config_.clip_norm)).clamp_min(1.0);
  steps_.add_(finite);
  at::_fused_adamw_(parameters_, grads_, first_moments_, second_moments_, /*max_exp_avg_sqs=*/{}, step_counts_,
                    config_.learning_rate, config_.beta1, config_.beta2, config_.weight_decay, config_.epsilon,
                    /*amsgrad=*/false, /*maximize=*/false, divisor.to(at::kFloat), skip);
}

}  // namespace refocus
