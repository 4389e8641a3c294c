// Partial attention of few rows over K and V in eight bits, bound by reading them. Codes come to shared memory, from
// there to registers in one access of 16 (8) for each key, and are widened to factors of the products (mma.cuh) without
// a bf16 tile between. What lets a lane take neighbouring codes where the instruction has pairs:
// - q . K^T may sum over head_dim in any order, as long as q comes in the same. Step 4 * p + w takes codes 4 * w to
//   4 * w + 3 of the 16 that lane t of four has of each 64, the even ones first.
// - V's columns may be any of the output's: column c of tile n is kDim / 8 * c + n, so that a lane has kDim / 8
//   neighbouring columns of its four keys.
// Warps own keys of every tile and wait for no other until the end.
#pragma once

#include <cuda_runtime.h>

#include "kernels/attend_rows.cuh"
#include "kernels/int8_tiles.cuh"
#include "kernels/key_tiles.cuh"

namespace refocus::kernels {
namespace {

inline constexpr int kCodeLineBytes = 128;

// A warp's keys lie row by row in lines of 128 bytes, whose pieces of 16 are permuted by the line: so neither the
// pieces that eight lanes read of two neighbouring keys nor those of every other key share banks.
template <int kDim>
__device__ __forceinline__ uint32_t CodeOffset(int key, int piece) {
  static_assert(kDim == 64 || kDim == 128);
  const int line = kDim == 128 ? key : key / 2;
  const int place = kDim == 128 ? piece : key % 2 * 4 + piece;
  const int turn = kDim == 128 ? (line & 6) ^ ((line & 1) << 2) : (line & 3) << 1;
  return line * kCodeLineBytes + ((place ^ turn) << 4);
}

// A warp's copy of kKeys keys from `own` on of a tile that begins at k and v: K, behind it V. Keys from `valid` on and
// columns from head_dim on become 0. kWhole: there are none, and then the loop needs next to no arithmetic.
template <int kDim, int kKeys, bool kWhole>
__device__ __forceinline__ void CopyWarpCodes(uint32_t to, const uint8_t* k, const uint8_t* v, int own, int valid,
                                              int head_dim) {
  constexpr int kPieces = kDim / 16;
  constexpr int kStep = 32 / kPieces;  // keys that a warp copies at once
  const int lane = threadIdx.x % 32;
  const int piece = lane % kPieces;
  const int first = lane / kPieces;
  const int stride = kWhole ? kDim : head_dim;
  const int limit = piece * 16 < head_dim ? valid - own : 0;
  const int from = (own + first) * stride + piece * 16;
#pragma unroll
  for (int i = 0; i < kKeys / kStep; ++i) {
    const bool inside = kWhole || i * kStep + first < limit;
    // Lines are permuted alike every eight keys.
    const uint32_t at = to + CodeOffset<kDim>(i * kStep % 8 + first, piece) + i * kStep / 8 * 8 * kDim;
    CopyAsync(at, inside ? k + from + i * kStep * stride : k, inside);
    CopyAsync(at + kDim * kKeys, inside ? v + from + i * kStep * stride : v, inside);
  }
}

// The left factor of q . K^T, in the order of columns above. Rows that do not exist are 0.
template <int kDim>
__device__ __forceinline__ void LoadQuery(uint32_t (&q)[kDim / 16][4], const __nv_bfloat16* from, const RowTile& rows,
                                          int heads, int head_dim) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
#pragma unroll
    for (int p = 0; p < kDim / 64; ++p) {
      const int column = p * 64 + lane % 4 * 16;
      alignas(16) uint32_t pairs[8] = {};
      if (row < rows.rows && column < head_dim) {
        const auto* at = reinterpret_cast<const uint4*>(from + rows.Index(row, heads) * head_dim + column);
        *reinterpret_cast<uint4*>(pairs) = at[0];
        *reinterpret_cast<uint4*>(pairs + 4) = at[1];
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        q[4 * p + w][half] = __byte_perm(pairs[2 * w], pairs[2 * w + 1], 0x5410);
        q[4 * p + w][half + 2] = __byte_perm(pairs[2 * w], pairs[2 * w + 1], 0x7632);
      }
    }
  }
}

// scores = q . K^T. scales: lane i has key i's, K's below.
template <int kDim, int kKeyTiles>
__device__ __forceinline__ void ScoreCodes(float (&scores)[kKeyTiles][4], const uint32_t (&q)[kDim / 16][4],
                                           const unsigned char* keys, uint32_t scales) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
  CodeScale scale[kKeyTiles];
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
    const uint32_t both = __shfl_sync(0xffffffffu, scales, n * 8 + lane / 4);
    scale[n] = CodeScale(__byte_perm(both, 0, 0x1010));
  }
#pragma unroll
  for (int p = 0; p < kDim / 64; ++p) {
    alignas(16) uint32_t codes[kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      *reinterpret_cast<uint4*>(codes[n]) =
          *reinterpret_cast<const uint4*>(keys + CodeOffset<kDim>(n * 8 + lane / 4, p * 4 + lane % 4));
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const uint32_t even = codes[n][w];
        const uint32_t odd = __byte_perm(even, 0, 0x2301);
        Mma(scores[n], q[4 * p + w], WidenPair(even, odd, scale[n]), WidenPair(odd, even, scale[n]));
      }
    }
  }
}

// out += weights (rounded to bf16) . V. scales: lane i has key i's, V's above.
template <int kDim, int kKeyTiles>
__device__ __forceinline__ void AddCodes(float (&out)[kDim / 8][4], const float (&weights)[kKeyTiles][4],
                                         const unsigned char* values, uint32_t scales) {
  constexpr int kWords = kDim / 32;  // of a lane, of a key
  const int lane = threadIdx.x % 32;
  const int bytes = lane / 4 * (kDim / 8);
#pragma unroll
  for (int step = 0; step < kKeyTiles / 2; ++step) {
    const int key = step * 16 + lane % 4 * 2;
    uint32_t a[4];
    PackFactor(a, weights[2 * step], weights[2 * step + 1]);
    CodeScale scale[2];  // of keys `key` and `key` + 1; of those 8 behind
    alignas(16) uint32_t codes[4][kWords];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* from = values + CodeOffset<kDim>(key + i / 2 * 8 + i % 2, bytes / 16) + bytes % 16;
      if constexpr (kWords == 4) {
        *reinterpret_cast<uint4*>(codes[i]) = *reinterpret_cast<const uint4*>(from);
      } else {
        *reinterpret_cast<uint2*>(codes[i]) = *reinterpret_cast<const uint2*>(from);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = __shfl_sync(0xffffffffu, scales, key + 8 * i);
      const uint32_t second = __shfl_sync(0xffffffffu, scales, key + 8 * i + 1);
      scale[i] = CodeScale(__byte_perm(first, second, 0x7632));
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {  // tiles of two neighbouring columns, both keys' codes in two orders
      const int w = n / 4;
      const uint32_t forth = n % 4 == 0 ? 0x5410 : 0x7632, back = n % 4 == 0 ? 0x4501 : 0x6723;
      const uint32_t low[2] = {__byte_perm(codes[0][w], codes[1][w], forth),
                               __byte_perm(codes[0][w], codes[1][w], back)};
      const uint32_t high[2] = {__byte_perm(codes[2][w], codes[3][w], forth),
                                __byte_perm(codes[2][w], codes[3][w], back)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Mma(out[n + i], a, WidenPair(low[i], low[1 - i], scale[0]), WidenPair(high[i], high[1 - i], scale[1]));
      }
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(AttendTile(kDim, 16, true).threads(), BlocksPerSm(kDim, AttendTile(kDim, 16, true)))
    AttendCodesKernel(const __grid_constant__ AttendArgs args) {
  constexpr TileConfig kTile = AttendTile(kDim, 16, true);
  constexpr int kThreads = kTile.threads();
  constexpr int kStages = kTile.stages;
  constexpr int kWarpKeys = kTile.keys / kTile.warps_n;
  constexpr int kWarpBytes = kDim * kWarpKeys;  // of K, as much of V
  static_assert(kWarpKeys == 32 && kTile.m_tiles == 1 && kTile.warps_m == 1, "a lane a key's scales");
  static_assert(MergeBytes(kDim, kTile) <= CodeTileBytes(kDim, kTile));
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ VisibleKeys<kTile.rows> visible;
  __shared__ int64_t first_scale[kMaxExtents];  // of the K/V head

  args.Begin();
  const AttentionShape& shape = args.shape;
  const BlockPlace place = args.grid.Place(blockIdx.x, shape.kv_heads, kTile.rows);
  const RowTile rows(shape, args.grid.group, place, kTile.rows);
  if (static_cast<int>(threadIdx.x) < shape.extents) {
    first_scale[threadIdx.x] = place.kv_head * (shape.kv[threadIdx.x].head_stride / shape.head_dim);
  }
  const int total = visible.template Fill<kTile.keys, kThreads>(shape, rows);
  const int begin = static_cast<int>(int64_t{total} * place.split / args.grid.splits);
  const int end = static_cast<int>(int64_t{total} * (place.split + 1) / args.grid.splits);

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int own = warp * kWarpKeys;  // first key of a tile
  unsigned char* const stages = shared + warp * kStages * 2 * kWarpBytes;
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
      const KvSlots& kv = shape.kv[loading.extent];
      const int64_t first = int64_t{loading.tile} * kTile.keys;
      const int64_t seen = visible.most[loading.extent] - first;
      const int64_t offset = place.kv_head * kv.head_stride + first * shape.head_dim;
      const uint32_t to = SharedAddress(stages) + stage * 2 * kWarpBytes;
      const auto* k = static_cast<const uint8_t*>(kv.k) + offset;
      const auto* v = static_cast<const uint8_t*>(kv.v) + offset;
      if (seen >= kTile.keys && shape.head_dim == kDim) {
        CopyWarpCodes<kDim, kWarpKeys, true>(to, k, v, own, kTile.keys, kDim);
      } else {
        const int valid = seen < kTile.keys ? static_cast<int>(seen) : kTile.keys;
        CopyWarpCodes<kDim, kWarpKeys, false>(to, k, v, own, valid, shape.head_dim);
      }
      loading.Next(visible.tiles, shape.extents);
    }
    CommitCopies();  // also when empty: groups are counted
  };
  // This lane's key's. 0 makes rows that nobody sees zero.
  const auto load_scales = [&](const KeyTile& at) {
    const KvSlots& kv = shape.kv[at.extent];
    const int64_t slot = int64_t{at.tile} * kTile.keys + own + lane;
    if (slot >= visible.most[at.extent]) return 0u;
    const int64_t from = first_scale[at.extent] + slot;
    const uint32_t low = static_cast<const uint16_t*>(kv.k_scale)[from];
    const uint32_t high = static_cast<const uint16_t*>(kv.v_scale)[from];
    return low | high << 16;
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  uint32_t next_scales = begin < end ? load_scales(current) : 0u;

  uint32_t q[kDim / 16][4];
  LoadQuery<kDim>(q, args.q, rows, shape.heads, shape.head_dim);
  RunningRows<kDim, 1> run;
  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    // The warp's keys of this tile have come for all its lanes, and none of them reads the stage that is filled next.
    WaitForCopies<kStages - 2>();
    __syncwarp();
    load(stage == 0 ? kStages - 1 : stage - 1);
    const uint32_t scales = next_scales;
    KeyTile next = current;
    next.Next(visible.tiles, shape.extents);
    if (tile + 1 < end) next_scales = load_scales(next);

    const unsigned char* const keys = stages + stage * 2 * kWarpBytes;
    float scores[1][kWarpKeys / 8][4];
    ScoreCodes<kDim>(scores[0], q, keys, scales);
    const int64_t first_key = int64_t{current.tile} * kTile.keys;
    if (first_key + kTile.keys > visible.least[current.extent]) {
      MaskScores(scores, visible.counts, 0, shape.kv[current.extent], first_key + own);
    }
    run.Weigh(scores, args.scale_log2);
    AddCodes<kDim>(run.out[0], scores[0], keys + kWarpBytes, scales);
    current = next;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  WaitForCopies<0>();
  __syncthreads();  // the stages become the meeting place
  MergeAndStore<kDim, kTile.rows, true>(run, args, rows, 0, warp, place.split * shape.rows * shape.heads,
                                        reinterpret_cast<float*>(shared));
  args.End();
}

}  // namespace
}  // namespace refocus::kernels
