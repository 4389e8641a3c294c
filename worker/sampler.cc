#include "worker/sampler.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "base/check.h"

namespace refocus {
namespace {

// A list that lies behind the sampler.
template <typename T>
const T* List(const SamplerState& s, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(&s) + offset);
}
template <typename T>
T* List(SamplerState& s, int64_t offset) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(&s) + offset);
}

// Of a list of `count` values of four bytes.
int64_t ListBytes(int64_t count) { return (count * 4 + 15) / 16 * 16; }

bool HasPenalties(const SamplingConfig& sampling) {
  return sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
}

using Candidate = SampleDistribution::Candidate;

// Logits after bias, penalties and min_tokens.
std::vector<float> Adjusted(const float* logits, int64_t vocab, const SamplerState& s) {
  std::vector<float> out(logits, logits + vocab);
  for (int32_t i = 0; i < s.bias_count; ++i) out[List<int32_t>(s, s.bias_ids)[i]] += List<float>(s, s.bias_values)[i];
  if (s.counts != 0) {
    const uint32_t* counts = List<uint32_t>(s, s.counts);
    for (int64_t id = 0; id < vocab; ++id) out[id] = Penalized(s, out[id], counts[id]);
  }
  if (s.index < s.min_tokens) {
    for (int32_t i = 0; i < s.end_count; ++i) {
      out[List<int32_t>(s, s.end_ids)[i]] = -std::numeric_limits<float>::infinity();
    }
  }
  return out;
}

// Keeps the fewest of the most likely candidates whose weights add up to `part` of all.
void KeepTopP(double part, const std::function<bool(const Candidate&, const Candidate&)>& likelier,
              std::vector<Candidate>& candidates) {
  uint64_t total = 0, sum = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  const uint64_t share = ShareOf(part, total);
  // Sorted piece by piece, because a few of many are enough as a rule.
  for (size_t sorted = 0, more = 256; sorted < candidates.size(); sorted += more, more *= 4) {
    more = std::min(more, candidates.size() - sorted);
    const auto begin = candidates.begin() + static_cast<int64_t>(sorted);
    std::partial_sort(begin, begin + static_cast<int64_t>(more), candidates.end(), likelier);
    for (size_t i = sorted; i < sorted + more; ++i) {
      if ((sum += candidates[i].weight) < share) continue;
      candidates.resize(i + 1);
      return;
    }
  }
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
  if (HasPenalties(sampling)) {
    counts.resize(vocab);
    for (const int32_t id : prompt) counts.at(id) = SamplerState::kInPrompt;
  }
  int64_t bytes = sizeof(SamplerState);
  const auto place = [&bytes](size_t count) {
    if (count == 0) return int64_t{0};
    const int64_t at = bytes;
    bytes += ListBytes(static_cast<int64_t>(count));
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

void CountTokens(const at::Tensor& sampler, const SamplingConfig& sampling, int64_t vocab,
                 const std::vector<int32_t>& ids) {
  if (!HasPenalties(sampling) || ids.empty()) return;
  const at::Tensor index = at::tensor(ids, at::kInt).to(sampler.device());
  // The counts are the last list.
  sampler.view(at::kInt)
      .narrow(0, (sampler.numel() - ListBytes(vocab)) / 4, vocab)
      .index_add_(0, index, at::ones({index.numel()}, index.options()));
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

SampleDistribution Distribution(const float* logits, int64_t vocab, const SamplerState& sampler) {
  const std::vector<float> z = Adjusted(logits, vocab, sampler);
  SampleDistribution result;
  result.best = std::max_element(z.begin(), z.end()) - z.begin();
  const float max = z[result.best];
  result.finite = std::isfinite(max);
  if (!result.finite || sampler.inverse_temperature == 0.0) return result;
  std::vector<Candidate>& candidates = result.candidates;
  for (int64_t id = 0; id < vocab; ++id) {
    const uint64_t weight = WeightOf(sampler, z[id], max);
    if (weight > 0) candidates.push_back({id, weight});
  }
  const auto likelier = [&z](const Candidate& a, const Candidate& b) {
    return z[a.id] != z[b.id] ? z[a.id] > z[b.id] : a.id < b.id;
  };
  if (sampler.top_k > 0 && static_cast<size_t>(sampler.top_k) < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + sampler.top_k, candidates.end(), likelier);
    candidates.resize(sampler.top_k);
  }
  if (sampler.top_p < 1.0) KeepTopP(sampler.top_p, likelier, candidates);
  std::erase_if(candidates, [&](const Candidate& c) { return !PassesMinP(sampler, z[c.id], max); });
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  return result;
}

Draw DrawToken(const float* logits, int64_t vocab, SamplerState& sampler) {
  const double lse = LogSumExp(logits, vocab);
  if (!std::isfinite(lse)) return {};
  const SampleDistribution distribution = Distribution(logits, vocab, sampler);
  if (!distribution.finite) return {};
  int64_t id = distribution.best;
  if (sampler.inverse_temperature > 0.0) {
    uint64_t total = 0, sum = 0;
    for (const Candidate& candidate : distribution.candidates) total += candidate.weight;
    const uint64_t target = DrawTarget(sampler.seed, sampler.index, total);
    for (const Candidate& candidate : distribution.candidates) {
      id = candidate.id;
      if ((sum += candidate.weight) > target) break;
    }
  }
  ++sampler.index;
  if (sampler.counts != 0) ++List<uint32_t>(sampler, sampler.counts)[id];
  return {id, static_cast<float>(logits[id] - lse)};
}

}  // namespace refocus
