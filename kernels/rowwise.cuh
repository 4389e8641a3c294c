// What the row-wise kernels share: accesses of four neighbouring elements, reductions in a fixed order, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/overlap.cuh"

namespace refocus::kernels::row {

inline constexpr int kWarp = 32;
inline constexpr int64_t kMaxBlocks = int64_t{1} << 20;  // of kernels that stride over what is left

using Bf16 = __nv_bfloat16;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 16-byte accesses need this of every pointer; rows follow when the row length is a multiple of the vector.
template <typename... Pointers>
bool Aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// The smallest power of two that is at least n, at most a warp.
inline int GroupWidth(int64_t n) {
  int width = 1;
  while (width < n && width < kWarp) width *= 2;
  return width;
}

// Kernels launched so obey kernels/overlap.cuh.
template <typename... Expected, typename... Actual>
cudaError_t Launch(void (*kernel)(Expected...), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
                   Actual&&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return LaunchOverlapping(kernel, dim3(static_cast<unsigned>(blocks)), threads, static_cast<size_t>(shared_bytes), stream,
                           static_cast<Actual&&>(arguments)...);
}

__device__ inline float Unpack(uint32_t pair, int which) {
  return __uint_as_float(which == 0 ? pair << 16 : pair & 0xffff0000u);
}

__device__ inline uint32_t Pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Four neighbouring elements: neighbouring lanes then read and write whole sectors, in fp32 and in bf16.
struct Four {
  float v[4];
};

__device__ inline Four Load(const float* p) {
  const float4 raw = *reinterpret_cast<const float4*>(p);
  return {raw.x, raw.y, raw.z, raw.w};
}

__device__ inline Four Load(const Bf16* p) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  return {Unpack(raw.x, 0), Unpack(raw.x, 1), Unpack(raw.y, 0), Unpack(raw.y, 1)};
}

__device__ inline void Store(float* p, const Four& a) {
  *reinterpret_cast<float4*>(p) = make_float4(a.v[0], a.v[1], a.v[2], a.v[3]);
}

__device__ inline void Store(Bf16* p, const Four& a) {
  *reinterpret_cast<uint2*>(p) = make_uint2(Pack(a.v[0], a.v[1]), Pack(a.v[2], a.v[3]));
}

// Sum over aligned groups of `width` lanes (a power of two); all lanes of the warp take part.
__device__ inline float GroupSum(float value, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

template <typename T>
__device__ inline T WarpSum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// Sum over the block, the same bits in every thread. `scratch` has an entry per warp and is free again when the
// caller has synchronized. blockDim.x is a multiple of the warp.
template <typename T>
__device__ inline T BlockSum(T value, T* scratch) {
  value = WarpSum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; ++i) sum += scratch[i];
  return sum;
}

// The largest value of the block; NaN is passed over.
__device__ inline float BlockMax(float value, float* scratch) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, mask));
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float largest = scratch[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / kWarp; ++i) largest = fmaxf(largest, scratch[i]);
  return largest;
}

}  // namespace refocus::kernels::row
