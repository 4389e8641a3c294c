// The arithmetic of combinations and sums, one part after the other: shared by what reads parts from this GPU's memory
// (combine.cu) and from the other GPUs (exchange.cu), whose results are the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention.h"

namespace refocus::kernels {

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

  // `high`: what the weights' exponents are relative to.
  __device__ __forceinline__ void Store(const CombineParams& p, int64_t row_head, int piece, int pieces,
                                        float high) const {
    const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
    const float4 y = make_float4(out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse);
    const int64_t at = row_head * pieces + piece;
    reinterpret_cast<float4*>(p.out)[at] = y;
    if (p.out_bf16 != nullptr) {
      __nv_bfloat162* rounded = reinterpret_cast<__nv_bfloat162*>(p.out_bf16) + at * 2;
      rounded[0] = __floats2bfloat162_rn(y.x, y.y);
      rounded[1] = __floats2bfloat162_rn(y.z, y.w);
    }
    if (piece == 0) p.lse[row_head] = weight == 0.0f ? -INFINITY : high + logf(weight);
  }
};

// Parts in order; an lse of -inf leaves a part out, whatever `x` holds.
template <int kParts>
__device__ __forceinline__ void CombineInOrder(const float (&lse)[kParts], const float4 (&x)[kParts],
                                               const CombineParams& p, int64_t row_head, int piece, int pieces) {
  float high = -INFINITY;
#pragma unroll
  for (int i = 0; i < kParts; ++i) high = fmaxf(high, lse[i]);
  const float base = high == -INFINITY ? 0.0f : high;
  WeightedSum sum;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if (lse[i] == -INFINITY) continue;  // left out whatever it holds; a NaN is kept
    sum.Add(expf(lse[i] - base), 1.0f, x[i]);
  }
  sum.Store(p, row_head, piece, pieces, high);
}

__device__ __forceinline__ void AddTo(float4& total, const float4& x) {
  total.x += x.x;
  total.y += x.y;
  total.z += x.z;
  total.w += x.w;
}

}  // namespace refocus::kernels
