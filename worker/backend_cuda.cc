// bf16 on one GPU: our kernels for attention and the row-wise steps, cuBLAS through LibTorch for matrix products.
// Everything is enqueued on the current stream; a pass that repeats is recorded as a CUDA graph.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <bit>
#include <cmath>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "base/rope.h"
#include "kernels/attention.h"
#include "kernels/few_rows.h"
#include "kernels/query_update.h"
#include "kernels/rowwise.h"
#include "worker/backend.h"
#include "worker/backend_cuda_graph.h"

namespace refocus {
namespace {

void CheckLaunch(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

cudaStream_t Stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// Device memory of a contiguous tensor; null when undefined.
template <typename T = void>
T* Data(const at::Tensor& t) {
  if (!t.defined()) return nullptr;
  REFOCUS_CHECK(t.is_cuda() && t.is_contiguous());
  return static_cast<T*>(t.data_ptr());
}

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

class CudaBackend : public Backend {
 public:
  CudaBackend(const ModelConfig& config, int index, KvType kv)
      : config_(config), kv_(kv), device_(at::kCUDA, static_cast<int8_t>(index)) {
    REFOCUS_CHECK_EQ(config.head_dim % 8, 0);
    REFOCUS_CHECK_LE(config.head_dim, kernels::kMaxHeadDim);
    REFOCUS_CHECK(kv != KvType::kInt8 || config.head_dim % 16 == 0);
  }

  at::Device device() const override { return device_; }
  at::ScalarType dtype() const override { return at::kBFloat16; }
  at::ScalarType kv_dtype() const override { return kv_ == KvType::kInt8 ? at::kByte : at::kBFloat16; }
  int64_t min_split_rows() const override { return 192; }

  void Bind() override {
    c10::cuda::set_device(device_.index());
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_.index()));
    aside_ = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device_.index());
    at::globalContext().setAllowBF16ReductionCuBLAS(/*allow_reduced_precision=*/false);
    sm_count_ = at::cuda::getDeviceProperties(device_.index())->multiProcessorCount;
    inverse_frequencies_ = at::tensor(InverseFrequencies(config_.rope_theta, config_.head_dim, config_.rope)).to(device_);
    // Passes run one after the other and keep nothing between two runs but what was allocated outside or is still held,
    // so their graphs share one pool of memory: a pool of its own for each would stay reserved behind it. This graph,
    // which is never run, keeps the pool.
    at::Tensor word = at::zeros({1}, at::TensorOptions(device_));
    pool_graph_.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    word.fill_(1);
    pool_graph_.capture_end();
    pool_ = pool_graph_.pool();
  }

  void Synchronize() override { c10::cuda::getCurrentCUDAStream().synchronize(); }

  std::unique_ptr<Repeat> Repeated(std::function<void()> pass) override {
    return std::make_unique<GraphRepeat>(std::move(pass), pool_);
  }

  int64_t Aside(const std::function<void()>& work) override {
    const c10::cuda::CUDAStream main = c10::cuda::getCurrentCUDAStream();
    before_aside_.record(main);
    before_aside_.block(*aside_);
    at::cuda::CUDAEvent& done = asides_[++last_aside_ % asides_.size()];
    c10::cuda::CUDAStreamGuard guard(*aside_);
    work();
    done.record(*aside_);
    return last_aside_;
  }

  void Await(int64_t ticket) override {
    REFOCUS_CHECK_LT(last_aside_ - ticket, static_cast<int64_t>(asides_.size()));
    asides_[ticket % asides_.size()].block(c10::cuda::getCurrentCUDAStream());
  }

  Partial Attend(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents) override {
    constexpr size_t kMost = kernels::kMaxExtents;
    if (extents.size() <= kMost) {
      Partial partial{Empty(q.sizes(), at::kFloat), Empty(q.sizes().slice(0, 2), at::kFloat)};
      AttendInto(q, pos, extents, partial.out, partial.lse);
      return partial;
    }
    const auto parts = static_cast<int64_t>((extents.size() + kMost - 1) / kMost);
    const at::Tensor out = Empty({parts, q.size(0), q.size(1), q.size(2)}, at::kFloat);
    const at::Tensor lse = Empty({parts, q.size(0), q.size(1)}, at::kFloat);
    for (int64_t part = 0; part < parts; ++part) {
      const auto first = extents.begin() + part * static_cast<int64_t>(kMost);
      AttendInto(q, pos, {first, part + 1 < parts ? first + kMost : extents.end()}, out.select(0, part),
                 lse.select(0, part));
    }
    return Combine(out, lse);
  }

  at::Tensor QueryGrad(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents,
                       const at::Tensor& dout, const at::Tensor& lse, const at::Tensor& row_dot) override {
    kernels::QueryGradParams params;
    params.shape = Shape(q, pos, extents);
    at::Tensor dq = Empty(q.sizes(), at::kFloat);
    const at::Tensor workspace = Bytes(kernels::QueryGradWorkspaceBytes(params.shape, sm_count_));
    REFOCUS_CHECK_EQ(dout.numel(), q.numel());
    REFOCUS_CHECK_EQ(lse.numel(), row_dot.numel());
    params.q = Data(q);
    params.dout = Data(dout);
    params.lse = Data<float>(lse);
    params.row_dot = Data<float>(row_dot);
    params.dq = Data<float>(dq);
    params.workspace = Data(workspace);
    CheckLaunch(kernels::QueryGrad(params, sm_count_, Stream()), "QueryGrad");
    return dq;
  }

  Partial Combine(const at::Tensor& out, const at::Tensor& lse) override {
    REFOCUS_CHECK_EQ(out.dim(), 4);
    Partial whole{Empty(out.sizes().slice(1), at::kFloat), Empty(lse.sizes().slice(1), at::kFloat)};
    kernels::CombineParams params;
    params.parts = out.size(0);
    params.rows = out.size(1);
    params.heads = static_cast<int>(out.size(2));
    params.head_dim = static_cast<int>(out.size(3));
    params.part_out = Data<float>(out);
    params.part_lse = Data<float>(lse);
    params.out = Data<float>(whole.out);
    params.lse = Data<float>(whole.lse);
    CheckLaunch(kernels::Combine(params, Stream()), "Combine");
    return whole;
  }

  at::Tensor Linear(const at::Tensor& x, const at::Tensor& w) override {
    if (!Few(x)) return at::linear(x, w);
    at::Tensor y = Empty({x.size(0), w.size(0)}, dtype());
    RunFew(std::array{FewOf(FewKind::kBf16, x, w, y)});
    return y;
  }

  at::Tensor GatedLinear(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up) override {
    if (!Few(x)) return SiluMul(Linear(x, gate), Linear(x, up));
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
        factors.push_back(at::linear(p.x, p.inner));
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
    at::Tensor dx = at::mm(dy, w);
    if (delta.defined()) dx.addmm_(dy, delta);
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

  void Append(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation, const at::Tensor& slots,
              const KvView& extent) override {
    CheckExtent(extent);
    kernels::AppendParams params;
    params.k = extent.k.data_ptr();
    params.v = extent.v.data_ptr();
    params.head_stride = extent.k.stride(0);
    if (kv_ == KvType::kInt8) {
      params.k_scale = extent.k_scale.data_ptr();
      params.v_scale = extent.v_scale.data_ptr();
    }
    AppendTo(h, weights, rotation, slots, params);
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

  void AppendRows(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation,
                  const at::Tensor& slots, const at::Tensor& tails, int64_t layer) override {
    kernels::AppendParams params;
    params.tails = Tails(tails, h.size(0));
    params.layer = layer;
    AppendTo(h, weights, rotation, slots, params);
  }

  Partial AttendRows(const at::Tensor& q, const at::Tensor& pos, const std::vector<RowSweep>& sweeps,
                     const at::Tensor& tails, int64_t layer, const ShardPlan& plan) override {
    const int64_t rows = q.size(0);
    kernels::AttendTailsParams params;
    params.rows = rows;
    params.heads = static_cast<int>(config_.heads);
    params.kv_heads = static_cast<int>(config_.kv_heads);
    params.head_dim = static_cast<int>(config_.head_dim);
    params.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config_.head_dim)));
    params.shards = plan.shards;
    params.shard = plan.shard;
    params.layer = layer;
    params.q = Data(q);
    params.pos = Data<int64_t>(pos);
    params.tails = Tails(tails, rows);
    params.int8 = kv_ == KvType::kInt8;
    const int64_t splits = kernels::TailSplits(rows, params.kv_heads, sm_count_);
    const at::Tensor out = Empty({1 + splits, rows, config_.heads, config_.head_dim}, at::kFloat);
    const at::Tensor lse = Empty({1 + splits, rows, config_.heads}, at::kFloat);
    int64_t swept = 0;
    for (const RowSweep& sweep : sweeps) {
      REFOCUS_CHECK_EQ(sweep.first, swept);
      swept += sweep.rows;
      AttendInto(q.narrow(0, sweep.first, sweep.rows), pos.narrow(0, sweep.first, sweep.rows), sweep.extents,
                 out.select(0, 0).narrow(0, sweep.first, sweep.rows),
                 lse.select(0, 0).narrow(0, sweep.first, sweep.rows));
    }
    REFOCUS_CHECK_EQ(swept, rows);
    params.out = Data<float>(out.narrow(0, 1, splits));
    params.lse = Data<float>(lse.narrow(0, 1, splits));
    CheckLaunch(kernels::AttendTails(params, sm_count_, Stream()), "AttendTails");
    return Combine(out, lse);
  }

  // A recording for each power of two.
  int64_t PaddedRows(int64_t rows) const override {
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
  }

 private:
  at::Tensor Empty(at::IntArrayRef shape, at::ScalarType type) const {
    return at::empty(shape, at::TensorOptions(device_).dtype(type));
  }
  at::Tensor Bytes(int64_t count) const { return count == 0 ? at::Tensor() : Empty({count}, at::kByte); }

  // Where to is in `params`.
  void AppendTo(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation, const at::Tensor& slots,
                kernels::AppendParams params) {
    const auto [raw, value] = KeysAndValues(h, weights);
    params.int8 = kv_ == KvType::kInt8;
    params.key = RotateOf(raw, weights.k, rotation);
    params.value = Data(value);
    params.slots = Data<int64_t>(slots);
    CheckLaunch(kernels::Append(params, Stream()), "Append");
  }

  // Few rows are bound by reading the weights, which cuBLAS does at half of the memory's rate.
  using FewKind = kernels::FewRowsProduct::Kind;
  static bool Few(const at::Tensor& x) { return x.size(0) > 0 && kernels::FewRowsFit(x.size(0), x.size(1)); }
  static kernels::FewRowsProduct FewOf(FewKind kind, const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                                       const at::Tensor& second = {}) {
    kernels::FewRowsProduct product;
    product.kind = kind;
    product.rows = x.size(0);
    product.in = x.size(1);
    product.out = w.size(0);
    product.x = Data(x);
    product.w = Data(w);
    product.second = Data(second);
    product.y = Data(y);
    return product;
  }
  static void RunFew(std::span<const kernels::FewRowsProduct> products) {
    CheckLaunch(kernels::FewRows(products, Stream()), "FewRows");
  }

  // Keys before bias, norm and rotation, fp32 [rows, kv_heads, head_dim], and values, bf16 [rows, kv_heads * head_dim].
  std::pair<at::Tensor, at::Tensor> KeysAndValues(const at::Tensor& h, const KeyValueWeights& weights) const {
    const at::Tensor keys = Empty({h.size(0), config_.kv_heads, config_.head_dim}, at::kFloat);
    if (Few(h)) {
      const at::Tensor values = Empty({h.size(0), config_.kv_dim()}, dtype());
      std::array products = {FewOf(FewKind::kFloat, h, weights.wk, keys),
                             FewOf(FewKind::kBf16, h, weights.wv, values)};
      products[1].bias = Data(weights.v_bias);
      RunFew(products);
      return {keys, values};
    }
    at::Tensor flat = keys.view({h.size(0), config_.kv_dim()});
    at::mm_out(flat, h, weights.wk.t(), at::kFloat);
    // The product's epilogue adds a bias in fp32.
    const auto bias = weights.v_bias.defined() ? std::optional(weights.v_bias) : std::nullopt;
    return {keys, at::linear(h, weights.wv, bias)};
  }

  // At most kMaxExtents.
  void AttendInto(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents, const at::Tensor& out,
                  const at::Tensor& lse) {
    kernels::AttendParams params;
    params.shape = Shape(q, pos, extents);
    const at::Tensor workspace = Bytes(kernels::AttendWorkspaceBytes(params.shape, sm_count_));
    params.q = Data(q);
    params.out = Data<float>(out);
    params.lse = Data<float>(lse);
    params.workspace = Data(workspace);
    CheckLaunch(kernels::Attend(params, sm_count_, Stream()), "Attend");
  }

  const kernels::TailExtent* Tails(const at::Tensor& tails, int64_t rows) const {
    static_assert(sizeof(kernels::TailExtent) == kTailWords * sizeof(int64_t) &&
                  kernels::kTailExtents == kMaxTailExtents);
    REFOCUS_CHECK_EQ(tails.numel(), rows * kMaxTailExtents * kTailWords);
    return reinterpret_cast<const kernels::TailExtent*>(Data<int64_t>(tails));
  }

  void CheckExtent(const KvView& view) const {
    for (const at::Tensor* t : {&view.k, &view.v}) {
      REFOCUS_CHECK(t->is_cuda() && t->scalar_type() == kv_dtype() && t->dim() == 3);
      REFOCUS_CHECK(t->stride(2) == 1 && t->stride(1) == config_.head_dim && t->stride(0) == view.k.stride(0));
      REFOCUS_CHECK_LE(view.length, t->size(1));
    }
    for (const at::Tensor* t : {&view.k_scale, &view.v_scale}) {
      if (kv_ != KvType::kInt8) break;
      REFOCUS_CHECK(t->is_cuda() && t->scalar_type() == at::kBFloat16 && t->dim() == 2 && t->stride(1) == 1);
      REFOCUS_CHECK_EQ(t->stride(0) * config_.head_dim, view.k.stride(0));
    }
  }

  kernels::AttentionShape Shape(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents) const {
    REFOCUS_CHECK(q.dim() == 3 && q.scalar_type() == dtype());
    REFOCUS_CHECK_EQ(pos.numel(), q.size(0));
    kernels::AttentionShape shape;
    shape.rows = q.size(0);
    shape.heads = static_cast<int>(config_.heads);
    shape.kv_heads = static_cast<int>(config_.kv_heads);
    shape.head_dim = static_cast<int>(config_.head_dim);
    REFOCUS_CHECK(q.size(1) == shape.heads && q.size(2) == shape.head_dim);
    shape.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
    shape.pos = Data<int64_t>(pos);
    shape.int8 = kv_ == KvType::kInt8;
    for (const KvView& view : extents) {
      if (view.length == 0) continue;
      CheckExtent(view);
      REFOCUS_CHECK_LT(shape.extents, kernels::kMaxExtents);
      kernels::KvSlots& slots = shape.kv[shape.extents++];
      slots.k = view.k.data_ptr();
      slots.v = view.v.data_ptr();
      slots.head_stride = view.k.stride(0);
      slots.slots = view.length;
      slots.first_index = view.first_index;
      if (shape.int8) {
        slots.k_scale = view.k_scale.data_ptr();
        slots.v_scale = view.v_scale.data_ptr();
      }
      shape.shards = view.plan.shards;
      shape.shard = view.plan.shard;
      shape.expected_keys += view.length;
    }
    return shape;
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

  at::cuda::CUDAGraph pool_graph_;
  at::cuda::MempoolId_t pool_{0, 0};
  const ModelConfig config_;
  const KvType kv_;
  const at::Device device_;
  int sm_count_ = 0;
  std::optional<c10::cuda::CUDAStream> aside_;
  at::cuda::CUDAEvent before_aside_;
  std::array<at::cuda::CUDAEvent, 8> asides_;
  int64_t last_aside_ = 0;
  at::Tensor inverse_frequencies_;  // [head_dim / 2] fp32
};

}  // namespace

std::unique_ptr<Backend> MakeCudaBackend(const ModelConfig& config, int index, KvType kv) {
  return std::make_unique<CudaBackend>(config, index, kv);
}

}  // namespace refocus
