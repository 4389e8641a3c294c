#include "worker/backend_cpu_rowwise.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/add.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/check.h"
#include "base/kv_int8.h"
#include "base/rope.h"
#include "worker/sampler.h"

namespace refocus {
namespace {

class EagerRepeat : public Repeat {
 public:
  explicit EagerRepeat(std::function<void()> pass) : pass_(std::move(pass)) {}
  void Run() override { pass_(); }

 private:
  std::function<void()> pass_;
};

at::Tensor SwapHalves(const at::Tensor& x) {
  const int64_t half = x.size(-1) / 2;
  return at::cat({x.narrow(-1, half, half), x.narrow(-1, 0, half)}, -1);
}

// x [rows, heads, head_dim], bias [heads * head_dim] or undefined
at::Tensor AddBias(const at::Tensor& x, const at::Tensor& bias) {
  return bias.defined() ? x + bias.view({x.size(1), x.size(2)}) : x;
}

at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return x * at::rsqrt(x.square().mean({-1}, /*keepdim=*/true) + eps) * weight;
}

// With r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight: dx = r * (g - x * r^2 * mean(g * x)).
at::Tensor RmsNormGrad(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dy, double eps) {
  const at::Tensor r = at::rsqrt(x.square().mean({-1}, /*keepdim=*/true) + eps);
  const at::Tensor g = dy * weight;
  return r * (g - x * (r.square() * (g * x).mean({-1}, /*keepdim=*/true)));
}

// Codes of `count` numbers; returns the bits of their scale (base/kv_int8.h).
uint16_t Quantize(const float* from, int64_t count, uint8_t* codes) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(from[i]) & 0x7fffffff);
  const uint16_t scale = Int8Scale(largest);
  if (scale == kInt8ScaleNaN) {
    std::fill_n(codes, count, uint8_t{0});
    return scale;
  }
  const float inverse = Int8Inverse(scale);
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = std::min(static_cast<int>(std::lrint(std::abs(from[i]) * inverse)), kInt8Largest);
    codes[i] = static_cast<uint8_t>(magnitude | (std::signbit(from[i]) ? 0x80 : 0));
  }
  return scale;
}

}  // namespace

CpuRowwise::CpuRowwise(const ModelConfig& config, KvType kv)
    : kv_(kv),
      eps_(config.rms_eps),
      kv_heads_(config.kv_heads),
      head_dim_(config.head_dim),
      inverse_frequencies_(InverseFrequencies(config.rope_theta, config.head_dim, config.rope)),
      attention_factor_(config.rope.attention_factor) {}

std::unique_ptr<Repeat> CpuRowwise::Repeated(std::function<void()> pass) {
  return std::make_unique<EagerRepeat>(std::move(pass));
}

at::Tensor CpuRowwise::LinearSum(const at::Tensor& x, const at::Tensor& w, const at::Tensor& delta) {
  at::Tensor y = Linear(x, w);
  if (delta.defined()) y.add_(Linear(x, delta));
  return y;
}

void CpuRowwise::AddLinears(const std::vector<AddedProduct>& products) {
  for (const AddedProduct& p : products) {
    p.y.add_(Linear(p.inner.defined() ? Linear(p.x, p.inner) : p.x, p.w), p.scale);
  }
}

at::Tensor CpuRowwise::LinearGrad(const at::Tensor& dy, const at::Tensor& w, const at::Tensor& delta) {
  at::Tensor dx = at::mm(dy, w);
  if (delta.defined()) dx.addmm_(dy, delta);
  return dx;
}

at::Tensor CpuRowwise::LinearPairGrad(const at::Tensor& dy, const at::Tensor& one, const at::Tensor& other_dy,
                                      const at::Tensor& other, bool /*wide*/) {
  return at::mm(dy, one).addmm_(other_dy, other);
}

void CpuRowwise::WeightGrad(const at::Tensor& dy, const at::Tensor& x, bool add, at::Tensor& grad) {
  grad.addmm_(dy.t(), x, /*beta=*/add ? 1 : 0);
}

void CpuRowwise::FactorNorm(const GradFactors& grad, at::Tensor norm) {
  norm.zero_();
  for (size_t layer = 0; layer < grad.dq.size(); ++layer) {
    const at::Tensor h = at::mm(grad.h[layer], grad.h[layer].t());
    norm.add_(h.to(at::kDouble).mul_(at::mm(grad.dq[layer], grad.dq[layer].t())).sum());
  }
  norm.clamp_min_(0.0).sqrt_();  // rows that cancel may leave less than nothing
}

// The gradient of one layer at a time.
void CpuRowwise::FactorAdamW(const GradFactors& grad, const OptimizerConfig& config, const AdamWStep& step) {
  for (size_t i = 0; i < grad.dq.size(); ++i) {
    const auto of_layer = [&](const at::Tensor& t) { return t.select(0, static_cast<int64_t>(i)); };
    at::_fused_adamw_({of_layer(step.parameter)}, {at::mm(grad.dq[i].t(), grad.h[i])}, {of_layer(step.first)},
                      {of_layer(step.second)}, /*max_exp_avg_sqs=*/{}, {step.steps}, step.rate, config.beta1,
                      config.beta2, config.weight_decay, config.epsilon, /*amsgrad=*/false, /*maximize=*/false,
                      step.divisor, step.skip);
  }
}

at::Tensor CpuRowwise::Embed(const at::Tensor& table, const at::Tensor& ids) { return at::index_select(table, 0, ids); }

at::Tensor CpuRowwise::Norm(const at::Tensor& x, const at::Tensor& weight) { return RmsNorm(x, weight, eps_); }

Normed CpuRowwise::AddNorm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight) {
  at::Tensor sum = x + y;
  at::Tensor h = RmsNorm(sum, weight, eps_);
  return {std::move(sum), std::move(h)};
}

at::Tensor CpuRowwise::Add(const at::Tensor& x, const at::Tensor& y) { return x + y; }

Gradient CpuRowwise::NormGrad(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dh,
                              const at::Tensor& residual) {
  at::Tensor dx = RmsNormGrad(x, weight, dh, eps_);
  if (residual.defined()) dx.add_(residual);
  return {dx, dx};
}

// Frequencies are rounded to fp32 as every implementation of these models does; the angle is formed in fp64, because at
// a position of a million an fp32 product is off by several hundredths of a radian.
Rotation CpuRowwise::RotationAt(const at::Tensor& pos) {
  const int64_t rows = pos.size(0);
  const int64_t half = head_dim_ / 2;
  Rotation rotation{pos, at::empty({rows, 1, 2 * half}, at::kFloat), at::empty({rows, 1, 2 * half}, at::kFloat)};
  const int64_t* positions = pos.const_data_ptr<int64_t>();
  float* cos = rotation.cos.data_ptr<float>();
  float* sin = rotation.sin.data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row, cos += 2 * half, sin += 2 * half) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(positions[row]) * static_cast<double>(inverse_frequencies_[i]);
      cos[i] = cos[half + i] = static_cast<float>(std::cos(angle) * attention_factor_);
      sin[half + i] = static_cast<float>(std::sin(angle) * attention_factor_);
      sin[i] = -sin[half + i];
    }
  }
  return rotation;
}

at::Tensor CpuRowwise::Rotate(const at::Tensor& raw, const HeadWeights& weights, const Rotation& rotation) {
  at::Tensor x = AddBias(raw, weights.bias);
  if (weights.norm.defined()) x = RmsNorm(x, weights.norm, eps_);
  return x * rotation.cos + SwapHalves(x) * rotation.sin;
}

at::Tensor CpuRowwise::RotateGrad(const at::Tensor& dq, const at::Tensor& raw, const HeadWeights& weights,
                                  const Rotation& rotation) {
  const at::Tensor dx = dq * rotation.cos - SwapHalves(dq) * rotation.sin;  // transposed: turned back
  if (!weights.norm.defined()) return dx.contiguous();
  return RmsNormGrad(AddBias(raw, weights.bias), weights.norm, dx, eps_).contiguous();
}

CpuRowwise::KeysValues CpuRowwise::MakeKeysValues(const at::Tensor& h, const KeyValueWeights& weights,
                                                  const Rotation& rotation) {
  const int64_t rows = h.size(0), heads = weights.wk.size(0) / head_dim_;
  return {Rotate(Linear(h, weights.wk).view({rows, heads, head_dim_}), weights.k, rotation),
          AddBias(Linear(h, weights.wv).view({rows, heads, head_dim_}), weights.v_bias)};
}

void CpuRowwise::Append(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation,
                        const at::Tensor& slots, const KvView& extent) {
  // Rows of other ranks are left out before anything is computed for them.
  std::vector<int64_t> writing, targets;
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < slots.size(0); ++i) {
    if (slot[i] < 0) continue;
    REFOCUS_CHECK_LT(slot[i], extent.length);
    writing.push_back(i);
    targets.push_back(slot[i]);
  }
  const int64_t rows = static_cast<int64_t>(writing.size());
  if (rows == 0) return;
  const bool all = rows == slots.size(0);
  const at::Tensor index = at::tensor(writing, at::kLong);
  const auto select = [&](const at::Tensor& t) { return all ? t : at::index_select(t, 0, index); };
  const at::Tensor x = select(h);
  const KeysValues made =
      MakeKeysValues(x, weights, {select(rotation.pos), select(rotation.cos), select(rotation.sin)});
  // In one run of slots, as prefill and decode write them, as a rule.
  bool run = kv_ != KvType::kInt8;
  for (int64_t i = 1; i < rows; ++i) run = run && targets[i] == targets[0] + i;
  if (run) {
    extent.k.narrow(1, targets[0], rows).copy_(made.k.transpose(0, 1));
    extent.v.narrow(1, targets[0], rows).copy_(made.v.transpose(0, 1));
    return;
  }
  for (int64_t i = 0; i < rows; ++i) Store(made, i, extent, targets[i]);
}

void CpuRowwise::Store(const KeysValues& rows, int64_t row, const KvView& extent, int64_t slot) const {
  if (kv_ != KvType::kInt8) {
    extent.k.select(1, slot).copy_(rows.k.select(0, row));
    extent.v.select(1, slot).copy_(rows.v.select(0, row));
    return;
  }
  const int64_t heads = rows.k.size(1);
  const auto store = [&](const at::Tensor& from, const at::Tensor& to, const at::Tensor& scales) {
    REFOCUS_CHECK(from.is_contiguous() && to.stride(2) == 1 && scales.stride(1) == 1);
    for (int64_t head = 0; head < heads; ++head) {
      uint8_t* const codes = to.data_ptr<uint8_t>() + head * to.stride(0) + slot * to.stride(1);
      uint16_t* const scale = static_cast<uint16_t*>(scales.data_ptr()) + head * scales.stride(0) + slot;
      *scale = Quantize(from.const_data_ptr<float>() + (row * heads + head) * head_dim_, head_dim_, codes);
    }
  };
  store(rows.k, extent.k, extent.k_scale);
  store(rows.v, extent.v, extent.v_scale);
}

at::Tensor CpuRowwise::SiluMul(const at::Tensor& gate, const at::Tensor& up) { return at::silu(gate).mul_(up); }

Backend::SiluGrads CpuRowwise::SiluMulGrad(const at::Tensor& dact, const at::Tensor& gate, const at::Tensor& up) {
  return {at::silu_backward(dact * up, gate), dact * at::silu(gate)};
}

at::Tensor CpuRowwise::RowDot(const at::Tensor& dout, const at::Tensor& out) { return (dout * out).sum(-1); }

Losses CpuRowwise::CrossEntropy(at::Tensor logits, const at::Tensor& targets, bool grad, double grad_scale) {
  const at::Tensor target = targets.unsqueeze(1);
  const at::Tensor lse = at::logsumexp(logits, {1}, /*keepdim=*/true);
  Losses losses;
  losses.loss = (lse - logits.gather(1, target)).squeeze(1);
  losses.greedy = at::argmax(logits, 1).eq(targets).to(at::kFloat);
  if (!grad) return losses;
  logits.sub_(lse).exp_();
  logits.scatter_add_(1, target, at::zeros({targets.size(0), 1}, at::kFloat).sub_(1.0));
  losses.dlogits = logits.mul_(grad_scale);
  return losses;
}

void CpuRowwise::Sample(const at::Tensor& logits, const at::Tensor& samplers, at::Tensor& tokens,
                        at::Tensor& logprobs) {
  REFOCUS_CHECK(logits.is_contiguous() && samplers.is_contiguous() && tokens.is_contiguous());
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const float* values = logits.const_data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    const auto address = static_cast<uintptr_t>(samplers.const_data_ptr<int64_t>()[row]);
    Draw draw;
    if (address != 0) draw = DrawToken(values + row * vocab, vocab, *reinterpret_cast<SamplerState*>(address));
    tokens.data_ptr<int64_t>()[row] = draw.id;
    logprobs.data_ptr<float>()[row] = draw.logprob;
  }
}

}  // namespace refocus
