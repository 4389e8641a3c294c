#include "coordinator/core/sampling.h"

#include <algorithm>
#include <string>

#include "base/limits.h"
#include "base/sampling.h"
#include "coordinator/core/check_field.h"

namespace refocus {
namespace {

constexpr double kMostBias = 1000;

Status PlanBias(const api::GenerateRequest& r, int64_t vocab, SamplingPlan* plan) {
  REFOCUS_RETURN_IF_ERROR(CheckInt("logit_bias (entries)", r.logit_bias_size(), 0, kMaxLogitBias));
  for (const auto& [id, value] : r.logit_bias()) {
    const std::string got = std::to_string(id), allowed = "0 to " + std::to_string(vocab - 1);
    if (static_cast<int64_t>(id) >= vocab) {
      return Error(StatusCode::kInvalidArgument, "TOKEN_ID_OUT_OF_RANGE",
                   "logit_bias: got token id " + got + ", allowed " + allowed,
                   {{"field", "logit_bias"}, {"got", got}, {"allowed", allowed}});
    }
    REFOCUS_RETURN_IF_ERROR(CheckReal("logit_bias", static_cast<double>(value), -kMostBias, kMostBias));
    plan->logit_bias[static_cast<int32_t>(id)] = value;
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<SamplingPlan> PlanSampling(const api::GenerateRequest& r, int64_t vocab, int64_t max_tokens, uint64_t seed) {
  SamplingPlan plan;
  plan.temperature = r.has_temperature() ? r.temperature() : 0;
  plan.seed = r.has_seed() ? r.seed() : seed;
  plan.top_k = r.has_top_k() ? r.top_k() : 0;
  plan.top_p = r.has_top_p() ? r.top_p() : 1;
  plan.min_p = r.has_min_p() ? r.min_p() : 0;
  plan.repetition_penalty = r.has_repetition_penalty() ? r.repetition_penalty() : 1;
  plan.presence_penalty = r.has_presence_penalty() ? r.presence_penalty() : 0;
  plan.frequency_penalty = r.has_frequency_penalty() ? r.frequency_penalty() : 0;
  plan.min_tokens = r.has_min_tokens() ? r.min_tokens() : 0;
  plan.samples = r.has_n() ? r.n() : 1;
  plan.prompt_logprobs = r.prompt_logprobs();
  REFOCUS_RETURN_IF_ERROR(CheckRealOrZero("temperature", plan.temperature, 0.01, 100));
  REFOCUS_RETURN_IF_ERROR(CheckInt("top_k", plan.top_k, 0, kMaxTopK));
  plan.top_k = static_cast<int32_t>(std::min<int64_t>(plan.top_k, vocab));
  REFOCUS_RETURN_IF_ERROR(CheckReal("top_p", plan.top_p, 1e-9, 1));
  REFOCUS_RETURN_IF_ERROR(CheckReal("min_p", plan.min_p, 0, 1));
  REFOCUS_RETURN_IF_ERROR(CheckReal("repetition_penalty", plan.repetition_penalty, 0.01, 100));
  REFOCUS_RETURN_IF_ERROR(CheckReal("presence_penalty", plan.presence_penalty, -10, 10));
  REFOCUS_RETURN_IF_ERROR(CheckReal("frequency_penalty", plan.frequency_penalty, -10, 10));
  REFOCUS_RETURN_IF_ERROR(CheckInt("min_tokens", plan.min_tokens, 0, max_tokens));
  REFOCUS_RETURN_IF_ERROR(CheckInt("n", plan.samples, 1, kMaxSamples));
  if (plan.samples > 1 && plan.temperature == 0) {
    return FieldError("n", std::to_string(plan.samples), "1 at temperature 0, where all samples are the same");
  }
  REFOCUS_RETURN_IF_ERROR(PlanBias(r, vocab, &plan));
  return plan;
}

void FillSampling(const SamplingPlan& plan, int32_t sample, wire::OpenSequence* open) {
  open->set_temperature(plan.temperature);
  open->set_seed(SampleSeed(plan.seed, sample));
  open->set_top_k(plan.top_k);
  open->set_top_p(plan.top_p);
  open->set_min_p(plan.min_p);
  open->set_repetition_penalty(plan.repetition_penalty);
  open->set_presence_penalty(plan.presence_penalty);
  open->set_frequency_penalty(plan.frequency_penalty);
  open->set_min_tokens(plan.min_tokens);
  for (const auto& [id, value] : plan.logit_bias) {
    open->add_bias_ids(static_cast<uint32_t>(id));
    open->add_bias_values(value);
  }
}

void FillSampling(const SamplingPlan& plan, int32_t sample, api::GenerateSummary* summary) {
  summary->set_temperature(plan.temperature);
  summary->set_seed(SampleSeed(plan.seed, sample));
  summary->set_top_k(plan.top_k);
  summary->set_top_p(plan.top_p);
  summary->set_min_p(plan.min_p);
  summary->set_repetition_penalty(plan.repetition_penalty);
  summary->set_presence_penalty(plan.presence_penalty);
  summary->set_frequency_penalty(plan.frequency_penalty);
  summary->set_min_tokens(plan.min_tokens);
  summary->set_n(plan.samples);
  for (const auto& [id, value] : plan.logit_bias) (*summary->mutable_logit_bias())[static_cast<uint32_t>(id)] = value;
}

}  // namespace refocus
