// Gradient of attention with respect to the queries, weights formed again from the combined lse. Same walk over keys as
// attend.cu; each key tile takes three products (q . K^T, dout . V^T, ds . K) and writes nothing until the end.
#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/hopper_paths.h"
#include "kernels/key_tiles.cuh"
#include "kernels/launch.cuh"
#include "kernels/sum_parts.cuh"

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

template <int kDim>
__global__ void __launch_bounds__(QueryGradTile(kDim).threads(), BlocksPerSm(kDim, QueryGradTile(kDim)))
    QueryGradKernel(const __grid_constant__ QueryGradArgs args) {
  constexpr TileConfig kTile = QueryGradTile(kDim);
  constexpr int kThreads = kTile.threads();
  constexpr int kTiles = kTile.m_tiles;
  constexpr int kKeyTiles = kTile.keys / 8;
  constexpr int kStageBytes = 2 * kDim * kTile.keys;  // of K, as much of V
  constexpr int kRowBytes = 2 * kDim * kTile.rows;
  static_assert(kTile.warps_n == 1 && kTile.rows == 16 * kTiles * kTile.warps_m && kKeyTiles % 2 == 0);
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ VisibleKeys<kTile.rows> visible;

  const AttentionShape& shape = args.shape;
  const BlockPlace place = args.grid.Place(blockIdx.x, shape.kv_heads, kTile.rows);
  const RowTile rows(shape, args.grid.group, place, kTile.rows);
  const uint32_t q_tile = SharedAddress(shared);
  const uint32_t kv_tiles = q_tile + 2 * kRowBytes;
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
      CopyKeyTile<kDim, kTile.keys, kThreads>(kv_tiles + stage * 2 * kStageBytes, shape, place.kv_head, loading,
                                              visible.most[loading.extent]);
      loading.Next(visible.tiles, shape.extents);
    }
    CommitCopies();
  };
#pragma unroll
  for (int stage = 0; stage < kTile.stages - 1; ++stage) load(stage);

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

  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    // This tile has come for every thread, and no warp reads the stage that is filled next.
    WaitForCopies<kTile.stages - 2>();
    __syncthreads();
    load(stage == 0 ? kTile.stages - 1 : stage - 1);

    const uint32_t keys = kv_tiles + stage * 2 * kStageBytes;
    float scores[kTiles][kKeyTiles][4];
    Scores<kDim>(scores, q_rows, rows_lane, keys, keys_lane);
    const int64_t first_key = int64_t{current.tile} * kTile.keys;
    if (first_key + kTile.keys > visible.least[current.extent]) {
      MaskScores(scores, visible.counts, first_row, shape.kv[current.extent], first_key);
    }
    float dweights[kTiles][kKeyTiles][4];
    Scores<kDim>(dweights, q_rows + kRowBytes, rows_lane, keys + kStageBytes, keys_lane);
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
    stage = stage + 1 == kTile.stages ? 0 : stage + 1;
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

template <int kDim>
cudaError_t Launch(const QueryGradArgs& args, uint32_t blocks, cudaStream_t stream) {
  constexpr TileConfig kTile = QueryGradTile(kDim);
  return LaunchBlocks(QueryGradKernel<kDim>, args, blocks, kTile.threads(), TileBytes(kDim, kTile, 2), stream);
}

cudaError_t LaunchDim(QueryGradArgs& args, int splits, cudaStream_t stream) {
  const int padded_dim = PaddedHeadDim(args.shape.head_dim);
  uint32_t blocks = 0;
  if (!MakeGrid(args.shape, QueryGradTile(padded_dim).rows, splits, &args.grid, &blocks)) return cudaErrorInvalidValue;
  switch (padded_dim) {
    case 32:
      return Launch<32>(args, blocks, stream);
    case 64:
      return Launch<64>(args, blocks, stream);
    case 96:
      return Launch<96>(args, blocks, stream);
    case 128:
      return Launch<128>(args, blocks, stream);
    case 256:
      return Launch<256>(args, blocks, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t QueryGrad(const QueryGradParams& params, int sm_count, cudaStream_t stream) {
  const AttentionShape& shape = params.shape;
  if (!ValidShape(shape) || sm_count <= 0) return cudaErrorInvalidValue;
  if (shape.rows == 0) return cudaSuccess;
  const int splits = QueryGradSplits(shape, sm_count);
  QueryGradArgs args;
  args.shape = shape;
  args.q = static_cast<const __nv_bfloat16*>(params.q);
  args.dout = static_cast<const __nv_bfloat16*>(params.dout);
  args.lse = params.lse;
  args.row_dot = params.row_dot;
  args.dq = splits == 1 ? params.dq : static_cast<float*>(params.workspace);
  args.scale_log2 = shape.scale * kLog2E;
  const cudaError_t error =
      UsesHopper(shape) ? QueryGradHopper(params, splits, args.dq, sm_count, stream) : LaunchDim(args, splits, stream);
  if (error != cudaSuccess || splits == 1) return error;
  return SumParts(args.dq, splits, shape.rows * shape.heads * shape.head_dim, params.dq, stream);
}

}  // namespace refocus::kernels
