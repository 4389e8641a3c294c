// Next-token cross-entropy: one block a row, which it reads once for the loss and once more for the gradient.
#include <cfloat>

#include "kernels/rowwise.cuh"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

using row::Bf16;

constexpr int kMaxThreads = 1024;
constexpr int kUnroll = 4;  // vectors that a thread has on their way

template <int kWidth>
struct Vector {
  float v[kWidth];
};

template <int kWidth>
__device__ Vector<kWidth> LoadVector(const float* p) {
  if constexpr (kWidth == 4) {
    const float4 raw = __ldg(reinterpret_cast<const float4*>(p));
    return {raw.x, raw.y, raw.z, raw.w};
  } else {
    return {__ldg(p)};
  }
}

template <int kWidth>
__device__ void StoreVector(Bf16* p, const Vector<kWidth>& a) {
  if constexpr (kWidth == 4) {
    *reinterpret_cast<uint2*>(p) = make_uint2(row::Pack(a.v[0], a.v[1]), row::Pack(a.v[2], a.v[3]));
  } else {
    *p = __float2bfloat16_rn(a.v[0]);
  }
}

// What a thread knows of a row. The largest value starts at the lowest finite one, so that -inf never meets -inf.
struct Online {
  float max = -FLT_MAX;
  float sum = 0.0f;     // of exp(value - max)
  bool beaten = false;  // an id before the target is as large, or any is larger
};

template <int kWidth>
__device__ void Take(const Vector<kWidth> (&values)[kUnroll], const int (&ids)[kUnroll], int target, float at_target,
                     Online& state) {
  float max = state.max;
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) max = fmaxf(max, values[k].v[j]);
  }
  float sum = state.sum * __expf(state.max - max);
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float value = values[k].v[j];
      sum += __expf(value - max);
      state.beaten |= ids[k] + j < target ? value >= at_target : value > at_target;
    }
  }
  state.max = max;
  state.sum = sum;
}

template <int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 1) CrossEntropyKernel(CrossEntropyParams p) {
  BeginInTurn();
  __shared__ float max_scratch[row::kWarp], sum_scratch[row::kWarp];
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * p.vocab;
  const float* logits = p.logits + offset;
  const int vectors = static_cast<int>(p.vocab / kWidth);
  const int stride = blockDim.x;
  const int rounds = (vectors + kUnroll * stride - 1) / (kUnroll * stride);
  const int target = static_cast<int>(p.targets[blockIdx.x]);
  const float at_target = logits[target];

  Online state;
  for (int round = 0; round < rounds; ++round) {
    Vector<kWidth> values[kUnroll];
    int ids[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = (round * kUnroll + k) * stride + threadIdx.x;
      ids[k] = i * kWidth;
      if (i < vectors) {
        values[k] = LoadVector<kWidth>(logits + ids[k]);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) values[k].v[j] = -INFINITY;
        ids[k] = INT32_MAX - kWidth;  // behind every target
      }
    }
    Take<kWidth>(values, ids, target, at_target, state);
  }
  const float max = row::BlockMax(state.max, max_scratch);
  const float sum = row::BlockSum(state.sum * __expf(state.max - max), sum_scratch);
  const bool beaten = __syncthreads_or(state.beaten) != 0;
  if (threadIdx.x == 0) {
    const float loss = logf(sum) + (max - at_target);
    p.loss[blockIdx.x] = loss;
    if (p.greedy != nullptr) p.greedy[blockIdx.x] = beaten || loss != loss ? 0.0f : 1.0f;
  }
  if (p.dlogits == nullptr) return;

  Bf16* dlogits = static_cast<Bf16*>(p.dlogits) + offset;
  const float scale = p.grad_scale / sum;
  // Backwards: what was read last is still in the cache.
  for (int round = rounds - 1; round >= 0; --round) {
    Vector<kWidth> values[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = (round * kUnroll + k) * stride + threadIdx.x;
      if (i < vectors) values[k] = LoadVector<kWidth>(logits + static_cast<int64_t>(i) * kWidth);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = (round * kUnroll + k) * stride + threadIdx.x;
      if (i >= vectors) continue;
      Vector<kWidth> d;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        d.v[j] = __expf(values[k].v[j] - max) * scale;
        if (i * kWidth + j == target) d.v[j] -= p.grad_scale;
      }
      StoreVector<kWidth>(dlogits + static_cast<int64_t>(i) * kWidth, d);
    }
  }
}

}  // namespace

cudaError_t CrossEntropy(const CrossEntropyParams& params, cudaStream_t stream) {
  if (params.rows < 0 || params.vocab <= 0 || params.vocab > (1 << 30)) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  const bool vector = params.vocab % 4 == 0 && row::Aligned(params.logits, params.dlogits);
  const int threads = params.vocab >= 8192 ? kMaxThreads : 128;
  return row::Launch(vector ? CrossEntropyKernel<4> : CrossEntropyKernel<1>, params.rows, threads, 0, stream, params);
}

}  // namespace refocus::kernels
