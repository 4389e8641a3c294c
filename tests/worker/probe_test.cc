// Attention mass against the softmax of the fp64 oracle, on 1 to 3 ranks; what a probe leaves behind; bad commands.
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include "base/limits.h"
#include "tests/worker/engine_harness.h"
#include "tests/worker/softmax_oracle.h"
#include "worker/generate.h"
#include "worker/prefill.h"

namespace refocus {
namespace {

constexpr int64_t kTokens = 700;  // blocks of 256: two ranks own 444 and 256 of them
constexpr double kBound = 2e-5;   // of a mass, absolute
constexpr uint64_t kContext = 1;
constexpr uint64_t kSequence = 5;

// Empty (at the ends and within), one key, in a block, over borders of shards, everything, overlapping, in any order.
const std::vector<KeyRange> kRanges = {{0, 0},     {kTokens, kTokens}, {300, 300}, {0, 1},
                                       {699, 700}, {255, 257},         {500, 530}, {10, 200},
                                       {100, 690}, {0, kTokens},       {0, 512},   {512, 700}};

std::vector<int32_t> SomeIds(int64_t count, uint64_t seed, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    ids.push_back(static_cast<int32_t>((seed >> 33) % static_cast<uint64_t>(vocab)));
  }
  return ids;
}

std::vector<int64_t> Numbers(int64_t first, int64_t count) {
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(first + i);
  return numbers;
}

class ProbeTest : public ::testing::TestWithParam<std::pair<std::string, int>> {
 protected:
  ProbeTest()
      : weights_(TestWeights(GetParam().first)),
        config_(weights_->config),
        ids_(SomeIds(kTokens, 7, config_.vocab)) {}

  // Rows of the context at these positions, all layers and heads, the ranges above.
  ProbeAttention InContext(const std::vector<int64_t>& positions) const {
    ProbeAttention probe{kSequence, positions, {}, {}, kRanges, Numbers(0, config_.layers), Numbers(0, config_.heads)};
    for (const int64_t pos : positions) probe.ids.push_back(ids_[pos]);
    probe.rows = Numbers(0, static_cast<int64_t>(positions.size()));
    return probe;
  }
  ProbeAttention Behind(const std::vector<int32_t>& prompt) const {
    const int64_t rows = static_cast<int64_t>(prompt.size());
    return {kSequence, Numbers(kTokens, rows), prompt, Numbers(0, rows), kRanges,
            Numbers(0, config_.layers), Numbers(0, config_.heads)};
  }

  // The masses of rank 0 with this delta, through Sequence itself: an engine's delta has no entry from outside.
  std::vector<float> Masses(const ProbeAttention& probe, const at::Tensor& delta) const {
    const int ranks = GetParam().second;
    const std::vector<std::shared_ptr<Collective>> collectives = MakeLocalCollectives(ranks, 30.0);
    std::vector<std::vector<float>> masses(ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank) {
      threads.emplace_back([&, rank] {
        const c10::InferenceMode inference;
        at::set_num_threads(1);
        std::atomic<int64_t> progress{0};
        const std::unique_ptr<Backend> backend = MakeCpuBackend(config_);
        try {
          Model model(*weights_, *backend, *collectives[rank], progress);
          // The first 300 tokens in an extent of their own, as if shared with another context.
          const auto extent = [&](int64_t first, int64_t count) {
            return std::make_shared<KvExtent>(config_, model.plan(), first, count, at::kFloat, /*poison=*/true);
          };
          const auto prefix = extent(0, 300), rest = extent(300, kTokens - 300);
          PrefillRows(model, KvChain(), *prefix, 0, {ids_.begin(), ids_.begin() + 300});
          KvChain context(prefix);
          PrefillRows(model, context, *rest, 300, {ids_.begin() + 300, ids_.end()});
          context.Add(rest);
          OpenSequence open{kSequence, kContext};
          open.capacity = kMaxProbePromptTokens;
          Sequence sequence(open, context, KvChain(), {}, extent(kTokens, open.capacity), delta);
          const Status status = sequence.Probe(model, probe, [&, rank](std::vector<float> piece) {
            EXPECT_LE(piece.size(), static_cast<size_t>(kProbeValuesAtOnce));
            masses[rank].insert(masses[rank].end(), piece.begin(), piece.end());
          });
          EXPECT_TRUE(status.ok()) << status;
        } catch (const std::exception& error) {
          collectives[rank]->Abort(error.what());
          ADD_FAILURE() << "rank " << rank << ": " << error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (int rank = 1; rank < ranks; ++rank) EXPECT_TRUE(masses[rank].empty()) << "rank 0 speaks for all";
    return masses[0];
  }

  // softmax [layers, H, rows, keys] fp64 of the oracle for all of the probe's rows.
  static void ExpectMasses(const ProbeAttention& probe, const at::Tensor& softmax, const std::vector<float>& masses) {
    ASSERT_EQ(masses.size(), probe.layers.size() * probe.rows.size() * probe.ranges.size() * probe.heads.size());
    size_t at = 0;
    double worst = 0, largest = 0;
    for (const int64_t layer : probe.layers) {
      for (const int64_t row : probe.rows) {
        for (const KeyRange& range : probe.ranges) {
          for (const int64_t head : probe.heads) {
            const double mass = masses[at++];
            const double expected =
                softmax[layer][head][row].narrow(0, range.begin, range.end - range.begin).sum().item<double>();
            if (range.begin == range.end) {
              ASSERT_EQ(mass, 0.0);
            }
            ASSERT_NEAR(mass, expected, kBound) << "layer " << layer << " row " << row << " head " << head << " range "
                                                << range.begin << " to " << range.end;
            worst = std::max(worst, std::abs(mass - expected));
            largest = std::max(largest, expected < 0.999 ? expected : 0.0);
          }
        }
      }
    }
    EXPECT_GT(largest, 0.05) << "nothing was measured";
    RecordProperty("worst", std::to_string(worst));
  }

  at::Tensor SomeDelta() const {
    at::Tensor delta = at::empty({config_.layers, config_.q_dim(), config_.hidden}, at::kFloat);
    delta.normal_(0.0, 0.05, at::detail::createCPUGenerator(5));
    return delta;
  }

  SoftmaxOracle Oracle() const {
    SoftmaxOracle oracle(*weights_, at::kCPU, at::kDouble);
    oracle.Prefill(ids_);
    return oracle;
  }

  std::shared_ptr<const Weights> weights_;
  const ModelConfig& config_;
  const std::vector<int32_t> ids_;
};

TEST_P(ProbeTest, RowsOfTheContext) {
  const ProbeAttention probe = InContext({0, 699, 5, 255, 256, 300, 511, 512, 698});
  ExpectMasses(probe, Oracle().Softmax(probe.ids, probe.positions, {}), Masses(probe, {}));
}

TEST_P(ProbeTest, ManyRowsOfTheContextAreSharedAmongRanks) {
  std::vector<int64_t> positions;
  for (int64_t pos = 1; pos < kTokens; pos += 2) positions.push_back(pos);
  ProbeAttention probe = InContext(positions);
  probe.rows = {0, 1, 100, 101, 102, 340};
  ExpectMasses(probe, Oracle().Softmax(probe.ids, probe.positions, {}), Masses(probe, {}));
}

TEST_P(ProbeTest, RowsOfAPrompt) {
  for (const int64_t rows : {1, 5, 300}) {
    ProbeAttention probe = Behind(SomeIds(rows, 11, config_.vocab));
    if (rows == 300) probe.rows = {0, 100, 298, 299};
    const at::Tensor softmax = Oracle().TailSoftmax(probe.ids, {});
    const std::vector<float> masses = Masses(probe, {});
    ExpectMasses(probe, softmax, masses);
    // The first row's own tail is its own key alone: the whole context has the rest.
    const double own = softmax[0][0][0][kTokens].item<double>();
    EXPECT_NEAR(masses[9 * probe.heads.size()], 1.0 - own, kBound);
  }
}

TEST_P(ProbeTest, AdaptedQueries) {
  const at::Tensor delta = SomeDelta();
  const ProbeAttention inside = InContext({699, 17, 512});
  const std::vector<float> masses = Masses(inside, delta);
  ExpectMasses(inside, Oracle().Softmax(inside.ids, inside.positions, delta), masses);
  EXPECT_NE(masses, Masses(inside, {}));
  const ProbeAttention behind = Behind(SomeIds(5, 11, config_.vocab));
  ExpectMasses(behind, Oracle().TailSoftmax(behind.ids, delta), Masses(behind, delta));
}

TEST_P(ProbeTest, SomeLayersAndHeads) {
  ProbeAttention probe = InContext({699, 17});
  probe.layers = {config_.layers - 2};
  probe.heads = {1, config_.heads - 1};
  ExpectMasses(probe, Oracle().Softmax(probe.ids, probe.positions, {}), Masses(probe, {}));
}

TEST_P(ProbeTest, LeavesNothingBehind) {
  Group group(weights_, GetParam().second);
  group.Prefill(kContext, ids_);
  const std::vector<int32_t> prompt = {7, 8, 9}, targets = {4, 5, 6};
  const Result before = group.Score(kContext, prompt, kTokens, targets);
  group.Do(OpenSequence{kSequence, kContext, 0, 0, 300});
  const std::vector<float> first = group.Do(Behind(prompt)).masses;
  EXPECT_EQ(first.size(), kRanges.size() * 3 * config_.layers * config_.heads);
  EXPECT_EQ(group.Do(InContext({699})).masses.size(), kRanges.size() * config_.layers * config_.heads);
  group.Do(Behind(SomeIds(300, 3, config_.vocab)));
  EXPECT_EQ(group.Do(Behind(prompt)).masses, first);
  // The sequence itself can still be used as if nothing had been probed.
  ExtendSequence extend{kSequence, kTokens, {7, 8, 9, 4, 5}};
  extend.score_ids = targets;
  EXPECT_EQ(group.Do(extend).result().score_logprobs, before.score_logprobs);
  group.Do(CloseSequence{kSequence});
  const Result after = group.Score(kContext, prompt, kTokens, targets);
  EXPECT_EQ(after.score_logprobs, before.score_logprobs);
  EXPECT_EQ(after.kv_used_bytes, before.kv_used_bytes);
}

TEST_P(ProbeTest, BadCommands) {
  Group group(weights_, GetParam().second);
  group.Prefill(kContext, ids_);
  const auto expect_refused = [&](const ProbeAttention& probe, const std::string& reason) {
    const Answer answer = group.Call(probe);
    EXPECT_EQ(answer.reason(), reason) << answer.result().status;
    EXPECT_TRUE(answer.masses.empty());
  };
  expect_refused(InContext({5}), "UNKNOWN_UID");
  group.Do(OpenSequence{kSequence, kContext, 0, 0, 4});
  const auto changed = [&](const std::function<void(ProbeAttention&)>& change) {
    ProbeAttention probe = InContext({5, 6});
    change(probe);
    return probe;
  };
  const std::string field = "FIELD_OUT_OF_RANGE";
  expect_refused(changed([](auto& p) { p.positions = {5, -1}; }), field);
  expect_refused(changed([](auto& p) { p.positions = {5, kTokens}; }), field);
  expect_refused(changed([](auto& p) { p.positions = {kTokens + 1, kTokens + 2}; }), field);
  expect_refused(changed([](auto& p) { p.positions = {5}; }), field);
  expect_refused(changed([](auto& p) { p = ProbeAttention{kSequence}; }), field);
  expect_refused(Behind({1, 2, 3, 4, 5}), field);  // beyond the sequence's capacity
  expect_refused(changed([](auto& p) { p.ids[0] = -1; }), "TOKEN_ID_OUT_OF_RANGE");
  expect_refused(changed([](auto& p) { p.rows = {}; }), field);
  expect_refused(changed([](auto& p) { p.rows = {1, 1}; }), field);
  expect_refused(changed([](auto& p) { p.rows = {2}; }), field);
  expect_refused(changed([](auto& p) { p.ranges = {}; }), field);
  expect_refused(changed([](auto& p) { p.ranges = {{0, kTokens + 1}}; }), field);
  expect_refused(changed([](auto& p) { p.ranges = {{6, 5}}; }), field);
  expect_refused(changed([](auto& p) { p.ranges = {{-1, 5}}; }), field);
  expect_refused(changed([&](auto& p) { p.layers = {config_.layers}; }), field);
  expect_refused(changed([](auto& p) { p.layers = {1, 0}; }), field);
  expect_refused(changed([&](auto& p) { p.heads = {config_.heads}; }), field);
  expect_refused(changed([](auto& p) { p.heads = {}; }), field);
  ExtendSequence extend{kSequence, kTokens, {1}};
  group.Do(extend);
  expect_refused(Behind({1}), field);  // the sequence has tokens of its own
  EXPECT_FALSE(group.Do(InContext({5, 6})).masses.empty());
}

INSTANTIATE_TEST_SUITE_P(Groups, ProbeTest,
                         ::testing::Values(std::pair{"qwen3", 1}, std::pair{"qwen3", 2}, std::pair{"llama", 3}),
                         [](const auto& info) { return info.param.first + std::to_string(info.param.second); });

}  // namespace
}  // namespace refocus
