// SwiGLU and its gradient, element by element, and the row dot product that the attention's gradient needs.
#include "kernels/rowwise.cuh"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

using row::Bf16;
using row::Four;

constexpr int kThreads = 256;
constexpr int kVector = 8;

struct Eight {
  float v[kVector];
};

__device__ Eight Unpack(const uint4& raw) {
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
  Eight result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result.v[i] = row::Unpack(pairs[i / 2], i % 2);
  return result;
}

__device__ uint4 Pack(const Eight& a) {
  return {row::Pack(a.v[0], a.v[1]), row::Pack(a.v[2], a.v[3]), row::Pack(a.v[4], a.v[5]), row::Pack(a.v[6], a.v[7])};
}

__device__ float Sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

__device__ float SiluTimes(float gate, float up) { return gate * Sigmoid(gate) * up; }

struct GateUp {
  float gate, up;
};

__device__ GateUp SiluTimesGrad(float dact, float gate, float up) {
  const float s = Sigmoid(gate);
  return {dact * up * s * (1.0f + gate * (1.0f - s)), dact * gate * s};
}

// Vectors first, then the elements behind the last whole one; `vectors` is 0 when the pointers are not aligned.
__global__ void __launch_bounds__(kThreads)
    SiluMulKernel(const Bf16* gate, const Bf16* up, int64_t vectors, int64_t count, Bf16* act) {
  BeginInTurn();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < vectors; i += step) {
    const Eight g = Unpack(reinterpret_cast<const uint4*>(gate)[i]);
    const Eight u = Unpack(reinterpret_cast<const uint4*>(up)[i]);
    Eight a;
#pragma unroll
    for (int j = 0; j < kVector; ++j) a.v[j] = SiluTimes(g.v[j], u.v[j]);
    reinterpret_cast<uint4*>(act)[i] = Pack(a);
  }
  for (int64_t i = vectors * kVector + first; i < count; i += step)
    act[i] = __float2bfloat16_rn(SiluTimes(__bfloat162float(gate[i]), __bfloat162float(up[i])));
}

// No __restrict__: the outputs may be the inputs' memory, and a thread reads its elements before it writes them.
__global__ void __launch_bounds__(kThreads) SiluMulGradKernel(const Bf16* dact, const Bf16* gate, const Bf16* up,
                                                              int64_t vectors, int64_t count, Bf16* dgate, Bf16* dup) {
  BeginInTurn();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < vectors; i += step) {
    const Eight d = Unpack(reinterpret_cast<const uint4*>(dact)[i]);
    const Eight g = Unpack(reinterpret_cast<const uint4*>(gate)[i]);
    const Eight u = Unpack(reinterpret_cast<const uint4*>(up)[i]);
    Eight a, b;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const GateUp result = SiluTimesGrad(d.v[j], g.v[j], u.v[j]);
      a.v[j] = result.gate;
      b.v[j] = result.up;
    }
    reinterpret_cast<uint4*>(dgate)[i] = Pack(a);
    reinterpret_cast<uint4*>(dup)[i] = Pack(b);
  }
  for (int64_t i = vectors * kVector + first; i < count; i += step) {
    const GateUp result = SiluTimesGrad(__bfloat162float(dact[i]), __bfloat162float(gate[i]), __bfloat162float(up[i]));
    dgate[i] = __float2bfloat16_rn(result.gate);
    dup[i] = __float2bfloat16_rn(result.up);
  }
}

int64_t BlocksFor(int64_t vectors, int64_t count) {
  const int64_t tail = count - vectors * kVector;
  const int64_t blocks = row::CeilDiv(vectors > tail ? vectors : tail, kThreads);
  return blocks < row::kMaxBlocks ? blocks : row::kMaxBlocks;
}

// A group of `width` lanes takes one row.
template <bool kFour>
__global__ void __launch_bounds__(kThreads)
    RowDotKernel(const Bf16* dout, const float* out, int64_t rows, int head_dim, int width, float* dot) {
  BeginInTurn();
  const int groups = kThreads / width;
  const int lane = threadIdx.x % width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  // Lanes of one warp leave the loop together: they shuffle.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups; first < rows; first += step) {
    const int64_t r = first + threadIdx.x / width;
    float sum = 0.0f;
    if (r < rows) {
      const Bf16* a = dout + r * head_dim;
      const float* b = out + r * head_dim;
      if constexpr (kFour) {
#pragma unroll 2
        for (int i = 4 * lane; i < head_dim; i += 4 * width) {
          const Four x = row::Load(a + i), y = row::Load(b + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum += x.v[j] * y.v[j];
        }
      } else {
        for (int i = lane; i < head_dim; i += width) sum += __bfloat162float(a[i]) * b[i];
      }
    }
    sum = row::GroupSum(sum, width);
    if (r < rows && lane == 0) dot[r] = sum;
  }
}

}  // namespace

cudaError_t SiluMul(const void* gate, const void* up, int64_t count, void* act, cudaStream_t stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const int64_t vectors = row::Aligned(gate, up, act) ? count / kVector : 0;
  return row::Launch(SiluMulKernel, BlocksFor(vectors, count), kThreads, 0, stream, static_cast<const Bf16*>(gate),
                     static_cast<const Bf16*>(up), vectors, count, static_cast<Bf16*>(act));
}

cudaError_t SiluMulGrad(const void* dact, const void* gate, const void* up, int64_t count, void* dgate, void* dup,
                        cudaStream_t stream) {
  if (count < 0) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const int64_t vectors = row::Aligned(dact, gate, up, dgate, dup) ? count / kVector : 0;
  return row::Launch(SiluMulGradKernel, BlocksFor(vectors, count), kThreads, 0, stream, static_cast<const Bf16*>(dact),
                     static_cast<const Bf16*>(gate), static_cast<const Bf16*>(up), vectors, count,
                     static_cast<Bf16*>(dgate), static_cast<Bf16*>(dup));
}

cudaError_t RowDot(const void* dout, const float* out, int64_t rows, int head_dim, float* dot, cudaStream_t stream) {
  if (rows < 0 || head_dim <= 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const bool four = head_dim % 4 == 0 && row::Aligned(dout, out);
  const int width = row::GroupWidth(four ? row::CeilDiv(head_dim, 8) : head_dim);
  const int64_t blocks = row::CeilDiv(rows, kThreads / width);
  return row::Launch(four ? RowDotKernel<true> : RowDotKernel<false>,
                     blocks < row::kMaxBlocks ? blocks : row::kMaxBlocks, kThreads, 0, stream,
                     static_cast<const Bf16*>(dout), out, rows, head_dim, width, dot);
}

}  // namespace refocus::kernels
