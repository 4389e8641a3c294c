// The arithmetic of combinations and sums, one part after the other: shared by what reads parts from this GPU's memory
// (combine.cu) and from the other GPUs (exchange.cu), whose results are the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"

namespace refocus::kernels {

__device__ __forceinline__ void StoreRounded(void* to, int64_t piece, const float4& x) {
  __nv_bfloat162* const rounded = static_cast<__nv_bfloat162*>(to) + piece * 2;
  rounded[0] = __floats2bfloat162_rn(x.x, x.y);
  rounded[1] = __floats2bfloat162_rn(x.z, x.w);
}

// A row and head, four columns, while parts are added up.
struct WeightedSum {
  float weight = 0.0f;
  float4 out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  __device__ __forceinline__ void Add(float w, float part_weight, const float4& part) {
    weight = fmaf(w, part_weight, weight);
    out.x = fmaf(w, part.x, out.x);
    out.y = fmaf(w, part.y, out.y);
    out.z = fmaf(w, part.z, out.z);
    out.w = fmaf(w, part.w, out.w);
  }

  __device__ __forceinline__ float4 Out() const {
    const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
    return make_float4(out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse);
  }

  // `high`: what the weights' exponents are relative to.
  __device__ __forceinline__ float Lse(float high) const { return weight == 0.0f ? -INFINITY : high + logf(weight); }

  __device__ __forceinline__ void Store(const CombineParams& p, int64_t row_head, int piece, int pieces,
                                        float high) const {
    const float4 y = Out();
    const int64_t at = row_head * pieces + piece;
    reinterpret_cast<float4*>(p.out)[at] = y;
    if (p.out_bf16 != nullptr) StoreRounded(p.out_bf16, at, y);
    if (piece == 0) p.lse[row_head] = Lse(high);
  }
};

// Parts in order; an lse of -inf leaves a part out, whatever `x` holds. Returns what the sum's weight is relative to.
template <int kParts>
__device__ __forceinline__ float AddInOrder(const float (&lse)[kParts], const float4 (&x)[kParts], WeightedSum* sum) {
  float high = -INFINITY;
#pragma unroll
  for (int i = 0; i < kParts; ++i) high = fmaxf(high, lse[i]);
  const float base = high == -INFINITY ? 0.0f : high;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if (lse[i] == -INFINITY) continue;  // left out whatever it holds; a NaN is kept
    sum->Add(expf(lse[i] - base), 1.0f, x[i]);
  }
  return high;
}

// Few parts: all loads of a row and head's four columns under way at once.
__device__ __forceinline__ float CombineFew(const CombineParams& p, int64_t row_head, int piece, WeightedSum* sum) {
  const int parts = static_cast<int>(p.parts);
  const int pieces = p.head_dim / 4;
  const int64_t row_heads = p.rows * p.heads;
  float lse[kPartsInOrder];
  float4 x[kPartsInOrder];
#pragma unroll
  for (int i = 0; i < kPartsInOrder; ++i) {
    // Behind the last part: that part again, as an empty one.
    const int part = i < parts ? i : parts - 1;
    lse[i] = i < parts ? p.part_lse[part * row_heads + row_head] : -INFINITY;
    x[i] = parts > 0 ? reinterpret_cast<const float4*>(p.part_out)[(part * row_heads + row_head) * pieces + piece]
                     : float4{};
  }
  return AddInOrder(lse, x, sum);
}

// Many parts: a block for a row and head and up to 128 columns. Warps take parts in turn, lanes four columns each, so
// that the loads of all parts are under way together; then warps are added up in order.
constexpr int kManyThreads = 512;
constexpr int kManyWarps = kManyThreads / 32;

struct ManyScratch {
  float highs[kManyWarps];
  float weights[kManyWarps];
  float4 outs[kManyWarps][32];
};

// The sum is that of warp 0's lanes with piece < pieces; of the others it means nothing. Returns what its weight is
// relative to. Another use of `scratch` stands behind a barrier.
__device__ __forceinline__ float CombineMany(const CombineParams& p, int64_t row_head, int piece, ManyScratch& scratch,
                                             WeightedSum* sum) {
  constexpr int kAhead = 4;  // parts of a warp
  const int pieces = p.head_dim / 4;
  const int parts = static_cast<int>(p.parts);
  const int64_t row_heads = p.rows * p.heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* const lse_from = p.part_lse + row_head;
  const float4* const from = reinterpret_cast<const float4*>(p.part_out) + row_head * pieces + piece;
  float lse[kAhead];
  float4 x[kAhead];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int part = first + i * kManyWarps;
      lse[i] = part < parts ? lse_from[part * row_heads] : -INFINITY;
      x[i] = part < parts && piece < pieces ? from[part * row_heads * pieces] : float4{};
    }
  };
  load(warp);
  float high = -INFINITY;
  for (int i = threadIdx.x; i < parts; i += kManyThreads) high = fmaxf(high, lse_from[i * row_heads]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, mask));
  if (lane == 0) scratch.highs[warp] = high;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kManyWarps; ++i) high = fmaxf(high, scratch.highs[i]);
  const float base = high == -INFINITY ? 0.0f : high;
  for (int part = warp; part < parts; part += kAhead * kManyWarps) {
    if (part != warp) load(part);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (lse[i] != -INFINITY) sum->Add(expf(lse[i] - base), 1.0f, x[i]);  // as above
    }
  }
  if (lane == 0) scratch.weights[warp] = sum->weight;
  scratch.outs[warp][lane] = sum->out;
  __syncthreads();
  if (warp != 0) return high;
#pragma unroll
  for (int i = 1; i < kManyWarps; ++i) sum->Add(1.0f, scratch.weights[i], scratch.outs[i][lane]);
  return high;
}

__device__ __forceinline__ void AddTo(float4& total, const float4& x) {
  total.x += x.x;
  total.y += x.y;
  total.z += x.z;
  total.w += x.w;
}

}  // namespace refocus::kernels
