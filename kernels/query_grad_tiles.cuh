// Gradient of attention with respect to the queries, weights formed again from the combined lse. Same walk over keys as
// attend_tiles.cuh; each key tile takes three products (q . K^T, dout . V^T, ds . K) and writes nothing until the end.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/int8_tiles.cuh"
#include "kernels/key_tiles.cuh"
#include "kernels/launch.cuh"
#include "kernels/portable_paths.h"

namespace refocus::kernels {
namespace {

struct QueryGradArgs {
  AttentionShape shape;
  GridShape grid;
  const __nv_bfloat16* q;
  const __nv_bfloat16* dout;
  const float* lse;
  const float* row_dot;
  float* dq;  // [splits, rows, heads, head_dim]
  float scale_log2;
};

template <int kDim, bool kInt8>
__global__ void __launch_bounds__(QueryGradTile(kDim).threads(), BlocksPerSm(kDim, QueryGradTile(kDim)))
    QueryGradKernel(const __grid_constant__ QueryGradArgs args) {
  constexpr TileConfig kTile = QueryGradTile(kDim);
  constexpr int kThreads = kTile.threads();
  constexpr int kTiles = kTile.m_tiles;
  constexpr int kKeyTiles = kTile.keys / 8;
  constexpr int kStages = kInt8 ? CodeStages(kTile) : kTile.stages;
  constexpr int kTileBytes = 2 * kDim * kTile.keys;  // of K in bf16, as much of V
  constexpr int kStageBytes = kInt8 ? kTileBytes / 2 : kTileBytes;
  constexpr int kRowBytes = 2 * kDim * kTile.rows;
  static_assert(kTile.warps_n == 1 && kTile.rows == 16 * kTiles * kTile.warps_m && kKeyTiles % 2 == 0);
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ VisibleKeys<kTile.rows> visible;
  BeginInTurn();

  const AttentionShape& shape = args.shape;
  const BlockPlace place = args.grid.Place(blockIdx.x, shape.kv_heads, kTile.rows);
  const RowTile rows(shape, args.grid.group, place, kTile.rows);
  const uint32_t q_tile = SharedAddress(shared);
  const uint32_t kv_tiles = q_tile + 2 * kRowBytes;
  const uint32_t wide_tile = kv_tiles + kStages * 2 * kStageBytes;  // of int8
  CopyRows<kDim, kTile.rows, kThreads>(q_tile, args.q, rows, shape.heads, shape.head_dim);
  CopyRows<kDim, kTile.rows, kThreads>(q_tile + kRowBytes, args.dout, rows, shape.heads, shape.head_dim);
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
  int left = end - begin;
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
    CommitCopies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);

  const int lane = threadIdx.x % 32;
  const int first_row = threadIdx.x / 32 * kTiles * 16;
  const auto rows_lane = LaneOffset<kDim>::RowsFirst(lane);
  const auto keys_lane = LaneOffset<kDim>::ColumnsFirst(lane);
  const uint32_t q_rows = q_tile + first_row * kDim * 2;

  // Rows without keys, and rows that do not exist: lse = +inf makes every weight 0.
  float lse_log2[kTiles][2];
  float row_dot[kTiles][2];
  float dq[kTiles][kDim / 8][4];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
      lse_log2[m][half] = INFINITY;
      row_dot[m][half] = 0.0f;
      if (row < rows.rows) {
        const int64_t index = rows.Index(row, shape.heads);
        const float lse = args.lse[index];
        if (lse != -INFINITY) {
          lse_log2[m][half] = lse * kLog2E;
          row_dot[m][half] = args.row_dot[index];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) dq[m][n][0] = dq[m][n][1] = dq[m][n][2] = dq[m][n][3] = 0.0f;
  }

  KeyWidener<kDim, kTile, false> widener;  // of int8
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
      __syncthreads();
      keys = wide_tile;
    }
    float scores[kTiles][kKeyTiles][4];
    Scores<kDim>(scores, q_rows, rows_lane, keys, keys_lane);
    const int64_t first_key = int64_t{current.tile} * kTile.keys;
    if (first_key + kTile.keys > visible.least[current.extent]) {
      MaskScores(scores, visible.counts, first_row, shape.kv[current.extent], first_key);
    }
    float dweights[kTiles][kKeyTiles][4];
    Scores<kDim>(dweights, q_rows + kRowBytes, rows_lane, keys + kTileBytes, keys_lane);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float weight = Exp2(fmaf(scores[m][n][c], args.scale_log2, -lse_log2[m][c / 2]));
          scores[m][n][c] = weight * (dweights[m][n][c] - row_dot[m][c / 2]);
        }
      }
    }
    AddWeighted<kDim>(dq, scores, keys, rows_lane);
    current.Next(visible.tiles, shape.extents);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  WaitForCopies<0>();

  const int64_t first_index = place.split * shape.rows * shape.heads;
  const int head_dim = shape.head_dim;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
      if (row >= rows.rows) continue;
      float* to = args.dq + (first_index + rows.Index(row, shape.heads)) * head_dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n * 8 >= head_dim) break;
        *reinterpret_cast<float2*>(to + n * 8 + (lane & 3) * 2) =
            make_float2(dq[m][n][2 * half] * shape.scale, dq[m][n][2 * half + 1] * shape.scale);
      }
    }
  }
}

template <int kDim, bool kInt8>
cudaError_t Launch(const QueryGradArgs& args, uint32_t blocks, cudaStream_t stream) {
  constexpr TileConfig kTile = QueryGradTile(kDim);
  return LaunchBlocks(QueryGradKernel<kDim, kInt8>, args, blocks, kTile.threads(), TileBytes(kDim, kTile, 2), stream);
}

template <bool kInt8>
cudaError_t QueryGradTiles(const QueryGradParams& params, int splits, float* dq, cudaStream_t stream) {
  QueryGradArgs args;
  args.shape = params.shape;
  args.q = static_cast<const __nv_bfloat16*>(params.q);
  args.dout = static_cast<const __nv_bfloat16*>(params.dout);
  args.lse = params.lse;
  args.row_dot = params.row_dot;
  args.dq = dq;
  args.scale_log2 = params.shape.scale * kLog2E;
  const int padded_dim = PaddedHeadDim(args.shape.head_dim);
  uint32_t blocks = 0;
  if (!MakeGrid(args.shape, QueryGradTile(padded_dim).rows, splits, &args.grid, &blocks)) return cudaErrorInvalidValue;
  switch (padded_dim) {
    case 32:
      return Launch<32, kInt8>(args, blocks, stream);
    case 64:
      return Launch<64, kInt8>(args, blocks, stream);
    case 96:
      return Launch<96, kInt8>(args, blocks, stream);
    case 128:
      return Launch<128, kInt8>(args, blocks, stream);
    case 256:
      return Launch<256, kInt8>(args, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace refocus::kernels
