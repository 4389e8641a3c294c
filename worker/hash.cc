#include "worker/hash.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/check.h"

namespace refocus {

uint64_t HashTensor(const at::Tensor& t, uint64_t seed) {
  REFOCUS_CHECK(t.is_contiguous());
  return XXH3_64bits_withSeed(t.data_ptr(), static_cast<size_t>(t.nbytes()), seed);
}

}  // namespace refocus
