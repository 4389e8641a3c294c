#include "worker/sampler.h"

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace refocus {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

Draw Sample(const std::vector<float>& logits, const SamplingConfig& sampling, int64_t index = 0) {
  const auto vocab = static_cast<int64_t>(logits.size());
  const at::Tensor sampler = MakeSampler(sampling, vocab, {}, at::kCPU);
  auto& state = *reinterpret_cast<SamplerState*>(SamplerAddress(sampler));
  state.index = index;
  const Draw draw = DrawToken(logits.data(), vocab, state);
  EXPECT_EQ(state.index, index + (draw.id >= 0 ? 1 : 0));
  return draw;
}

TEST(SamplerTest, GreedyTakesTheLowestIdAmongEquals) {
  const Draw token = Sample({0.5f, 2.0f, -1.0f, 2.0f}, {});
  EXPECT_EQ(token.id, 1);
  const double total = std::exp(0.5) + 2 * std::exp(2.0) + std::exp(-1.0);
  EXPECT_NEAR(token.logprob, 2.0 - std::log(total), 1e-6);
}

TEST(SamplerTest, TopLogprobsAreInOrder) {
  Token token;
  AddTopLogprobs(at::tensor({0.5f, 2.0f, -1.0f, 2.0f}, at::kFloat), 3, token);
  EXPECT_EQ(token.top_ids, (std::vector<int32_t>{1, 3, 0}));
  EXPECT_EQ(token.top_logprobs[0], Sample({0.5f, 2.0f, -1.0f, 2.0f}, {}).logprob);
  EXPECT_NEAR(token.top_logprobs[0] - token.top_logprobs[2], 1.5, 1e-6);
  Token all;
  AddTopLogprobs(at::tensor({1.0f, 0.0f}, at::kFloat), 9, all);
  EXPECT_EQ(all.top_ids.size(), 2u);
}

// 10^5 draws over five logits: each count within five standard deviations of softmax(logits / 0.7).
TEST(SamplerTest, DrawsFollowTheDistribution) {
  const std::vector<float> logits = {1.0f, -0.5f, 0.3f, -kInf, 0.9f};
  SamplingConfig sampling;
  sampling.temperature = 0.7f;
  sampling.seed = 20;
  constexpr int kDraws = 100'000;
  std::vector<int> counts(logits.size(), 0);
  for (int i = 0; i < kDraws; ++i) ++counts[Sample(logits, sampling, i).id];
  double total = 0.0;
  for (const float logit : logits) total += std::exp(logit / 0.7);
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p = std::exp(logits[i] / 0.7) / total;
    EXPECT_NEAR(counts[i], p * kDraws, 5 * std::sqrt(kDraws * p * (1 - p)) + 0.5) << "token " << i;
  }
}

TEST(SamplerTest, SeedAndIndexAloneDecide) {
  SamplingConfig sampling;
  sampling.temperature = 1.0f;
  const std::vector<float> logits(1000, 0.0f);
  sampling.seed = 1;
  EXPECT_EQ(Sample(logits, sampling, 5).id, Sample(logits, sampling, 5).id);
  EXPECT_NE(Sample(logits, sampling, 5).id, Sample(logits, sampling, 6).id);
  const int64_t first = Sample(logits, sampling, 5).id;
  sampling.seed = 2;
  EXPECT_NE(Sample(logits, sampling, 5).id, first);
  for (int64_t index = 0; index < 1000; ++index) {
    EXPECT_LT(UniformBits(7, index), uint64_t{1} << 53);
  }
}

TEST(SamplerTest, WhatIsNotADistributionGivesNoToken) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float temperature : {0.0f, 1.0f}) {
    SamplingConfig sampling;
    sampling.temperature = static_cast<double>(temperature);
    EXPECT_EQ(Sample({0.0f, nan, 1.0f}, sampling).id, -1);
    EXPECT_EQ(Sample({nan, 0.0f}, sampling).id, -1);
    EXPECT_EQ(Sample({-kInf, -kInf}, sampling).id, -1);
    EXPECT_EQ(Sample({0.0f, kInf}, sampling).id, -1);
    EXPECT_EQ(Sample({-kInf, 3.0f}, sampling).id, 1);
  }
}

}  // namespace
}  // namespace refocus
