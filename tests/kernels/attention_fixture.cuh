// Inputs, runs and comparisons for attention_test.cu. A token's K and V depend on its position alone, so that any
// sharding of a context holds the same tokens.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "tests/kernels/attention_reference.cuh"

namespace refocus::kernels {

#define ASSERT_CUDA(call)                                                                  \
  do {                                                                                     \
    const cudaError_t cuda_error = (call);                                                 \
    ASSERT_EQ(cuda_error, cudaSuccess) << #call << ": " << cudaGetErrorString(cuda_error); \
  } while (false)

// Freshly allocated memory is all ones: NaN in every type used here.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t size = 0) : size_(size) {
    if (size == 0) return;
    if (cudaMalloc(&data_, size * sizeof(T)) != cudaSuccess) {
      ADD_FAILURE() << "cudaMalloc of " << size * sizeof(T) << " bytes";
      return;
    }
    Poison(0xff);
  }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(static_cast<int64_t>(host.size())) {
    if (size_ > 0) cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }

  void Poison(int byte) {
    if (size_ > 0) cudaMemset(data_, byte, size_ * sizeof(T));
  }
  T* get() const { return data_; }
  int64_t size() const { return size_; }
  std::vector<T> Host() const {
    std::vector<T> host(size_);
    if (size_ > 0) cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost);
    return host;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

using Bf16Buffer = DeviceBuffer<__nv_bfloat16>;

// About normal, mean 0, variance 1; a function of its arguments.
__host__ __device__ inline float Noise(uint64_t seed, uint64_t index) {
  uint64_t x = index * 0x9e3779b97f4a7c15u + seed * 0xd1342543de82ef95u;
  float sum = 0.0f;
  for (int i = 0; i < 2; ++i) {
    x ^= x >> 32;
    x *= 0xe9846af9b1a615du;
    x ^= x >> 29;
    x *= 0xe9846af9b1a615du;
    x ^= x >> 28;
    for (int part = 0; part < 4; ++part) sum += static_cast<float>((x >> (16 * part)) & 0xffff) / 65536.0f - 0.5f;
  }
  return sum * 1.2247449f;  // eight uniforms of variance 1/12
}

static __global__ void FillNoise(__nv_bfloat16* to, int64_t size, uint64_t seed, float gain) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = __float2bfloat16(gain * Noise(seed, i));
  }
}

// One extent: tokens at positions up to last_visible; NaN behind them and between the heads.
static __global__ void FillExtent(__nv_bfloat16* to, int64_t head_stride, int kv_heads, int head_dim, int64_t slots,
                                  int64_t first_index, int64_t shards, int64_t shard, int64_t last_visible,
                                  uint64_t seed) {
  const int64_t size = head_stride * kv_heads;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t head = i / head_stride;
    const int64_t slot = i % head_stride / head_dim;
    const int64_t column = i % head_stride % head_dim;
    const int64_t position = reference::PositionOf(first_index + slot, shards, shard);
    const bool written = slot < slots && position <= last_visible;
    to[i] = __float2bfloat16(written ? Noise(seed, (position * kv_heads + head) * head_dim + column) : NAN);
  }
}

// An extent that FillExtent wrote, in eight bits; what the codes stand for takes its place. Vectors with a NaN, as
// where nothing was written, get a scale of NaN. A thread a vector.
static __global__ void PackExtent(__nv_bfloat16* numbers, int64_t vectors, int head_dim, uint8_t* codes,
                                  uint16_t* scales) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < vectors; i += int64_t{gridDim.x} * blockDim.x) {
    __nv_bfloat16* const vector = numbers + i * head_dim;
    float most = 0.0f;
    bool nan = false;
    for (int c = 0; c < head_dim; ++c) {
      const float x = __bfloat162float(vector[c]);
      nan = nan || isnan(x);
      most = fmaxf(most, fabsf(x));
    }
    const __nv_bfloat16 scale = __float2bfloat16(nan ? NAN : most / 127.0f);
    scales[i] = __bfloat16_as_ushort(scale);
    for (int c = 0; c < head_dim; ++c) {
      const float x = __bfloat162float(vector[c]), step = __bfloat162float(scale);
      const float magnitude = nan ? 127.0f : most == 0.0f ? 0.0f : fminf(rintf(fabsf(x) / step), 127.0f);
      codes[i * head_dim + c] = static_cast<uint8_t>(static_cast<int>(magnitude) + (x < 0.0f ? 128 : 0));
      vector[c] = __float2bfloat16(x < 0.0f ? -magnitude * step : magnitude * step);
    }
  }
}

struct Case {
  int64_t rows = 1;
  int heads = 1;
  int kv_heads = 1;
  int head_dim = 64;
  int64_t keys = 64;  // tokens of the whole context
  int64_t shards = 1;
  std::vector<double> cuts = {0.0, 1.0};  // of each shard's tokens: extent i holds those from cuts[i] to cuts[i + 1]
  std::string order =
      "tail";         // tail: the last rows positions; random: any, repeated; early: the first ones; behind: all keys
  float gain = 1.0f;  // of q
  int64_t expected_keys = -1;  // -1: the truth
  uint64_t seed = 1;
  bool int8 = false;  // the kernels read K and V in eight bits, the references what these stand for

  std::string Describe() const {
    return "rows " + std::to_string(rows) + ", heads " + std::to_string(heads) + "/" + std::to_string(kv_heads) +
           " x " + std::to_string(head_dim) + ", keys " + std::to_string(keys) + ", shards " + std::to_string(shards) +
           ", extents " + std::to_string(cuts.size() - 1) + ", " + order + ", gain " + std::to_string(gain) +
           ", expected " + std::to_string(expected_keys) + ", seed " + std::to_string(seed) + (int8 ? ", int8" : "");
  }
};

// One shard's K and V on the device.
struct Shard {
  std::vector<Bf16Buffer> memory;
  AttentionShape shape;  // in bf16
  std::vector<DeviceBuffer<uint8_t>> codes;
  std::vector<DeviceBuffer<uint16_t>> scales;
  AttentionShape packed;  // in eight bits, if the case says so; else the same
};

struct Inputs {
  std::vector<int64_t> pos_host;
  DeviceBuffer<int64_t> pos;
  Bf16Buffer q;
  Bf16Buffer dout;
  std::vector<Shard> shards;
};

Inputs MakeInputs(const Case& c);

// Worst error of a run as a share of what rounding may do, and against the rms of the reference.
struct Worst {
  double share = 0.0;
  double of_rms = 0.0;
  std::string where;

  // NaN and inf count as infinitely wrong.
  void See(double got, double want, double bound, double rms, const std::string& what, int64_t index) {
    const double error = std::fabs(got - want);
    const double ratio = std::isfinite(error) ? error / bound : INFINITY;
    if (rms > 0 && error / rms > of_rms) of_rms = error / rms;
    if (ratio > share || where.empty()) {
      share = ratio;
      where = what + "[" + std::to_string(index) + "]: got " + std::to_string(got) + ", want " + std::to_string(want) +
              ", bound " + std::to_string(bound);
    }
  }
  void Merge(const Worst& other, const std::string& prefix) {
    if (other.of_rms > of_rms) of_rms = other.of_rms;
    if (other.share > share || where.empty()) {
      share = other.share;
      where = prefix + ": " + other.where;
    }
  }
};

struct AttendReference {
  std::vector<double> out, lse, out_abs, score_abs;
};
struct QueryGradReference {
  std::vector<double> dq, ds_abs, dot_abs;
};

AttendReference ReferenceAttend(const AttentionShape& shape, const Bf16Buffer& q);
QueryGradReference ReferenceQueryGrad(const AttentionShape& shape, const Bf16Buffer& q, const Bf16Buffer& dout,
                                      const DeviceBuffer<float>& lse, const DeviceBuffer<float>& row_dot);

// Partials added up in fp64 (absolute terms too).
AttendReference CombineReference(const std::vector<AttendReference>& parts, int head_dim);

// What bf16 rounding of the weights (2^-8) and fp32 sums may do to each element, given the sums of absolute terms.
Worst CompareAttend(const std::vector<float>& out, const std::vector<float>& lse, const AttendReference& want,
                    int head_dim);
Worst CompareQueryGrad(const std::vector<float>& dq, const QueryGradReference& want, const AttendReference& attend,
                       const std::vector<float>& lse, int head_dim);

bool SameBits(const std::vector<float>& a, const std::vector<float>& b);

struct PartialOut {
  std::vector<float> out;
  std::vector<float> lse;
};

struct Combined {
  PartialOut partial;
  std::vector<__nv_bfloat16> rounded;
};

// Attention and gradient run twice, with different bytes in the memory they are given; the bits must agree. A failed
// call is a fatal failure.
void RunAttend(const AttentionShape& shape, const Bf16Buffer& q, int sm_count, PartialOut* result);
void RunQueryGrad(const AttentionShape& shape, const Inputs& in, const DeviceBuffer<float>& lse,
                  const DeviceBuffer<float>& row_dot, int sm_count, std::vector<float>* result);
void RunCombine(const Case& c, const std::vector<PartialOut>& parts, Combined* result);

// rowsum(dout * out) of the combined attention, as the caller forms it.
std::vector<float> RowDot(const Bf16Buffer& dout, const std::vector<double>& out, int head_dim);

class Attention : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    cudaGetLastError();  // a missing driver is no failure
    if (error != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device: " << (error == cudaSuccess ? "none found" : cudaGetErrorString(error));
    }
    cudaDeviceGetAttribute(&sm_count_, cudaDevAttrMultiProcessorCount, 0);
  }
  // A test that left an error behind would make the next one fail.
  void TearDown() override {
    if (sm_count_ > 0) {
      EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    }
  }

  int sm_count_ = 0;
};

// Every shard forward, the combination, every shard backward: each against fp64. Stops after several failed cases and
// prints the worst errors.
void CheckAll(const std::vector<Case>& cases, int sm_count);
void Print(const char* what, const Worst& worst);

}  // namespace refocus::kernels
