// Partial attention with a running maximum over key tiles. One thread block: a tile of packed rows, one K/V head, one
// key split (key_tiles.cuh).
//
// K and V in eight bits are widened into one bf16 tile beside their stages (int8_tiles.cuh), which is then read like
// any, unless rows are few (attend_codes.cuh).
#pragma once

#include <cuda_runtime.h>

#include "kernels/attend_codes.cuh"
#include "kernels/attend_rows.cuh"
#include "kernels/attention.h"
#include "kernels/int8_tiles.cuh"
#include "kernels/key_tiles.cuh"
#include "kernels/launch.cuh"
#include "kernels/portable_paths.h"

namespace refocus::kernels {
namespace {

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

  args.Begin();
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
  args.End();
}

template <int kDim, int kTileRows, bool kInt8>
cudaError_t Launch(const AttendArgs& args, uint32_t blocks, cudaStream_t stream) {
  constexpr TileConfig kTile = AttendTile(kDim, kTileRows);
  return LaunchBlocks(AttendKernel<kDim, kTileRows, kInt8>, args, blocks, kTile.threads(), TileBytes(kDim, kTile, 1),
                      stream);
}

template <int kDim, bool kInt8>
cudaError_t LaunchRows(const AttendArgs& args, int tile_rows, uint32_t blocks, cudaStream_t stream) {
  if constexpr (kInt8 && WidensInRegisters(kDim, 16)) {
    constexpr TileConfig kTile = AttendTile(kDim, 16, true);
    if (tile_rows == 16) {
      return LaunchBlocks(AttendCodesKernel<kDim>, args, blocks, kTile.threads(), CodeTileBytes(kDim, kTile), stream);
    }
  } else {
    if (tile_rows == 16) return Launch<kDim, 16, kInt8>(args, blocks, stream);
  }
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
  args.beside_previous = params.beside_previous;
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
