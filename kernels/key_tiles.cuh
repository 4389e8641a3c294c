// How a thread block finds its rows and its share of the keys: packed rows, visible slots of each extent, key tiles and
// the copies that bring them into shared memory. Used by attend.cu and query_grad.cu; key_pipeline.cuh is Hopper's way.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "base/shard_plan.h"
#include "kernels/attention_plan.h"
#include "kernels/mma.cuh"

namespace refocus::kernels {

// Block b of the grid: row tiles from the last to the first, because in a prefill later rows see more keys and long
// blocks are better started early; within a row tile the K/V heads, within a head the key splits.
struct BlockPlace {
  int64_t first_packed;  // of the row tile
  int kv_head;
  int split;
};

struct GridShape {
  int row_tiles = 0;
  int splits = 1;
  int group = 1;  // heads / kv_heads

  __device__ BlockPlace Place(uint32_t block, int kv_heads, int tile_rows) const {
    const uint32_t splits_u = splits;
    const uint32_t head = block / splits_u;
    const uint32_t tile = row_tiles - 1 - head / kv_heads;
    return {int64_t{tile} * tile_rows, static_cast<int>(head % kv_heads), static_cast<int>(block % splits_u)};
  }
};

// Packed row i of the block's tile -> query row and head.
struct RowTile {
  int64_t first_row;
  int first_member;  // of the group
  int group;
  int rows;  // of the tile that exist
  int first_head;

  __device__ RowTile(const AttentionShape& shape, int group_size, const BlockPlace& place, int tile_rows)
      : first_row(place.first_packed / group_size),
        first_member(static_cast<int>(place.first_packed % group_size)),
        group(group_size),
        first_head(place.kv_head * group_size) {
    const int64_t left = shape.rows * group_size - place.first_packed;
    rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
  }

  __device__ int64_t Row(int i) const { return first_row + static_cast<uint32_t>(first_member + i) / group; }

  // row * heads + head: the index into lse; times head_dim, into q and out.
  __device__ int64_t Index(int i, int heads) const {
    const uint32_t member = first_member + i;
    const uint32_t row = member / group;
    return (first_row + row) * heads + first_head + (member - row * group);
  }
};

// ShardPlan::CountBelow without 64-bit divisions where the numbers allow.
__device__ inline int64_t CountBelow(int64_t position, uint32_t shards, uint32_t shard) {
  const uint64_t block = static_cast<uint64_t>(position) / kBlockTokens;
  uint64_t cycle;
  uint32_t rest;
  if (block >> 32 == 0) {
    const uint32_t quotient = static_cast<uint32_t>(block) / shards;
    rest = static_cast<uint32_t>(block) - quotient * shards;
    cycle = quotient;
  } else {
    cycle = block / shards;
    rest = static_cast<uint32_t>(block - cycle * shards);
  }
  const int64_t in_block = position % kBlockTokens;
  const int64_t in_cycle = rest < shard ? 0 : rest > shard ? kBlockTokens : in_block;
  return static_cast<int64_t>(cycle) * kBlockTokens + in_cycle;
}

__device__ inline int64_t ClampCount(int64_t count, const KvSlots& kv) {
  const int64_t visible = count - kv.first_index;
  return visible < 0 ? 0 : visible > kv.slots ? kv.slots : visible;
}

// What the rows of a tile see, in shared memory.
template <int kRows>
struct VisibleKeys {
  int64_t counts[kRows];      // owned positions at or before the row's; rows that do not exist: kAll
  int64_t most[kMaxExtents];  // slots that the row seeing most sees
  int64_t least[kMaxExtents];
  int tiles[kMaxExtents];
  int64_t warp_most[8];
  int64_t warp_least[8];

  static constexpr int64_t kAll = int64_t{1} << 62;

  // All threads; ends with a barrier. Returns the number of key tiles.
  template <int kKeys, int kThreads>
  __device__ int Fill(const AttentionShape& shape, const RowTile& rows) {
    int64_t high = 0;
    int64_t low = kAll;
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      int64_t count = kAll;
      if (i < rows.rows) {
        count = CountBelow(shape.pos[rows.Row(i)] + 1, shape.shards, shape.shard);
        high = count > high ? count : high;
        low = count < low ? count : low;
      }
      counts[i] = count;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const int64_t other_high = __shfl_xor_sync(0xffffffffu, high, mask);
      const int64_t other_low = __shfl_xor_sync(0xffffffffu, low, mask);
      high = other_high > high ? other_high : high;
      low = other_low < low ? other_low : low;
    }
    if (threadIdx.x % 32 == 0) {
      warp_most[threadIdx.x / 32] = high;
      warp_least[threadIdx.x / 32] = low;
    }
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(shape.extents)) {
      for (int warp = 0; warp < kThreads / 32; ++warp) {
        high = warp_most[warp] > high ? warp_most[warp] : high;
        low = warp_least[warp] < low ? warp_least[warp] : low;
      }
      const KvSlots& kv = shape.kv[threadIdx.x];
      most[threadIdx.x] = ClampCount(high, kv);
      least[threadIdx.x] = ClampCount(low, kv);
      tiles[threadIdx.x] = static_cast<int>((most[threadIdx.x] + kKeys - 1) / kKeys);
    }
    __syncthreads();
    int total = 0;
    for (int e = 0; e < shape.extents; ++e) total += tiles[e];
    return total;
  }
};

// A key tile: tile `tile` of extent `extent`. Tiles never cross extents.
struct KeyTile {
  int extent = 0;
  int tile = 0;

  __device__ void Seek(const int* tiles, int index) {
    while (index >= tiles[extent]) index -= tiles[extent++];
    tile = index;
  }
  __device__ void Next(const int* tiles, int extents) {
    if (++tile < tiles[extent]) return;
    tile = 0;
    do {
      ++extent;
    } while (extent < extents && tiles[extent] == 0);
  }
};

// kKeys rows of kDim columns from rows `from` of head_dim columns; rows from `valid` on and columns from head_dim on
// are zero and not read.
template <int kDim, int kKeys, int kThreads>
__device__ __forceinline__ void CopyKeys(uint32_t to, const __nv_bfloat16* from, int valid, int head_dim) {
  constexpr int kPieces = kDim / 8;
  constexpr int kTotal = kKeys * kPieces;
#pragma unroll
  for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kPieces;
    const int piece = index % kPieces;
    if (kTotal % kThreads != 0 && index >= kTotal) break;
    const bool inside = row < valid && piece * 8 < head_dim;
    CopyAsync(to + TileOffset<kDim>(row, piece), from + (inside ? row * head_dim + piece * 8 : 0), inside);
  }
}

// K of a key tile, behind it V. `most`: slots of its extent that any row sees.
template <int kDim, int kKeys, int kThreads>
__device__ __forceinline__ void CopyKeyTile(uint32_t to, const AttentionShape& shape, int kv_head, const KeyTile& place,
                                            int64_t most) {
  const KvSlots& kv = shape.kv[place.extent];
  const int64_t first = int64_t{place.tile} * kKeys;
  const int valid = most - first < kKeys ? static_cast<int>(most - first) : kKeys;
  const int64_t offset = kv_head * kv.head_stride + first * shape.head_dim;
  CopyKeys<kDim, kKeys, kThreads>(to, static_cast<const __nv_bfloat16*>(kv.k) + offset, valid, shape.head_dim);
  CopyKeys<kDim, kKeys, kThreads>(to + 2 * kDim * kKeys, static_cast<const __nv_bfloat16*>(kv.v) + offset, valid,
                                  shape.head_dim);
}

// The tile's packed rows of a [rows, heads, head_dim] tensor; rows that do not exist are zero.
template <int kDim, int kRows, int kThreads>
__device__ __forceinline__ void CopyRows(uint32_t to, const __nv_bfloat16* from, const RowTile& rows, int heads,
                                         int head_dim) {
  constexpr int kPieces = kDim / 8;
  for (int index = threadIdx.x; index < kRows * kPieces; index += kThreads) {
    const int row = index / kPieces;
    const int piece = index % kPieces;
    const bool inside = row < rows.rows && piece * 8 < head_dim;
    CopyAsync(to + TileOffset<kDim>(row, piece), inside ? from + rows.Index(row, heads) * head_dim + piece * 8 : from,
              inside);
  }
}

// -inf where a row does not see the key. first_row: the warp's first row in the tile; first_key: the slot of the warp's
// first key.
template <int kTiles, int kKeyTiles>
__device__ __forceinline__ void MaskScores(float (&scores)[kTiles][kKeyTiles][4], const int64_t* counts, int first_row,
                                           const KvSlots& kv, int64_t first_key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t seen = ClampCount(counts[first_row + m * 16 + half * 8 + lane / 4], kv) - first_key;
      const int limit = seen < 0 ? 0 : seen > kKeyTiles * 8 ? kKeyTiles * 8 : static_cast<int>(seen);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const int key = n * 8 + (lane & 3) * 2;
        if (key >= limit) scores[m][n][2 * half] = -INFINITY;
        if (key + 1 >= limit) scores[m][n][2 * half + 1] = -INFINITY;
      }
    }
  }
}

}  // namespace refocus::kernels
