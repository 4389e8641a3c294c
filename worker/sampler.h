// One token from one row of logits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/command.h"

namespace refocus {

// logits [vocab] fp32. Greedy at temperature 0 (the lowest id among equals), else by inverse CDF of softmax(logits /
// temperature) with a number that depends on (seed, index) alone: the index-th token of an answer is drawn the same way
// however the answer was cut into commands. Log-probabilities are at temperature 1. id -1 when a logit is NaN or all
// are -inf.
Token SampleToken(const at::Tensor& logits, const SamplingConfig& sampling, int64_t index);

// The `count` most likely tokens of the same row, best first, to token.top_ids and top_logprobs.
void AddTopLogprobs(const at::Tensor& logits, int64_t count, Token& token);

// Uniform in [0, 1), splitmix64 over the pair.
double UniformAt(uint64_t seed, int64_t index);

}  // namespace refocus
