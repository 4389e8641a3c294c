// A block computes 16 outputs of all rows of a product; its warps share the inner dimension, 32 elements at a time in
// turn, so that together they read whole stretches of 16 matrix rows. Tensor cores do the arithmetic, since eight rows
// then cost no more instructions than one; the weights go from memory to registers as the left factor. Its columns may
// come in any order as long as x's come in the same: every lane takes 8 neighbouring elements in one access where the
// instruction has pairs (kernels/mma.cuh).
//
// What counts is that loads are always under way: each thread has a ring of them, and a launch begins to load weights
// while the kernels before it still run (kernels/overlap.cuh), which hides what launches cost. The ring lies in shared
// memory: a multiprocessor that is never idle keeps the division between that and the first cache that attention asked
// for, and loads to registers, for which the first cache must have room while they are under way, then take twice as
// long. Every thread reads back what it loaded itself, so that nobody waits for others.
#include "kernels/few_rows.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/mma.cuh"
#include "kernels/rowwise.cuh"

namespace refocus::kernels {
namespace {

constexpr int kTile = 16;   // outputs of a block
constexpr int kDepth = 32;  // elements of the inner dimension that a warp takes at once
constexpr int kWarps = 8;
constexpr int kStride = kWarps * kDepth;

// Accesses of each of a lane's two matrix rows under way, over all matrices. Where blocks are few, more of them, and so
// that at most two blocks fit a multiprocessor: those that begin while the kernel before ends would else crowd where it
// ended first.
constexpr int kLoads = 4;
constexpr int kLoadsOfFewBlocks = 12;
constexpr int64_t kFewBlocks = 264;  // two a multiprocessor of an H100 or H200
constexpr int BlocksPerSm(int loads) { return loads == kLoads ? 5 : 2; }
constexpr int PiecesAhead(int loads) { return loads == kLoads ? 2 : 4; }  // of x, in registers

constexpr int kThreads = kWarps * row::kWarp;
constexpr int RingBytes(int loads) { return loads * 2 * 16 * kThreads; }

// Of one launch: most have up to three products, which should not pay for the parameters of many.
constexpr size_t kFewProducts = 3;
constexpr size_t kManyProducts = 32;

template <size_t kMost>
struct Launch {
  FewRowsProduct product[kMost];
};

__device__ __forceinline__ void Multiply(float (&c)[4], const uint4& low, const uint4& high, const uint4& x) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(x.x), "r"(x.y));
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(low.z), "r"(high.z), "r"(low.w), "r"(high.w), "r"(x.z), "r"(x.w));
}

// One lane's rows of a matrix, g and g + 8 of the tile; null where the tile has no such row.
struct TileRows {
  const row::Bf16* low = nullptr;
  const row::Bf16* high = nullptr;

  TileRows() = default;
  __device__ TileRows(const void* w, int64_t first, int64_t out, int64_t stride) {
    if (w == nullptr) return;
    if (first < out) low = static_cast<const row::Bf16*>(w) + first * stride;
    if (first + 8 < out) high = static_cast<const row::Bf16*>(w) + (first + 8) * stride;
  }
};

__device__ __forceinline__ uint4 Load(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// sums[m] += matrix m's rows . x, for every m. `ring`: of the block, RingBytes(kMatrices * kSlots).
template <int kMatrices, int kSlots, int kAhead>
__device__ __forceinline__ void Walk(const TileRows (&w)[kMatrices], const row::Bf16* x, int in, uint32_t ring,
                                     float (&sums)[kMatrices][4]) {
  constexpr int kAccessBytes = 16 * kThreads;
  const int lane = threadIdx.x % row::kWarp;
  const int first = threadIdx.x / row::kWarp * kDepth + lane % 4 * 8;
  const uint32_t own = ring + threadIdx.x * 16;
  int loading = 0;  // slot
  const auto load = [&](int k) {
    const uint32_t to = own + loading * (2 * kMatrices * kAccessBytes);
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      const bool low = w[m].low != nullptr && k < in, high = w[m].high != nullptr && k < in;
      CopyAsync(to + 2 * m * kAccessBytes, low ? w[m].low + k : x, low);
      CopyAsync(to + (2 * m + 1) * kAccessBytes, high ? w[m].high + k : x, high);
    }
    CommitCopies();
    loading = loading + 1 == kSlots ? 0 : loading + 1;
  };
#pragma unroll
  for (int i = 0; i < kSlots; ++i) load(first + i * kStride);
  // Only what is above may run beside the kernel that makes x.
  AwaitPrevious();
  const auto rows = [&](int at) {
    return x != nullptr && at < in ? *reinterpret_cast<const uint4*>(x + at) : make_uint4(0, 0, 0, 0);
  };
  uint4 v[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) v[i] = rows(first + i * kStride);
  int slot = 0;
  for (int k = first; k - lane % 4 * 8 < in; k += kAhead * kStride) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      WaitForCopies<kSlots - 1>();
      const uint32_t from = own + slot * (2 * kMatrices * kAccessBytes);
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        Multiply(sums[m], Load(from + 2 * m * kAccessBytes), Load(from + (2 * m + 1) * kAccessBytes), v[i]);
      }
      slot = slot + 1 == kSlots ? 0 : slot + 1;
      load(k + (i + kSlots) * kStride);
      v[i] = rows(k + (kAhead + i) * kStride);
    }
  }
  WaitForCopies<0>();
}

// kMatrices: 2 where a product of the launch has a second matrix. Grid: tiles of the longest output, products.
template <int kMatrices, size_t kMost, int kAllLoads>
__global__ void __launch_bounds__(kThreads, BlocksPerSm(kAllLoads))
    FewRowsKernel(const __grid_constant__ Launch<kMost> launch) {
  LetNextBegin();
  const FewRowsProduct& p = launch.product[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  if (first >= p.out) return;
  const int lane = threadIdx.x % row::kWarp, warp = threadIdx.x / row::kWarp;
  const int g = lane / 4;

  extern __shared__ __align__(128) unsigned char ring[];
  float sums[kMatrices][4] = {};
  TileRows w[kMatrices];
  const int64_t stride = p.stride == 0 ? p.in : p.stride;
  w[0] = TileRows(p.w, first + g, p.out, stride);
  if (kMatrices == 2) w[kMatrices - 1] = TileRows(p.second, first + g, p.out, stride);
  const row::Bf16* const x = g < p.rows ? static_cast<const row::Bf16*>(p.x) + g * p.in : nullptr;
  Walk<kMatrices, kAllLoads / kMatrices, PiecesAhead(kAllLoads)>(w, x, static_cast<int>(p.in), SharedAddress(ring),
                                                                 sums);

  auto& shared = *reinterpret_cast<float(*)[kWarps][kMatrices][kTile][kFewRows]>(ring);
  __syncthreads();  // the ring becomes the meeting place
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[warp][m][g + i / 2 * 8][(lane % 4) * 2 + i % 2] = sums[m][i];
  }
  __syncthreads();
  const int column = threadIdx.x % kTile, r = threadIdx.x / kTile;
  if (r >= p.rows || first + column >= p.out) return;
  float y = 0.0f, z = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    y += shared[i][0][column][r];
    if (kMatrices == 2) z += shared[i][kMatrices - 1][column][r];
  }
  const int64_t at = r * p.out + first + column;
  if (p.kind == FewRowsProduct::Kind::kGated) {
    const float gate = __bfloat162float(__float2bfloat16_rn(y)), up = __bfloat162float(__float2bfloat16_rn(z));
    y = gate / (1.0f + __expf(-gate)) * up;
  } else {
    y += z;
    if (p.bias != nullptr) y += __bfloat162float(static_cast<const row::Bf16*>(p.bias)[first + column]);
  }
  if (p.kind == FewRowsProduct::Kind::kFloat) {
    y *= p.scale;
    static_cast<float*>(p.y)[at] = p.add != nullptr ? p.add[at] + y : y;
  } else {
    static_cast<row::Bf16*>(p.y)[at] = __float2bfloat16_rn(y);
  }
}

// At most kMost products, none of them empty.
template <size_t kMost>
cudaError_t Start(std::span<const FewRowsProduct> products, cudaStream_t stream) {
  Launch<kMost> launch;
  std::copy(products.begin(), products.end(), launch.product);
  int64_t most_tiles = 0, all_tiles = 0;
  bool second = false;
  for (const FewRowsProduct& p : products) {
    const int64_t tiles = row::CeilDiv(p.out, kTile);
    most_tiles = std::max(most_tiles, tiles);
    all_tiles += tiles;
    second = second || p.second != nullptr;
  }
  const dim3 blocks(static_cast<unsigned>(most_tiles), static_cast<unsigned>(products.size()));
  constexpr int kDeep = kLoadsOfFewBlocks;
  const bool few = all_tiles <= kFewBlocks;
  const int ring = RingBytes(few ? kDeep : kLoads);
  const auto kernel = few ? (second ? FewRowsKernel<2, kMost, kDeep> : FewRowsKernel<1, kMost, kDeep>)
                          : (second ? FewRowsKernel<2, kMost, kLoads> : FewRowsKernel<1, kMost, kLoads>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ring);
  if (error != cudaSuccess) return error;
  return LaunchOverlapping(kernel, blocks, kThreads, static_cast<size_t>(ring), stream, launch);
}

bool Fits(const FewRowsProduct& p) {
  return p.rows >= 0 && FewRowsFit(p.rows, p.in) && p.in <= INT32_MAX / 2 && p.out <= INT32_MAX &&
         (p.stride == 0 || (p.stride >= p.in && p.stride % 8 == 0)) && row::Aligned(p.x, p.w, p.second);
}

}  // namespace

cudaError_t FewRows(std::span<const FewRowsProduct> products, cudaStream_t stream) {
  if (!std::all_of(products.begin(), products.end(), Fits)) return cudaErrorInvalidValue;
  std::array<FewRowsProduct, kManyProducts> some;
  size_t count = 0;
  const auto start = [&] {
    const std::span<const FewRowsProduct> now(some.data(), std::exchange(count, 0));
    if (now.empty()) return cudaSuccess;
    return now.size() <= kFewProducts ? Start<kFewProducts>(now, stream) : Start<kManyProducts>(now, stream);
  };
  for (const FewRowsProduct& p : products) {
    if (p.rows == 0 || p.out == 0) continue;
    some[count++] = p;
    if (count < some.size()) continue;
    if (const cudaError_t error = start(); error != cudaSuccess) return error;
  }
  return start();
}

}  // namespace refocus::kernels
