// bf16 on one GPU: our kernels for attention and the row-wise steps, cuBLAS through LibTorch for matrix products.
// Everything is enqueued on the current stream; a pass that repeats is recorded as a CUDA graph.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "base/rope.h"
#include "kernels/attention.h"
#include "kernels/exchange.h"
#include "kernels/rowwise.h"
#include "worker/backend.h"
#include "worker/backend_cuda_graph.h"
#include "worker/backend_cuda_rowwise.h"

namespace refocus {
namespace {

class CudaBackend : public CudaRowwise {
 public:
  using CudaRowwise::CudaRowwise;

  int64_t min_split_rows() const override { return 192; }

  void Bind() override {
    c10::cuda::set_device(device_.index());
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_.index()));
    aside_ = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device_.index());
    at::globalContext().setAllowBF16ReductionCuBLAS(/*allow_reduced_precision=*/false);
    const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(device_.index());
    sm_count_ = properties.multiProcessorCount;
    if (properties.major == 9 && properties.minor == 0) {
      CheckLaunch(kernels::MeasureSpanGpu(&span_gpu_), "MeasureSpanGpu");
    }
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
    std::vector<kernels::AttendParams> pieces;
    int64_t splits = 0;
    for (size_t first = 0; first == 0 || first < extents.size(); first += kernels::kMaxExtents) {
      const size_t end = std::min(first + kernels::kMaxExtents, extents.size());
      pieces.push_back(AttendOf(q, pos, {extents.begin() + first, extents.begin() + end}));
      splits += kernels::AttendSplits(pieces.back().shape, sm_count_);
    }
    const Partial parts = MakePartials(splits, q.size(0));
    int64_t part = 0;
    for (const kernels::AttendParams& piece : pieces) part += RunPartials(piece, parts, part);
    if (splits > 1) return Combine(parts.out, parts.lse);
    return {parts.out.select(0, 0), parts.lse.select(0, 0), at::Tensor()};
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
    Partial whole;
    CheckLaunch(kernels::Combine(CombineOf(out, lse, &whole), Stream()), "Combine");
    return whole;
  }

  Partial CombineOverPeers(const Partial& own, const kernels::PeerMemory& peers) override {
    Partial whole;
    const kernels::CombineParams params = CombineOf(own.out.unsqueeze(0), own.lse.unsqueeze(0), &whole);
    CheckLaunch(kernels::ExchangeCombine(params, peers, Stream()), "ExchangeCombine");
    return whole;
  }

  at::Tensor SumOverPeers(const at::Tensor& x, at::ScalarType type, const kernels::PeerMemory& peers) override {
    at::Tensor sum = Empty(x.sizes(), type);
    float* const wide = type == at::kFloat ? Data<float>(sum) : nullptr;
    void* const rounded = type == at::kFloat ? nullptr : Data(sum);
    CheckLaunch(kernels::ExchangeSum(Data<float>(x), x.numel(), wide, rounded, peers, Stream()), "ExchangeSum");
    return sum;
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
    const KeyValueRows keys = KeysAndValues(h, weights);
    FillAppend(keys, weights, rotation, slots, &params);
    CheckLaunch(kernels::Append(params, Stream()), "Append");
  }

  at::Tensor RotateAndAppendRows(const at::Tensor& raw, const HeadWeights& queries, const at::Tensor& h,
                                 const KeyValueWeights& weights, const KeyValueRows& keys, const Rotation& rotation,
                                 const at::Tensor& slots, const at::Tensor& tails, int64_t layer) override {
    at::Tensor q = Empty(raw.sizes(), dtype());
    kernels::RotateParams rotate = RotateOf(raw, queries, rotation);
    rotate.out = Data(q);
    kernels::AppendParams params;
    params.tails = Tails(tails, h.size(0));
    params.layer = layer;
    FillAppend(keys.k.defined() ? keys : KeysAndValues(h, weights), weights, rotation, slots, &params);
    CheckLaunch(kernels::RotateAndAppend(rotate, params, Stream()), "RotateAndAppend");
    return q;
  }

  Partial AttendRows(const at::Tensor& q, const at::Tensor& pos, const std::vector<RowSweep>& sweeps,
                     const at::Tensor& tails, int64_t layer, const ShardPlan& plan,
                     const kernels::PeerMemory* peers) override {
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
    const int64_t tail_splits = kernels::TailSplits(rows, params.kv_heads, sm_count_);
    std::vector<kernels::AttendParams> shared;
    int64_t swept = 0;
    for (const RowSweep& sweep : sweeps) {
      REFOCUS_CHECK_EQ(sweep.first, swept);
      swept += sweep.rows;
      shared.push_back(AttendOf(q.narrow(0, sweep.first, sweep.rows), pos.narrow(0, sweep.first, sweep.rows),
                                sweep.extents));
    }
    REFOCUS_CHECK_EQ(swept, rows);
    // One context's partials are combined with the tails' in one go; of several, whose splits differ, each by itself.
    const int64_t splits = shared.size() == 1 ? kernels::AttendSplits(shared[0].shape, sm_count_) : 1;
    const Partial parts = MakePartials(splits + tail_splits, rows);
    params.out = Data<float>(parts.out.narrow(0, splits, tail_splits));
    params.lse = Data<float>(parts.lse.narrow(0, splits, tail_splits));
    CheckLaunch(kernels::AttendTails(params, sm_count_, Stream()), "AttendTails");
    if (shared.size() == 1) {
      shared[0].beside_previous = true;
      RunPartials(shared[0], parts, 0);
    } else {
      for (size_t i = 0; i < shared.size(); ++i) {
        const int64_t first = sweeps[i].first * config_.heads;
        const at::Tensor workspace = Bytes(kernels::AttendWorkspaceBytes(shared[i].shape, sm_count_));
        shared[i].out = Data<float>(parts.out) + first * config_.head_dim;
        shared[i].lse = Data<float>(parts.lse) + first;
        shared[i].workspace = Data(workspace);
        CheckLaunch(kernels::Attend(shared[i], sm_count_, Stream()), "Attend");
      }
    }
    if (peers == nullptr) return Combine(parts.out, parts.lse);
    if (!kernels::ExchangePartsFits(rows, params.heads, params.head_dim, *peers)) {
      return CombineOverPeers(Combine(parts.out, parts.lse), *peers);
    }
    Partial whole;
    CheckLaunch(kernels::ExchangeParts(CombineOf(parts.out, parts.lse, &whole), *peers, Stream()), "ExchangeParts");
    return whole;
  }

  // A recording for each power of two.
  int64_t PaddedRows(int64_t rows) const override {
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
  }

 private:
  // out [parts, rows, heads, head_dim], lse [parts, rows, heads]; `whole` gets room for the result.
  kernels::CombineParams CombineOf(const at::Tensor& out, const at::Tensor& lse, Partial* whole) const {
    *whole = {Empty(out.sizes().slice(1), at::kFloat), Empty(lse.sizes().slice(1), at::kFloat),
              Empty(out.sizes().slice(1), dtype())};
    kernels::CombineParams params;
    params.parts = out.size(0);
    params.rows = out.size(1);
    params.heads = static_cast<int>(out.size(2));
    params.head_dim = static_cast<int>(out.size(3));
    params.part_out = Data<float>(out);
    params.part_lse = Data<float>(lse);
    params.out = Data<float>(whole->out);
    params.lse = Data<float>(whole->lse);
    params.out_bf16 = Data(whole->rounded);
    return params;
  }

  // All of `params` but where to.
  void FillAppend(const KeyValueRows& keys, const KeyValueWeights& weights, const Rotation& rotation,
                  const at::Tensor& slots, kernels::AppendParams* params) const {
    params->int8 = kv_ == KvType::kInt8;
    params->key = RotateOf(keys.k, weights.k, rotation);
    params->value = Data(keys.v);
    params->slots = Data<int64_t>(slots);
  }

  // At most kMaxExtents; where to, and how, is left open.
  kernels::AttendParams AttendOf(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents) const {
    kernels::AttendParams params;
    params.shape = Shape(q, pos, extents);
    params.q = Data(q);
    return params;
  }

  // Room for out and lse of so many parts, as Combine takes them.
  Partial MakePartials(int64_t parts, int64_t rows) const {
    return {Empty({parts, rows, config_.heads, config_.head_dim}, at::kFloat),
            Empty({parts, rows, config_.heads}, at::kFloat), at::Tensor()};
  }

  // A part for each split, from `first` on; returns how many.
  int64_t RunPartials(kernels::AttendParams params, const Partial& parts, int64_t first) const {
    const int64_t splits = kernels::AttendSplits(params.shape, sm_count_);
    params.partials = true;
    params.out = Data<float>(parts.out.narrow(0, first, splits));
    params.lse = Data<float>(parts.lse.narrow(0, first, splits));
    CheckLaunch(kernels::Attend(params, sm_count_, Stream()), "Attend");
    return splits;
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

  at::cuda::CUDAGraph pool_graph_;
  at::cuda::MempoolId_t pool_{0, 0};
  int sm_count_ = 0;
  std::optional<c10::cuda::CUDAStream> aside_;
  at::cuda::CUDAEvent before_aside_;
  std::array<at::cuda::CUDAEvent, 8> asides_;
  int64_t last_aside_ = 0;
};

}  // namespace

std::unique_ptr<Backend> MakeCudaBackend(const ModelConfig& config, int index, KvType kv) {
  return std::make_unique<CudaBackend>(config, index, kv);
}

}  // namespace refocus
