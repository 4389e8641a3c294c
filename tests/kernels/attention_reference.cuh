// Attention written down naively in fp64 from the definition in worker/backend.h: every key of every extent is looked
// at, its position taken from its local index, visible iff that is not behind the row's. Beside each result stands the
// sum of the absolute terms, from which the tests derive what rounding may do.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention_shape.h"

namespace refocus::kernels::reference {

// All [rows, heads] or [rows, heads, head_dim], fp64.
struct AttendResult {
  double* out = nullptr;
  double* lse = nullptr;
  double* out_abs = nullptr;    // sum of weight * |v|
  double* score_abs = nullptr;  // largest scale * sum of |q k| over the visible keys
};

struct QueryGradResult {
  double* dq = nullptr;
  double* ds_abs = nullptr;   // scale * sum of |ds k|
  double* dot_abs = nullptr;  // scale * sum of P * (sum of |dout v| + |row_dot|) * |k|
};

__host__ __device__ inline int64_t PositionOf(int64_t local_index, int64_t shards, int64_t shard) {
  const int64_t block = local_index / 256;
  return (block * shards + shard) * 256 + local_index % 256;
}

__host__ __device__ inline bool Visible(const AttentionShape& s, const KvSlots& kv, int64_t slot, int64_t query_pos) {
  return PositionOf(kv.first_index + slot, s.shards, s.shard) <= query_pos;
}

inline constexpr int kThreads = 256;

// One block a (row, head). Keys one a thread for the scores, then one column a thread for the sums.

__device__ inline double Reduce(double x, bool maximum) {
  __shared__ double values[kThreads];
  __syncthreads();
  values[threadIdx.x] = x;
  __syncthreads();
  double total = values[0];
  for (int i = 1; i < kThreads; ++i) {
    if (maximum) {
      total = values[i] > total ? values[i] : total;
    } else {
      total += values[i];
    }
  }
  return total;
}

struct Dot {
  double sum = 0.0;
  double absolute = 0.0;
};

__host__ __device__ inline Dot DotProduct(const __nv_bfloat16* a, const __nv_bfloat16* b, int n) {
  Dot dot;
  for (int i = 0; i < n; ++i) {
    const double term = static_cast<double>(__bfloat162float(a[i])) * static_cast<double>(__bfloat162float(b[i]));
    dot.sum += term;
    dot.absolute += term < 0 ? -term : term;
  }
  return dot;
}

static __global__ void AttendKernel(AttentionShape s, const __nv_bfloat16* q, AttendResult r) {
  const int64_t index = blockIdx.x;
  const int64_t pos = s.pos[index / s.heads];
  const int kv_head = static_cast<int>(index % s.heads) / (s.heads / s.kv_heads);
  const __nv_bfloat16* q_row = q + index * s.head_dim;
  double high = -INFINITY;
  double score_abs = 0.0;
  for (int e = 0; e < s.extents; ++e) {
    const KvSlots& kv = s.kv[e];
    const auto* k = static_cast<const __nv_bfloat16*>(kv.k) + kv_head * kv.head_stride;
    for (int64_t i = threadIdx.x; i < kv.slots; i += kThreads) {
      if (!Visible(s, kv, i, pos)) continue;
      const Dot dot = DotProduct(q_row, k + i * s.head_dim, s.head_dim);
      high = fmax(high, dot.sum * s.scale);
      score_abs = fmax(score_abs, dot.absolute * s.scale);
    }
  }
  high = Reduce(high, true);
  score_abs = Reduce(score_abs, true);

  __shared__ double weights[kThreads];
  double sum = 0.0;
  double out = 0.0;
  double out_abs = 0.0;
  for (int e = 0; e < s.extents; ++e) {
    const KvSlots& kv = s.kv[e];
    const auto* k = static_cast<const __nv_bfloat16*>(kv.k) + kv_head * kv.head_stride;
    const auto* v = static_cast<const __nv_bfloat16*>(kv.v) + kv_head * kv.head_stride;
    for (int64_t first = 0; first < kv.slots; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      double weight = -1.0;  // not visible
      if (i < kv.slots && Visible(s, kv, i, pos)) {
        weight = exp(DotProduct(q_row, k + i * s.head_dim, s.head_dim).sum * s.scale - high);
      }
      sum += weight < 0.0 ? 0.0 : weight;
      __syncthreads();
      weights[threadIdx.x] = weight;
      __syncthreads();
      if (static_cast<int>(threadIdx.x) >= s.head_dim) continue;
#pragma unroll 8
      for (int j = 0; j < kThreads; ++j) {
        const int64_t slot = first + j < kv.slots ? first + j : kv.slots - 1;
        const double value = __bfloat162float(v[slot * s.head_dim + threadIdx.x]);
        if (weights[j] < 0.0) continue;
        out += weights[j] * value;
        out_abs += fabs(weights[j] * value);
      }
    }
  }
  sum = Reduce(sum, false);
  const bool none = high == -INFINITY;
  if (static_cast<int>(threadIdx.x) < s.head_dim) {
    r.out[index * s.head_dim + threadIdx.x] = none ? 0.0 : out / sum;
    r.out_abs[index * s.head_dim + threadIdx.x] = none ? 0.0 : out_abs / sum;
  }
  if (threadIdx.x == 0) {
    r.lse[index] = none ? -INFINITY : high + log(sum);
    r.score_abs[index] = score_abs;
  }
}

static __global__ void QueryGradKernel(AttentionShape s, const __nv_bfloat16* q, const __nv_bfloat16* dout,
                                       const float* lse, const float* row_dot, QueryGradResult r) {
  const int64_t index = blockIdx.x;
  const int64_t pos = s.pos[index / s.heads];
  const int kv_head = static_cast<int>(index % s.heads) / (s.heads / s.kv_heads);
  const __nv_bfloat16* q_row = q + index * s.head_dim;
  const __nv_bfloat16* dout_row = dout + index * s.head_dim;
  __shared__ double gradients[kThreads];
  __shared__ double dots[kThreads];
  double dq = 0.0;
  double ds_abs = 0.0;
  double dot_abs = 0.0;
  const double row_lse = lse[index];
  for (int e = 0; e < s.extents && row_lse != -INFINITY; ++e) {
    const KvSlots& kv = s.kv[e];
    const auto* k = static_cast<const __nv_bfloat16*>(kv.k) + kv_head * kv.head_stride;
    const auto* v = static_cast<const __nv_bfloat16*>(kv.v) + kv_head * kv.head_stride;
    for (int64_t first = 0; first < kv.slots; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      double ds = 0.0;
      double dot = -1.0;  // not visible
      if (i < kv.slots && Visible(s, kv, i, pos)) {
        const double weight = exp(DotProduct(q_row, k + i * s.head_dim, s.head_dim).sum * s.scale - row_lse);
        const Dot dweight = DotProduct(dout_row, v + i * s.head_dim, s.head_dim);
        ds = weight * (dweight.sum - static_cast<double>(row_dot[index]));
        dot = weight * (dweight.absolute + fabs(static_cast<double>(row_dot[index])));
      }
      __syncthreads();
      gradients[threadIdx.x] = ds;
      dots[threadIdx.x] = dot;
      __syncthreads();
      if (static_cast<int>(threadIdx.x) >= s.head_dim) continue;
#pragma unroll 8
      for (int j = 0; j < kThreads; ++j) {
        const int64_t slot = first + j < kv.slots ? first + j : kv.slots - 1;
        const double key = __bfloat162float(k[slot * s.head_dim + threadIdx.x]);
        if (dots[j] < 0.0) continue;
        dq += gradients[j] * key;
        ds_abs += fabs(gradients[j] * key);
        dot_abs += dots[j] * fabs(key);
      }
    }
  }
  if (static_cast<int>(threadIdx.x) < s.head_dim) {
    const int64_t at = index * s.head_dim + threadIdx.x;
    r.dq[at] = dq * s.scale;
    r.ds_abs[at] = ds_abs * s.scale;
    r.dot_abs[at] = dot_abs * s.scale;
  }
}

}  // namespace refocus::kernels::reference
