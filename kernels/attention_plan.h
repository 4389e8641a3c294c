// Tile shapes of the attention kernels and the choice of key splits, shared by the kernels and their launchers. Pure
// arithmetic, no CUDA.
#pragma once

#include <cstdint>

#include "kernels/attention_shape.h"

namespace refocus::kernels {

// One thread block works on `rows` packed rows (row i of a K/V head is query row i / G, query head head * G + i % G,
// with G = heads / kv_heads) and walks over its keys in tiles of `keys`, `stages` of which lie in shared memory. A warp
// owns m_tiles * 16 rows; warps_n warps share the keys of each tile among them.
struct TileConfig {
  int rows;
  int keys;
  int stages;
  int m_tiles;
  int warps_m;
  int warps_n;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
};

// As many as registers (255 a thread) and shared memory allow.
constexpr int BlocksPerSm(int padded_dim, TileConfig tile) {
  return padded_dim <= 128 && tile.threads() <= 128 ? 2 : 1;
}

// The head_dim that a kernel is compiled for; the columns between are zero in shared memory.
constexpr int PaddedHeadDim(int head_dim) {
  return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : head_dim <= 96 ? 96 : head_dim <= 128 ? 128 : 256;
}

// The fewest rows of a tile that hold all packed rows: few rows are bound by reading K/V, so their warps share the
// keys.
constexpr int AttendTileRows(int64_t packed_rows) { return packed_rows <= 16 ? 16 : packed_rows <= 64 ? 64 : 128; }

// Few rows over K and V in eight bits: no bf16 tile, codes are widened where they are multiplied (attend_codes.cuh).
constexpr bool WidensInRegisters(int padded_dim, int tile_rows) {
  return tile_rows == 16 && (padded_dim == 64 || padded_dim == 128);
}

constexpr TileConfig AttendTile(int padded_dim, int tile_rows, bool int8 = false) {
  if (int8 && WidensInRegisters(padded_dim, tile_rows)) return {16, 128, padded_dim == 64 ? 6 : 3, 1, 1, 4};
  if (tile_rows == 16) return {16, padded_dim <= 64 ? 128 : 64, 3, 1, 1, 4};
  if (padded_dim <= 128) return tile_rows == 64 ? TileConfig{64, 64, 3, 2, 2, 2} : TileConfig{128, 64, 2, 2, 4, 1};
  return tile_rows == 64 ? TileConfig{64, 64, 2, 1, 4, 2} : TileConfig{128, 64, 2, 1, 8, 1};
}

constexpr TileConfig QueryGradTile(int padded_dim) {
  if (padded_dim <= 128) return {128, 32, padded_dim <= 64 ? 3 : 2, 2, 4, 1};
  return {128, 32, 2, 1, 8, 1};
}

// Stages of K and V behind `row_operands` tiles of rows (q; q and dout).
constexpr int TileBytes(int padded_dim, TileConfig tile, int row_operands) {
  return 2 * padded_dim * (row_operands * tile.rows + 2 * tile.stages * tile.keys);
}

// Stages of codes alone, where codes are widened in registers.
constexpr int CodeTileBytes(int padded_dim, TileConfig tile) { return 2 * padded_dim * tile.stages * tile.keys; }

// Where the warps that share keys meet: out [warps_n, rows, padded_dim + 8], then maximum and sum [warps_n, rows] each.
constexpr int MergeBytes(int padded_dim, TileConfig tile) {
  return tile.warps_n == 1 ? 0 : 4 * tile.warps_n * tile.rows * (padded_dim + 8 + 2);
}

// The tile of a Hopper block: 64 rows for each consuming warpgroup, keys of a tile, how many tiles of K and of V lie in
// shared memory; and for K and V in eight bits, how many tiles of codes on their way there, and how many registers each
// consuming thread leaves to those who widen them.
struct HopperTile {
  int rows;
  int keys;
  int k_stages;
  int v_stages;
  int code_stages = 0;
  int spare_registers = 0;

  constexpr int consumers() const { return rows / 64; }
  constexpr int threads() const { return 128 * (1 + consumers()); }
};

// As many keys as the registers hold scores and weights of. Tall tiles, of three warpgroups, read K and V least often
// and hide most.
constexpr HopperTile HopperAttendTile(int head_dim, bool tall, bool int8 = false) {
  if (int8 && head_dim <= 64) return tall ? HopperTile{192, 128, 4, 4, 4} : HopperTile{128, 128, 4, 4, 4, 8};
  if (int8) return tall ? HopperTile{192, 80, 3, 3, 4, 8} : HopperTile{128, 128, 2, 2, 3, 8};
  if (head_dim <= 64) return {192, 128, 4, 4};
  return tall ? HopperTile{192, 80, 4, 4} : HopperTile{128, 176, 2, 2};
}

// Not where the last one would be mostly empty.
constexpr bool HopperFillsTallTiles(int64_t packed_rows) {
  const int64_t tall = (packed_rows + 191) / 192 * 192;
  const int64_t low = (packed_rows + 127) / 128 * 128;
  return tall * 100 <= low * 107;
}

// Two products of a tile lie beside each other in registers.
constexpr HopperTile HopperQueryGradTile(int head_dim, bool int8 = false) {
  if (int8) return head_dim <= 64 ? HopperTile{192, 80, 4, 4, 4} : HopperTile{128, 96, 3, 2, 3, 8};
  return head_dim <= 64 ? HopperTile{192, 80, 4, 4} : HopperTile{128, 96, 3, 3};
}

// Row operands (q; q and dout) and stages.
constexpr int HopperTileBytes(int head_dim, HopperTile tile, int row_operands) {
  return head_dim * (2 * row_operands * tile.rows +
                     (2 * (tile.k_stages + tile.v_stages) + tile.code_stages) * tile.keys);
}

// The most packed rows that Hopper's kernels leave to the portable ones, since they are bound by reading K and V. Of
// head_dim 64 and bf16 the tiles there are as tall as those of many rows.
constexpr int64_t HopperSpares(int head_dim, bool int8) { return int8 || head_dim == 128 ? 16 : 64; }

// Whether Hopper's warpgroup kernels take the shape: many rows, and columns that fill their panels.
bool UsesHopper(const AttentionShape& shape);

// Its attention's tile.
HopperTile HopperAttendTileOf(const AttentionShape& shape);

// rows >= 0, head_dim, heads, extents, shard and strides within their limits.
bool ValidShape(const AttentionShape& shape);

inline int64_t PackedRows(const AttentionShape& shape) { return shape.rows * (shape.heads / shape.kv_heads); }

}  // namespace refocus::kernels
