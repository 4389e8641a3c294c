// Hopper's warpgroup products (wgmma, bf16 in, fp32 sums) on tiles in shared memory.
//
// A tile is [columns / 64][rows][64] bf16: panels of 128-byte rows, 16-byte pieces permuted by the row (128-byte
// swizzle, what a bulk tensor copy writes), each panel 1024-byte aligned. The same tile serves as a right factor in two
// ways: rows . tile^T (Steps along its columns) and weights . tile (steps along its rows).
//
// A warpgroup's sums of 64 x kN: the thread's element 4 * j + 2 * half + c is row 16 * warp + 8 * half + lane / 4,
// column 8 * j + 2 * (lane % 4) + c. Neighbouring sums, rounded, are a left factor's registers without any exchange
// (mma.cuh).
#pragma once

#include <cstdint>

#include "kernels/mma.cuh"

namespace refocus::kernels {

inline constexpr int kPanelColumns = 64;
inline constexpr int kPanelRowBytes = 128;

__device__ __forceinline__ void WarpgroupArrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void WarpgroupCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void WarpgroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers across a wait.
template <int kSize>
__device__ __forceinline__ void Pin(float (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kSize>
__device__ __forceinline__ void Pin(uint32_t (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Where a factor begins, as the instruction wants it. Groups of eight rows lie 1024 bytes apart. Of an address
// 18 bits count: what lies above (in a cluster, the block) must not spill into the next field.
__device__ __forceinline__ uint64_t FactorStart(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | ((address & 0x3ffff) >> 4);
}
// Rows along the product's rows (or columns of the result), columns along its sum.
__device__ __forceinline__ uint64_t FactorByColumns(uint32_t address) {
  return FactorStart(address) | (uint64_t{1} << 16);
}
// Transposed: rows along the sum, columns along the result's columns, panels panel_bytes apart.
__device__ __forceinline__ uint64_t FactorByRows(uint32_t address, uint32_t panel_bytes) {
  return FactorStart(address) | (uint64_t{panel_bytes >> 4} << 16);
}

// As FactorByRows, of one panel of 32 columns: rows of 64 bytes with the 64-byte swizzle, groups of eight 512 bytes
// apart, 512-byte aligned.
__device__ __forceinline__ uint64_t NarrowFactorByRows(uint32_t address) {
  return (uint64_t{2} << 62) | (uint64_t{512 >> 4} << 32) | (uint64_t{512 >> 4} << 16) | ((address & 0x3ffff) >> 4);
}

// One instruction: sums (64 x kN) += a (64 x 16) . b (16 x kN); `add` 0 overwrites the sums.
template <int kN>
struct WarpgroupMma;

#define REFOCUS_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REFOCUS_F16(i) REFOCUS_F4(i), REFOCUS_F4(i + 4), REFOCUS_F4(i + 8), REFOCUS_F4(i + 12)
#define REFOCUS_F32(i) REFOCUS_F16(i), REFOCUS_F16(i + 16)
#define REFOCUS_L0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REFOCUS_L16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REFOCUS_L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REFOCUS_L48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REFOCUS_L64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define REFOCUS_L80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define REFOCUS_L88 ",%88,%89,%90,%91,%92,%93,%94,%95"

// kN; its sums as text and as operands; the numbers of the operands behind them.
#define REFOCUS_WARPGROUP_MMA(N, LIST, SUMS, I0, I1, I2, I3, I4, I5)                                               \
  template <>                                                                                                      \
  struct WarpgroupMma<N> {                                                                                         \
    /* Both factors in shared memory, sums along columns. */                                                       \
    static __device__ __forceinline__ void Shared(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                                        \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, %" #I0 ", %" #I1          \
                   ", p, 1, 1, 0, 0;\n}\n"                                                                         \
                   : SUMS                                                                                          \
                   : "l"(a), "l"(b), "r"(add));                                                                    \
    }                                                                                                              \
    /* Both in shared memory, the right one by rows. */                                                            \
    static __device__ __forceinline__ void SharedByRows(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {      \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2                                                        \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, %" #I0 ", %" #I1          \
                   ", p, 1, 1, 0, 1;\n}\n"                                                                         \
                   : SUMS                                                                                          \
                   : "l"(a), "l"(b), "r"(add));                                                                    \
    }                                                                                                              \
    /* The left factor in registers, the right one by rows. */                                                     \
    static __device__ __forceinline__ void Registers(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2,     \
                                                     uint32_t a3, uint64_t b, int add) {                           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5                                                        \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, {%" #I0 ",%" #I1 ",%" #I2 \
                   ",%" #I3 "}, %" #I4 ", p, 1, 1, 1;\n}\n"                                                        \
                   : SUMS                                                                                          \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add));                                        \
    }                                                                                                              \
  };

#define REFOCUS_S32 REFOCUS_F16(0)
#define REFOCUS_S64 REFOCUS_F32(0)
#define REFOCUS_S80 REFOCUS_F32(0), REFOCUS_F4(32), REFOCUS_F4(36)
#define REFOCUS_S96 REFOCUS_F32(0), REFOCUS_F16(32)
#define REFOCUS_S128 REFOCUS_F32(0), REFOCUS_F32(32)
#define REFOCUS_S160 REFOCUS_S128, REFOCUS_F16(64)
#define REFOCUS_S176 REFOCUS_F32(0), REFOCUS_F32(32), REFOCUS_F16(64), REFOCUS_F4(80), REFOCUS_F4(84)
#define REFOCUS_S192 REFOCUS_S128, REFOCUS_F32(64)
#define REFOCUS_T32 REFOCUS_L0
#define REFOCUS_T64 REFOCUS_L0 REFOCUS_L16
#define REFOCUS_T80 REFOCUS_T64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REFOCUS_T96 REFOCUS_T64 REFOCUS_L32
#define REFOCUS_T128 REFOCUS_T96 REFOCUS_L48
#define REFOCUS_T160 REFOCUS_T128 REFOCUS_L64
#define REFOCUS_T176 REFOCUS_T160 REFOCUS_L80
#define REFOCUS_T192 REFOCUS_T176 REFOCUS_L88

REFOCUS_WARPGROUP_MMA(32, REFOCUS_T32, REFOCUS_S32, 16, 17, 18, 19, 20, 21)
REFOCUS_WARPGROUP_MMA(64, REFOCUS_T64, REFOCUS_S64, 32, 33, 34, 35, 36, 37)
REFOCUS_WARPGROUP_MMA(80, REFOCUS_T80, REFOCUS_S80, 40, 41, 42, 43, 44, 45)
REFOCUS_WARPGROUP_MMA(96, REFOCUS_T96, REFOCUS_S96, 48, 49, 50, 51, 52, 53)
REFOCUS_WARPGROUP_MMA(128, REFOCUS_T128, REFOCUS_S128, 64, 65, 66, 67, 68, 69)
REFOCUS_WARPGROUP_MMA(160, REFOCUS_T160, REFOCUS_S160, 80, 81, 82, 83, 84, 85)
REFOCUS_WARPGROUP_MMA(176, REFOCUS_T176, REFOCUS_S176, 88, 89, 90, 91, 92, 93)
REFOCUS_WARPGROUP_MMA(192, REFOCUS_T192, REFOCUS_S192, 96, 97, 98, 99, 100, 101)

// sums (64 x kKeys) = rows (64 x kDim) . keys^T: both tiles in shared memory, panels row_panel and key_panel bytes
// long.
template <int kDim, int kKeys>
__device__ __forceinline__ void RowsTimesKeys(float (&sums)[kKeys / 2], uint32_t rows, uint32_t row_panel,
                                              uint32_t keys) {
  constexpr uint32_t kKeyPanel = kKeys * kPanelRowBytes;
  const uint64_t a = FactorByColumns(rows);
  const uint64_t b = FactorByColumns(keys);
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const uint32_t panel = step / 4;
    const uint32_t within = step % 4 * 32;
    WarpgroupMma<kKeys>::Shared(sums, a + ((panel * row_panel + within) >> 4), b + ((panel * kKeyPanel + within) >> 4),
                                step > 0);
  }
}

// sums (64 x kDim) += weights (64 x kKeys, packed pairs) . values (kKeys x kDim).
template <int kDim, int kKeys>
__device__ __forceinline__ void AddWeightsTimesRows(float (&sums)[kDim / 2], const uint32_t (&weights)[kKeys / 4],
                                                    uint32_t values, bool add) {
  const uint64_t b = FactorByRows(values, kKeys * kPanelRowBytes);
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    WarpgroupMma<kDim>::Registers(sums, weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                                  weights[4 * step + 3], b + ((step * 16 * kPanelRowBytes) >> 4),
                                  step > 0 ? 1 : static_cast<int>(add));
  }
}

}  // namespace refocus::kernels
