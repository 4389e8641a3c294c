// What a request says about sampling: checked, sent to the ranks, and returned as it was in effect.
#include "coordinator/core/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/limits.h"
#include "base/sampling.h"
#include "coordinator/core/validate.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

constexpr int64_t kVocab = 100;

api::GenerateRequest Full() {
  api::GenerateRequest r;
  r.set_temperature(0.7);
  r.set_seed(9);
  r.set_top_k(40);
  r.set_top_p(0.95);
  r.set_min_p(0.05);
  r.set_repetition_penalty(1.1);
  r.set_presence_penalty(0.25);
  r.set_frequency_penalty(-0.5);
  (*r.mutable_logit_bias())[99] = -100.0f;
  (*r.mutable_logit_bias())[3] = 1.5f;
  r.set_min_tokens(7);
  r.set_n(5);
  return r;
}

TEST(SamplingTest, DefaultsChangeNothing) {
  const SamplingPlan plan = *PlanSampling({}, kVocab, 20, 77);
  wire::OpenSequence open;
  FillSampling(plan, 0, &open);
  EXPECT_EQ(open.temperature(), 0);
  EXPECT_EQ(open.seed(), 77u);
  EXPECT_EQ(open.top_k(), 0);
  EXPECT_EQ(open.top_p(), 1);
  EXPECT_EQ(open.min_p(), 0);
  EXPECT_EQ(open.repetition_penalty(), 1);
  EXPECT_EQ(open.presence_penalty(), 0);
  EXPECT_EQ(open.frequency_penalty(), 0);
  EXPECT_EQ(open.min_tokens(), 0);
  EXPECT_EQ(open.bias_ids_size() + open.bias_values_size(), 0);
  EXPECT_EQ(plan.samples, 1);
}

TEST(SamplingTest, EveryFieldReachesRanksAndSummary) {
  const SamplingPlan plan = *PlanSampling(Full(), kVocab, 20, 77);
  wire::OpenSequence open;
  api::GenerateSummary summary;
  FillSampling(plan, 3, &open);
  FillSampling(plan, 3, &summary);
  EXPECT_EQ(open.seed(), SampleSeed(9, 3));
  EXPECT_EQ(summary.seed(), open.seed());
  for (const auto& [sent, told, value] : std::vector<std::tuple<double, double, double>>{
           {open.temperature(), summary.temperature(), 0.7},
           {open.top_k(), summary.top_k(), 40},
           {open.top_p(), summary.top_p(), 0.95},
           {open.min_p(), summary.min_p(), 0.05},
           {open.repetition_penalty(), summary.repetition_penalty(), 1.1},
           {open.presence_penalty(), summary.presence_penalty(), 0.25},
           {open.frequency_penalty(), summary.frequency_penalty(), -0.5},
           {open.min_tokens(), summary.min_tokens(), 7}}) {
    EXPECT_EQ(sent, value);
    EXPECT_EQ(told, value);
  }
  EXPECT_EQ(summary.n(), 5);
  ASSERT_EQ(open.bias_ids_size(), 2);
  EXPECT_EQ(open.bias_ids(0), 3u);
  EXPECT_EQ(open.bias_values(0), 1.5f);
  EXPECT_EQ(open.bias_ids(1), 99u);
  EXPECT_EQ(open.bias_values(1), -100.0f);
  EXPECT_EQ(summary.logit_bias().at(3), 1.5f);
  EXPECT_EQ(summary.logit_bias().at(99), -100.0f);
}

TEST(SamplingTest, TopKIsCutToTheVocabulary) {
  api::GenerateRequest request;
  for (const int32_t asked : {0, 99, 100, 101, kMaxTopK}) {
    request.set_top_k(asked);
    EXPECT_EQ(PlanSampling(request, kVocab, 20, 0)->top_k, std::min<int64_t>(asked, kVocab)) << asked;
  }
}

TEST(SamplingTest, OutOfRangeIsNamed) {
  const double nan = std::nan("");
  const std::vector<std::pair<std::string, std::function<void(api::GenerateRequest&)>>> cases = {
      {"temperature", [&](auto& r) { r.set_temperature(nan); }},
      {"top_k", [](auto& r) { r.set_top_k(-1); }},
      {"top_k", [](auto& r) { r.set_top_k(kMaxTopK + 1); }},
      {"top_p", [](auto& r) { r.set_top_p(0); }},
      {"top_p", [](auto& r) { r.set_top_p(1.01); }},
      {"top_p", [&](auto& r) { r.set_top_p(nan); }},
      {"min_p", [](auto& r) { r.set_min_p(-0.1); }},
      {"min_p", [](auto& r) { r.set_min_p(1.5); }},
      {"repetition_penalty", [](auto& r) { r.set_repetition_penalty(0); }},
      {"repetition_penalty", [](auto& r) { r.set_repetition_penalty(-1); }},
      {"repetition_penalty", [](auto& r) { r.set_repetition_penalty(1e9); }},
      {"presence_penalty", [](auto& r) { r.set_presence_penalty(11); }},
      {"frequency_penalty", [&](auto& r) { r.set_frequency_penalty(-std::numeric_limits<double>::infinity()); }},
      {"min_tokens", [](auto& r) { r.set_min_tokens(-1); }},
      {"min_tokens", [](auto& r) { r.set_min_tokens(21); }},
      {"n", [](auto& r) { r.set_n(0); }},
      {"n", [](auto& r) { r.set_n(kMaxSamples + 1); }},
      {"n", [](auto& r) { r.set_temperature(0); }},
      {"logit_bias", [](auto& r) { (*r.mutable_logit_bias())[5] = 1e4f; }},
      {"logit_bias", [&](auto& r) { (*r.mutable_logit_bias())[5] = static_cast<float>(nan); }},
      {"logit_bias", [](auto& r) { (*r.mutable_logit_bias())[kVocab] = 1.0f; }},
      {"logit_bias (entries)",
       [](auto& r) {
         for (uint32_t id = 0; id <= kMaxLogitBias; ++id) (*r.mutable_logit_bias())[id] = 1.0f;
       }},
  };
  for (const auto& [field, spoil] : cases) {
    api::GenerateRequest request = Full();
    spoil(request);
    const Status status = PlanSampling(request, kVocab, 20, 0).status();
    ASSERT_EQ(status.code(), StatusCode::kInvalidArgument) << field;
    const ErrorMetadata metadata = DetailOf(status).metadata;
    EXPECT_NE(std::find(metadata.begin(), metadata.end(), std::make_pair(std::string("field"), field)), metadata.end())
        << field << ": " << status.message();
  }
}

// Prompt rows come in several commands; every token's log-probability arrives once, in order, before the first token.
TEST(SamplingTest, PromptLogprobs) {
  Simulation simulation;
  simulation.Launch(2);
  simulation.Run();
  simulation.CreateReady("a", 100);
  std::vector<int32_t> prompt(1500);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>(i * 5 % 199);
  for (const bool wanted : {true, false}) {
    api::GenerateRequest request;
    request.set_name("contexts/a");
    request.set_max_tokens(3);
    request.set_prompt_logprobs(wanted);
    request.set_temperature(1);
    request.set_n(3);
    const auto job = *simulation.core().Generate(request, prompt);
    simulation.Run();
    ASSERT_TRUE(job->status().ok()) << job->status().message();
    const auto events = job->TakeEvents();
    ASSERT_EQ(events[0].prompt_logprobs_size(), wanted ? 1500 : 0);
    ASSERT_EQ(events[0].prompt_best_size(), wanted ? 1500 : 0);
    for (int i = 0; i < events[0].prompt_logprobs_size(); ++i) {
      ASSERT_EQ(events[0].prompt_logprobs(i), -static_cast<float>(prompt[i] % 7) - 0.5f) << i;
      ASSERT_EQ(events[0].prompt_best(i).logprob(), -0.5f) << i;
    }
    for (size_t i = 1; i < events.size(); ++i) EXPECT_EQ(events[i].prompt_logprobs_size(), 0);
    for (const auto& fork : job->forks()) {
      for (const auto& event : fork->TakeEvents()) EXPECT_EQ(event.prompt_logprobs_size(), 0) << "sample 0 alone";
    }
  }
  api::GenerateRequest request;
  request.set_name("contexts/a");
  request.set_prompt_logprobs(true);
  const auto refused = simulation.core().Generate(request, std::vector<int32_t>(kMaxPromptLogprobs + 1, 1));
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
}

TEST(SamplingTest, MinTokensNeedsATokenThatGoesOn) {
  ModelConfig model;
  model.vocab = 3;
  api::GenerateRequest request;
  request.set_min_tokens(1);
  for (const uint32_t id : {0, 1}) request.add_stop_token_ids(id);
  EXPECT_TRUE(PlanGenerate(request, model, nullptr, 0).ok());
  request.add_stop_token_ids(2);
  EXPECT_EQ(DetailOf(PlanGenerate(request, model, nullptr, 0).status()).metadata[0].second, "min_tokens");
}

}  // namespace
}  // namespace refocus
