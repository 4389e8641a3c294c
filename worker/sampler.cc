#include "worker/sampler.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace refocus {
namespace {

int64_t Choose(const float* logits, int64_t vocab, float max, double inverse_temperature, double u) {
  double total = 0.0;
  for (int64_t i = 0; i < vocab; ++i) total += std::exp((static_cast<double>(logits[i]) - max) * inverse_temperature);
  double rest = u * total;
  int64_t last = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double weight = std::exp((static_cast<double>(logits[i]) - max) * inverse_temperature);
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

at::Tensor MakeSampler(const SamplingConfig& sampling, int64_t vocab, const std::vector<int32_t>& prompt,
                       at::Device device) {
  SamplerState state;
  state.inverse_temperature = sampling.temperature > 0 ? 1.0 / sampling.temperature : 0.0;
  state.top_p = sampling.top_p;
  state.min_p_margin = sampling.min_p > 0 ? sampling.temperature * std::log(sampling.min_p)
                                          : -std::numeric_limits<double>::infinity();
  state.seed = sampling.seed;
  state.min_tokens = sampling.min_tokens;
  state.repetition = static_cast<float>(sampling.repetition_penalty);
  state.presence = static_cast<float>(sampling.presence_penalty);
  state.frequency = static_cast<float>(sampling.frequency_penalty);
  state.top_k = sampling.top_k;
  state.bias_count = static_cast<int32_t>(sampling.bias_ids.size());
  state.end_count = sampling.min_tokens > 0 ? static_cast<int32_t>(sampling.stop_ids.size()) : 0;
  REFOCUS_CHECK_EQ(sampling.bias_values.size(), sampling.bias_ids.size());

  std::vector<uint32_t> counts;
  if (state.repetition != 1.0f || state.presence != 0.0f || state.frequency != 0.0f) {
    counts.resize(vocab);
    for (const int32_t id : prompt) counts.at(id) = SamplerState::kInPrompt;
  }
  int64_t bytes = sizeof(SamplerState);
  const auto place = [&bytes](size_t count) {
    if (count == 0) return int64_t{0};
    const int64_t at = bytes;
    bytes += (static_cast<int64_t>(count) * 4 + 15) / 16 * 16;
    return at;
  };
  state.bias_ids = place(sampling.bias_ids.size());
  state.bias_values = place(sampling.bias_values.size());
  state.end_ids = place(state.end_count);
  state.counts = place(counts.size());
  at::Tensor memory = at::zeros({bytes}, at::kByte);
  uint8_t* const to = memory.data_ptr<uint8_t>();
  const auto copy = [to](int64_t at, const void* from, size_t count) {
    if (count > 0) std::memcpy(to + at, from, count * 4);
  };
  std::memcpy(to, &state, sizeof(state));
  copy(state.bias_ids, sampling.bias_ids.data(), sampling.bias_ids.size());
  copy(state.bias_values, sampling.bias_values.data(), sampling.bias_values.size());
  copy(state.end_ids, sampling.stop_ids.data(), state.end_count);
  copy(state.counts, counts.data(), counts.size());
  return memory.to(device);
}

int64_t SamplerAddress(const at::Tensor& sampler) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(sampler.data_ptr()));
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

Draw DrawToken(const float* logits, int64_t vocab, SamplerState& sampler) {
  const int64_t best = std::max_element(logits, logits + vocab) - logits;
  const double lse = LogSumExp(logits, vocab);
  if (!std::isfinite(lse)) return {};
  const double u = static_cast<double>(UniformBits(sampler.seed, sampler.index)) * 0x1.0p-53;
  const int64_t id = sampler.inverse_temperature > 0
                         ? Choose(logits, vocab, logits[best], sampler.inverse_temperature, u)
                         : best;
  ++sampler.index;
  return {id, static_cast<float>(logits[id] - lse)};
}

}  // namespace refocus
