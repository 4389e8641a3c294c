#include "tests/worker/torch_oracle.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

namespace refocus {

namespace {

constexpr double kTwoPi = 2.0 * 3.14159265358979323846;

std::optional<at::Tensor> Optional(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

// The paper's own form: a share of every frequency by how often it turns over the original window.
at::Tensor Llama3Frequencies(const at::Tensor& frequency, const RopeScaling& rope) {
  const at::Tensor turns = frequency * (static_cast<double>(rope.original_positions) / kTwoPi);
  const at::Tensor kept = ((turns - rope.low_factor) / (rope.high_factor - rope.low_factor)).clamp(0.0, 1.0);
  return frequency * (kept + (1.0 - kept) / rope.factor);
}

at::Tensor YarnFrequencies(const at::Tensor& frequency, const RopeScaling& rope, double theta, int64_t d) {
  const auto edge = [&](double turns) {
    return static_cast<double>(d) / 2.0 * std::log(static_cast<double>(rope.original_positions) / (turns * kTwoPi)) /
           std::log(theta);
  };
  const double low = std::max(0.0, std::floor(edge(rope.beta_fast)));
  const double high = std::min(static_cast<double>(d - 1), std::ceil(edge(rope.beta_slow)));
  const at::Tensor divided = ((at::arange(d / 2, frequency.options()) - low) / (high - low)).clamp(0.0, 1.0);
  return frequency * (divided / rope.factor + (1.0 - divided));
}

}  // namespace

TorchOracle::TorchOracle(const Weights& weights, at::Device device, at::ScalarType dtype)
    : weights_(weights), device_(device), dtype_(dtype) {
  const auto convert = [&](at::Tensor& t) {
    if (t.defined()) t = t.to(device, dtype);
  };
  for (at::Tensor* t : {&weights_.embedding, &weights_.final_norm, &weights_.output}) convert(*t);
  for (LayerWeights& w : weights_.layers) {
    for (at::Tensor* t : {&w.attn_norm, &w.wq, &w.wk, &w.wv, &w.wo, &w.q_bias, &w.k_bias, &w.v_bias, &w.q_norm,
                          &w.k_norm, &w.mlp_norm, &w.gate, &w.up, &w.down}) {
      convert(*t);
    }
  }
}

// As these models' reference does: the norm in fp32 at least, rounded before the weight is applied.
at::Tensor TorchOracle::Norm(const at::Tensor& x, const at::Tensor& weight) const {
  const at::Tensor wide = dtype_ == at::kDouble ? x : x.to(at::kFloat);
  return (wide * at::rsqrt(wide.square().mean({-1}, true) + weights_.config.rms_eps)).to(dtype_) * weight;
}

// x [rows, heads, d]
at::Tensor TorchOracle::Rope(const at::Tensor& x, const at::Tensor& positions) const {
  const int64_t d = x.size(-1);
  const at::Tensor exponent = at::arange(0, d, 2, x.options().dtype(at::kDouble)) / static_cast<double>(-d);
  at::Tensor frequency = at::pow(weights_.config.rope_theta, exponent);
  double stretch = 1.0;  // of sine and cosine
  const RopeScaling& rope = weights_.config.rope;
  if (rope.type == RopeType::kLlama3) {
    frequency = Llama3Frequencies(frequency, rope);
  } else if (rope.type == RopeType::kYarn) {
    frequency = YarnFrequencies(frequency, rope, weights_.config.rope_theta, d);
    stretch = 0.1 * std::log(rope.factor) + 1.0;
  }
  frequency = frequency.to(at::kFloat).to(at::kDouble);
  const at::Tensor half = positions.to(at::kDouble).unsqueeze(1) * frequency;
  const at::Tensor angle = at::cat({half, half}, 1).unsqueeze(1);
  const at::Tensor turned = at::cat({-x.narrow(-1, d / 2, d / 2), x.narrow(-1, 0, d / 2)}, -1);
  return x * (at::cos(angle) * stretch).to(dtype_) + turned * (at::sin(angle) * stretch).to(dtype_);
}

std::vector<at::Tensor> TorchOracle::Layers(const at::Tensor& delta) const {
  std::vector<at::Tensor> layers;
  for (int64_t l = 0; delta.defined() && l < delta.size(0); ++l) layers.push_back(delta[l].to(device_, dtype_));
  return layers;
}

at::Tensor TorchOracle::Ids(const std::vector<int64_t>& values) const { return at::tensor(values, at::kLong).to(device_); }

at::Tensor TorchOracle::Attention(int64_t /*layer*/, const at::Tensor& q, const at::Tensor& positions,
                                  const at::Tensor& keys, const at::Tensor& values) const {
  const ModelConfig& c = weights_.config;
  const int64_t group = c.heads / c.kv_heads;
  const at::Tensor k = keys.repeat_interleave(group, 0), v = values.repeat_interleave(group, 0);
  at::Tensor scores = at::matmul(q, k.transpose(1, 2)) / std::sqrt(static_cast<double>(c.head_dim));
  const at::Tensor key_pos = at::arange(k.size(1), positions.options());
  scores = scores.masked_fill((key_pos.unsqueeze(0) > positions.unsqueeze(1)).unsqueeze(0),
                              -std::numeric_limits<double>::infinity());
  return at::matmul(at::softmax(scores, -1, dtype_ == at::kDouble ? at::kDouble : at::kFloat).to(dtype_), v);
}

at::Tensor TorchOracle::Forward(const at::Tensor& ids, const at::Tensor& positions, const at::Tensor& seen,
                                const std::vector<at::Tensor>& delta, bool write, std::vector<at::Tensor>& keys,
                                std::vector<at::Tensor>& values) const {
  const ModelConfig& c = weights_.config;
  const int64_t n = ids.size(0);
  at::Tensor x = at::index_select(weights_.embedding, 0, ids);
  for (int64_t l = 0; l < c.layers; ++l) {
    const LayerWeights& w = weights_.layers[l];
    const at::Tensor h = Norm(x, w.attn_norm);
    if (write) {
      at::Tensor k = at::linear(h, w.wk, Optional(w.k_bias)).view({n, c.kv_heads, c.head_dim});
      if (c.qk_norm) k = Norm(k, w.k_norm);
      k = Kept(Rope(k, positions).transpose(0, 1)).detach();
      const at::Tensor v =
          Kept(at::linear(h, w.wv, Optional(w.v_bias)).view({n, c.kv_heads, c.head_dim}).transpose(0, 1)).detach();
      keys[l] = keys[l].defined() ? at::cat({keys[l], k}, 1) : k;
      values[l] = values[l].defined() ? at::cat({values[l], v}, 1) : v;
    }
    at::Tensor q = at::linear(h, delta.empty() ? w.wq : w.wq + delta[l], Optional(w.q_bias)).view({n, c.heads, c.head_dim});
    if (c.qk_norm) q = Norm(q, w.q_norm);
    q = Rope(q, positions).transpose(0, 1);  // [H, n, d]
    const at::Tensor mixed = Attention(l, q, seen, keys[l], values[l]);
    x = x + at::linear(mixed.transpose(0, 1).reshape({n, c.q_dim()}), w.wo);
    const at::Tensor m = Norm(x, w.mlp_norm);
    x = x + at::linear(at::silu(at::linear(m, w.gate)) * at::linear(m, w.up), w.down);
  }
  return at::linear(Norm(x, weights_.final_norm), weights_.output);
}

void TorchOracle::Prefill(const std::vector<int32_t>& ids) {
  tokens_ = static_cast<int64_t>(ids.size());
  keys_.assign(weights_.layers.size(), at::Tensor());
  values_ = keys_;
  const at::Tensor positions = at::arange(tokens_, at::TensorOptions(device_).dtype(at::kLong));
  Forward(Ids({ids.begin(), ids.end()}), positions, positions, {}, true, keys_, values_);
}

at::Tensor TorchOracle::Logprobs(const std::vector<int32_t>& ids, const std::vector<int64_t>& positions,
                                 const at::Tensor& delta) {
  const at::Tensor logits =
      Forward(Ids({ids.begin(), ids.end()}), Ids(positions), Ids(positions), Layers(delta), false, keys_, values_);
  return at::log_softmax(logits.to(at::kDouble), 1).cpu();
}

at::Tensor TorchOracle::TailLogprobs(const std::vector<int32_t>& ids, const at::Tensor& delta) {
  std::vector<at::Tensor> keys = keys_, values = values_;
  const at::Tensor positions =
      at::arange(tokens_, tokens_ + static_cast<int64_t>(ids.size()), at::TensorOptions(device_).dtype(at::kLong));
  const at::Tensor logits = Forward(Ids({ids.begin(), ids.end()}), positions, positions, Layers(delta), true, keys, values);
  return at::log_softmax(logits.to(at::kDouble), 1).cpu();
}

TorchOracle::Gradient TorchOracle::SpanGradient(const std::vector<Span>& spans, const at::Tensor& delta) {
  std::vector<at::Tensor> layers = Layers(delta);
  for (at::Tensor& layer : layers) layer = layer.detach().clone().requires_grad_(true);
  std::vector<int64_t> targets;
  std::vector<at::Tensor> logits_of;
  for (const Span& span : spans) {
    const at::TensorOptions options = at::TensorOptions(device_).dtype(at::kLong);
    const at::Tensor rows = at::arange(span.rows(), options);
    const at::Tensor ids = Ids({span.ids.begin(), span.ids.end() - 1});
    if (span.behind != 0) {
      std::vector<at::Tensor> keys = keys_, values = values_;
      logits_of.push_back(Forward(ids, rows + span.behind, rows + tokens_, layers, true, keys, values));
    } else {
      logits_of.push_back(Forward(ids, rows + span.start, rows + span.start, layers, false, keys_, values_));
    }
    targets.insert(targets.end(), span.ids.begin() + 1, span.ids.end());
  }
  const at::Tensor logits = at::cat(logits_of);
  const at::Tensor loss =
      at::cross_entropy_loss(dtype_ == at::kDouble ? logits : logits.to(at::kFloat), Ids(targets));
  loss.backward();
  Gradient gradient;
  gradient.loss = loss.item<double>();
  std::vector<at::Tensor> grads;
  for (const at::Tensor& layer : layers) grads.push_back(layer.grad().to(at::kDouble).cpu());
  gradient.grad = at::stack(grads);
  return gradient;
}

}  // namespace refocus
