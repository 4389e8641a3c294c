// What a sequence's draws depend on beside its logits, and the arithmetic that all devices share: plain memory on the
// device where the logits are, so that a recorded decode step reads it anew each time it is repeated.
//
// The order of operations on a row of logits l, in the model's order of ids:
//   1. bias           l += bias, of at most kMaxLogitBias ids
//   2. penalties      repetition (of ids in the request's prompt or its answer so far): l / r if l > 0, else l * r;
//                     then l -= frequency * (times in the answer) and l -= presence (if in the answer at all).
//                     Defined as transformers and vLLM define them, but for one point: the context's tokens do not count.
//   3. end tokens     -inf while fewer than min_tokens were drawn
//   4. temperature    l / temperature; 0: the largest wins (the lowest id among equals), and what follows is not read
//   5. top-k          only the k largest stay
//   6. top-p          of those, renormalised: the fewest of the largest whose probabilities add up to at least p
//   7. min-p          of those: the ones at least min_p times as probable as the most probable one
//   8. draw           the first id, in rising order, at which the running sum of what is left exceeds u times the total;
//                     u depends on (seed, index) alone
// Among equal values the lower id counts as the larger. Log-probabilities that are returned are those of the row as the
// model gave it, at temperature 1.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define REFOCUS_HOST_DEVICE __host__ __device__ inline
#else
#define REFOCUS_HOST_DEVICE inline
#endif

namespace refocus {

// Followed, in one allocation aligned to 16 bytes, by the lists whose offsets (in bytes from its start) it has; an offset
// of 0: there is no such list. Written by the host once and by draws.
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

// The seed of the i-th of several samples of one request: the first is the request's own, the others are the outputs of
// splitmix64 behind it. Each can be drawn again alone by giving its seed.
REFOCUS_HOST_DEVICE uint64_t SampleSeed(uint64_t seed, int64_t sample) {
  return sample == 0 ? seed : MixBits(seed + static_cast<uint64_t>(sample) * 0x9e3779b97f4a7c15u);
}

}  // namespace refocus
