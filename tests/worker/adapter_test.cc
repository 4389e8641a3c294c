// Adapters as an engine's commands, on 1 to 3 ranks: LoRA over its life, on top of another, read out and written into
// other contexts and groups, and what is refused.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/limits.h"
#include "base/memory_plan.h"
#include "tests/worker/engine_harness.h"
#include "tests/worker/golden.h"

namespace refocus {
namespace {

constexpr uint64_t kContext = 1, kOther = 2, kAdapter = 11, kOtherAdapter = 12;
constexpr DeltaConfig kLora{.lora_rank = 4, .lora_alpha = 8.0f};

std::vector<std::pair<int32_t, float>> Bits(const std::vector<Token>& tokens) {
  std::vector<std::pair<int32_t, float>> bits;
  for (const Token& token : tokens) bits.emplace_back(token.id, token.logprob);
  return bits;
}

std::vector<int32_t> TokenIds(const std::vector<Token>& tokens) {
  std::vector<int32_t> ids;
  for (const Token& token : tokens) ids.push_back(token.id);
  return ids;
}

class AdapterTest : public ::testing::TestWithParam<int> {
 protected:
  AdapterTest() : golden_(LoadGolden("qwen3")), group_(TestWeights("qwen3"), GetParam()) {}

  std::vector<int32_t> Ids(int64_t first, int64_t count) const {
    const std::vector<int32_t> all = golden_.context();
    return {all.begin() + first, all.begin() + first + count};
  }
  Span At(int64_t start, int64_t rows) const { return {start, Ids(start, rows + 1)}; }

  static void Begin(Group& group, uint64_t context, uint64_t adapter, const DeltaConfig& delta, uint64_t from = 0) {
    BeginAdapt begin{context, adapter, from};
    begin.delta = delta;
    begin.seed = 5;
    group.Do(begin);
  }
  void Step(Group& group, uint64_t adapter, int64_t step, int64_t start) const {
    group.Do(AdaptStep{adapter, step, {At(start, 30)}, 3e-2f});
  }
  void Adapt(Group& group, uint64_t context, uint64_t adapter, const DeltaConfig& delta, uint64_t from = 0,
             int64_t steps = 3) const {
    Begin(group, context, adapter, delta, from);
    for (int64_t step = 1; step <= steps; ++step) Step(group, adapter, step, 20 * step);
    group.Do(EndAdapt{adapter, true, 1});
  }
  static std::string Export(Group& group, uint64_t adapter, int64_t numbers, int64_t piece) {
    std::string all;
    for (int64_t at = 0; at < numbers; at += piece) {
      const Answer answer = group.Do(ReadDelta{adapter, 1, at, std::min(piece, numbers - at)});
      all += answer.result().data;
      for (int rank = 1; rank < group.size(); ++rank) EXPECT_TRUE(answer.ranks[rank].data.empty());
    }
    return all;
  }
  static void Import(Group& group, uint64_t context, uint64_t adapter, const DeltaConfig& delta,
                     const std::string& data, int64_t piece) {
    group.Do(BeginImport{context, adapter, delta});
    for (size_t at = 0; at < data.size(); at += static_cast<size_t>(4 * piece)) {
      group.Do(WriteDelta{adapter, static_cast<int64_t>(at / 4), data.substr(at, static_cast<size_t>(4 * piece))});
    }
    group.Do(EndAdapt{adapter, true, 1});
  }
  static std::vector<Token> Ask(Group& group, uint64_t context, uint64_t adapter) {
    return group.Ask(context, 300, {7, 8, 9}, 0, 8, adapter, adapter == 0 ? 0 : 1);
  }
  void ExpectRefused(Body body, const std::string& reason, const std::string& what) {
    const Answer answer = group_.Call(std::move(body));
    EXPECT_EQ(answer.reason(), reason) << what << ": " << answer.result().status;
  }

  const Golden& golden_;
  Group group_;
};

TEST_P(AdapterTest, LoraAnswersAndGoesWithoutATrace) {
  group_.Prefill(kContext, Ids(0, 300));
  const auto base = Bits(Ask(group_, kContext, 0));
  Begin(group_, kContext, kAdapter, kLora);
  Step(group_, kAdapter, 1, 10);
  group_.Do(EndAdapt{kAdapter, false, 0});
  Adapt(group_, kContext, kAdapter, kLora);
  EXPECT_NE(Bits(Ask(group_, kContext, kAdapter)), base);
  EXPECT_EQ(Bits(Ask(group_, kContext, 0)), base);
  group_.Do(DropAdapter{kAdapter});
  EXPECT_EQ(Bits(Ask(group_, kContext, 0)), base);
}

// A LoRA on which nothing was learned is the base, to the bit: B is zero.
TEST_P(AdapterTest, UntrainedLoraIsTheBase) {
  group_.Prefill(kContext, Ids(0, 300));
  Adapt(group_, kContext, kAdapter, kLora, 0, 0);
  EXPECT_EQ(Bits(Ask(group_, kContext, kAdapter)), Bits(Ask(group_, kContext, 0)));
}

TEST_P(AdapterTest, TwoContextsAdaptedAtOnceDoNotTouchEachOther) {
  group_.Prefill(kContext, Ids(0, 300));
  group_.Prefill(kOther, Ids(100, 300));
  Adapt(group_, kContext, kAdapter, kLora);
  Adapt(group_, kOther, kOtherAdapter, {});
  const auto first = Bits(Ask(group_, kContext, kAdapter)), second = Bits(Ask(group_, kOther, kOtherAdapter));
  group_.Do(DropAdapter{kAdapter});
  group_.Do(DropAdapter{kOtherAdapter});
  Begin(group_, kContext, kAdapter, kLora);
  Begin(group_, kOther, kOtherAdapter, {});
  for (int64_t step = 1; step <= 3; ++step) {
    Step(group_, kAdapter, step, 20 * step);
    Step(group_, kOtherAdapter, step, 20 * step);
  }
  group_.Do(EndAdapt{kOtherAdapter, true, 1});
  group_.Do(EndAdapt{kAdapter, true, 1});
  EXPECT_EQ(Bits(Ask(group_, kContext, kAdapter)), first);
  EXPECT_EQ(Bits(Ask(group_, kOther, kOtherAdapter)), second);
}

TEST_P(AdapterTest, OnTopOfAnotherThatStaysAsItIs) {
  group_.Prefill(kContext, Ids(0, 300));
  for (const DeltaConfig& kind : {DeltaConfig{}, kLora}) {
    Adapt(group_, kContext, kAdapter, kind);
    const auto below = Bits(Ask(group_, kContext, kAdapter));
    Adapt(group_, kContext, kOtherAdapter, kind, kAdapter, 0);
    EXPECT_EQ(Bits(Ask(group_, kContext, kOtherAdapter)), below) << "starts from it";
    group_.Do(DropAdapter{kOtherAdapter});
    Adapt(group_, kContext, kOtherAdapter, kind, kAdapter, 2);
    EXPECT_NE(Bits(Ask(group_, kContext, kOtherAdapter)), below);
    EXPECT_EQ(Bits(Ask(group_, kContext, kAdapter)), below);
    group_.Do(DropAdapter{kOtherAdapter});
    group_.Do(DropAdapter{kAdapter});
  }
}

TEST_P(AdapterTest, ExportedAndImportedElsewhereGivesTheSameTokens) {
  group_.Prefill(kContext, Ids(0, 300));
  const ModelConfig& model = TestWeights("qwen3")->config;
  for (const DeltaConfig& kind : {DeltaConfig{}, kLora}) {
    const int64_t numbers = DeltaNumbers(model, kind.lora_rank);
    Adapt(group_, kContext, kAdapter, kind);
    const std::string data = Export(group_, kAdapter, numbers, 1000);
    ASSERT_EQ(static_cast<int64_t>(data.size()), 4 * numbers);
    const std::vector<Token> expected = Ask(group_, kContext, kAdapter);
    // Another adapter of this context: the same bits.
    Import(group_, kContext, kOtherAdapter, kind, data, 777);
    EXPECT_EQ(Bits(Ask(group_, kContext, kOtherAdapter)), Bits(expected));
    EXPECT_EQ(Export(group_, kOtherAdapter, numbers, 5000), data);
    // Groups of other sizes: the same tokens.
    for (const int ranks : {1, 4}) {
      Group other(TestWeights("qwen3"), ranks);
      other.Prefill(kOther, Ids(0, 300));
      Import(other, kOther, kAdapter, kind, data, kDeltaPieceNumbers);
      EXPECT_EQ(TokenIds(Ask(other, kOther, kAdapter)), TokenIds(expected)) << ranks << " ranks";
    }
    group_.Do(DropAdapter{kOtherAdapter});
    group_.Do(DropAdapter{kAdapter});
  }
}

TEST_P(AdapterTest, BadTransfersAreRefusedAndChangeNothing) {
  group_.Prefill(kContext, Ids(0, 300));
  Adapt(group_, kContext, kAdapter, kLora);
  const auto before = Bits(Ask(group_, kContext, kAdapter));
  const int64_t numbers = DeltaNumbers(TestWeights("qwen3")->config, kLora.lora_rank);
  const std::string two(8, '\0');
  ExpectRefused(ReadDelta{78, 1, 0, 1}, "UNKNOWN_UID", "read of unknown");
  ExpectRefused(ReadDelta{kAdapter, 2, 0, 1}, "ADAPTER_CHANGED", "read of another revision");
  ExpectRefused(ReadDelta{kAdapter, 1, numbers, 1}, "FIELD_OUT_OF_RANGE", "read behind the end");
  ExpectRefused(WriteDelta{kAdapter, 0, two}, "COMMAND_OUT_OF_PLACE", "write without begin");
  ExpectRefused(BeginImport{77, kOtherAdapter, kLora}, "UNKNOWN_UID", "import into unknown");
  ExpectRefused(BeginImport{kContext, kOtherAdapter, {.lora_rank = kMaxLoraRank + 1}}, "FIELD_OUT_OF_RANGE", "rank");
  group_.Do(BeginImport{kContext, kAdapter, kLora});  // over the committed one
  ExpectRefused(BeginImport{kContext, kAdapter, kLora}, "COMMAND_OUT_OF_PLACE", "import twice");
  ExpectRefused(WriteDelta{kAdapter, 1, two}, "FIELD_OUT_OF_RANGE", "a gap");
  group_.Do(WriteDelta{kAdapter, 0, two});
  ExpectRefused(WriteDelta{kAdapter, 0, two}, "FIELD_OUT_OF_RANGE", "again");
  const float bad = std::numeric_limits<float>::quiet_NaN();
  std::string poison(4, '\0');
  std::memcpy(poison.data(), &bad, 4);
  ExpectRefused(WriteDelta{kAdapter, 2, poison}, "ADAPTER_FILE_INVALID", "NaN");
  ExpectRefused(AdaptStep{kAdapter, 1, {At(5, 9)}}, "COMMAND_OUT_OF_PLACE", "a step on an import");
  ExpectRefused(EndAdapt{kAdapter, true, 2}, "COMMAND_OUT_OF_PLACE", "commit of a part");
  EXPECT_EQ(Bits(Ask(group_, kContext, kAdapter)), before) << "while it comes in";
  group_.Do(EndAdapt{kAdapter, false, 0});
  EXPECT_EQ(Bits(Ask(group_, kContext, kAdapter)), before);
  BeginAdapt other_kind{kContext, kOtherAdapter, kAdapter};
  ExpectRefused(other_kind, "FIELD_OUT_OF_RANGE", "a full delta on top of a LoRA");
  other_kind.delta = {.lora_rank = 4, .lora_alpha = 9.0f};
  ExpectRefused(other_kind, "FIELD_OUT_OF_RANGE", "another alpha");
  other_kind.from_adapter = 78;
  ExpectRefused(other_kind, "UNKNOWN_UID", "from unknown");
}

// By the bytes that are planned: a LoRA fits where a full delta does not, and an import needs no gradient.
TEST_P(AdapterTest, MemoryFollowsTheKind) {
  const ModelConfig& model = TestWeights("qwen3")->config;
  const int64_t cache = 300 * KvBytesPerToken(model, DeviceKind::kCpu);
  Group small(TestWeights("qwen3"), GetParam(), cache + AdaptationBytes(model, DeviceKind::kCpu) - 1);
  small.Prefill(kContext, Ids(0, 300));
  if (GetParam() == 1) {
    EXPECT_EQ(small.Call(BeginAdapt{kContext, kAdapter}).reason(), "ADAPT_OUT_OF_MEMORY");
  }
  for (uint64_t adapter = 1; adapter <= 3; ++adapter) Adapt(small, kContext, adapter, kLora, 0, 1);
  const int64_t left =
      AdaptationBytes(model, DeviceKind::kCpu) - 1 - 3 * AdapterBytes(model, DeviceKind::kCpu, kLora.lora_rank);
  ASSERT_GT(left, AdapterBytes(model, DeviceKind::kCpu));
  small.Do(BeginImport{kContext, kAdapter, {}});
  small.Do(EndAdapt{kAdapter, false, 0});
}

// What a probe kept is committed: the bits of a run that ended there. Without it the room is not taken, nor may it be used.
TEST_P(AdapterTest, KeepsTheBest) {
  group_.Prefill(kContext, Ids(0, 300));
  const ProbeLoss probe{kOtherAdapter, {At(10, 20)}, true};
  BeginAdapt begin{kContext, kOtherAdapter, 0};
  begin.seed = 5;
  begin.keep_best = true;
  group_.Do(begin);
  double least = group_.Do(probe).result().loss;
  int64_t best = 0;
  for (int64_t step = 1; step <= 5; ++step) {
    group_.Do(AdaptStep{kOtherAdapter, step, {At(20 * step, 30)}, step < 3 ? 3e-2f : 1.0f});
    const double loss = group_.Do(probe).result().loss;
    if (loss < least) best = step;
    least = std::min(least, loss);
  }
  ASSERT_TRUE(best == 1 || best == 2) << best << ": the later steps were meant to harm";
  group_.Do(EndAdapt{kOtherAdapter, true, 1, true});
  Adapt(group_, kContext, kAdapter, {}, 0, best);
  const std::vector<Token> expected = Ask(group_, kContext, kAdapter);
  EXPECT_EQ(Bits(Ask(group_, kContext, kOtherAdapter)), Bits(expected));

  Begin(group_, kContext, 13, {});
  ExpectRefused(ProbeLoss{13, {At(10, 20)}, true}, "FIELD_OUT_OF_RANGE", "keep_best");
  ExpectRefused(EndAdapt{13, true, 1, true}, "COMMAND_OUT_OF_PLACE", "kept");
}

// A lower loss is kept if it is below the probe's limit as well.
TEST_P(AdapterTest, KeepsWhatIsBelowALimit) {
  group_.Prefill(kContext, Ids(0, 300));
  for (const bool below : {false, true}) {
    const uint64_t limited_adapter = below ? 51 : 50, plain = below ? 53 : 52;
    const ProbeLoss probe{limited_adapter, {At(10, 20)}, true};
    BeginAdapt begin{kContext, limited_adapter, 0};
    begin.seed = 5;
    begin.keep_best = true;
    group_.Do(begin);
    const double before = group_.Do(probe).result().loss;
    group_.Do(AdaptStep{limited_adapter, 1, {At(20, 30)}, 3e-2f});
    ProbeLoss limited = probe;
    limited.keep_below = below ? before : before / 100;
    const double after = group_.Do(limited).result().loss;
    ASSERT_TRUE(before / 100 < after && after < before) << before << " " << after;
    group_.Do(EndAdapt{limited_adapter, true, 1, true});
    Adapt(group_, kContext, plain, {}, 0, below ? 1 : 0);
    EXPECT_EQ(Bits(Ask(group_, kContext, limited_adapter)), Bits(Ask(group_, kContext, plain))) << below;
  }
}

// A restart forgets the steps: the bits of an adaptation that never made them, from nothing, from a drawn LoRA and from
// another adapter; what a probe kept before it stays kept.
TEST_P(AdapterTest, RestartsFromWhereItBegan) {
  group_.Prefill(kContext, Ids(0, 300));
  Adapt(group_, kContext, 20, kLora, 0, 2);
  const auto restart = [&](uint64_t adapter, const DeltaConfig& delta, uint64_t from) {
    Begin(group_, kContext, adapter, delta, from);
    group_.Do(AdaptStep{adapter, 1, {At(200, 30)}, 1e-1f});
    group_.Do(AdaptStep{adapter, 2, {At(100, 30)}, 1e-1f});
    ExpectRefused(AdaptStep{adapter, 2, {At(20, 30)}, 3e-2f, true}, "COMMAND_OUT_OF_PLACE", "step");
    group_.Do(AdaptStep{adapter, 1, {At(20, 30)}, 3e-2f, true});
    group_.Do(AdaptStep{adapter, 2, {At(40, 30)}, 3e-2f});
    group_.Do(EndAdapt{adapter, true, 1});
  };
  struct Case {
    DeltaConfig delta;
    uint64_t from;
  };
  uint64_t next = 21;
  for (const Case& c : {Case{{}, 0}, Case{kLora, 0}, Case{kLora, 20}}) {
    const uint64_t plain = next++, restarted = next++;
    Adapt(group_, kContext, plain, c.delta, c.from, 2);
    restart(restarted, c.delta, c.from);
    EXPECT_EQ(Bits(Ask(group_, kContext, restarted)), Bits(Ask(group_, kContext, plain))) << plain;
  }
  BeginAdapt begin{kContext, 40, 0};
  begin.seed = 5;
  begin.keep_best = true;
  group_.Do(begin);
  group_.Do(AdaptStep{40, 1, {At(20, 30)}, 3e-2f});
  group_.Do(ProbeLoss{40, {At(10, 20)}, true});
  group_.Do(AdaptStep{40, 1, {At(50, 30)}, 1.0f, true});
  group_.Do(EndAdapt{40, true, 1, true});
  Adapt(group_, kContext, 41, {}, 0, 1);
  EXPECT_EQ(Bits(Ask(group_, kContext, 40)), Bits(Ask(group_, kContext, 41)));
}

INSTANTIATE_TEST_SUITE_P(Ranks, AdapterTest, ::testing::Values(1, 2, 3),
                         [](const auto& info) { return std::to_string(info.param) + "_ranks"; });

}  // namespace
}  // namespace refocus
