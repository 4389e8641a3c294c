// Combination of partials and the ordered sum of partial gradients.
#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/in_order.cuh"
#include "kernels/overlap.cuh"
#include "kernels/sum_parts.cuh"

namespace refocus::kernels {
namespace {

constexpr int kThreads = 128;

// Few parts: a thread for four columns.
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ CombineParams p) {
  BeginInTurn();
  const int pieces = p.head_dim / 4;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row_heads = p.rows * p.heads;
  const int64_t row_head = thread / pieces;
  if (row_head >= row_heads) return;
  const int piece = static_cast<int>(thread - row_head * pieces);
  WeightedSum sum;
  const float high = CombineFew(p, row_head, piece, &sum);
  sum.Store(p, row_head, piece, pieces, high);
}

__global__ void __launch_bounds__(kManyThreads) CombineManyKernel(const __grid_constant__ CombineParams p) {
  BeginInTurn();
  __shared__ ManyScratch scratch;
  const int pieces = p.head_dim / 4;
  const int piece = blockIdx.y * 32 + threadIdx.x % 32;
  WeightedSum sum;
  const float high = CombineMany(p, blockIdx.x, piece, scratch, &sum);
  if (threadIdx.x < 32 && piece < pieces) sum.Store(p, blockIdx.x, piece, pieces, high);
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
