#include "worker/sampler.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "worker/backend.h"

namespace refocus {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

SamplerState& StateOf(const at::Tensor& sampler) { return *reinterpret_cast<SamplerState*>(SamplerAddress(sampler)); }

Draw Sample(const std::vector<float>& logits, const SamplingConfig& sampling, int64_t index = 0) {
  const auto vocab = static_cast<int64_t>(logits.size());
  const at::Tensor sampler = MakeSampler(sampling, vocab, {}, at::kCPU);
  StateOf(sampler).index = index;
  const Draw draw = DrawToken(logits.data(), vocab, StateOf(sampler));
  EXPECT_EQ(StateOf(sampler).index, index + (draw.id >= 0 ? 1 : 0));
  return draw;
}

SamplingConfig Warm(double temperature, uint64_t seed = 1) {
  SamplingConfig sampling;
  sampling.temperature = temperature;
  sampling.seed = seed;
  return sampling;
}

std::vector<float> Normal(int64_t count, uint64_t seed, float scale = 2.0f) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

// The definition of base/sampling.h read word by word, in fp64, with a full sort: probabilities by id.
std::vector<double> Defined(const std::vector<float>& logits, const SamplingConfig& c,
                            const std::vector<int32_t>& prompt, const std::vector<int32_t>& answer) {
  std::vector<double> l(logits.begin(), logits.end());
  for (size_t i = 0; i < c.bias_ids.size(); ++i) l[c.bias_ids[i]] += static_cast<double>(c.bias_values[i]);
  for (size_t id = 0; id < l.size(); ++id) {
    const auto times = std::count(answer.begin(), answer.end(), static_cast<int32_t>(id));
    const bool seen = times > 0 || std::count(prompt.begin(), prompt.end(), static_cast<int32_t>(id)) > 0;
    if (seen) l[id] = l[id] > 0 ? l[id] / c.repetition_penalty : l[id] * c.repetition_penalty;
    l[id] -= c.frequency_penalty * static_cast<double>(times) + (times > 0 ? c.presence_penalty : 0.0);
  }
  if (static_cast<int64_t>(answer.size()) < c.min_tokens) {
    for (const int32_t id : c.stop_ids) l[id] = -std::numeric_limits<double>::infinity();
  }
  std::vector<size_t> order(l.size());
  std::iota(order.begin(), order.end(), 0);
  // Ties are those of fp32, which the adjusted logits have.
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const auto x = static_cast<float>(l[a]), y = static_cast<float>(l[b]);
    return x != y ? x > y : a < b;
  });
  std::vector<double> p(l.size());
  for (size_t i = 0; i < l.size(); ++i) p[i] = std::exp((l[i] - l[order[0]]) / c.temperature);
  if (c.top_k > 0 && static_cast<size_t>(c.top_k) < order.size()) order.resize(c.top_k);
  double total = 0.0, sum = 0.0;
  for (const size_t id : order) total += p[id];
  std::vector<double> kept(l.size(), 0.0);
  for (const size_t id : order) {
    if (sum > 0.0 && sum >= c.top_p * total) break;
    sum += p[id];
    if (p[id] >= c.min_p * p[order[0]]) kept[id] = p[id];
  }
  const double left = std::accumulate(kept.begin(), kept.end(), 0.0);
  for (double& value : kept) value /= left;
  return kept;
}

// What DrawToken draws from.
std::vector<double> Ours(const std::vector<float>& logits, const SamplerState& state) {
  const SampleDistribution distribution = Distribution(logits.data(), static_cast<int64_t>(logits.size()), state);
  std::vector<double> p(logits.size(), 0.0);
  double total = 0.0;
  for (const auto& candidate : distribution.candidates) total += static_cast<double>(candidate.weight);
  for (const auto& candidate : distribution.candidates) p[candidate.id] = static_cast<double>(candidate.weight) / total;
  return p;
}

// As if `answer` had been drawn.
void Answered(SamplerState& state, const std::vector<int32_t>& answer) {
  state.index = static_cast<int64_t>(answer.size());
  if (state.counts == 0) return;
  auto* counts = reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(&state) + state.counts);
  for (const int32_t id : answer) ++counts[id];
}

// Knobs in all combinations, from none to all.
SamplingConfig RandomConfig(std::mt19937_64& engine, int64_t vocab) {
  const auto chance = [&] { return engine() % 2 == 0; };
  const auto real = [&](double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine); };
  SamplingConfig c = Warm(real(0.2, 3.0), engine());
  if (chance()) c.top_k = static_cast<int32_t>(1 + engine() % std::min<int64_t>(vocab, 2000));
  if (chance()) c.top_p = real(0.05, 1.0);
  if (chance()) c.min_p = real(0.0, 0.3);
  if (chance()) c.repetition_penalty = real(0.7, 1.8);
  if (chance()) c.presence_penalty = real(-1.0, 2.0);
  if (chance()) c.frequency_penalty = real(-0.5, 1.0);
  std::map<int32_t, float> bias;
  for (int i = 0; chance() && i < 40; ++i) bias[engine() % vocab] = static_cast<float>(real(-5.0, 5.0));
  for (const auto& [id, value] : bias) {
    c.bias_ids.push_back(id);
    c.bias_values.push_back(value);
  }
  if (vocab > 3 && chance()) {
    c.min_tokens = static_cast<int64_t>(engine() % 8);
    c.stop_ids = {static_cast<int32_t>(vocab - 1), 1};
  }
  return c;
}

std::vector<int32_t> RandomIds(std::mt19937_64& engine, int64_t vocab, size_t count) {
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(engine() % vocab);
  return ids;
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

TEST(SamplerTest, WeightsAreExponentials) {
  EXPECT_EQ(WeightOf(0.0), uint64_t{1} << kWeightBits);
  EXPECT_EQ(WeightOf(-100.0), 0u);
  EXPECT_EQ(WeightOf(-std::numeric_limits<double>::infinity()), 0u);
  const double unit = std::ldexp(1.0, kWeightBits);
  for (double x = -40.0; x <= 0.0; x += 0.00371) {
    EXPECT_NEAR(static_cast<double>(WeightOf(x)), std::exp(x) * unit, 0.51 + 1e-14 * std::exp(x) * unit) << x;
  }
}

TEST(SamplerTest, AsTransformersDoes) {
  std::ifstream file(std::string(REFOCUS_SOURCE_DIR) + "/tests/golden/sampling.json");
  const auto golden = nlohmann::json::parse(file);
  const auto logits = golden.at("logits").get<std::vector<float>>();
  for (const auto& want : golden.at("cases")) {
    SamplingConfig c = Warm(want.value("temperature", 1.0));
    c.top_k = want.value("top_k", 0);
    c.top_p = want.value("top_p", 1.0);
    c.min_p = want.value("min_p", 0.0);
    c.repetition_penalty = want.value("repetition_penalty", 1.0);
    c.presence_penalty = want.value("presence_penalty", 0.0);
    c.frequency_penalty = want.value("frequency_penalty", 0.0);
    c.min_tokens = want.value("min_tokens", 0);
    c.stop_ids = want.value("stop_ids", std::vector<int32_t>());
    for (const auto& [id, value] : want.value("bias", std::map<std::string, float>())) {
      c.bias_ids.push_back(std::stoi(id));
      c.bias_values.push_back(value);
    }
    const at::Tensor sampler = MakeSampler(c, static_cast<int64_t>(logits.size()),
                                           golden.at("prompt").get<std::vector<int32_t>>(), at::kCPU);
    Answered(StateOf(sampler), golden.at("answer").get<std::vector<int32_t>>());
    const std::vector<double> got = Ours(logits, StateOf(sampler));
    const auto probabilities = want.at("probabilities").get<std::vector<double>>();
    ASSERT_EQ(probabilities.size(), got.size());
    for (size_t id = 0; id < got.size(); ++id) {
      EXPECT_NEAR(got[id], probabilities[id], 2e-6) << "token " << id << " of " << want.dump().substr(0, 120);
      EXPECT_EQ(got[id] > 1e-8, probabilities[id] > 1e-8) << "token " << id << " of " << want.dump().substr(0, 120);
    }
  }
}

// Every draw is the one that the definition gives, unless u lies within rounding of a boundary.
TEST(SamplerTest, DrawsWhatTheDefinitionSays) {
  std::mt19937_64 engine(5);
  int draws = 0, near = 0;
  for (const int64_t vocab : {1, 2, 7, 300, 49152, 151936}) {
    for (int round = 0; round < (vocab > 1000 ? 12 : 300); ++round) {
      const SamplingConfig c = RandomConfig(engine, vocab);
      const std::vector<float> logits = Normal(vocab, engine(), 3.0f);
      const std::vector<int32_t> prompt = RandomIds(engine, vocab, engine() % 10);
      const std::vector<int32_t> answer = RandomIds(engine, vocab, engine() % 10);
      const at::Tensor sampler = MakeSampler(c, vocab, prompt, at::kCPU);
      Answered(StateOf(sampler), answer);
      const std::vector<double> p = Defined(logits, c, prompt, answer);
      const double u = static_cast<double>(UniformBits(c.seed, StateOf(sampler).index)) * 0x1.0p-53;
      const int64_t got = DrawToken(logits.data(), vocab, StateOf(sampler)).id;
      ++draws;
      double sum = 0.0;
      bool found = false;
      for (int64_t id = 0; id < vocab && !found; ++id) {
        if ((sum += p[id]) <= u + 1e-6 && id != got) continue;
        found = true;
        EXPECT_EQ(id, got) << "vocabulary " << vocab << ", round " << round;
        EXPECT_GT(p[id], 0.0) << "vocabulary " << vocab << ", round " << round;
        if (sum <= u || sum - p[id] > u) ++near;
        EXPECT_GE(sum, u - 1e-6);
        EXPECT_LE(sum - p[id], u + 1e-6);
      }
      EXPECT_TRUE(found);
    }
  }
  EXPECT_LE(near, draws / 200 + 1);
}

// Counts of many draws against the definition: the chi-squared statistic within six standard deviations (it has mean df
// and variance 2 df), and nothing drawn that has no probability.
TEST(SamplerTest, DrawsFollowTheDistribution) {
  constexpr int kDraws = 20'000;
  std::mt19937_64 engine(6);
  for (const int64_t vocab : {1, 7, 50, 1000}) {
    for (int round = 0; round < (vocab > 100 ? 2 : 8); ++round) {
      SamplingConfig c = RandomConfig(engine, vocab);
      c.min_tokens = 0;
      const std::vector<float> logits = Normal(vocab, engine(), 1.5f);
      const std::vector<int32_t> prompt = RandomIds(engine, vocab, 5), answer = RandomIds(engine, vocab, 5);
      at::Tensor sampler = MakeSampler(c, vocab, prompt, at::kCPU);
      Answered(StateOf(sampler), answer);
      const std::vector<double> p = Defined(logits, c, prompt, answer);
      std::vector<int> counts(vocab, 0);
      for (int64_t i = 0; i < kDraws; ++i) {
        const at::Tensor copy = sampler.clone();
        StateOf(copy).index = i;
        ++counts[DrawToken(logits.data(), vocab, StateOf(copy)).id];
      }
      double chi = 0.0, rest = 0.0;
      int df = -1, rest_count = 0;
      for (int64_t id = 0; id < vocab; ++id) {
        ASSERT_TRUE(p[id] > 0.0 || counts[id] == 0) << "token " << id;
        if (p[id] * kDraws < 8) {  // too few for the statistic: together
          rest += p[id] * kDraws;
          rest_count += counts[id];
          continue;
        }
        chi += std::pow(counts[id] - p[id] * kDraws, 2) / (p[id] * kDraws);
        ++df;
      }
      if (rest >= 8) {
        chi += std::pow(rest_count - rest, 2) / rest;
        ++df;
      }
      EXPECT_LE(chi, df + 6 * std::sqrt(2.0 * df) + 1e-9) << "vocabulary " << vocab << ", round " << round;
    }
  }
}

TEST(SamplerTest, KnobsAtTheirEnds) {
  const std::vector<float> logits = Normal(500, 9);
  const int64_t best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  SamplingConfig one = Warm(100.0), tiny = Warm(100.0), picky = Warm(100.0), all = Warm(0.9), wide = Warm(0.9);
  one.top_k = 1;
  tiny.top_p = 1e-12;
  picky.min_p = 1.0 - 1e-12;
  wide.top_k = 500;
  for (int64_t index = 0; index < 50; ++index) {
    for (const SamplingConfig& c : {one, tiny, picky}) EXPECT_EQ(Sample(logits, c, index).id, best);
    EXPECT_EQ(Sample(logits, wide, index).id, Sample(logits, all, index).id);
  }
  std::vector<float> masked(500, -kInf);
  masked[321] = -7.0f;
  SamplingConfig every = Warm(2.0);
  every.top_k = 3;
  every.top_p = 0.5;
  every.min_p = 0.5;
  EXPECT_EQ(Sample(masked, every, 4).id, 321);
  EXPECT_EQ(Sample(masked, every, 4).logprob, 0.0f);
}

TEST(SamplerTest, AmongEqualsTheLowerIdIsTheLarger) {
  const std::vector<float> logits = {1.0f, 3.0f, 2.0f, 3.0f, -0.0f, 3.0f, 0.0f, 2.0f};
  const auto drawn = [&](const SamplingConfig& c) {
    std::vector<int> counts(logits.size(), 0);
    for (int64_t index = 0; index < 2000; ++index) ++counts[Sample(logits, c, index).id];
    std::vector<size_t> ids;
    for (size_t id = 0; id < counts.size(); ++id) {
      if (counts[id] > 0) ids.push_back(id);
    }
    return ids;
  };
  SamplingConfig c = Warm(3.0);
  c.top_k = 2;
  EXPECT_EQ(drawn(c), (std::vector<size_t>{1, 3}));
  c.top_k = 4;
  EXPECT_EQ(drawn(c), (std::vector<size_t>{1, 2, 3, 5}));
  c.top_k = 7;
  EXPECT_EQ(drawn(c), (std::vector<size_t>{0, 1, 2, 3, 4, 5, 7}));
  c.top_k = 3;
  c.top_p = 0.6;  // of three equals
  EXPECT_EQ(drawn(c), (std::vector<size_t>{1, 3}));
}

TEST(SamplerTest, PenaltiesFollowTheAnswer) {
  const std::vector<float> logits = {1.0f, 0.9f, 0.8f, -5.0f};
  SamplingConfig c;
  c.frequency_penalty = 0.15;
  const at::Tensor sampler = MakeSampler(c, 4, {0, 0, 0}, at::kCPU);  // the prompt does not count for it
  std::vector<int64_t> ids;
  for (int i = 0; i < 6; ++i) ids.push_back(DrawToken(logits.data(), 4, StateOf(sampler)).id);
  EXPECT_EQ(ids, (std::vector<int64_t>{0, 1, 0, 2, 1, 0}));
  c = {};
  c.repetition_penalty = 1.5;
  const at::Tensor repeats = MakeSampler(c, 4, {0}, at::kCPU);
  ids.clear();
  for (int i = 0; i < 4; ++i) ids.push_back(DrawToken(logits.data(), 4, StateOf(repeats)).id);
  EXPECT_EQ(ids, (std::vector<int64_t>{1, 2, 0, 0}));
  c = {};
  c.min_tokens = 2;
  c.stop_ids = {0, 1};
  const at::Tensor longer = MakeSampler(c, 4, {}, at::kCPU);
  ids.clear();
  for (int i = 0; i < 3; ++i) ids.push_back(DrawToken(logits.data(), 4, StateOf(longer)).id);
  EXPECT_EQ(ids, (std::vector<int64_t>{2, 2, 0}));
}

TEST(SamplerTest, ForcedTokensCountAsDrawnOnes) {
  std::mt19937_64 engine(12);
  for (int round = 0; round < 20; ++round) {
    const int64_t vocab = 1 + static_cast<int64_t>(engine() % 70);
    const SamplingConfig c = RandomConfig(engine, vocab);
    const std::vector<int32_t> ids = RandomIds(engine, vocab, 6);
    const at::Tensor forced = MakeSampler(c, vocab, {0}, at::kCPU), drawn = forced.clone();
    CountTokens(forced, c, vocab, ids);
    Answered(StateOf(drawn), ids);
    StateOf(drawn).index = 0;  // they are no draws
    EXPECT_TRUE(forced.equal(drawn));
  }
}

TEST(SamplerTest, SeedAndIndexAloneDecide) {
  const std::vector<float> logits(1000, 0.0f);
  EXPECT_EQ(Sample(logits, Warm(1.0, 1), 5).id, Sample(logits, Warm(1.0, 1), 5).id);
  EXPECT_NE(Sample(logits, Warm(1.0, 1), 5).id, Sample(logits, Warm(1.0, 1), 6).id);
  EXPECT_NE(Sample(logits, Warm(1.0, 2), 5).id, Sample(logits, Warm(1.0, 1), 5).id);
  for (int64_t index = 0; index < 1000; ++index) EXPECT_LT(UniformBits(7, index), uint64_t{1} << 53);
}

// The published outputs of splitmix64 from state 1234567.
TEST(SamplerTest, SeedsOfSamplesAreSplitmix) {
  EXPECT_EQ(SampleSeed(1234567, 0), 1234567u);
  EXPECT_EQ(MixBits(1234567), 6457827717110365317u);
  EXPECT_EQ(SampleSeed(1234567, 1), 3203168211198807973u);
  EXPECT_EQ(SampleSeed(1234567, 2), 9817491932198370423u);
}

// Rows of a batch, each with knobs of its own, draw what they draw alone; a row without a sampler draws nothing.
TEST(SamplerTest, RowsOfABatchAreTheSameAlone) {
  const auto backend = MakeCpuBackend();
  std::mt19937_64 engine(8);
  for (const int64_t rows : {1, 2, 17, 64}) {
    const int64_t vocab = 777;
    const std::vector<float> logits = Normal(rows * vocab, engine());
    const at::Tensor all = at::tensor(logits, at::kFloat).view({rows, vocab});
    std::vector<at::Tensor> together, alone;
    at::Tensor addresses = at::zeros({rows}, at::kLong);
    for (int64_t row = 0; row < rows; ++row) {
      const SamplingConfig c = RandomConfig(engine, vocab);
      together.push_back(MakeSampler(c, vocab, RandomIds(engine, vocab, 4), at::kCPU));
      alone.push_back(together.back().clone());
      if (row != 5) addresses[row].fill_(SamplerAddress(together.back()));
    }
    at::Tensor ids = at::empty({rows}, at::kLong), logprobs = at::empty({rows}, at::kFloat);
    for (int step = 0; step < 4; ++step) {
      backend->Sample(all, addresses, ids, logprobs);
      for (int64_t row = 0; row < rows; ++row) {
        if (row == 5) {
          EXPECT_EQ(ids[row].item<int64_t>(), -1);
          continue;
        }
        const Draw draw = DrawToken(logits.data() + row * vocab, vocab, StateOf(alone[row]));
        EXPECT_EQ(ids[row].item<int64_t>(), draw.id);
        EXPECT_EQ(logprobs[row].item<float>(), draw.logprob);
        EXPECT_TRUE(together[row].equal(alone[row])) << "state of row " << row;
      }
    }
  }
}

TEST(SamplerTest, WhatIsNotADistributionGivesNoToken) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const double temperature : {0.0, 1.0}) {
    SamplingConfig sampling = Warm(temperature);
    sampling.top_k = 2;
    sampling.top_p = 0.9;
    EXPECT_EQ(Sample({0.0f, nan, 1.0f}, sampling).id, -1);
    EXPECT_EQ(Sample({nan, 0.0f}, sampling).id, -1);
    EXPECT_EQ(Sample({-kInf, -kInf}, sampling).id, -1);
    EXPECT_EQ(Sample({0.0f, kInf}, sampling).id, -1);
    EXPECT_EQ(Sample({-kInf, 3.0f}, sampling).id, 1);
    sampling.min_tokens = 1;
    sampling.stop_ids = {0, 1};
    EXPECT_EQ(Sample({2.0f, 3.0f}, sampling).id, -1);
  }
}

}  // namespace
}  // namespace refocus
