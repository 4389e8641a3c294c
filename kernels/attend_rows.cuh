// What the kernels of attend_tiles.cuh and attend_codes.cuh keep of their rows, and how it leaves the block. Scores
// stay in registers; weights are rounded to bf16 for the product with V, their sum is not.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/key_tiles.cuh"
#include "kernels/overlap.cuh"

namespace refocus::kernels {
namespace {

struct AttendArgs {
  AttentionShape shape;
  GridShape grid;
  const __nv_bfloat16* q;
  float* out;  // [splits, rows, heads, head_dim]
  float* lse;  // [splits, rows, heads]
  float scale_log2;
  bool beside_previous;

  // All threads, first and last in their kernel.
  __device__ __forceinline__ void Begin() const {
    LetNextBegin();
    if (!beside_previous) AwaitPrevious();
  }
  __device__ __forceinline__ void End() const {
    if (beside_previous) AwaitPrevious();
  }
};

// A warp's rows while it walks over keys: maximum in base-2 units of scale, sum of weights (of this thread's
// columns), and the weighted sum of V. Index [m][half]: row m * 16 + half * 8 + lane / 4.
template <int kDim, int kTiles>
struct RunningRows {
  float max[kTiles][2];
  float sum[kTiles][2];
  float out[kTiles][kDim / 8][4];

  __device__ RunningRows() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      max[m][0] = max[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.0f;
    }
  }

  // Scores -> weights, after bringing what is summed so far to the new maximum.
  template <int kKeyTiles>
  __device__ __forceinline__ void Weigh(float (&scores)[kTiles][kKeyTiles][4], float scale_log2) {
    float rescale[kTiles][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          high = fmaxf(high, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        const float new_max = fmaxf(max[m][half], RowMax(high) * scale_log2);
        // A row that has seen no key keeps -inf; 0 in its place makes every weight below exp2(-inf) = 0.
        const float base = new_max == -INFINITY ? 0.0f : new_max;
        rescale[m][half] = Exp2(max[m][half] - base);
        moved |= max[m][half] != new_max;
        max[m][half] = new_max;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c) {
            scores[m][n][c] = Exp2(fmaf(scores[m][n][c], scale_log2, -base));
            added += scores[m][n][c];
          }
        }
        sum[m][half] = sum[m][half] * rescale[m][half] + added;
      }
    }
    if (!__any_sync(0xffffffffu, moved)) return;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out[m][n][0] *= rescale[m][0];
        out[m][n][1] *= rescale[m][0];
        out[m][n][2] *= rescale[m][1];
        out[m][n][3] *= rescale[m][1];
      }
    }
  }

  __device__ __forceinline__ void SumOverLanes() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      sum[m][0] = RowSum(sum[m][0]);
      sum[m][1] = RowSum(sum[m][1]);
    }
  }
};

// A sum of weights is 0 only where no key was visible; NaN stays NaN.
__device__ __forceinline__ float Inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

__device__ __forceinline__ float LogSumExp(float max_log2, float sum) {
  return sum == 0.0f ? -INFINITY : (max_log2 + log2f(sum)) * kLn2;
}

// The warps own different rows.
template <int kDim, int kTiles>
__device__ __forceinline__ void Store(RunningRows<kDim, kTiles>& run, const AttendArgs& args, const RowTile& rows,
                                      int first_row, int64_t first_index) {
  run.SumOverLanes();
  const int lane = threadIdx.x % 32;
  const int head_dim = args.shape.head_dim;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
      if (row >= rows.rows) continue;
      const int64_t index = first_index + rows.Index(row, args.shape.heads);
      const float inverse = Inverse(run.sum[m][half]);
      float* to = args.out + index * head_dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n * 8 >= head_dim) break;
        *reinterpret_cast<float2*>(to + n * 8 + (lane & 3) * 2) =
            make_float2(run.out[m][n][2 * half] * inverse, run.out[m][n][2 * half + 1] * inverse);
      }
      if (lane % 4 == 0) args.lse[index] = LogSumExp(run.max[m][half], run.sum[m][half]);
    }
  }
}

// Warps that share rows meet in shared memory (MergeBytes) and are added up in their order. kNeighbours: column c of
// tile n is not column 8 * n + c of the output but kDim / 8 * c + n.
template <int kDim, int kTileRows, bool kNeighbours = false>
__device__ __forceinline__ void MergeAndStore(RunningRows<kDim, AttendTile(kDim, kTileRows).m_tiles>& run,
                                              const AttendArgs& args, const RowTile& rows, int first_row, int key_warp,
                                              int64_t first_index, float* shared) {
  constexpr TileConfig kTile = AttendTile(kDim, kTileRows);
  constexpr int kStride = kDim + 8;  // the eight rows that a warp writes at once lie in different banks
  float* const outs = shared;
  float* const maxima = outs + kTile.warps_n * kTileRows * kStride;
  float* const sums = maxima + kTile.warps_n * kTileRows;
  const int lane = threadIdx.x % 32;
  run.SumOverLanes();
#pragma unroll
  for (int m = 0; m < kTile.m_tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int slot = key_warp * kTileRows + first_row + m * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0) {
        maxima[slot] = run.max[m][half];
        sums[slot] = run.sum[m][half];
      }
      if constexpr (kNeighbours) {
        float* const to = outs + slot * kStride + (lane & 3) * (kDim / 4);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int n = 0; n < kDim / 8; n += 4) {
            *reinterpret_cast<float4*>(to + c * (kDim / 8) + n) =
                make_float4(run.out[m][n][2 * half + c], run.out[m][n + 1][2 * half + c],
                            run.out[m][n + 2][2 * half + c], run.out[m][n + 3][2 * half + c]);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          *reinterpret_cast<float2*>(outs + slot * kStride + n * 8 + (lane & 3) * 2) =
              make_float2(run.out[m][n][2 * half], run.out[m][n][2 * half + 1]);
        }
      }
    }
  }
  __syncthreads();

  const int head_dim = args.shape.head_dim;
  const int pieces = head_dim / 4;
  for (int i = threadIdx.x; i < rows.rows * pieces; i += kTile.threads()) {
    const int row = i / pieces;
    const int column = (i - row * pieces) * 4;
    float high = -INFINITY;
    for (int w = 0; w < kTile.warps_n; ++w) high = fmaxf(high, maxima[w * kTileRows + row]);
    const float base = high == -INFINITY ? 0.0f : high;
    float sum = 0.0f;
    float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int w = 0; w < kTile.warps_n; ++w) {
      const int slot = w * kTileRows + row;
      const float weight = Exp2(maxima[slot] - base);
      const float4 part = *reinterpret_cast<const float4*>(outs + slot * kStride + column);
      sum = fmaf(weight, sums[slot], sum);
      out.x = fmaf(weight, part.x, out.x);
      out.y = fmaf(weight, part.y, out.y);
      out.z = fmaf(weight, part.z, out.z);
      out.w = fmaf(weight, part.w, out.w);
    }
    const float inverse = Inverse(sum);
    const int64_t index = first_index + rows.Index(row, args.shape.heads);
    *reinterpret_cast<float4*>(args.out + index * head_dim + column) =
        make_float4(out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse);
    if (column == 0) args.lse[index] = LogSumExp(high, sum);
  }
}

}  // namespace
}  // namespace refocus::kernels
