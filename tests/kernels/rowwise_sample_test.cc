// Draws against the definition of base/sampling.h, read word by word with a full sort of every row: the same ids
// exactly, because weights are integers.
#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <set>

#include "base/sampling.h"
#include "base/shard_plan.h"
#include "kernels/rowwise.h"
#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using SampleTest = RowwiseTest;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Token {
  int64_t id;
  float logprob;
};

struct Knobs {
  double temperature = 1.0;  // 0: greedy
  uint64_t seed = 1;
  int64_t index = 0;
  int32_t top_k = 0;
  double top_p = 1.0;
  double min_p = 0.0;
  float repetition = 1.0f, presence = 0.0f, frequency = 0.0f;
  int64_t min_tokens = 0;
  std::set<int32_t> ends;
  std::map<int32_t, float> bias;
  std::map<int32_t, uint32_t> counts;

  bool counting() const { return repetition != 1.0f || presence != 0.0f || frequency != 0.0f; }
};

SamplerState Plain(const Knobs& k) {
  SamplerState state;
  state.inverse_temperature = k.temperature > 0.0 ? 1.0 / k.temperature : 0.0;
  state.top_p = k.top_p;
  state.min_p_margin = k.min_p > 0.0 ? k.temperature * std::log(k.min_p) : -std::numeric_limits<double>::infinity();
  state.seed = k.seed;
  state.index = k.index;
  state.min_tokens = k.min_tokens;
  state.repetition = k.repetition;
  state.presence = k.presence;
  state.frequency = k.frequency;
  state.top_k = k.top_k;
  state.bias_count = static_cast<int32_t>(k.bias.size());
  state.end_count = static_cast<int32_t>(k.ends.size());
  return state;
}

// The state and the lists behind it.
std::vector<char> Blob(const Knobs& k, int64_t vocab) {
  SamplerState state = Plain(k);
  std::vector<char> out(sizeof(state));
  const auto add = [&out](const auto& values) {
    const auto at = static_cast<int64_t>(out.size());
    const char* bytes = reinterpret_cast<const char*>(values.data());
    out.insert(out.end(), bytes, bytes + values.size() * sizeof(values[0]));
    out.resize((out.size() + 15) / 16 * 16);
    return at;
  };
  std::vector<int32_t> ids;
  std::vector<float> values;
  for (const auto& [id, value] : k.bias) {
    ids.push_back(id);
    values.push_back(value);
  }
  state.bias_ids = add(ids);
  state.bias_values = add(values);
  state.end_ids = add(std::vector<int32_t>(k.ends.begin(), k.ends.end()));
  if (k.counting()) {
    std::vector<uint32_t> counts(vocab, 0);
    for (const auto& [id, count] : k.counts) counts[id] = count;
    state.counts = add(counts);
  }
  std::memcpy(out.data(), &state, sizeof(state));
  return out;
}

// Rows with samplers of their own; the workspace is poisoned before the first draw.
class Batch {
 public:
  Batch(const std::vector<float>& logits, const std::vector<Knobs>& knobs, int64_t shift = 0)
      : rows_(static_cast<int64_t>(knobs.size())),
        vocab_(static_cast<int64_t>(logits.size()) / rows_),
        logits_(logits, shift),
        workspace_(SampleWorkspaceBytes(rows_, vocab_)),
        samplers_(rows_),
        tokens_(rows_),
        logprobs_(rows_) {
    for (const Knobs& k : knobs) states_.push_back(std::make_unique<DeviceArray<char>>(Blob(k, vocab_)));
    for (int64_t row = 0; row < rows_; ++row) SetSampler(row, StateAt(row));
  }

  SamplerState* StateAt(int64_t row) { return reinterpret_cast<SamplerState*>(states_[row]->get()); }
  void SetSampler(int64_t row, SamplerState* state) {
    cudaMemcpy(samplers_.get() + row, &state, sizeof(state), cudaMemcpyHostToDevice);
  }
  std::vector<char> Memory(int64_t row) { return states_[row]->Download(); }
  SamplerState State(int64_t row) {
    SamplerState state;
    std::memcpy(&state, Memory(row).data(), sizeof(state));
    return state;
  }
  SampleParams Params() {
    return {rows_, vocab_, logits_.get(), samplers_.get(), tokens_.get(), logprobs_.get(), workspace_.get()};
  }
  std::vector<Token> Draw() {
    EXPECT_EQ(Sample(Params(), nullptr), cudaSuccess);
    workspace_.Download();  // its guards
    const std::vector<int64_t> ids = tokens_.Download();
    const std::vector<float> logprobs = logprobs_.Download();
    std::vector<Token> out;
    for (int64_t row = 0; row < rows_; ++row) out.push_back({ids[row], logprobs[row]});
    return out;
  }

 private:
  int64_t rows_, vocab_;
  DeviceArray<float> logits_;
  DeviceArray<char> workspace_;
  std::vector<std::unique_ptr<DeviceArray<char>>> states_;
  DeviceArray<SamplerState*> samplers_;
  DeviceArray<int64_t> tokens_;
  DeviceArray<float> logprobs_;
};

Token DrawOne(const std::vector<float>& logits, const Knobs& knobs, int64_t shift = 0) {
  Batch batch(logits, {knobs}, shift);
  const Token token = batch.Draw()[0];
  EXPECT_EQ(batch.State(0).index, knobs.index + (token.id >= 0 ? 1 : 0));
  return token;
}

// The definition, for a row that is a distribution.
Token Defined(const float* logits, int64_t vocab, const Knobs& k) {
  const SamplerState state = Plain(k);
  std::vector<float> l(logits, logits + vocab);
  for (const auto& [id, value] : k.bias) l[id] += value;
  for (const auto& [id, count] : k.counts) {
    if (k.counting()) l[id] = Penalized(state, l[id], count);
  }
  for (const int32_t id : k.ends) {
    if (k.index < k.min_tokens) l[id] = -kInfinity;
  }
  std::vector<int64_t> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return l[a] != l[b] ? l[a] > l[b] : a < b; });
  const float max = l[order[0]];
  int64_t drawn = order[0];
  if (k.temperature > 0.0) {
    if (k.top_k > 0 && k.top_k < vocab) order.resize(k.top_k);
    uint64_t total = 0, sum = 0;
    for (const int64_t id : order) total += WeightOf(state, l[id], max);
    const uint64_t share = ShareOf(k.top_p, total);
    std::vector<int64_t> kept;
    for (const int64_t id : order) {
      if (sum >= share) break;
      sum += WeightOf(state, l[id], max);
      if (PassesMinP(state, l[id], max)) kept.push_back(id);
    }
    std::sort(kept.begin(), kept.end());
    total = sum = 0;
    for (const int64_t id : kept) total += WeightOf(state, l[id], max);
    const uint64_t target = DrawTarget(k.seed, k.index, total);
    for (const int64_t id : kept) {
      drawn = id;
      if ((sum += WeightOf(state, l[id], max)) > target) break;
    }
  }
  const double raw_max = *std::max_element(logits, logits + vocab);
  double plain = 0.0;
  for (int64_t i = 0; i < vocab; ++i) plain += std::exp(static_cast<double>(logits[i]) - raw_max);
  return {drawn, static_cast<float>(logits[drawn] - (raw_max + std::log(plain)))};
}

Knobs RandomKnobs(Random& random, int64_t vocab) {
  const auto chance = [&] { return random.Below(2) == 0; };
  const auto real = [&](double low, double high) {
    return low + (high - low) * 0x1p-20 * static_cast<double>(random.Below(1 << 20));
  };
  Knobs k;
  k.temperature = random.Below(6) == 0 ? 0.0 : real(0.2, 3.0);
  k.seed = static_cast<uint64_t>(random.Below(INT64_MAX)) * 2 + 1;
  k.index = random.Below(int64_t{1} << 40);
  if (chance()) k.top_k = static_cast<int32_t>(1 + random.Below(std::min<int64_t>(vocab + 5, 5000)));
  if (chance()) k.top_p = real(0.001, 1.0);
  if (chance()) k.min_p = real(0.0, 0.3);
  if (chance()) k.repetition = static_cast<float>(real(0.7, 1.8));
  if (chance()) k.presence = static_cast<float>(real(-1.0, 2.0));
  if (chance()) k.frequency = static_cast<float>(real(-0.5, 1.0));
  for (int i = 0; i < 50; ++i) {
    const auto id = static_cast<int32_t>(random.Below(vocab));
    k.counts[id] = static_cast<uint32_t>(random.Below(4)) | (chance() ? SamplerState::kInPrompt : 0);
  }
  const bool biased = chance();
  for (int i = 0; biased && i < 900; ++i) {
    k.bias[static_cast<int32_t>(random.Below(vocab))] = static_cast<float>(real(-5, 5));
  }
  if (vocab > 3 && chance()) {
    k.ends = {static_cast<int32_t>(random.Below(vocab)), static_cast<int32_t>(vocab - 1)};
    k.min_tokens = chance() ? k.index + 1 : k.index;
  }
  return k;
}

TEST_F(SampleTest, DrawsTheTokensOfTheDefinition) {
  for (const int64_t vocab : {1, 2, 7, 1023, 1024, 1025, 16383, 16384, 49152, 151936, 300001}) {
    Random random(static_cast<uint64_t>(vocab) + 1);
    double worst = 0.0;
    for (int round = 0; round < (vocab > 10000 ? 4 : 30); ++round) {
      const int64_t rows = vocab > 10000 ? 8 : std::vector<int64_t>{1, 5, 64}[round % 3];
      std::vector<float> logits = random.Floats(rows * vocab, 3.0f);
      if (round % 2 == 1) {  // many equals
        for (float& logit : logits) logit = std::round(logit * 2.0f) / 2.0f;
      }
      std::vector<Knobs> knobs;
      for (int64_t row = 0; row < rows; ++row) knobs.push_back(RandomKnobs(random, vocab));
      Batch batch(logits, knobs, round % 3);
      const std::vector<Token> got = batch.Draw();
      for (int64_t row = 0; row < rows; ++row) {
        const Token want = Defined(logits.data() + row * vocab, vocab, knobs[row]);
        ASSERT_EQ(got[row].id, want.id) << "vocab " << vocab << " round " << round << " row " << row << ": top_k "
                                        << knobs[row].top_k << " top_p " << knobs[row].top_p << " min_p "
                                        << knobs[row].min_p << " temperature " << knobs[row].temperature;
        worst = std::max(worst, std::abs(static_cast<double>(got[row].logprob) - want.logprob));
        Knobs after = knobs[row];
        ++after.index;
        ++after.counts[static_cast<int32_t>(want.id)];
        ASSERT_TRUE(SameBits(batch.Memory(row), Blob(after, vocab))) << "what the sampler keeps";
      }
    }
    std::printf("sample vocab %ld: worst log-probability error %.3g\n", static_cast<long>(vocab), worst);
    EXPECT_LE(worst, 2e-6);
  }
}

// To the bit, wherever a row lies and whoever is beside it; a row without a sampler draws nothing.
TEST_F(SampleTest, RowsDoNotKnowOfEachOther) {
  const int64_t rows = 64, vocab = 5003;
  Random random(31);
  const std::vector<float> logits = random.Floats(rows * vocab, 2.0f);
  std::vector<Knobs> knobs;
  for (int64_t row = 0; row < rows; ++row) knobs.push_back(RandomKnobs(random, vocab));
  Batch batch(logits, knobs);
  batch.SetSampler(7, nullptr);
  const std::vector<Token> together = batch.Draw();
  for (int64_t row = 0; row < rows; ++row) {
    if (row == 7) {
      EXPECT_EQ(together[row].id, -1);
      EXPECT_EQ(batch.State(row).index, knobs[row].index);
      continue;
    }
    const std::vector<float> own(logits.begin() + row * vocab, logits.begin() + (row + 1) * vocab);
    const Token alone = DrawOne(own, knobs[row], row % 4);
    EXPECT_EQ(together[row].id, alone.id) << row;
    EXPECT_EQ(together[row].logprob, alone.logprob) << row;
  }
}

TEST_F(SampleTest, KnobsAtTheirEnds) {
  Random random(32);
  const int64_t vocab = 151936;
  std::vector<float> logits = random.Floats(vocab);
  logits[99999] = 20.0f;
  for (int64_t index = 0; index < 5; ++index) {
    Knobs one, tiny, picky;
    one.temperature = tiny.temperature = picky.temperature = 100.0;
    one.index = tiny.index = picky.index = index;
    one.top_k = 1;
    tiny.top_p = 1e-12;
    picky.min_p = 1.0;
    for (const Knobs& k : {one, tiny, picky}) EXPECT_EQ(DrawOne(logits, k).id, 99999);
    for (const double temperature : {1e-3, 1e-20, 1e-38}) {
      Knobs cold;
      cold.temperature = temperature;
      cold.index = index;
      EXPECT_EQ(DrawOne(logits, cold).id, 99999);
    }
  }
  std::vector<float> masked(vocab, -kInfinity);  // all but one
  masked[123456] = -7.0f;
  Knobs every;
  every.top_k = 3;
  every.top_p = 0.5;
  every.min_p = 0.5;
  EXPECT_EQ(DrawOne(masked, every).id, 123456);
  EXPECT_EQ(DrawOne(masked, every).logprob, 0.0f);
  Knobs ties;  // of equals, the lowest ids
  ties.top_k = 40000;
  std::set<int64_t> seen;
  for (ties.index = 0; ties.index < 200; ++ties.index) {
    seen.insert(DrawOne(std::vector<float>(vocab, 0.5f), ties).id);
  }
  EXPECT_LT(*seen.rbegin(), 40000);
  EXPECT_GT(*seen.rbegin(), 38000);
}

TEST_F(SampleTest, GreedyTakesTheLowestIdAmongEquals) {
  Random random(23);
  Knobs greedy;
  greedy.temperature = 0.0;
  for (const int64_t vocab : {1, 7, 1024, 151936}) {
    const std::vector<float> noise = random.Floats(vocab);
    for (int round = 0; round < 10; ++round) {
      std::vector<float> logits = noise;
      int64_t lowest = vocab;
      for (int tie = 0; tie < 4; ++tie) {
        const int64_t id = random.Below(vocab);
        logits[id] = 10.0f;
        lowest = std::min(lowest, id);
      }
      const Token got = DrawOne(logits, greedy, round % 4);
      EXPECT_EQ(got.id, lowest) << "vocab " << vocab;
      EXPECT_NEAR(got.logprob, Defined(logits.data(), vocab, greedy).logprob, 2e-6);
    }
    std::vector<float> zeros(vocab, 0.0f);
    for (int64_t i = 0; i < vocab; i += 2) zeros[i] = -0.0f;
    EXPECT_EQ(DrawOne(zeros, greedy).id, 0);
    EXPECT_EQ(DrawOne(std::vector<float>(vocab, -3e38f), greedy).id, 0);
  }
}

TEST_F(SampleTest, WhatIsNotADistributionGivesNoToken) {
  Random random(24);
  for (const double temperature : {0.0, 1.0}) {
    Knobs k;
    k.temperature = temperature;
    k.top_k = 3;
    k.top_p = 0.5;
    for (const int64_t vocab : {1, 5000}) {
      const std::vector<float> none(vocab, -kInfinity);
      EXPECT_EQ(DrawOne(none, k).id, -1);
      for (const float bad : {std::nanf(""), kInfinity}) {
        for (const int64_t at : {int64_t{0}, vocab / 2, vocab - 1}) {
          std::vector<float> logits = random.Floats(vocab);
          logits[at] = bad;
          EXPECT_EQ(DrawOne(logits, k).id, -1) << bad << " at " << at << " of " << vocab;
        }
      }
    }
    k.ends = {0, 1};
    k.min_tokens = 1;
    EXPECT_EQ(DrawOne({1.0f, 2.0f}, k).id, -1) << "nothing but end tokens";
  }
}

TEST_F(SampleTest, RefusesWhatItCannotAddUp) {
  SampleParams params;
  params.rows = 1;
  EXPECT_EQ(Sample(params, nullptr), cudaErrorInvalidValue);
  params.vocab = (int64_t{1} << 22) + 1;
  EXPECT_EQ(Sample(params, nullptr), cudaErrorInvalidValue);
  params.vocab = 5;
  params.rows = 0;
  EXPECT_EQ(Sample(params, nullptr), cudaSuccess);
}

// A captured draw, replayed: that of every index.
TEST_F(SampleTest, ReplaysAdvance) {
  Random random(25);
  const std::vector<float> logits = random.Floats(3000);
  const int64_t steps = 700;
  Knobs knobs;
  knobs.seed = 99;
  Batch batch(logits, {knobs});
  const SampleParams sample = batch.Params();
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
    const Token want = Defined(logits.data(), 3000, knobs);
    ++knobs.index;
    ASSERT_EQ(token, want.id) << "step " << i;
    ASSERT_NEAR(logprob, want.logprob, 2e-6);
  }
  EXPECT_EQ(batch.State(0).index, steps);
  cudaGraphExecDestroy(step);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// One recorded step for sequences that come, go and change rows.
TEST_F(SampleTest, ReplayedStepsFollowTheirSamplers) {
  const int64_t rows = 4, vocab = 3000;
  Random random(26);
  const std::vector<float> row = random.Floats(vocab, 2.0f);
  std::vector<float> logits;
  for (int64_t i = 0; i < rows; ++i) logits.insert(logits.end(), row.begin(), row.end());
  std::vector<Knobs> knobs;
  for (int64_t i = 0; i < rows; ++i) knobs.push_back(RandomKnobs(random, vocab));
  Batch batch(logits, knobs);
  const SampleParams params = batch.Params();
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t step;
  REFOCUS_CUDA(cudaStreamCreate(&stream));
  REFOCUS_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  REFOCUS_CUDA(Sample(params, stream));
  REFOCUS_CUDA(cudaStreamEndCapture(stream, &graph));
  REFOCUS_CUDA(cudaGraphInstantiate(&step, graph, 0));
  for (int64_t i = 0; i < 40; ++i) {
    std::vector<int64_t> who(rows);  // of each row; -1: nobody
    for (int64_t at = 0; at < rows; ++at) {
      who[at] = (at + i) % rows == i % 3 ? -1 : (at + i) % rows;
      batch.SetSampler(at, who[at] < 0 ? nullptr : batch.StateAt(who[at]));
    }
    REFOCUS_CUDA(cudaGraphLaunch(step, stream));
    REFOCUS_CUDA(cudaStreamSynchronize(stream));
    std::vector<int64_t> ids(rows);
    REFOCUS_CUDA(cudaMemcpy(ids.data(), params.tokens, rows * sizeof(int64_t), cudaMemcpyDeviceToHost));
    for (int64_t at = 0; at < rows; ++at) {
      if (who[at] < 0) {
        EXPECT_EQ(ids[at], -1);
        continue;
      }
      Knobs& k = knobs[who[at]];
      ASSERT_EQ(ids[at], Defined(row.data(), vocab, k).id) << "step " << i << " row " << at;
      ++k.index;
      ++k.counts[static_cast<int32_t>(ids[at])];
    }
  }
  cudaGraphExecDestroy(step);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace refocus::kernels
