// The row-wise half of the CUDA backend: matrix products, norms, rotations, losses and sampling, without attention and
// what runs passes. Included by the CUDA backend alone.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/attention_shape.h"
#include "kernels/few_rows.h"
#include "kernels/query_update.h"
#include "kernels/rowwise.h"
#include "kernels/span_product.h"
#include "worker/backend.h"

namespace refocus {

class CudaRowwise : public Backend {
 public:
  CudaRowwise(const ModelConfig& config, int index, KvType kv)
      : config_(config), kv_(kv), device_(at::kCUDA, static_cast<int8_t>(index)) {
    REFOCUS_CHECK_EQ(config.head_dim % 8, 0);
    REFOCUS_CHECK_LE(config.head_dim, kernels::kMaxHeadDim);
    REFOCUS_CHECK(kv != KvType::kInt8 || config.head_dim % 16 == 0);
  }

  at::Device device() const override { return device_; }
  at::ScalarType dtype() const override { return at::kBFloat16; }
  at::ScalarType kv_dtype() const override { return kv_ == KvType::kInt8 ? at::kByte : at::kBFloat16; }

  at::Tensor Linear(const at::Tensor& x, const at::Tensor& w) override {
    const bool few = Few(x);
    if (!few && !Spans(x, w, 1, false)) return at::linear(x, w);
    at::Tensor y = Empty({x.size(0), w.size(0)}, dtype());
    if (few) {
      RunFew(std::array{FewOf(FewKind::kBf16, x, w, y)});
    } else {
      RunSpan(std::array{SpanOf(x, w, y)});
    }
    return y;
  }

  std::array<at::Tensor, 2> LinearPair(const at::Tensor& x, const at::Tensor& one, const at::Tensor& other) override {
    const bool few = Few(x);
    if ((!few && !Spans(x, one, 1, false)) || one.sizes() != other.sizes()) return {Linear(x, one), Linear(x, other)};
    std::array y = {Empty({x.size(0), one.size(0)}, dtype()), Empty({x.size(0), other.size(0)}, dtype())};
    if (few) {
      RunFew(std::array{FewOf(FewKind::kBf16, x, one, y[0]), FewOf(FewKind::kBf16, x, other, y[1])});
    } else {
      RunSpan(std::array{SpanOf(x, one, y[0]), SpanOf(x, other, y[1])});
    }
    return y;
  }

  at::Tensor GatedLinear(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up) override {
    if (!Few(x)) {
      const auto [one, other] = LinearPair(x, gate, up);
      return SiluMul(one, other);
    }
    at::Tensor y = Empty({x.size(0), gate.size(0)}, dtype());
    RunFew(std::array{FewOf(FewKind::kGated, x, gate, y, up)});
    return y;
  }

  at::Tensor LinearSum(const at::Tensor& x, const at::Tensor& w, const at::Tensor& delta) override {
    at::Tensor y = Empty({x.size(0), w.size(0)}, at::kFloat);
    if (x.size(0) == 0) return y;
    if (Few(x)) {
      RunFew(std::array{FewOf(FewKind::kFloat, x, w, y, delta)});
      return y;
    }
    if (Spans(x, w, delta.defined() ? 2 : 1, false)) {
      kernels::SpanProduct product = SpanOf(x, w, y);
      if (delta.defined()) AddTerm(x, delta, &product);
      RunSpan(std::array{product});
      return y;
    }
    at::mm_out(y, x, w.t(), at::kFloat);
    if (delta.defined()) at::addmm_out(y, y, x, delta.t(), at::kFloat);
    return y;
  }

  void AddLinears(const std::vector<AddedProduct>& products) override {
    std::vector<at::Tensor> factors;
    std::vector<kernels::FewRowsProduct> inner, outer;
    for (const AddedProduct& p : products) {
      if (!p.inner.defined()) {
        factors.push_back(p.x);
      } else if (Few(p.x)) {
        factors.push_back(Empty({p.x.size(0), p.inner.size(0)}, dtype()));
        inner.push_back(FewOf(FewKind::kBf16, p.x, p.inner, factors.back()));
      } else {
        factors.push_back(Linear(p.x, p.inner));
      }
    }
    RunFew(inner);
    for (size_t i = 0; i < products.size(); ++i) {
      const AddedProduct& p = products[i];
      at::Tensor y = p.y;
      if (Few(factors[i])) {
        outer.push_back(FewOf(FewKind::kFloat, factors[i], p.w, y));
        outer.back().add = Data<float>(y);
        outer.back().scale = static_cast<float>(p.scale);
      } else if (y.size(0) > 0) {
        at::addmm_out(y, y, factors[i], p.w.t(), at::kFloat, /*beta=*/1, p.scale);
      }
    }
    RunFew(outer);
  }

  at::Tensor LinearGrad(const at::Tensor& dy, const at::Tensor& w, const at::Tensor& delta) override {
    if (delta.defined()) return LinearPairGrad(dy, w, dy, delta, /*wide=*/false);
    if (!Spans(dy, w, 1, true)) return at::mm(dy, w);
    at::Tensor dx = Empty({dy.size(0), w.size(1)}, dtype());
    RunSpan(std::array{SpanOf(dy, w, dx, /*backward=*/true)});
    return dx;
  }

  at::Tensor LinearPairGrad(const at::Tensor& dy, const at::Tensor& one, const at::Tensor& other_dy,
                            const at::Tensor& other, bool wide) override {
    at::Tensor dx = Empty({dy.size(0), one.size(1)}, wide ? at::kFloat : dtype());
    if (!Spans(dy, one, 2, true)) {
      if (!wide) return at::mm(dy, one).addmm_(other_dy, other);
      if (dy.size(0) == 0) return dx;
      at::mm_out(dx, dy, one, at::kFloat);
      at::addmm_out(dx, dx, other_dy, other, at::kFloat);
      return dx;
    }
    kernels::SpanProduct product = SpanOf(dy, one, dx, /*backward=*/true);
    AddTerm(other_dy, other, &product);
    RunSpan(std::array{product});
    return dx;
  }

  void WeightGrad(const at::Tensor& dy, const at::Tensor& x, bool add, at::Tensor& grad) override {
    if (dy.size(0) == 0) {
      if (!add) grad.zero_();
    } else if (add) {
      at::addmm_out(grad, grad, dy.t(), x, at::kFloat);
    } else {
      at::mm_out(grad, dy.t(), x, at::kFloat);
    }
  }

  int64_t factor_rows() const override {
    return kernels::FactorsFit(0, config_.q_dim(), config_.hidden) ? kernels::kFactorRows : 0;
  }

  void FactorNorm(const GradFactors& grad, at::Tensor norm) override {
    const FactorsOf factors(grad, dtype());
    const at::Tensor workspace = Bytes(kernels::QueryNormWorkspaceBytes(factors.params));
    CheckLaunch(kernels::QueryNorm(factors.params, Data(workspace), Data<double>(norm), Stream()), "QueryNorm");
  }

  void FactorAdamW(const GradFactors& grad, const OptimizerConfig& config, const AdamWStep& step) override {
    const FactorsOf factors(grad, dtype());
    const kernels::QueryFactors& f = factors.params;
    for (const at::Tensor* t : {&step.parameter, &step.first, &step.second, &step.rounded}) {
      REFOCUS_CHECK_EQ(t->numel(), f.layers * f.out * f.in);
    }
    const at::Tensor workspace = Empty({kernels::kQueryUpdateWords}, at::kFloat);
    kernels::QueryUpdateParams params;
    params.factors = f;
    params.p = Data<float>(step.parameter);
    params.m = Data<float>(step.first);
    params.v = Data<float>(step.second);
    params.rounded = Data(step.rounded);
    params.rate = Data<float>(step.rate);
    params.steps = Data<float>(step.steps);
    params.divisor = Data<float>(step.divisor);
    params.skip = Data<float>(step.skip);
    params.workspace = Data<float>(workspace);
    params.beta1 = config.beta1;
    params.beta2 = config.beta2;
    params.epsilon = config.epsilon;
    params.weight_decay = config.weight_decay;
    CheckLaunch(kernels::QueryUpdate(params, Stream()), "QueryUpdate");
  }

  at::Tensor Rounded(const at::Tensor& t) override { return t.to(dtype()); }

  at::Tensor Embed(const at::Tensor& table, const at::Tensor& ids) override {
    at::Tensor x = Empty({ids.size(0), table.size(1)}, at::kFloat);
    CheckLaunch(kernels::Embed(Data(table), Data<int64_t>(ids), ids.size(0), table.size(1), Data<float>(x), Stream()),
                "Embed");
    return x;
  }

  at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) override {
    return RunNorm(x, at::Tensor(), weight, at::Tensor());
  }

  Normed AddNorm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight) override {
    at::Tensor sum = Empty(x.sizes(), at::kFloat);
    at::Tensor h = RunNorm(x, y, weight, sum);
    return {std::move(sum), std::move(h)};
  }

  at::Tensor Add(const at::Tensor& x, const at::Tensor& y) override { return x + y; }

  Gradient NormGrad(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dh,
                    const at::Tensor& residual) override {
    Gradient dx{Empty(x.sizes(), at::kFloat), Empty(x.sizes(), dtype())};
    kernels::NormGradParams params;
    params.rows = x.size(0);
    params.hidden = x.size(1);
    params.eps = static_cast<float>(config_.rms_eps);
    params.x = Data<float>(x);
    params.weight = Data(weight);
    params.dh = Data(dh);
    params.residual = Data<float>(residual);
    params.dx = Data<float>(dx.sum);
    params.dx_bf16 = Data(dx.rounded);
    CheckLaunch(kernels::NormGrad(params, Stream()), "NormGrad");
    return dx;
  }

  Rotation RotationAt(const at::Tensor& pos) override { return {pos, {}, {}}; }

  at::Tensor Rotate(const at::Tensor& raw, const HeadWeights& weights, const Rotation& rotation) override {
    at::Tensor out = Empty(raw.sizes(), dtype());
    kernels::RotateParams params = RotateOf(raw, weights, rotation);
    params.out = Data(out);
    CheckLaunch(kernels::Rotate(params, Stream()), "Rotate");
    return out;
  }

  at::Tensor RotateGrad(const at::Tensor& dq, const at::Tensor& raw, const HeadWeights& weights,
                        const Rotation& rotation) override {
    at::Tensor draw = Empty(raw.sizes(), dtype());
    kernels::RotateGradParams params;
    params.forward = RotateOf(raw, weights, rotation);
    params.dq = Data<float>(dq);
    params.draw = Data(draw);
    CheckLaunch(kernels::RotateGrad(params, Stream()), "RotateGrad");
    return draw;
  }

  at::Tensor SiluMul(const at::Tensor& gate, const at::Tensor& up) override {
    at::Tensor act = Empty(gate.sizes(), dtype());
    CheckLaunch(kernels::SiluMul(Data(gate), Data(up), gate.numel(), Data(act), Stream()), "SiluMul");
    return act;
  }

  SiluGrads SiluMulGrad(const at::Tensor& dact, const at::Tensor& gate, const at::Tensor& up) override {
    SiluGrads grads{Empty(gate.sizes(), dtype()), Empty(up.sizes(), dtype())};
    CheckLaunch(kernels::SiluMulGrad(Data(dact), Data(gate), Data(up), gate.numel(), Data(grads.gate), Data(grads.up),
                                     Stream()),
                "SiluMulGrad");
    return grads;
  }

  at::Tensor RowDot(const at::Tensor& dout, const at::Tensor& out) override {
    at::Tensor dot = Empty(out.sizes().slice(0, 2), at::kFloat);
    CheckLaunch(kernels::RowDot(Data(dout), Data<float>(out), dot.numel(), static_cast<int>(config_.head_dim),
                                Data<float>(dot), Stream()),
                "RowDot");
    return dot;
  }

  Losses CrossEntropy(at::Tensor logits, const at::Tensor& targets, bool grad, double grad_scale) override {
    Losses losses{Empty({logits.size(0)}, at::kFloat), Empty({logits.size(0)}, at::kFloat), at::Tensor()};
    if (grad) losses.dlogits = Empty(logits.sizes(), dtype());
    kernels::CrossEntropyParams params;
    params.rows = logits.size(0);
    params.vocab = logits.size(1);
    params.logits = Data<float>(logits);
    params.targets = Data<int64_t>(targets);
    params.loss = Data<float>(losses.loss);
    params.greedy = Data<float>(losses.greedy);
    params.dlogits = Data(losses.dlogits);
    params.grad_scale = static_cast<float>(grad_scale);
    CheckLaunch(kernels::CrossEntropy(params, Stream()), "CrossEntropy");
    return losses;
  }

  void Sample(const at::Tensor& logits, const at::Tensor& samplers, at::Tensor& tokens, at::Tensor& logprobs) override {
    const at::Tensor workspace = Bytes(kernels::SampleWorkspaceBytes(logits.size(0), logits.size(1)));
    for (const int64_t count : {samplers.numel(), tokens.numel(), logprobs.numel()}) {
      REFOCUS_CHECK_EQ(count, logits.size(0));
    }
    kernels::SampleParams params;
    params.rows = logits.size(0);
    params.vocab = logits.size(1);
    params.logits = Data<float>(logits);
    params.samplers = reinterpret_cast<SamplerState* const*>(Data<int64_t>(samplers));
    params.tokens = Data<int64_t>(tokens);
    params.logprobs = Data<float>(logprobs);
    params.workspace = Data(workspace);
    CheckLaunch(kernels::Sample(params, Stream()), "Sample");
  }

  at::Tensor ProjectRows(const at::Tensor& h, const at::Tensor& wq, const at::Tensor& delta,
                         const KeyValueWeights& weights, KeyValueRows* keys) override {
    if (!Few(h)) return LinearSum(h, wq, delta);
    at::Tensor q = Empty({h.size(0), wq.size(0)}, at::kFloat);
    *keys = MakeKeyValueRows(h.size(0));
    const auto [k, v] = FewKeysAndValues(h, weights, *keys);
    RunFew(std::array{FewOf(FewKind::kFloat, h, wq, q, delta), k, v});
    return q;
  }

 protected:
  static void CheckLaunch(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }

  static cudaStream_t Stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

  // Device memory of a contiguous tensor; null when undefined.
  template <typename T = void>
  static T* Data(const at::Tensor& t) {
    if (!t.defined()) return nullptr;
    REFOCUS_CHECK(t.is_cuda() && t.is_contiguous());
    return static_cast<T*>(t.data_ptr());
  }

  // A matrix whose rows may lie apart.
  static void* Matrix(const at::Tensor& t) {
    if (!t.defined()) return nullptr;
    REFOCUS_CHECK(t.is_cuda() && t.dim() == 2 && t.stride(1) == 1);
    return t.data_ptr();
  }

  at::Tensor Empty(at::IntArrayRef shape, at::ScalarType type) const {
    return at::empty(shape, at::TensorOptions(device_).dtype(type));
  }
  at::Tensor Bytes(int64_t count) const { return count == 0 ? at::Tensor() : Empty({count}, at::kByte); }

  // Few rows are bound by reading the weights, which cuBLAS does at half of the memory's rate.
  using FewKind = kernels::FewRowsProduct::Kind;
  static bool Few(const at::Tensor& x) { return x.size(0) > 0 && kernels::FewRowsFit(x.size(0), x.size(1)); }
  static kernels::FewRowsProduct FewOf(FewKind kind, const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                                       const at::Tensor& second = {}) {
    REFOCUS_CHECK(!second.defined() || second.stride(0) == w.stride(0));
    kernels::FewRowsProduct product;
    product.kind = kind;
    product.rows = x.size(0);
    product.in = x.size(1);
    product.out = w.size(0);
    product.x = Data(x);
    product.stride = w.size(0) > 1 ? w.stride(0) : 0;
    product.w = Matrix(w);
    product.second = Matrix(second);
    product.y = Data(y);
    return product;
  }
  static void RunFew(std::span<const kernels::FewRowsProduct> products) {
    CheckLaunch(kernels::FewRows(products, Stream()), "FewRows");
  }

  // So are more, up to 128, where the kernel for them is faster than cuBLAS.
  bool Spans(const at::Tensor& x, const at::Tensor& w, int terms, bool backward) const {
    return span_gpu_.multiprocessors > 0 && kernels::SpanFits(x.size(0), w.size(1), w.size(0)) &&
           kernels::SpanPays(x.size(0), terms, backward);
  }
  static kernels::SpanProduct SpanOf(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                                     bool backward = false) {
    REFOCUS_CHECK_EQ(x.size(1), w.size(backward ? 0 : 1));
    kernels::SpanProduct product;
    product.backward = backward;
    product.rows = x.size(0);
    product.in = w.size(1);
    product.out = w.size(0);
    product.stride = w.size(0) > 1 ? w.stride(0) : 0;
    product.term[0] = {Data(x), Matrix(w)};
    product.wide = y.scalar_type() == at::kFloat;
    product.y = Data(y);
    return product;
  }
  static void AddTerm(const at::Tensor& x, const at::Tensor& w, kernels::SpanProduct* product) {
    REFOCUS_CHECK(x.size(0) == product->rows && x.size(1) == (product->backward ? product->out : product->in));
    REFOCUS_CHECK(w.size(0) == product->out && w.size(1) == product->in);
    REFOCUS_CHECK(product->stride == 0 || product->stride == w.stride(0));
    product->term[product->terms++] = {Data(x), Matrix(w)};
  }
  void RunSpan(std::span<const kernels::SpanProduct> products) const {
    CheckLaunch(kernels::SpanProducts(products, span_gpu_, Stream()), "SpanProducts");
  }

  KeyValueRows MakeKeyValueRows(int64_t rows) const {
    return {Empty({rows, config_.kv_heads, config_.head_dim}, at::kFloat), Empty({rows, config_.kv_dim()}, dtype())};
  }

  static std::array<kernels::FewRowsProduct, 2> FewKeysAndValues(const at::Tensor& h, const KeyValueWeights& weights,
                                                                 const KeyValueRows& keys) {
    std::array products = {FewOf(FewKind::kFloat, h, weights.wk, keys.k), FewOf(FewKind::kBf16, h, weights.wv, keys.v)};
    products[1].bias = Data(weights.v_bias);
    return products;
  }

  KeyValueRows KeysAndValues(const at::Tensor& h, const KeyValueWeights& weights) const {
    KeyValueRows keys = MakeKeyValueRows(h.size(0));
    if (Few(h)) {
      RunFew(FewKeysAndValues(h, weights, keys));
      return keys;
    }
    if (Spans(h, weights.wk, 1, false) && !weights.v_bias.defined()) {
      RunSpan(std::array{SpanOf(h, weights.wk, keys.k), SpanOf(h, weights.wv, keys.v)});
      return keys;
    }
    at::Tensor flat = keys.k.view({h.size(0), config_.kv_dim()});
    at::mm_out(flat, h, weights.wk.t(), at::kFloat);
    // The product's epilogue adds a bias in fp32.
    const auto bias = weights.v_bias.defined() ? std::optional(weights.v_bias) : std::nullopt;
    keys.v = at::linear(h, weights.wv, bias);
    return keys;
  }

  kernels::RotateParams RotateOf(const at::Tensor& raw, const HeadWeights& weights, const Rotation& rotation) const {
    REFOCUS_CHECK_EQ(rotation.pos.numel(), raw.size(0));
    kernels::RotateParams params;
    params.rows = raw.size(0);
    params.heads = static_cast<int>(raw.size(1));
    params.head_dim = static_cast<int>(raw.size(2));
    params.eps = static_cast<float>(config_.rms_eps);
    params.raw = Data<float>(raw);
    REFOCUS_CHECK(!weights.bias.defined() || weights.bias.numel() == raw.size(1) * raw.size(2));
    params.bias = Data(weights.bias);
    params.norm = Data(weights.norm);
    params.attention_factor = static_cast<float>(config_.rope.attention_factor);
    params.pos = Data<int64_t>(rotation.pos);
    params.inverse_frequencies = Data<float>(inverse_frequencies_);
    return params;
  }

  const ModelConfig config_;
  const KvType kv_;
  const at::Device device_;
  at::Tensor inverse_frequencies_;  // [head_dim / 2] fp32; set by Bind
  kernels::SpanGpu span_gpu_;       // set by Bind; without multiprocessors: kernels/span_product.h is not for this GPU

 private:
  // `params` holds no longer than this.
  struct FactorsOf {
    FactorsOf(const GradFactors& grad, at::ScalarType dtype) {
      for (size_t layer = 0; layer < grad.dq.size(); ++layer) {
        const at::Tensor &one = grad.dq[layer], &other = grad.h[layer];
        for (const at::Tensor* t : {&one, &other}) REFOCUS_CHECK(t->dim() == 2 && t->scalar_type() == dtype);
        REFOCUS_CHECK(one.sizes() == grad.dq[0].sizes() && other.sizes() == grad.h[0].sizes());
        REFOCUS_CHECK_EQ(one.size(0), other.size(0));
        dq.push_back(Data(one));
        h.push_back(Data(other));
      }
      params.layers = static_cast<int64_t>(dq.size());
      params.rows = grad.dq[0].size(0);
      params.out = grad.dq[0].size(1);
      params.in = grad.h[0].size(1);
      params.dq = dq.data();
      params.h = h.data();
    }
    FactorsOf(const FactorsOf&) = delete;

    std::vector<const void*> dq, h;
    kernels::QueryFactors params;
  };

  at::Tensor RunNorm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& sum) {
    at::Tensor h = Empty(x.sizes(), dtype());
    kernels::NormParams params;
    params.rows = x.size(0);
    params.hidden = x.size(1);
    params.eps = static_cast<float>(config_.rms_eps);
    params.x = Data<float>(x);
    params.y = Data(y);
    params.weight = Data(weight);
    params.sum = Data<float>(sum);
    params.h = Data(h);
    CheckLaunch(kernels::Norm(params, Stream()), "Norm");
    return h;
  }
};

}  // namespace refocus
