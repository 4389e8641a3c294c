#include "worker/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace refocus {
namespace {

uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

int64_t Draw(const float* logits, int64_t vocab, float max, double temperature, double u) {
  double total = 0.0;
  for (int64_t i = 0; i < vocab; ++i) total += std::exp((static_cast<double>(logits[i]) - max) / temperature);
  double rest = u * total;
  int64_t last = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double weight = std::exp((static_cast<double>(logits[i]) - max) / temperature);
    if (weight <= 0.0) continue;
    last = i;  // rounding may leave a rest behind the last token that has any weight
    if ((rest -= weight) < 0.0) break;
  }
  return last;
}

// NaN or infinite unless all logits are numbers or -inf and one is finite.
double LogSumExp(const float* values, int64_t count) {
  const float max = *std::max_element(values, values + count);
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += std::exp(static_cast<double>(values[i]) - max);
  return max + std::log(total);
}

}  // namespace

double UniformAt(uint64_t seed, int64_t index) {
  return static_cast<double>(Mix(Mix(seed) ^ static_cast<uint64_t>(index)) >> 11) * 0x1.0p-53;
}

void AddTopLogprobs(const at::Tensor& logits, int64_t count, Token& token) {
  const int64_t vocab = logits.numel();
  const float* values = logits.const_data_ptr<float>();
  const double lse = LogSumExp(values, vocab);
  std::vector<int32_t> ids(vocab);
  std::iota(ids.begin(), ids.end(), 0);
  const int64_t top = std::min(count, vocab);
  std::partial_sort(ids.begin(), ids.begin() + top, ids.end(),
                    [&](int32_t a, int32_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
  for (int64_t i = 0; i < top; ++i) {
    token.top_ids.push_back(ids[i]);
    token.top_logprobs.push_back(static_cast<float>(values[ids[i]] - lse));
  }
}

Token SampleToken(const at::Tensor& logits, const SamplingConfig& sampling, int64_t index) {
  REFOCUS_CHECK(logits.is_contiguous());
  const int64_t vocab = logits.numel();
  const float* values = logits.const_data_ptr<float>();
  Token token;
  token.id = -1;
  const int64_t best = std::max_element(values, values + vocab) - values;
  const float max = values[best];
  const double lse = LogSumExp(values, vocab);
  if (!std::isfinite(lse)) return token;

  const int64_t id = sampling.temperature > 0.0f
                         ? Draw(values, vocab, max, sampling.temperature, UniformAt(sampling.seed, index))
                         : best;
  token.id = static_cast<int32_t>(id);
  token.logprob = static_cast<float>(values[id] - lse);
  if (sampling.top_logprobs > 0) AddTopLogprobs(logits, sampling.top_logprobs, token);
  return token;
}

}  // namespace refocus
