// What the tests of the row-wise kernels share: device memory with guards, bf16 on the host, comparison with fp64.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace refocus::kernels {

using Bits = uint16_t;  // of one bf16

inline Bits ToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return static_cast<Bits>(bits >> 16 | 0x40);
  return static_cast<Bits>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float FromBf16(Bits bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline double Wide(Bits bits) { return FromBf16(bits); }
inline double Wide(float value) { return value; }

#define REFOCUS_CUDA(call)                                                         \
  do {                                                                             \
    const cudaError_t error_ = (call);                                             \
    ASSERT_EQ(error_, cudaSuccess) << #call << ": " << cudaGetErrorString(error_); \
  } while (false)

// Elements in device memory between two guards, every byte 0xff (NaN in fp32 and bf16, -1 in integers) until written.
// `shift` elements off a 256-byte boundary.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count, int64_t shift = 0) : count_(count), shift_(shift) {
    const size_t bytes = static_cast<size_t>(count + shift) * sizeof(T) + 2 * kGuard;
    if (cudaMalloc(&base_, bytes) != cudaSuccess || cudaMemset(base_, 0xff, bytes) != cudaSuccess) {
      ADD_FAILURE() << "device memory: " << bytes << " bytes";
    }
  }
  explicit DeviceArray(const std::vector<T>& values, int64_t shift = 0)
      : DeviceArray(static_cast<int64_t>(values.size()), shift) {
    cudaMemcpy(get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(base_); }

  T* get() { return reinterpret_cast<T*>(static_cast<char*>(base_) + kGuard) + shift_; }

  // Waits for the device; fails the test when the kernel failed or wrote beside the elements.
  std::vector<T> Download() {
    const cudaError_t error = cudaDeviceSynchronize();
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    std::vector<unsigned char> raw(static_cast<size_t>(count_ + shift_) * sizeof(T) + 2 * kGuard);
    EXPECT_EQ(cudaMemcpy(raw.data(), base_, raw.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    const size_t begin = kGuard + static_cast<size_t>(shift_) * sizeof(T);
    const size_t end = begin + static_cast<size_t>(count_) * sizeof(T);
    for (size_t i = 0; i < raw.size(); ++i) {
      if (raw[i] == 0xff || (i >= begin && i < end)) continue;
      ADD_FAILURE() << "written outside: byte " << static_cast<int64_t>(i) - static_cast<int64_t>(begin) << " of "
                    << end - begin;
      break;
    }
    std::vector<T> values(static_cast<size_t>(count_));
    if (count_ > 0) std::memcpy(values.data(), raw.data() + begin, end - begin);
    return values;
  }

 private:
  static constexpr size_t kGuard = 256;
  int64_t count_;
  int64_t shift_;
  void* base_ = nullptr;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  float Normal() { return normal_(engine_); }
  int64_t Below(int64_t limit) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(limit)); }
  std::vector<float> Floats(int64_t count, float scale = 1.0f) {
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(scale * Normal());
    return values;
  }
  std::vector<Bits> Bf16s(int64_t count, float scale = 1.0f) {
    std::vector<Bits> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(ToBf16(scale * Normal()));
    return values;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// Rounding to bf16 is off by at most half of the last of eight bits.
constexpr double kBf16 = 0x1p-8 * 1.01;

// |got - want| <= relative * |want| + absolute for every element; prints the worst one either way.
template <typename T>
void ExpectNear(const std::string& what, const std::vector<T>& got, const std::vector<double>& want, double relative,
                double absolute) {
  ASSERT_EQ(got.size(), want.size()) << what;
  size_t worst = 0;
  double largest = -1.0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(Wide(got[i]) - want[i]) / (relative * std::abs(want[i]) + absolute);
    if (largest < 0.0 || error > largest || std::isnan(error)) {
      worst = i;
      largest = error;
    }
    if (std::isnan(error)) break;
  }
  if (want.empty()) return;
  std::printf("%-58s worst %.3f of the bound at %zu: got %.9g want %.9g\n", what.c_str(), largest, worst,
              Wide(got[worst]), want[worst]);
  EXPECT_LE(largest, 1.0) << what << ": element " << worst << " of " << want.size() << ": got " << Wide(got[worst])
                          << ", want " << want[worst];
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

class RowwiseTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
};

}  // namespace refocus::kernels
