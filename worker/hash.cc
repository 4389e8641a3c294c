#include "worker/hash.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/sum.h>

#include "base/check.h"

namespace refocus {

uint64_t HashTensor(const at::Tensor& t, uint64_t seed) {
  REFOCUS_CHECK(t.is_contiguous());
  if (!t.is_cpu()) {
    const at::ScalarType bits = t.element_size() == 4 ? at::kInt : t.element_size() == 2 ? at::kShort : at::kByte;
    const at::Tensor rows = t.dim() == 0 ? t.view({1}) : t;
    return HashTensor(at::sum(rows.view(bits), {-1}, /*keepdim=*/false, at::kLong).cpu(), seed);
  }
  return HashBytes(t.data_ptr(), static_cast<int64_t>(t.nbytes()), seed);
}

uint64_t HashBytes(const void* data, int64_t bytes, uint64_t seed) {
  return XXH3_64bits_withSeed(data, static_cast<size_t>(bytes), seed);
}

}  // namespace refocus
