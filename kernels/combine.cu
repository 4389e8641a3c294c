// Combination of partials and the ordered sum of partial gradients: one thread per four columns, loads of several parts
// in flight at once.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/sum_parts.cuh"

namespace refocus::kernels {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) CombineKernel(const CombineParams p) {
  const int pieces = p.head_dim / 4;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row_heads = p.rows * p.heads;
  const int64_t row_head = thread / pieces;
  if (row_head >= row_heads) return;
  const int64_t stride = row_heads * p.head_dim;

  // Few rows leave nothing else to hide a load's latency behind, so loads are asked for in batches.
  constexpr int kLseBatch = 16;
  constexpr int kOutBatch = 8;
  const float* lse_from = p.part_lse + row_head;
  float high = -INFINITY;
  for (int64_t first = 0; first < p.parts; first += kLseBatch) {
    float lse[kLseBatch];
#pragma unroll
    for (int i = 0; i < kLseBatch; ++i) lse[i] = first + i < p.parts ? lse_from[(first + i) * row_heads] : -INFINITY;
#pragma unroll
    for (int i = 0; i < kLseBatch; ++i) high = fmaxf(high, lse[i]);
  }
  const float base = high == -INFINITY ? 0.0f : high;
  float sum = 0.0f;
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4* out_from = reinterpret_cast<const float4*>(p.part_out) + thread;
  for (int64_t first = 0; first < p.parts; first += kOutBatch) {
    float lse[kOutBatch];
    float4 x[kOutBatch];
#pragma unroll
    for (int i = 0; i < kOutBatch; ++i) {
      // Behind the last part: that part again, as an empty one.
      const int64_t part = first + i < p.parts ? first + i : p.parts - 1;
      lse[i] = first + i < p.parts ? lse_from[part * row_heads] : -INFINITY;
      x[i] = out_from[part * (stride / 4)];
    }
#pragma unroll
    for (int i = 0; i < kOutBatch; ++i) {
      if (lse[i] == -INFINITY) continue;  // left out whatever it holds; a NaN is kept
      const float weight = expf(lse[i] - base);
      sum += weight;
      out.x = fmaf(weight, x[i].x, out.x);
      out.y = fmaf(weight, x[i].y, out.y);
      out.z = fmaf(weight, x[i].z, out.z);
      out.w = fmaf(weight, x[i].w, out.w);
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  out = make_float4(out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse);
  reinterpret_cast<float4*>(p.out)[thread] = out;
  if (p.out_bf16 != nullptr) {
    __nv_bfloat162* rounded = reinterpret_cast<__nv_bfloat162*>(p.out_bf16) + thread * 2;
    rounded[0] = __floats2bfloat162_rn(out.x, out.y);
    rounded[1] = __floats2bfloat162_rn(out.z, out.w);
  }
  if (thread == row_head * pieces) p.lse[row_head] = sum == 0.0f ? -INFINITY : high + logf(sum);
}

__global__ void __launch_bounds__(kThreads) SumKernel(const float4* parts, int count, int64_t pieces, float4* sum) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= pieces) return;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int part = 0; part < count; ++part) {
    const float4 x = parts[part * pieces + i];
    total.x += x.x;
    total.y += x.y;
    total.z += x.z;
    total.w += x.w;
  }
  sum[i] = total;
}

// 0 where the grid would be too large.
uint32_t Blocks(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return blocks > 0x7fffffff ? 0 : static_cast<uint32_t>(blocks);
}

}  // namespace

cudaError_t Combine(const CombineParams& params, cudaStream_t stream) {
  if (params.parts < 0 || params.rows < 0 || params.heads <= 0) return cudaErrorInvalidValue;
  if (params.head_dim <= 0 || params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  const uint32_t blocks = Blocks(params.rows * params.heads * (params.head_dim / 4));
  if (blocks == 0) return cudaErrorInvalidValue;
  CombineKernel<<<blocks, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t SumParts(const float* parts, int count, int64_t elements, float* sum, cudaStream_t stream) {
  const uint32_t blocks = Blocks(elements / 4);
  if (elements == 0) return cudaSuccess;
  if (blocks == 0 || elements % 4 != 0) return cudaErrorInvalidValue;
  SumKernel<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const float4*>(parts), count, elements / 4,
                                             reinterpret_cast<float4*>(sum));
  return cudaGetLastError();
}

}  // namespace refocus::kernels
