// 64-bit fingerprints of tensor bytes, to compare ranks and to prove that something did not change. Not cryptographic.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace refocus {

// t contiguous; `seed` chains hashes. xxHash3 of the bytes on the CPU; on a GPU of the exact integer sums of each row's
// elements, so that a delta of gigabytes is read once where it lies (not comparable with the CPU's hash).
uint64_t HashTensor(const at::Tensor& t, uint64_t seed = 0);
uint64_t HashBytes(const void* data, int64_t bytes, uint64_t seed = 0);

}  // namespace refocus
