// Partial attention with a running maximum over key tiles. One thread block: a tile of packed rows, one K/V head, one
// key split (key_tiles.cuh). Scores stay in registers; weights are rounded to bf16 for the product with V, their sum
// is not.
//
// K and V in eight bits are widened into one bf16 tile beside their stages (int8_tiles.cuh), which is then read like
// any.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/int8_tiles.cuh"
#include "kernels/key_tiles.cuh"
#include "kernels/launch.cuh"
#include "kernels/portable_paths.h"

namespace refocus::kernels {
namespace {

struct AttendArgs {
  AttentionShape shape;
  GridShape grid;
  const __nv_bfloat16* q;
  float* out;  // [splits, rows, heads, head_dim]
  float* lse;  // [splits, rows, heads]
  float scale_log2;
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

// Warps that share rows meet in shared memory (MergeBytes) and are added up in their order.
template <int kDim, int kTileRows>
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
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<float2*>(outs + slot * kStride + n * 8 + (lane & 3) * 2) =
            make_float2(run.out[m][n][2 * half], run.out[m][n][2 * half + 1]);
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

template <int kDim, int kTileRows, bool kInt8>
__global__ void __launch_bounds__(AttendTile(kDim, kTileRows).threads(), BlocksPerSm(kDim, AttendTile(kDim, kTileRows)))
    AttendKernel(const __grid_constant__ AttendArgs args) {
  constexpr TileConfig kTile = AttendTile(kDim, kTileRows);
  constexpr int kThreads = kTile.threads();
  constexpr int kWarpKeys = kTile.keys / kTile.warps_n;
  constexpr int kStages = kInt8 ? CodeStages(kTile) : kTile.stages;
  constexpr int kTileBytes = 2 * kDim * kTile.keys;  // of K in bf16, as much of V
  constexpr int kStageBytes = kInt8 ? kTileBytes / 2 : kTileBytes;
  constexpr bool kOwnKeys = kTile.warps_m == 1;  // no warp reads another's keys
  constexpr bool kQueryInRegisters = kTile.m_tiles * kDim <= 128;
  static_assert(kWarpKeys % 16 == 0 && kTileRows == 16 * kTile.m_tiles * kTile.warps_m);
  static_assert(MergeBytes(kDim, kTile) <= TileBytes(kDim, kTile, 1));
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ VisibleKeys<kTileRows> visible;

  const AttentionShape& shape = args.shape;
  const BlockPlace place = args.grid.Place(blockIdx.x, shape.kv_heads, kTileRows);
  const RowTile rows(shape, args.grid.group, place, kTileRows);
  const uint32_t q_tile = SharedAddress(shared);
  const uint32_t kv_tiles = q_tile + 2 * kDim * kTileRows;
  const uint32_t wide_tile = kv_tiles + kStages * 2 * kStageBytes;  // of int8
  CopyRows<kDim, kTileRows, kThreads>(q_tile, args.q, rows, shape.heads, shape.head_dim);
  CommitCopies();

  const int total = visible.template Fill<kTile.keys, kThreads>(shape, rows);
  const int begin = static_cast<int>(int64_t{total} * place.split / args.grid.splits);
  const int end = static_cast<int>(int64_t{total} * (place.split + 1) / args.grid.splits);

  KeyTile loading;
  KeyTile current;
  if (begin < end) {
    loading.Seek(visible.tiles, begin);
    current = loading;
  }
  int left = end - begin;  // tiles to load
  const auto load = [&](int stage) {
    if (left > 0) {
      --left;
      const uint32_t to = kv_tiles + stage * 2 * kStageBytes;
      if constexpr (kInt8) {
        CopyCodeTile<kDim, kTile.keys, kThreads>(to, shape, place.kv_head, loading, visible.most[loading.extent]);
      } else {
        CopyKeyTile<kDim, kTile.keys, kThreads>(to, shape, place.kv_head, loading, visible.most[loading.extent]);
      }
      loading.Next(visible.tiles, shape.extents);
    }
    CommitCopies();  // also when empty: groups are counted
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int first_row = warp % kTile.warps_m * kTile.m_tiles * 16;
  const int key_warp = warp / kTile.warps_m;
  const auto rows_lane = LaneOffset<kDim>::RowsFirst(lane);
  const auto keys_lane = LaneOffset<kDim>::ColumnsFirst(lane);
  const uint32_t q_rows = q_tile + first_row * kDim * 2;

  uint32_t q[kQueryInRegisters ? kDim / 16 : 1][kTile.m_tiles][4];
  if constexpr (kQueryInRegisters) {
    WaitForCopies<kStages - 1>();
    __syncthreads();
    LoadRows<kDim, kTile.m_tiles>(q, q_rows, rows_lane);
  }

  RunningRows<kDim, kTile.m_tiles> run;
  KeyWidener<kDim, kTile, kOwnKeys> widener;  // of int8
  if constexpr (kInt8) {
    if (begin < end) widener.LoadScales(shape, place.kv_head, current, visible.most[current.extent]);
  }
  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    // This tile has come for every thread, and no warp reads the stage that is filled next.
    WaitForCopies<kStages - 2>();
    __syncthreads();
    load(stage == 0 ? kStages - 1 : stage - 1);

    uint32_t keys = kv_tiles + stage * 2 * kStageBytes;
    if constexpr (kInt8) {
      widener.Widen(keys, wide_tile);
      KeyTile next = current;
      next.Next(visible.tiles, shape.extents);
      if (tile + 1 < end) widener.LoadScales(shape, place.kv_head, next, visible.most[next.extent]);
      if constexpr (kOwnKeys) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      keys = wide_tile;
    }
    keys += key_warp * kWarpKeys * kDim * 2;
    float scores[kTile.m_tiles][kWarpKeys / 8][4];
    if constexpr (kQueryInRegisters) {
      Scores<kDim>(scores, q, keys, keys_lane);
    } else {
      Scores<kDim>(scores, q_rows, rows_lane, keys, keys_lane);
    }
    const int64_t first_key = int64_t{current.tile} * kTile.keys;
    if (first_key + kTile.keys > visible.least[current.extent]) {
      MaskScores(scores, visible.counts, first_row, shape.kv[current.extent], first_key + key_warp * kWarpKeys);
    }
    run.Weigh(scores, args.scale_log2);
    AddWeighted<kDim>(run.out, scores, keys + kTileBytes, rows_lane);
    current.Next(visible.tiles, shape.extents);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  WaitForCopies<0>();
  const int64_t first_index = place.split * shape.rows * shape.heads;
  if constexpr (kTile.warps_n == 1) {
    Store(run, args, rows, first_row, first_index);
  } else {
    __syncthreads();  // the stages become the meeting place
    MergeAndStore<kDim, kTileRows>(run, args, rows, first_row, key_warp, first_index, reinterpret_cast<float*>(shared));
  }
}

template <int kDim, int kTileRows, bool kInt8>
cudaError_t Launch(const AttendArgs& args, uint32_t blocks, cudaStream_t stream) {
  constexpr TileConfig kTile = AttendTile(kDim, kTileRows);
  return LaunchBlocks(AttendKernel<kDim, kTileRows, kInt8>, args, blocks, kTile.threads(), TileBytes(kDim, kTile, 1),
                      stream);
}

template <int kDim, bool kInt8>
cudaError_t LaunchRows(const AttendArgs& args, int tile_rows, uint32_t blocks, cudaStream_t stream) {
  if (tile_rows == 16) return Launch<kDim, 16, kInt8>(args, blocks, stream);
  if (tile_rows == 64) return Launch<kDim, 64, kInt8>(args, blocks, stream);
  return Launch<kDim, 128, kInt8>(args, blocks, stream);
}

template <bool kInt8>
cudaError_t AttendTiles(const AttendParams& params, int splits, float* out, float* lse, cudaStream_t stream) {
  AttendArgs args;
  args.shape = params.shape;
  args.q = static_cast<const __nv_bfloat16*>(params.q);
  args.out = out;
  args.lse = lse;
  args.scale_log2 = params.shape.scale * kLog2E;
  const int tile_rows = AttendTileRows(PackedRows(args.shape));
  uint32_t blocks = 0;
  if (!MakeGrid(args.shape, tile_rows, splits, &args.grid, &blocks)) return cudaErrorInvalidValue;
  switch (PaddedHeadDim(args.shape.head_dim)) {
    case 32:
      return LaunchRows<32, kInt8>(args, tile_rows, blocks, stream);
    case 64:
      return LaunchRows<64, kInt8>(args, tile_rows, blocks, stream);
    case 96:
      return LaunchRows<96, kInt8>(args, tile_rows, blocks, stream);
    case 128:
      return LaunchRows<128, kInt8>(args, tile_rows, blocks, stream);
    case 256:
      return LaunchRows<256, kInt8>(args, tile_rows, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace refocus::kernels
