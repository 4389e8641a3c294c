// A block computes 16 outputs of all rows of a product; its warps share the inner dimension, 32 elements at a time in
// turn, so that together they read whole stretches of 16 matrix rows. Tensor cores do the arithmetic, since eight rows
// then cost no more instructions than one; the weights go from memory to registers as the left factor. Its columns may
// come in any order as long as x's come in the same: every lane takes 8 neighbouring elements in one access where the
// instruction has pairs (kernels/mma.cuh).
//
// What counts is that loads are always under way: each warp holds a ring of them, and a launch begins to load weights
// while the kernel before it still runs (programmatic dependent launch), which hides what 250 launches a token cost.
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
constexpr int kLoads = 4;   // of each matrix row that a lane has under way, over all matrices

// Of one launch: most have one or two products, which should not pay for the parameters of many.
constexpr size_t kFewProducts = 2;
constexpr size_t kManyProducts = 32;

template <size_t kMost>
struct Launch {
  FewRowsProduct product[kMost];
};

// Weights are read once: past the first cache, and not to be kept.
__device__ __forceinline__ uint4 Stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

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
  __device__ TileRows(const void* w, int64_t first, int64_t out, int64_t in) {
    if (w == nullptr) return;
    if (first < out) low = static_cast<const row::Bf16*>(w) + first * in;
    if (first + 8 < out) high = static_cast<const row::Bf16*>(w) + (first + 8) * in;
  }
};

__device__ __forceinline__ uint4 StreamOr0(const row::Bf16* from, int k, int in) {
  return from != nullptr && k < in ? Stream(from + k) : make_uint4(0, 0, 0, 0);
}

// sums[m] += matrix m's rows . x, for every m.
template <int kMatrices>
__device__ __forceinline__ void Walk(const TileRows (&w)[kMatrices], const row::Bf16* x, int in,
                                     float (&sums)[kMatrices][4]) {
  constexpr int kRing = kLoads / kMatrices;
  const int lane = threadIdx.x % row::kWarp;
  int k = threadIdx.x / row::kWarp * kDepth + lane % 4 * 8;
  uint4 low[kRing][kMatrices], high[kRing][kMatrices], v[kRing];
#pragma unroll
  for (int i = 0; i < kRing; ++i) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      low[i][m] = StreamOr0(w[m].low, k + i * kStride, in);
      high[i][m] = StreamOr0(w[m].high, k + i * kStride, in);
    }
  }
  // Only what is above may run beside the kernel that makes x.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const auto rows = [&](int at) {
    return x != nullptr && at < in ? *reinterpret_cast<const uint4*>(x + at) : make_uint4(0, 0, 0, 0);
  };
#pragma unroll
  for (int i = 0; i < kRing; ++i) v[i] = rows(k + i * kStride);
  for (const int own = lane % 4 * 8; k - own < in; k += kRing * kStride) {
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      const int next = k + (kRing + i) * kStride;
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) Multiply(sums[m], low[i][m], high[i][m], v[i]);
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        low[i][m] = StreamOr0(w[m].low, next, in);
        high[i][m] = StreamOr0(w[m].high, next, in);
      }
      v[i] = rows(next);
    }
  }
}

// kMatrices: 2 where a product of the launch has a second matrix. Grid: tiles of the longest output, products.
template <int kMatrices, size_t kMost>
__global__ void __launch_bounds__(kWarps* row::kWarp) FewRowsKernel(const __grid_constant__ Launch<kMost> launch) {
  asm volatile("griddepcontrol.launch_dependents;");
  const FewRowsProduct& p = launch.product[blockIdx.y];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  if (first >= p.out) return;
  const int lane = threadIdx.x % row::kWarp, warp = threadIdx.x / row::kWarp;
  const int g = lane / 4;

  float sums[kMatrices][4] = {};
  TileRows w[kMatrices];
  w[0] = TileRows(p.w, first + g, p.out, p.in);
  if (kMatrices == 2) w[kMatrices - 1] = TileRows(p.second, first + g, p.out, p.in);
  Walk(w, g < p.rows ? static_cast<const row::Bf16*>(p.x) + g * p.in : nullptr, static_cast<int>(p.in), sums);

  __shared__ float shared[kWarps][kMatrices][kTile][kFewRows];
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
  int64_t longest = 0;
  bool second = false;
  for (const FewRowsProduct& p : products) {
    longest = std::max(longest, p.out);
    second = second || p.second != nullptr;
  }
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(row::CeilDiv(longest, kTile)), static_cast<unsigned>(products.size()));
  config.blockDim = dim3(kWarps * row::kWarp);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return second ? cudaLaunchKernelEx(&config, FewRowsKernel<2, kMost>, launch)
                : cudaLaunchKernelEx(&config, FewRowsKernel<1, kMost>, launch);
}

bool Fits(const FewRowsProduct& p) {
  return p.rows >= 0 && FewRowsFit(p.rows, p.in) && p.in <= INT32_MAX / 2 && p.out <= INT32_MAX &&
         row::Aligned(p.x, p.w, p.second);
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
