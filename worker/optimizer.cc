#include "worker/optimizer.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/_fused_sgd.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

namespace refocus {
namespace {

// One entry a layer: the fused operators count a tensor's elements in 32 bits in places.
std::vector<at::Tensor> Layers(const at::Tensor& t) { return t.defined() ? t.unbind(0) : std::vector<at::Tensor>(); }

}  // namespace

Optimizer::Optimizer(const OptimizerConfig& config, const at::Tensor& parameter, const at::Tensor& rounded)
    : config_(config),
      rate_(at::zeros({}, parameter.options().dtype(at::kFloat))),
      steps_(at::zeros({}, parameter.options().dtype(at::kFloat))),
      parameter_(parameter),
      rounded_(rounded) {
  if (config.moments() > 0) first_moment_ = at::zeros_like(parameter);
  if (config.moments() > 1) second_moment_ = at::zeros_like(parameter);
}

void Optimizer::Reset() {
  steps_.zero_();
  if (first_moment_.defined()) first_moment_.zero_();
  if (second_moment_.defined()) second_moment_.zero_();
}

Optimizer::Clip Optimizer::Begin(const at::Tensor& stats) {
  const at::Tensor finite = at::isfinite(stats).all().to(at::kFloat);
  steps_.add_(finite);
  return {((stats.select(0, 1) + 1e-6) / static_cast<double>(config_.clip_norm)).clamp_min(1.0).to(at::kFloat),
          1.0 - finite};
}

void Optimizer::Step(const at::Tensor& stats, const at::Tensor& grad) {
  const Clip clip = Begin(stats);
  if (config_.sgd) {
    // The first step finds zeros in the moments, which is what torch.optim.SGD starts from without dampening.
    at::_fused_sgd_(Layers(parameter_), Layers(grad), Layers(first_moment_), config_.weight_decay, config_.momentum,
                    rate_, /*dampening=*/0.0, /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false,
                    clip.divisor, clip.skip);
  } else {
    at::_fused_adamw_(Layers(parameter_), Layers(grad), Layers(first_moment_), Layers(second_moment_),
                      /*max_exp_avg_sqs=*/{}, std::vector<at::Tensor>(parameter_.size(0), steps_), rate_, config_.beta1,
                      config_.beta2, config_.weight_decay, config_.epsilon, /*amsgrad=*/false, /*maximize=*/false,
                      clip.divisor, clip.skip);
  }
  if (!rounded_.is_same(parameter_)) rounded_.copy_(parameter_);
}

void Optimizer::Step(Backend& backend, const at::Tensor& stats, const GradFactors& grad) {
  const Clip clip = Begin(stats);
  backend.FactorAdamW(grad, config_,
                      {parameter_, first_moment_, second_moment_, rounded_, rate_, steps_, clip.divisor, clip.skip});
}

}  // namespace refocus
