// Warp-level building blocks: swizzled bf16 tiles in shared memory, asynchronous copies into them, and products of such
// tiles with mma.m16n8k16 (bf16 in, fp32 sums).
//
// Fragments, with g = lane / 4 and t = lane % 4. Sums of a 16 x 8 tile: c[0], c[1] = (g, 2t), (g, 2t + 1); c[2], c[3] =
// the same in row g + 8. The left factor's (16 x 16) registers hold pairs of columns 2t of rows g, g + 8, then columns
// 2t + 8 of rows g, g + 8: two neighbouring 16 x 8 tiles of sums, rounded, are such a factor without any exchange.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace refocus::kernels {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes; zeros where !valid, and then `from` is not read.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kPending` of this thread's groups are under way. Others' copies are seen after a barrier.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A row-major tile of kDim bf16 columns in pieces of 16 bytes. Pieces are permuted within each 128 (64) bytes by the
// row so that the same column piece of eight rows lies in different banks. The permutation repeats every 8 rows.
template <int kDim>
__device__ __forceinline__ int Swizzle(int row) {
  return kDim % 64 == 0 ? row & 7 : (row >> 1) & 3;
}

template <int kDim>
__device__ __forceinline__ uint32_t TileOffset(int row, int piece) {
  return row * (kDim * 2) + ((piece ^ Swizzle<kDim>(row)) << 4);
}

// Eight-by-eight matrices at the rows whose addresses the lanes give (lane i: row i % 8 of matrix i / 8).
__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A lane's share of the addresses of 16 x 16 blocks (rows a multiple of 16, columns 16 * step).
template <int kDim>
struct LaneOffset {
  uint32_t row_bytes;
  uint32_t piece_bits;

  // Matrices in the order (rows 0-7, 8-15) x (columns 0-7), then columns 8-15: the left factor; and transposed, with
  // keys as rows, the right factor of two neighbouring output tiles.
  static __device__ __forceinline__ LaneOffset RowsFirst(int lane) { return Make(lane & 15, lane >> 4); }

  // Matrices in the order (columns 0-7, 8-15) x (rows 0-7), then rows 8-15: with keys as rows, the right factor of
  // x . keys^T for two neighbouring output tiles.
  static __device__ __forceinline__ LaneOffset ColumnsFirst(int lane) {
    return Make((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
  }

  // (2 * step + piece) ^ swizzle, split so that what lies above the swizzled bits is an immediate.
  __device__ __forceinline__ uint32_t At(int step) const {
    return row_bytes + (piece_bits ^ ((step & 3) << 5)) + ((step >> 2) << 7);
  }

 private:
  static __device__ __forceinline__ LaneOffset Make(int row, int piece) {
    return {static_cast<uint32_t>(row * kDim * 2), static_cast<uint32_t>((piece ^ Swizzle<kDim>(row)) << 4)};
  }
};

// The left factor in registers: kTiles * 16 rows of kDim columns.
template <int kDim, int kTiles>
__device__ __forceinline__ void LoadRows(uint32_t (&a)[kDim / 16][kTiles][4], uint32_t rows, LaneOffset<kDim> lane) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) LoadMatrices(a[step][m], rows + m * 16 * kDim * 2 + lane.At(step));
  }
}

// One step (16 columns) of sums = rows . keys^T.
template <int kDim, int kTiles, int kKeyTiles>
__device__ __forceinline__ void ScoreStep(float (&sums)[kTiles][kKeyTiles][4], const uint32_t (&a)[kTiles][4],
                                          uint32_t keys, LaneOffset<kDim> lane, int step) {
#pragma unroll
  for (int pair = 0; pair < kKeyTiles / 2; ++pair) {
    uint32_t b[4];
    LoadMatrices(b, keys + pair * 16 * kDim * 2 + lane.At(step));
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      Mma(sums[m][2 * pair], a[m], b[0], b[1]);
      Mma(sums[m][2 * pair + 1], a[m], b[2], b[3]);
    }
  }
}

// sums = rows . keys^T: rows from shared memory (rows_lane: RowsFirst), keys (keys_lane: ColumnsFirst).
template <int kDim, int kTiles, int kKeyTiles>
__device__ __forceinline__ void Scores(float (&sums)[kTiles][kKeyTiles][4], uint32_t rows, LaneOffset<kDim> rows_lane,
                                       uint32_t keys, LaneOffset<kDim> keys_lane) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) LoadMatrices(a[m], rows + m * 16 * kDim * 2 + rows_lane.At(step));
    ScoreStep<kDim>(sums, a, keys, keys_lane, step);
  }
}

// The same with the rows in registers.
template <int kDim, int kTiles, int kKeyTiles>
__device__ __forceinline__ void Scores(float (&sums)[kTiles][kKeyTiles][4],
                                       const uint32_t (&rows)[kDim / 16][kTiles][4], uint32_t keys,
                                       LaneOffset<kDim> keys_lane) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) ScoreStep<kDim>(sums, rows[step], keys, keys_lane, step);
}

// Sums of two neighbouring 16 x 8 tiles as a left factor.
__device__ __forceinline__ void PackFactor(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = PackBf16(left[0], left[1]);
  a[1] = PackBf16(left[2], left[3]);
  a[2] = PackBf16(right[0], right[1]);
  a[3] = PackBf16(right[2], right[3]);
}

// out += weights (rounded to bf16) . values, with values' rows the keys (values_lane: RowsFirst).
template <int kDim, int kTiles, int kKeyTiles>
__device__ __forceinline__ void AddWeighted(float (&out)[kTiles][kDim / 8][4],
                                            const float (&weights)[kTiles][kKeyTiles][4], uint32_t values,
                                            LaneOffset<kDim> values_lane) {
#pragma unroll
  for (int step = 0; step < kKeyTiles / 2; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) PackFactor(a[m], weights[m][2 * step], weights[m][2 * step + 1]);
#pragma unroll
    for (int pair = 0; pair < kDim / 16; ++pair) {
      uint32_t b[4];
      LoadMatricesTransposed(b, values + step * 16 * kDim * 2 + values_lane.At(pair));
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        Mma(out[m][2 * pair], a[m], b[0], b[1]);
        Mma(out[m][2 * pair + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Over the four lanes that hold a row.
__device__ __forceinline__ float RowMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float RowSum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace refocus::kernels
