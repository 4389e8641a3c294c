// K and V in eight bits on their way to what tensor cores read (base/kv_int8.h). A magnitude m is the mantissa of the
// bf16 number 128 + m; scale * (128 + m) - scale * 128 is formed exactly and rounded once.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/key_tiles.cuh"
#include "kernels/mma.cuh"

namespace refocus::kernels {

// Two scales as the product wants them: of one vector twice, or of two.
struct CodeScale {
  uint32_t times;
  uint32_t plus;  // -128 * scale

  CodeScale() = default;
  __device__ __forceinline__ explicit CodeScale(uint32_t pair) : times(pair) {
    constexpr uint32_t kMinus128 = 0xc300c300u;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(plus) : "r"(times), "r"(kMinus128));
  }
  static __device__ __forceinline__ CodeScale Twice(uint16_t bits) { return CodeScale(bits * 0x10001u); }
};

// Two codes: magnitudes from the low bytes of one word's halves, signs from the high bytes of another's.
__device__ __forceinline__ uint32_t WidenPair(uint32_t low, uint32_t high, const CodeScale& scale) {
  uint32_t shifted, wide;  // the first (low & 0x007f007f) | 0x43004300, in one instruction
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(shifted) : "r"(low), "r"(0x007f007fu), "r"(0x43004300u));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(wide) : "r"(shifted), "r"(scale.times), "r"(scale.plus));
  return wide ^ (high & 0x80008000u);
}

__device__ __forceinline__ uint32_t WidenPair(uint32_t doubled, const CodeScale& scale) {
  return WidenPair(doubled, doubled, scale);
}

// Four codes -> four bf16 numbers.
__device__ __forceinline__ uint2 WidenCodes(uint32_t codes, const CodeScale& scale) {
  return make_uint2(WidenPair(__byte_perm(codes, 0, 0x1100), scale), WidenPair(__byte_perm(codes, 0, 0x3322), scale));
}

__device__ __forceinline__ uint4 LoadShared(uint32_t from) {
  uint4 data;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
               : "r"(from)
               : "memory");
  return data;
}

__device__ __forceinline__ void StoreShared(uint32_t to, uint2 low, uint2 high) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(low.x), "r"(low.y), "r"(high.x), "r"(high.y)
               : "memory");
}

// Sixteen codes to two neighbouring pieces of a bf16 tile. `turn`: which one is written first, so that the lanes of a
// quarter of a warp write to different banks.
__device__ __forceinline__ void WidenPiece(uint32_t from, uint32_t to_first, uint32_t to_second, bool turn,
                                           const CodeScale& scale) {
  const uint4 codes = LoadShared(from);
  const uint2 a = WidenCodes(codes.x, scale), b = WidenCodes(codes.y, scale);
  const uint2 c = WidenCodes(codes.z, scale), d = WidenCodes(codes.w, scale);
  StoreShared(turn ? to_second : to_first, turn ? c : a, turn ? d : b);
  StoreShared(turn ? to_first : to_second, turn ? a : c, turn ? b : d);
}

// kKeys rows of kDim codes from rows `from` of head_dim codes; rows from `valid` on and columns from head_dim on are
// zero and not read.
template <int kDim, int kKeys, int kThreads>
__device__ __forceinline__ void CopyCodes(uint32_t to, const uint8_t* from, int valid, int head_dim) {
  constexpr int kPieces = kDim / 16;
  constexpr int kTotal = kKeys * kPieces;
#pragma unroll
  for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kPieces;
    const int piece = index % kPieces;
    if (kTotal % kThreads != 0 && index >= kTotal) break;
    const bool inside = row < valid && piece * 16 < head_dim;
    CopyAsync(to + index * 16, from + (inside ? row * head_dim + piece * 16 : 0), inside);
  }
}

// As CopyKeyTile: codes of K of a key tile, behind them those of V.
template <int kDim, int kKeys, int kThreads>
__device__ __forceinline__ void CopyCodeTile(uint32_t to, const AttentionShape& shape, int kv_head,
                                             const KeyTile& place, int64_t most) {
  const KvSlots& kv = shape.kv[place.extent];
  const int64_t first = int64_t{place.tile} * kKeys;
  const int valid = most - first < kKeys ? static_cast<int>(most - first) : kKeys;
  const int64_t offset = kv_head * kv.head_stride + first * shape.head_dim;
  CopyCodes<kDim, kKeys, kThreads>(to, static_cast<const uint8_t*>(kv.k) + offset, valid, shape.head_dim);
  CopyCodes<kDim, kKeys, kThreads>(to + kDim * kKeys, static_cast<const uint8_t*>(kv.v) + offset, valid,
                                   shape.head_dim);
}

// Widens the code tiles of a block one after the other: every thread its share, or, where a warp reads no keys but its
// own, every warp its own keys. A tile's scales are asked for one tile ahead.
template <int kDim, TileConfig kTile, bool kOwnKeys>
struct KeyWidener {
  static constexpr int kGroup = kOwnKeys ? 32 : kTile.threads();
  static constexpr int kRows = kOwnKeys ? kTile.keys / kTile.warps_n : kTile.keys;
  static constexpr int kRowPieces = kDim / 16;
  static constexpr int kPieces = 2 * kRows * kRowPieces / kGroup;  // of a thread
  static_assert(2 * kRows * kRowPieces % kGroup == 0 && (!kOwnKeys || kTile.warps_m == 1));

  uint16_t scales[kPieces];

  // This thread's piece i: of K or V, its row in the tile, its place in the row.
  struct Piece {
    bool value;
    int row;
    int piece;
  };
  static __device__ __forceinline__ Piece PieceAt(int i) {
    const int index = i * kGroup + static_cast<int>(threadIdx.x) % kGroup;
    const int row = index / kRowPieces;
    const int first = kOwnKeys ? static_cast<int>(threadIdx.x) / 32 * kRows : 0;
    return {row >= kRows, first + row % kRows, index % kRowPieces};
  }

  __device__ __forceinline__ void LoadScales(const AttentionShape& shape, int kv_head, const KeyTile& place,
                                             int64_t most) {
    const KvSlots& kv = shape.kv[place.extent];
    const int64_t first = int64_t{place.tile} * kTile.keys;
    const int64_t offset = kv_head * (kv.head_stride / shape.head_dim) + first;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const Piece at = PieceAt(i);
      const auto* from = static_cast<const uint16_t*>(at.value ? kv.v_scale : kv.k_scale) + offset;
      scales[i] = first + at.row < most ? from[at.row] : 0;  // 0: the row becomes zero
    }
  }

  // raw: K's codes, behind them V's; wide: K's tile, behind it V's. A barrier of those who read them follows.
  __device__ __forceinline__ void Widen(uint32_t raw, uint32_t wide) const {
    const bool half = threadIdx.x / 4 % 2 != 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const Piece at = PieceAt(i);
      const int row = at.row + (at.value ? kTile.keys : 0);
      const uint32_t to = wide + (at.value ? 2 * kDim * kTile.keys : 0);
      WidenPiece(raw + row * kDim + at.piece * 16, to + TileOffset<kDim>(at.row, 2 * at.piece),
                 to + TileOffset<kDim>(at.row, 2 * at.piece + 1), half != (at.row % 2 != 0),
                 CodeScale::Twice(scales[i]));
    }
  }
};

// Stages of codes in the memory that bf16's stages would take, beside one widened tile.
constexpr int CodeStages(TileConfig tile) { return 2 * (tile.stages - 1); }

}  // namespace refocus::kernels
