#include "worker/random_weights.h"

namespace refocus {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
constexpr float kWidth = 0.069282032f;  // 0.02 * sqrt(12)

uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace

uint64_t RandomKey(uint64_t seed, std::string_view tensor_name) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : tensor_name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
  return Mix(hash ^ Mix(seed));
}

void RandomValues(uint64_t key, int64_t first, int64_t count, c10::BFloat16* out) {
  uint64_t counter = key + static_cast<uint64_t>(first) * kGolden;
  for (int64_t i = 0; i < count; ++i, counter += kGolden) {
    const auto top = static_cast<int32_t>(Mix(counter) >> 40);
    // All but the last product is exact.
    out[i] = static_cast<c10::BFloat16>((static_cast<float>(top) * 0x1p-24f - 0.5f) * kWidth);
  }
}

}  // namespace refocus
