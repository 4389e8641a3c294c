// The embedding's rows and RMSNorm with its gradient: one block a row, the row kept in registers.
#include "kernels/rowwise.cuh"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

using row::Bf16;
using row::Four;
using row::Load;
using row::Store;

constexpr int kThreads = 512;  // at most
constexpr int kMaxWarps = kThreads / row::kWarp;
constexpr int kScalarThreads = 256;

__device__ float FromBf16(Bf16 value) { return __bfloat162float(value); }

// A decode step that is replayed before the host saw that no token could be drawn embeds id -1: NaN, so that the steps
// behind it draw none either.
template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    EmbedKernel(const Bf16* table, const int64_t* ids, int64_t hidden, float* x) {
  BeginInTurn();
  const int64_t id = ids[blockIdx.x];
  const Bf16* from = table + (id < 0 ? 0 : id) * hidden;
  float* to = x + static_cast<int64_t>(blockIdx.x) * hidden;
  const float nan = __uint_as_float(0x7fffffffu);
  if constexpr (kVector) {
    for (int64_t i = 4 * threadIdx.x; i < hidden; i += 4 * blockDim.x)
      Store(to + i, id < 0 ? Four{nan, nan, nan, nan} : Load(from + i));
  } else {
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = id < 0 ? nan : FromBf16(from[i]);
  }
}

__device__ float InverseRms(float square_sum, int64_t hidden, float eps) {
  return rsqrtf(square_sum / static_cast<float>(hidden) + eps);
}

__device__ bool WritesSum(const NormParams& p) { return p.sum != nullptr && (p.y != nullptr || p.sum != p.x); }

// Thread t holds chunks t, t + blockDim.x, ... of four elements.
template <int kItems>
__global__ void __launch_bounds__(kThreads) NormKernel(NormParams p) {
  LetNextBegin();
  __shared__ float scratch[kMaxWarps];
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const int chunks = static_cast<int>(p.hidden / 4);
  const float* x = p.x + offset;
  const Bf16* y = static_cast<const Bf16*>(p.y);
  const Bf16* weight = static_cast<const Bf16*>(p.weight);
  Four s[kItems], w[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int c = threadIdx.x + k * blockDim.x;
    w[k] = c < chunks ? Load(weight + 4 * c) : Four{};
  }
  AwaitPrevious();
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int c = threadIdx.x + k * blockDim.x;
    s[k] = c < chunks ? Load(x + 4 * c) : Four{};
  }
  if (y != nullptr) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int c = threadIdx.x + k * blockDim.x;
      if (c >= chunks) continue;
      const Four add = Load(y + offset + 4 * c);
#pragma unroll
      for (int j = 0; j < 4; ++j) s[k].v[j] += add.v[j];
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
#pragma unroll
    for (int j = 0; j < 4; ++j) squares += s[k].v[j] * s[k].v[j];
  }
  const float r = InverseRms(row::BlockSum(squares, scratch), p.hidden, p.eps);
  const bool writes_sum = WritesSum(p);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int c = threadIdx.x + k * blockDim.x;
    if (c >= chunks) continue;
    Four h;
#pragma unroll
    for (int j = 0; j < 4; ++j) h.v[j] = s[k].v[j] * r * w[k].v[j];
    if (writes_sum) Store(p.sum + offset + 4 * c, s[k]);
    Store(static_cast<Bf16*>(p.h) + offset + 4 * c, h);
  }
}

// Any hidden size and alignment, reading the row twice. Where `sum` is x, a thread reads back what it wrote itself.
__global__ void __launch_bounds__(kScalarThreads) NormScalarKernel(NormParams p) {
  BeginInTurn();
  __shared__ float scratch[kScalarThreads / row::kWarp];
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const Bf16* y = static_cast<const Bf16*>(p.y);
  const Bf16* weight = static_cast<const Bf16*>(p.weight);
  const bool writes_sum = WritesSum(p);
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    const float s = p.x[offset + i] + (y != nullptr ? FromBf16(y[offset + i]) : 0.0f);
    squares += s * s;
    if (writes_sum) p.sum[offset + i] = s;
  }
  const float r = InverseRms(row::BlockSum(squares, scratch), p.hidden, p.eps);
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    const float s = writes_sum ? p.sum[offset + i] : p.x[offset + i] + (y != nullptr ? FromBf16(y[offset + i]) : 0.0f);
    static_cast<Bf16*>(p.h)[offset + i] = __float2bfloat16_rn(s * r * FromBf16(weight[i]));
  }
}

template <int kItems>
__global__ void __launch_bounds__(kThreads) NormGradKernel(NormGradParams p) {
  BeginInTurn();
  __shared__ float square_scratch[kMaxWarps], product_scratch[kMaxWarps];
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const int chunks = static_cast<int>(p.hidden / 4);
  const Bf16* weight = static_cast<const Bf16*>(p.weight);
  const Bf16* dh = static_cast<const Bf16*>(p.dh);
  Four x[kItems], g[kItems], residual[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int c = threadIdx.x + k * blockDim.x;
    x[k] = g[k] = residual[k] = {};
    if (c >= chunks) continue;
    x[k] = Load(p.x + offset + 4 * c);
    g[k] = Load(dh + offset + 4 * c);
    if (p.residual != nullptr) residual[k] = Load(p.residual + offset + 4 * c);
    const Four w = Load(weight + 4 * c);
#pragma unroll
    for (int j = 0; j < 4; ++j) g[k].v[j] *= w.v[j];
  }
  float squares = 0.0f, products = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      squares += x[k].v[j] * x[k].v[j];
      products += g[k].v[j] * x[k].v[j];
    }
  }
  const float r = InverseRms(row::BlockSum(squares, square_scratch), p.hidden, p.eps);
  const float pull = r * r * (row::BlockSum(products, product_scratch) / static_cast<float>(p.hidden));
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int c = threadIdx.x + k * blockDim.x;
    if (c >= chunks) continue;
    Four dx;
#pragma unroll
    for (int j = 0; j < 4; ++j) dx.v[j] = residual[k].v[j] + r * (g[k].v[j] - x[k].v[j] * pull);
    Store(p.dx + offset + 4 * c, dx);
    if (p.dx_bf16 != nullptr) Store(static_cast<Bf16*>(p.dx_bf16) + offset + 4 * c, dx);
  }
}

__global__ void __launch_bounds__(kScalarThreads) NormGradScalarKernel(NormGradParams p) {
  BeginInTurn();
  __shared__ float square_scratch[kScalarThreads / row::kWarp], product_scratch[kScalarThreads / row::kWarp];
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const Bf16* weight = static_cast<const Bf16*>(p.weight);
  const Bf16* dh = static_cast<const Bf16*>(p.dh) + offset;
  const float* x = p.x + offset;
  float squares = 0.0f, products = 0.0f;
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    squares += x[i] * x[i];
    products += FromBf16(dh[i]) * FromBf16(weight[i]) * x[i];
  }
  const float r = InverseRms(row::BlockSum(squares, square_scratch), p.hidden, p.eps);
  const float pull = r * r * (row::BlockSum(products, product_scratch) / static_cast<float>(p.hidden));
  for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
    const float residual = p.residual != nullptr ? p.residual[offset + i] : 0.0f;
    const float dx = residual + r * (FromBf16(dh[i]) * FromBf16(weight[i]) - x[i] * pull);
    p.dx[offset + i] = dx;
    if (p.dx_bf16 != nullptr) static_cast<Bf16*>(p.dx_bf16)[offset + i] = __float2bfloat16_rn(dx);
  }
}

// Chunks per thread, from few (latency) to as many as the registers hold; 0: the row fits no such block.
int ItemsFor(int64_t chunks) {
  if (chunks <= 256) return 1;
  if (chunks <= 2 * kThreads) return 2;
  if (chunks <= 4 * kThreads) return 4;
  return chunks <= 8 * kThreads ? 8 : 0;
}

int ThreadsFor(int64_t chunks, int items) {
  return static_cast<int>(row::CeilDiv(row::CeilDiv(chunks, items), row::kWarp) * row::kWarp);
}

}  // namespace

cudaError_t Embed(const void* table, const int64_t* ids, int64_t rows, int64_t hidden, float* x, cudaStream_t stream) {
  if (rows < 0 || hidden <= 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const bool vector = hidden % 4 == 0 && row::Aligned(table, x);
  const int64_t chunks = vector ? hidden / 4 : hidden;
  const int threads = ThreadsFor(chunks < kThreads ? chunks : kThreads, 1);
  return row::Launch(vector ? EmbedKernel<true> : EmbedKernel<false>, rows, threads, 0, stream,
                     static_cast<const Bf16*>(table), ids, hidden, x);
}

cudaError_t Norm(const NormParams& params, cudaStream_t stream) {
  if (params.rows < 0 || params.hidden <= 0) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  const int64_t chunks = params.hidden / 4;
  const int items = ItemsFor(chunks);
  if (items == 0 || params.hidden % 4 != 0 || !row::Aligned(params.x, params.y, params.weight, params.sum, params.h))
    return row::Launch(NormScalarKernel, params.rows, kScalarThreads, 0, stream, params);
  const auto kernel = items == 1   ? NormKernel<1>
                      : items == 2 ? NormKernel<2>
                      : items == 4 ? NormKernel<4>
                                   : NormKernel<8>;
  return row::Launch(kernel, params.rows, ThreadsFor(chunks, items), 0, stream, params);
}

cudaError_t NormGrad(const NormGradParams& params, cudaStream_t stream) {
  if (params.rows < 0 || params.hidden <= 0) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  const int64_t chunks = params.hidden / 4;
  const int items = ItemsFor(chunks);
  if (items == 0 || params.hidden % 4 != 0 ||
      !row::Aligned(params.x, params.weight, params.dh, params.residual, params.dx, params.dx_bf16))
    return row::Launch(NormGradScalarKernel, params.rows, kScalarThreads, 0, stream, params);
  const auto kernel = items == 1   ? NormGradKernel<1>
                      : items == 2 ? NormGradKernel<2>
                      : items == 4 ? NormGradKernel<4>
                                   : NormGradKernel<8>;
  return row::Launch(kernel, params.rows, ThreadsFor(chunks, items), 0, stream, params);
}

}  // namespace refocus::kernels
