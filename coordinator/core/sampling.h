// How an answer's tokens are drawn: what a request says, checked, with every default filled in, and back into messages.
// The knobs are defined in base/sampling.h.
#pragma once

#include <cstdint>
#include <map>

#include "base/status.h"
#include "coordinator/core/messages.h"

namespace refocus {

struct SamplingPlan {
  double temperature = 0;
  uint64_t seed = 0;  // of the request; each sample has its own: SampleSeed
  int32_t top_k = 0;
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  std::map<int32_t, float> logit_bias;
  int64_t min_tokens = 0;
  int32_t samples = 1;
  bool prompt_logprobs = false;
};

// `max_tokens` is the request's, checked; `seed` is used when it has none. FIELD_OUT_OF_RANGE, TOKEN_ID_OUT_OF_RANGE.
StatusOr<SamplingPlan> PlanSampling(const api::GenerateRequest& request, int64_t vocab, int64_t max_tokens,
                                    uint64_t seed);

// Of sample `sample`; beside it stop_ids and top_logprobs.
void FillSampling(const SamplingPlan& plan, int32_t sample, wire::OpenSequence* open);
// What was in effect.
void FillSampling(const SamplingPlan& plan, int32_t sample, api::GenerateSummary* summary);

}  // namespace refocus
