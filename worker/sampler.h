// Draws tokens from logits, as base/sampling.h defines it: what the CPU does, and what both devices keep of a sequence.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "base/sampling.h"
#include "worker/command.h"

namespace refocus {

// The sampler of one answer on `device`, a SamplerState with its lists in [bytes] uint8, before its first token. With a
// repetition penalty, `prompt` is what it counts beside the answer. 4 bytes an id of the vocabulary with any penalty,
// else a few hundred.
at::Tensor MakeSampler(const SamplingConfig& sampling, int64_t vocab, const std::vector<int32_t>& prompt,
                       at::Device device);

// Tokens that became part of the answer without a draw; penalties count them from now on.
// `sampling` and `vocab` are those that it was made with.
void CountTokens(const at::Tensor& sampler, const SamplingConfig& sampling, int64_t vocab,
                 const std::vector<int32_t>& ids);

// What Backend::Sample reads; valid as long as the tensor.
int64_t SamplerAddress(const at::Tensor& sampler);

// What the CPU draws from.
struct SampleDistribution {
  struct Candidate {
    int64_t id;
    uint64_t weight;  // in units of WeightOf; above 0
  };
  bool finite = false;                // the largest adjusted logit is; else there is nothing else here
  int64_t best = -1;                  // its id
  std::vector<Candidate> candidates;  // rising ids; none where greedy
};
SampleDistribution Distribution(const float* logits, int64_t vocab, const SamplerState& sampler);

struct Draw {
  int64_t id = -1;  // none
  float logprob = std::numeric_limits<float>::quiet_NaN();
};

// The CPU's: logits [vocab].
Draw DrawToken(const float* logits, int64_t vocab, SamplerState& sampler);

// The `count` most likely tokens of logits [vocab] fp32, best first, to token.top_ids and top_logprobs.
void AddTopLogprobs(const at::Tensor& logits, int64_t count, Token& token);

}  // namespace refocus
