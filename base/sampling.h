// What a sequence's draws depend on beside its logits, and the arithmetic that all devices share: plain memory on the
// device where the logits are, so that a recorded decode step reads it anew each time it is repeated.
//
// The order of operations on a row of logits l, in the model's order of ids:
//   1. bias           l += bias, of at most kMaxLogitBias ids
//   2. penalties      repetition (of ids in the request's prompt or its answer so far): l / r if l > 0, else l * r;
//                     then l -= frequency * (times in the answer) and l -= presence (if in the answer at all).
//                     As transformers and vLLM define them, but for one point: the context's tokens do not count.
//   3. end tokens     -inf while fewer than min_tokens were drawn
//   4. temperature    l / temperature; 0: the largest wins (the lowest id among equals), and what follows is not read
//   5. top-k          only the k largest stay
//   6. top-p          of those, renormalised: the fewest of the largest whose probabilities add up to at least p
//   7. min-p          of those: the ones at least min_p times as probable as the most probable one
//   8. draw           the first id, in rising order, at which the running sum of what is left exceeds u times the
//                     total; u depends on (seed, index) alone
// Among equal values the lower id counts as the larger. Log-probabilities that are returned are those of the row as the
// model gave it, at temperature 1.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define REFOCUS_HOST_DEVICE __host__ __device__ inline
#else
#define REFOCUS_HOST_DEVICE inline
#endif

namespace refocus {

// Followed, in one allocation aligned to 16 bytes, by the lists whose offsets (in bytes from its start) it has; an
// offset of 0: there is no such list. Written by the host once and by draws.
struct SamplerState {
  double inverse_temperature = 0;  // 0: greedy
  double top_p = 1;                // 1: all
  double min_p_margin = 0;         // temperature * log(min_p), negative; -inf: all
  uint64_t seed = 0;
  int64_t index = 0;               // tokens drawn so far; a draw adds one
  int64_t min_tokens = 0;
  float repetition = 1;            // 1, 0, 0: no penalties
  float presence = 0;
  float frequency = 0;
  int32_t top_k = 0;               // 0: all
  int32_t bias_count = 0;
  int32_t end_count = 0;
  int64_t bias_ids = 0;            // [bias_count] int32, each once
  int64_t bias_values = 0;         // [bias_count] float
  int64_t end_ids = 0;             // [end_count] int32
  int64_t counts = 0;              // [vocab] uint32: times drawn, and kInPrompt; only with a penalty

  static constexpr uint32_t kInPrompt = uint32_t{1} << 31;
};

// A logit after the penalties; `count` of its id, as in SamplerState. Products of a float and a small integer are exact
// in double, and the result is rounded once: the same on every device.
REFOCUS_HOST_DEVICE float Penalized(const SamplerState& s, float logit, uint32_t count) {
  if (count == 0) return logit;
  double l = static_cast<double>(logit);
  if (s.repetition != 1.0f) {
    l = l > 0.0 ? l / static_cast<double>(s.repetition) : l * static_cast<double>(s.repetition);
  }
  const uint32_t times = count & ~SamplerState::kInPrompt;
  if (times > 0) {
    l -= static_cast<double>(s.frequency) * static_cast<double>(times);
    l -= static_cast<double>(s.presence);
  }
  return static_cast<float>(l);
}

// Rises with the value; 0 and -0 are equal. Not for NaN.
REFOCUS_HOST_DEVICE uint32_t OrderKey(float value) {
  if (value == 0.0f) value = 0.0f;
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  return (bits >> 31) != 0 ? ~bits : bits | uint32_t{1} << 31;
}

// exp(x) for x <= 0 in units of 2^-41, rounded; those of the largest vocabulary (2^22) fit 63 bits. Integers add up to
// the same sum in any order, and every step here is rounded in the same way everywhere (no fused multiply-add): a draw
// does not depend on the device, on how a row was cut into tiles, or on the batch. What is below half a unit (2.3e-13 of
// the most probable token) counts as 0.
inline constexpr int kWeightBits = 41;

REFOCUS_HOST_DEVICE double RoundedProduct(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
REFOCUS_HOST_DEVICE double RoundedSum(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

REFOCUS_HOST_DEVICE uint64_t WeightOf(double x) {
  if (!(x > -29.2)) return 0;
  const double y = RoundedProduct(x, 1.4426950408889634);  // exp(x) = 2^y = 2^n 2^f, |f| <= 1/2
  const int n = -static_cast<int>(0.5 - y);
  const double f = RoundedSum(y, -static_cast<double>(n));
  // ln(2)^k / k!, k = 12 .. 0: the next term is below 2e-16.
  constexpr double kTaylor[] = {2.5678435993488196e-11, 4.44553827187081e-10, 7.054911620801121e-09,
                                1.0178086009239696e-07, 1.3215486790144305e-06, 1.5252733804059838e-05,
                                0.00015403530393381606, 0.0013333558146428441,
                                0.009618129107628477, 0.055504108664821576,
                                0.2402265069591007, 0.6931471805599453, 1.0};
  double sum = kTaylor[0];
  for (int k = 1; k < 13; ++k) sum = RoundedSum(RoundedProduct(sum, f), kTaylor[k]);
  const uint64_t scale_bits = static_cast<uint64_t>(1023 + kWeightBits + n) << 52;
  double scale = 0.0;
  memcpy(&scale, &scale_bits, sizeof(scale));
  return static_cast<uint64_t>(RoundedSum(RoundedProduct(sum, scale), 0.5));
}

// The weight of an adjusted logit beside the row's largest one.
REFOCUS_HOST_DEVICE uint64_t WeightOf(const SamplerState& s, float logit, float max) {
  return WeightOf((static_cast<double>(logit) - static_cast<double>(max)) * s.inverse_temperature);
}

REFOCUS_HOST_DEVICE bool PassesMinP(const SamplerState& s, float logit, float max) {
  return static_cast<double>(logit) - static_cast<double>(max) >= s.min_p_margin;
}

// The least weight that is the share `part` of `total`: 1 to total, which is at least 1.
REFOCUS_HOST_DEVICE uint64_t ShareOf(double part, uint64_t total) {
  if (part >= 1.0) return total;
  const double exact = part * static_cast<double>(total);
  uint64_t share = static_cast<uint64_t>(exact);
  if (static_cast<double>(share) < exact) ++share;
  if (share < 1) share = 1;
  return share < total ? share : total;
}

REFOCUS_HOST_DEVICE uint64_t MixBits(uint64_t x) {  // the output function of splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Uniform in [0, 2^53), of a token's index in the answer: the same however the answer was cut into commands or batches.
REFOCUS_HOST_DEVICE uint64_t UniformBits(uint64_t seed, int64_t index) {
  return MixBits(MixBits(seed) ^ static_cast<uint64_t>(index)) >> 11;
}

// u times the total, rounded down: below the total.
REFOCUS_HOST_DEVICE uint64_t DrawTarget(uint64_t seed, int64_t index, uint64_t total) {
  const uint64_t u = UniformBits(seed, index) << 11;  // of 2^64
#ifdef __CUDA_ARCH__
  return __umul64hi(u, total);
#else
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<uint64_t>(static_cast<Wide>(u) * total >> 64);
#endif
}

// The seed of the i-th of several samples of one request: the first is the request's own, the others are the outputs of
// splitmix64 behind it. Each can be drawn again alone by giving its seed.
REFOCUS_HOST_DEVICE uint64_t SampleSeed(uint64_t seed, int64_t sample) {
  return sample == 0 ? seed : MixBits(seed + static_cast<uint64_t>(sample) * 0x9e3779b97f4a7c15u);
}

}  // namespace refocus
