#include "kernels/attention_plan.h"

#include <algorithm>

namespace refocus::kernels {
namespace {

// Rates of one H100/H200 multiprocessor that the choice balances, and the fixed costs in microseconds. Rough is good
// enough: they only rank the splits.
constexpr double kBytesPerUs = 2.6e4;  // its share of the memory stream
constexpr double kCombineUs = 3.0;     // one more launch

// What the blocks of a kernel are and do.
struct BlockRates {
  int rows;
  int keys;
  int blocks_per_sm;
  double flops_per_us;  // of a multiprocessor
  double block_us;      // prologue, first loads, epilogue
};

constexpr double kPortableFlopsPerUs = 2.7e6;
constexpr double kHopperFlopsPerUs = 4.8e6;
constexpr double kPortableBlockUs = 2.5;
constexpr double kHopperBlockUs = 3.0;

constexpr int kMaxSplits = 128;
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;
// With so many rounds of blocks the last one is short beside the others, and splitting only adds traffic.
constexpr int64_t kFullRounds = 4;
// The fewest splits this near the best are taken: the rates above are no more exact than that.
constexpr double kNearBest = 1.03;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t OutElements(const AttentionShape& shape) { return shape.rows * shape.heads * shape.head_dim; }

int64_t AttendPartialBytes(const AttentionShape& shape) {
  return (OutElements(shape) + shape.rows * shape.heads) * int64_t{sizeof(float)};
}

int64_t QueryGradPartialBytes(const AttentionShape& shape) { return OutElements(shape) * int64_t{sizeof(float)}; }

int64_t RoundUp256(int64_t bytes) { return CeilDiv(bytes, 256) * 256; }

BlockRates PortableRates(const AttentionShape& shape, TileConfig tile) {
  return {tile.rows, tile.keys, BlocksPerSm(PaddedHeadDim(shape.head_dim), tile), kPortableFlopsPerUs,
          kPortableBlockUs};
}

BlockRates HopperRates(HopperTile tile) { return {tile.rows, tile.keys, 1, kHopperFlopsPerUs, kHopperBlockUs}; }

// products: matrix products a tile of keys takes.
int ChooseSplits(const AttentionShape& shape, BlockRates tile, int products, int64_t partial_bytes, int sm_count) {
  if (shape.rows == 0 || sm_count <= 0) return 1;
  const int64_t blocks = CeilDiv(PackedRows(shape), tile.rows) * shape.kv_heads;
  const int64_t slots = int64_t{sm_count} * tile.blocks_per_sm;
  const int64_t key_tiles = CeilDiv(std::max<int64_t>(shape.expected_keys, 1), tile.keys);
  if (blocks >= kFullRounds * slots) return 1;

  const double flops = 2.0 * products * tile.rows * tile.keys * PaddedHeadDim(shape.head_dim);
  const double bytes = (shape.int8 ? 2.0 : 4.0) * tile.keys * shape.head_dim;
  const double tile_us = tile.blocks_per_sm * std::max(flops / tile.flops_per_us, bytes / kBytesPerUs);
  // Written, then read.
  const double partial_us = 2.0 * static_cast<double>(partial_bytes) / (kBytesPerUs * sm_count);
  const int64_t most =
      std::min({int64_t{kMaxSplits}, key_tiles, std::max<int64_t>(1, kMaxPartialBytes / partial_bytes)});
  const auto time_us = [&](int64_t splits) {
    const double rounds = static_cast<double>(CeilDiv(blocks * splits, slots));
    const double combine_us = splits == 1 ? 0.0 : kCombineUs + static_cast<double>(splits) * partial_us;
    return rounds * (static_cast<double>(CeilDiv(key_tiles, splits)) * tile_us + tile.block_us) + combine_us;
  };
  double best_us = time_us(1);
  for (int64_t splits = 2; splits <= most; ++splits) best_us = std::min(best_us, time_us(splits));
  int splits = 1;
  while (time_us(splits) > kNearBest * best_us) ++splits;
  return splits;
}

}  // namespace

bool ValidShape(const AttentionShape& s) {
  if (s.rows < 0 || s.heads <= 0 || s.kv_heads <= 0 || s.heads % s.kv_heads != 0) return false;
  if (s.head_dim <= 0 || s.head_dim > kMaxHeadDim || s.head_dim % 8 != 0) return false;
  if (s.int8 && s.head_dim % 16 != 0) return false;
  if (!(s.scale > 0.0f) || s.shards <= 0 || s.shard < 0 || s.shard >= s.shards) return false;
  if (s.extents < 0 || s.extents > kMaxExtents) return false;
  for (int i = 0; i < s.extents; ++i) {
    const KvSlots& kv = s.kv[i];
    if (kv.slots < 0 || kv.first_index < 0 || kv.head_stride % 8 != 0) return false;
    if (kv.slots > 0 && (kv.k == nullptr || kv.v == nullptr)) return false;
    if (s.int8 && kv.head_stride % s.head_dim != 0) return false;
    if (s.int8 && kv.slots > 0 && (kv.k_scale == nullptr || kv.v_scale == nullptr)) return false;
    const auto bits = reinterpret_cast<uintptr_t>(kv.k) | reinterpret_cast<uintptr_t>(kv.v);
    if (bits % 16 != 0) return false;
  }
  return true;
}

bool UsesHopper(const AttentionShape& shape) {
  if (shape.portable_only || (shape.head_dim != 64 && shape.head_dim != 128)) return false;
  // The copy engine counts in 32 bits.
  constexpr int64_t kMost = 0x7fffff00;
  for (int i = 0; i < shape.extents; ++i) {
    if (shape.kv[i].slots > kMost) return false;
  }
  return PackedRows(shape) > HopperSpares(shape.head_dim, shape.int8) && shape.rows <= kMost;
}

HopperTile HopperAttendTileOf(const AttentionShape& shape) {
  return HopperAttendTile(shape.head_dim, HopperFillsTallTiles(PackedRows(shape)), shape.int8);
}

int TailSplits(int64_t rows, int kv_heads, int sm_count) {
  // Two blocks a multiprocessor. Empty splits cost a block that ends at once, and a part for Combine to look at.
  constexpr int64_t kMostSplits = 8;
  const int64_t blocks = std::max<int64_t>(1, rows * kv_heads);
  return static_cast<int>(std::clamp<int64_t>(2 * int64_t{sm_count} / blocks, 1, kMostSplits));
}

int AttendSplits(const AttentionShape& shape, int sm_count) {
  if (!ValidShape(shape)) return 1;
  const BlockRates rates =
      UsesHopper(shape)
          ? HopperRates(HopperAttendTileOf(shape))
          : PortableRates(shape, AttendTile(PaddedHeadDim(shape.head_dim), AttendTileRows(PackedRows(shape)),
                                            shape.int8));
  return ChooseSplits(shape, rates, 2, AttendPartialBytes(shape), sm_count);
}

int64_t AttendWorkspaceBytes(const AttentionShape& shape, int sm_count) {
  const int splits = AttendSplits(shape, sm_count);
  return splits == 1 ? 0 : RoundUp256(splits * AttendPartialBytes(shape));
}

int QueryGradSplits(const AttentionShape& shape, int sm_count) {
  if (!ValidShape(shape)) return 1;
  const BlockRates rates = UsesHopper(shape) ? HopperRates(HopperQueryGradTile(shape.head_dim, shape.int8))
                                             : PortableRates(shape, QueryGradTile(PaddedHeadDim(shape.head_dim)));
  return ChooseSplits(shape, rates, 3, QueryGradPartialBytes(shape), sm_count);
}

int64_t QueryGradWorkspaceBytes(const AttentionShape& shape, int sm_count) {
  const int splits = QueryGradSplits(shape, sm_count);
  return splits == 1 ? 0 : RoundUp256(splits * QueryGradPartialBytes(shape));
}

}  // namespace refocus::kernels
