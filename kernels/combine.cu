// Combination of partials and the ordered sum of partial gradients.
#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/in_order.cuh"
#include "kernels/overlap.cuh"
#include "kernels/sum_parts.cuh"

namespace refocus::kernels {
namespace {

constexpr int kThreads = 128;

// Few parts: a thread for four columns, all its loads under way at once.
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ CombineParams p) {
  BeginInTurn();
  const int pieces = p.head_dim / 4;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row_heads = p.rows * p.heads;
  const int64_t row_head = thread / pieces;
  if (row_head >= row_heads) return;
  const int parts = static_cast<int>(p.parts);
  float lse[kPartsInOrder];
  float4 x[kPartsInOrder];
#pragma unroll
  for (int i = 0; i < kPartsInOrder; ++i) {
    // Behind the last part: that part again, as an empty one.
    const int part = i < parts ? i : parts - 1;
    lse[i] = i < parts ? p.part_lse[part * row_heads + row_head] : -INFINITY;
    x[i] = parts > 0 ? reinterpret_cast<const float4*>(p.part_out)[part * row_heads * pieces + thread] : float4{};
  }
  CombineInOrder(lse, x, p, row_head, static_cast<int>(thread - row_head * pieces), pieces);
}

// Many parts: a block for a row and head and up to 128 columns. Warps take parts in turn, lanes four columns each, so
// that the loads of all parts are under way together; then warps are added up in order.
constexpr int kManyThreads = 512;
constexpr int kManyWarps = kManyThreads / 32;
constexpr int kAhead = 4;  // parts of a warp

__global__ void __launch_bounds__(kManyThreads) CombineManyKernel(const __grid_constant__ CombineParams p) {
  BeginInTurn();
  __shared__ float highs[kManyWarps];
  __shared__ float weights[kManyWarps];
  __shared__ float4 outs[kManyWarps][32];
  const int pieces = p.head_dim / 4;
  const int parts = static_cast<int>(p.parts);
  const int64_t row_heads = p.rows * p.heads;
  const int64_t row_head = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int piece = blockIdx.y * 32 + lane;
  const float* const lse_from = p.part_lse + row_head;
  const float4* const from = reinterpret_cast<const float4*>(p.part_out) + row_head * pieces + piece;
  float lse[kAhead];
  float4 x[kAhead];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int part = first + i * kManyWarps;
      lse[i] = part < parts ? lse_from[part * row_heads] : -INFINITY;
      x[i] = part < parts && piece < pieces ? from[part * row_heads * pieces] : float4{};
    }
  };
  load(warp);
  float high = -INFINITY;
  for (int i = threadIdx.x; i < parts; i += kManyThreads) high = fmaxf(high, lse_from[i * row_heads]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, mask));
  if (lane == 0) highs[warp] = high;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kManyWarps; ++i) high = fmaxf(high, highs[i]);
  const float base = high == -INFINITY ? 0.0f : high;

  WeightedSum sum;
  for (int part = warp; part < parts; part += kAhead * kManyWarps) {
    if (part != warp) load(part);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (lse[i] != -INFINITY) sum.Add(expf(lse[i] - base), 1.0f, x[i]);  // as above
    }
  }
  if (lane == 0) weights[warp] = sum.weight;
  outs[warp][lane] = sum.out;
  __syncthreads();
  if (warp != 0 || piece >= pieces) return;
#pragma unroll
  for (int i = 1; i < kManyWarps; ++i) sum.Add(1.0f, weights[i], outs[i][lane]);
  sum.Store(p, row_head, piece, pieces, high);
}

__global__ void __launch_bounds__(kThreads) SumKernel(const float4* parts, int count, int64_t pieces, float4* sum) {
  BeginInTurn();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= pieces) return;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int part = 0; part < count; ++part) {
    AddTo(total, parts[part * pieces + i]);
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
  const bool many = params.parts > kPartsInOrder;
  const int pieces = params.head_dim / 4;
  const int64_t row_heads = params.rows * params.heads;
  const uint32_t blocks = many ? Blocks(row_heads * kThreads) : Blocks(row_heads * pieces);
  if (blocks == 0) return cudaErrorInvalidValue;
  return many ? LaunchOverlapping(CombineManyKernel, dim3(blocks, (pieces + 31) / 32), kManyThreads, 0, stream, params)
              : LaunchOverlapping(CombineKernel, dim3(blocks), kThreads, 0, stream, params);
}

cudaError_t SumParts(const float* parts, int count, int64_t elements, float* sum, cudaStream_t stream) {
  const uint32_t blocks = Blocks(elements / 4);
  if (elements == 0) return cudaSuccess;
  if (blocks == 0 || elements % 4 != 0) return cudaErrorInvalidValue;
  return LaunchOverlapping(SumKernel, dim3(blocks), kThreads, 0, stream, reinterpret_cast<const float4*>(parts), count,
                           elements / 4, reinterpret_cast<float4*>(sum));
}

}  // namespace refocus::kernels
