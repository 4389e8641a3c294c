#include <algorithm>
#include <limits>
#include <memory>

#include "base/shard_plan.h"
#include "kernels/rowwise.h"
#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using SampleTest = RowwiseTest;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double UniformAt(uint64_t seed, int64_t index) {
  return static_cast<double>(UniformBits(seed, index)) * 0x1.0p-53;
}

struct Token {
  int64_t id;
  float logprob;
};

// Owns what one call needs; the workspace is poisoned before the first.
class Sampler {
 public:
  explicit Sampler(const std::vector<float>& logits, int64_t shift = 0)
      : logits_(logits, shift),
        workspace_(SampleWorkspaceBytes(1, static_cast<int64_t>(logits.size()))),
        samplers_(std::vector<SamplerState*>{state_.get()}),
        vocab_(static_cast<int64_t>(logits.size())) {}

  SampleParams Params() {
    return {1, vocab_, logits_.get(), samplers_.get(), token_.get(), logprob_.get(), workspace_.get()};
  }

  void Set(float temperature, uint64_t seed, int64_t index) {
    SamplerState state;
    state.inverse_temperature = temperature > 0.0f ? 1.0 / static_cast<double>(temperature) : 0.0;
    state.seed = seed;
    state.index = index;
    cudaMemcpy(state_.get(), &state, sizeof(state), cudaMemcpyHostToDevice);
  }

  Token Draw(float temperature, uint64_t seed, int64_t index) {
    Set(temperature, seed, index);
    EXPECT_EQ(Sample(Params(), nullptr), cudaSuccess);
    workspace_.Download();  // its guards
    const Token token = {token_.Download()[0], logprob_.Download()[0]};
    EXPECT_EQ(state_.Download()[0].index, index + (token.id >= 0 ? 1 : 0));
    return token;
  }

  SamplerState State() { return state_.Download()[0]; }

 private:
  DeviceArray<float> logits_;
  DeviceArray<char> workspace_;
  DeviceArray<SamplerState> state_{1};
  DeviceArray<SamplerState*> samplers_;
  DeviceArray<int64_t> token_{1};
  DeviceArray<float> logprob_{1};
  int64_t vocab_;
};

// The reference: weights and running sums in rising order of ids, once per temperature.
class Reference {
 public:
  Reference(const std::vector<float>& logits, float temperature) : logits_(logits) {
    const double max = *std::max_element(logits.begin(), logits.end());
    double total = 0.0, plain = 0.0;
    for (const float logit : logits) {
      weights_.push_back(std::exp((static_cast<double>(logit) - max) / static_cast<double>(temperature)));
      sums_.push_back(total += weights_.back());
      plain += std::exp(static_cast<double>(logit) - max);
    }
    lse_ = max + std::log(plain);
  }
  // -1 when u lies so near a boundary that the order of additions decides.
  int64_t Draw(double u) const {
    const double target = u * sums_.back(), slack = 1e-12 * sums_.back();
    for (size_t i = 0; i < sums_.size(); ++i) {
      if (weights_[i] <= 0.0 || sums_[i] <= target - slack) continue;
      return sums_[i] > target + slack ? static_cast<int64_t>(i) : -1;
    }
    return -1;
  }
  double LogProb(int64_t id) const { return logits_[id] - lse_; }

 private:
  std::vector<float> logits_;
  std::vector<double> weights_, sums_;
  double lse_;
};

TEST_F(SampleTest, DrawsTheTokensOfTheReference) {
  for (const int64_t vocab : {1, 2, 7, 1023, 1024, 1025, 5000, 49152, 151936, 300001}) {
    Random random(static_cast<uint64_t>(vocab) + 1);
    const std::vector<float> logits = random.Floats(vocab, 3.0f);
    Sampler sampler(logits);
    int near = 0;
    double worst = 0.0;
    for (const float temperature : {0.3f, 1.0f, 2.5f, 50.0f}) {
      const Reference reference(logits, temperature);
      for (int draw = 0; draw < 150; ++draw) {
        const uint64_t seed = draw % 3 == 0 ? 7 : static_cast<uint64_t>(random.Below(INT64_MAX)) * 2 + 1;
        const int64_t index = draw % 3 == 0 ? draw : random.Below(int64_t{1} << 40);
        const int64_t want = reference.Draw(UniformAt(seed, index));
        const Token got = sampler.Draw(temperature, seed, index);
        near += want < 0;
        ASSERT_TRUE(want < 0 || got.id == want)
            << "vocab " << vocab << " temperature " << temperature << " seed " << seed << " index " << index << ": got "
            << got.id << ", want " << want;
        ASSERT_GE(got.id, 0);
        ASSERT_LT(got.id, vocab);
        worst = std::max(worst, std::abs(got.logprob - reference.LogProb(got.id)));
      }
    }
    std::printf("sample vocab %ld: 600 draws, %d too near a boundary, worst log-probability error %.3g\n",
                static_cast<long>(vocab), near, worst);
    EXPECT_LE(near, 1);
    EXPECT_LE(worst, 2e-6);
  }
}

TEST_F(SampleTest, WithoutWeightNothingIsDrawn) {
  const int64_t vocab = 20000;
  Random random(21);
  std::vector<float> logits = random.Floats(vocab, 2.0f);
  for (int64_t i = 0; i < vocab; ++i) {
    if (i % 10 != 3 || i < 3000 || i > 17000) logits[i] = -kInfinity;  // whole tiles too
  }
  Sampler sampler(logits, 1);  // off the 16-byte boundary
  const Reference reference(logits, 4.0f);
  for (int64_t index = 0; index < 300; ++index) {
    const int64_t want = reference.Draw(UniformAt(3, index));
    const Token got = sampler.Draw(4.0f, 3, index);
    ASSERT_GE(got.id, 0);
    ASSERT_GT(logits[got.id], -kInfinity) << "index " << index;
    ASSERT_TRUE(want < 0 || got.id == want) << "index " << index;
  }
}

TEST_F(SampleTest, TinyTemperaturesDrawTheLargest) {
  Random random(22);
  std::vector<float> logits = random.Floats(4000);
  logits[2777] = 20.0f;
  Sampler sampler(logits);
  for (const float temperature : {1e-3f, 1e-20f, 1e-38f, 1e-45f}) {
    for (int64_t index = 0; index < 20; ++index) EXPECT_EQ(sampler.Draw(temperature, 1, index).id, 2777);
  }
}

TEST_F(SampleTest, GreedyTakesTheLowestIdAmongEquals) {
  Random random(23);
  for (const int64_t vocab : {1, 7, 1024, 151936}) {
    const std::vector<float> noise = random.Floats(vocab);
    for (int round = 0; round < 20; ++round) {
      std::vector<float> logits = noise;
      int64_t lowest = vocab;
      for (int tie = 0; tie < 4; ++tie) {
        const int64_t id = random.Below(vocab);
        logits[id] = 10.0f;
        lowest = std::min(lowest, id);
      }
      Sampler sampler(logits);
      const Token got = sampler.Draw(0.0f, 1, 0);
      EXPECT_EQ(got.id, lowest) << "vocab " << vocab;
      EXPECT_NEAR(got.logprob, Reference(logits, 1.0f).LogProb(lowest), 2e-6);
    }
    std::vector<float> zeros(vocab, 0.0f);
    for (int64_t i = 0; i < vocab; i += 2) zeros[i] = -0.0f;
    EXPECT_EQ(Sampler(zeros).Draw(0.0f, 1, 0).id, 0);
    EXPECT_EQ(Sampler(std::vector<float>(vocab, -3e38f)).Draw(0.0f, 1, 0).id, 0);
  }
}

TEST_F(SampleTest, WhatIsNotADistributionGivesNoToken) {
  Random random(24);
  for (const float temperature : {0.0f, 1.0f}) {
    for (const int64_t vocab : {1, 5000}) {
      const std::vector<float> none(vocab, -kInfinity);
      EXPECT_EQ(Sampler(none).Draw(temperature, 1, 0).id, -1);
      for (const float bad : {std::nanf(""), kInfinity}) {
        for (const int64_t at : {int64_t{0}, vocab / 2, vocab - 1}) {
          std::vector<float> logits = random.Floats(vocab);
          logits[at] = bad;
          EXPECT_EQ(Sampler(logits).Draw(temperature, 1, 0).id, -1) << bad << " at " << at << " of " << vocab;
          if (vocab > 1) {
            std::vector<float> rest = none;
            rest[at] = bad;
            EXPECT_EQ(Sampler(rest).Draw(temperature, 1, 0).id, -1);
          }
        }
      }
    }
  }
}

// A captured draw, replayed: that of every index.
TEST_F(SampleTest, ReplaysAdvance) {
  Random random(25);
  const std::vector<float> logits = random.Floats(3000);
  const Reference reference(logits, 1.0f);
  const int64_t steps = 700;
  Sampler sampler(logits);
  const SampleParams sample = sampler.Params();
  sampler.Set(1.0f, 99, 0);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t step;
  REFOCUS_CUDA(cudaStreamCreate(&stream));
  REFOCUS_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  REFOCUS_CUDA(Sample(sample, stream));
  REFOCUS_CUDA(cudaStreamEndCapture(stream, &graph));
  REFOCUS_CUDA(cudaGraphInstantiate(&step, graph, 0));
  for (int64_t i = 0; i < steps; ++i) {
    REFOCUS_CUDA(cudaGraphLaunch(step, stream));
    REFOCUS_CUDA(cudaStreamSynchronize(stream));
    int64_t token = 0;
    float logprob = 0.0f;
    REFOCUS_CUDA(cudaMemcpy(&token, sample.tokens, sizeof(token), cudaMemcpyDeviceToHost));
    REFOCUS_CUDA(cudaMemcpy(&logprob, sample.logprobs, sizeof(logprob), cudaMemcpyDeviceToHost));
    const int64_t want = reference.Draw(UniformAt(99, i));
    ASSERT_TRUE(want < 0 || token == want) << "step " << i;
    ASSERT_NEAR(logprob, reference.LogProb(token), 2e-6);
  }
  EXPECT_EQ(sampler.State().index, steps);
  cudaGraphExecDestroy(step);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace refocus::kernels
