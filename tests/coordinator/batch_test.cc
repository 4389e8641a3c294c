// Answers that decode together: what is in a command, who leaves it, and that nobody's tokens depend on the others.
#include <algorithm>
#include <set>

#include "base/limits.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

DecodeRow Row(uint64_t sequence, int64_t tokens = 100, double step_seconds = 0.01) {
  return {sequence, tokens, step_seconds};
}

std::vector<uint64_t> Sequences(const DecodeBatch::Plan& plan) {
  std::vector<uint64_t> sequences;
  for (const DecodeRow& row : plan.rows) sequences.push_back(row.sequence);
  return sequences;
}

TEST(DecodeBatchTest, StepsFillFiftyMillisecondsAndNoMore) {
  DecodeBatch batch;
  EXPECT_TRUE(batch.Next({}).rows.empty());
  EXPECT_EQ(batch.Next({Row(1, 100, 0)}).steps, 1);  // nobody knows yet
  EXPECT_EQ(batch.Next({Row(1)}).steps, 5);
  EXPECT_DOUBLE_EQ(batch.Next({Row(1)}).seconds, 0.05);
  EXPECT_EQ(batch.Next({Row(1), Row(2, 100, 0.02)}).steps, 2);   // the slowest counts
  EXPECT_EQ(batch.Next({Row(1), Row(2, 100, 0)}).steps, 1);      // so does a newcomer
  EXPECT_EQ(batch.Next({Row(1), Row(2, 3)}).steps, 3);           // nobody takes more than it may
  EXPECT_EQ(batch.Next({Row(1, 100, 1e-6)}).steps, kMaxDecodeSteps);
  EXPECT_EQ(batch.Next({Row(1, 100, 0.2)}).steps, 1);
}

TEST(DecodeBatchTest, MoreThanFitTakeTurnsInACircle) {
  DecodeBatch batch;
  std::vector<DecodeRow> rows;
  for (uint64_t sequence = 150; sequence >= 1; --sequence) rows.push_back(Row(sequence));
  std::map<uint64_t, int> times;
  for (int i = 0; i < 75; ++i) {  // 75 x 64 = 150 x 32
    const auto sequences = Sequences(batch.Next(rows));
    EXPECT_EQ(sequences.size(), static_cast<size_t>(kMaxDecodeRows));
    EXPECT_EQ(std::set<uint64_t>(sequences.begin(), sequences.end()).size(), sequences.size());
    for (const uint64_t sequence : sequences) ++times[sequence];
  }
  EXPECT_EQ(times.size(), 150u);
  for (const auto& [sequence, count] : times) EXPECT_EQ(count, 32) << sequence;
}

class BatchTest : public ::testing::Test {
 protected:
  void SetUp() override {
    simulation_.Launch(2, [](FakeRank& rank, int32_t) { rank.keyed = true; });
    simulation_.Run();
  }
  void TearDown() override {
    simulation_.Run();
    simulation_.ExpectConsistent();
  }
  std::shared_ptr<GenerateJob> Ask(const std::string& id, std::vector<int32_t> prompt, int64_t max_tokens,
                                   const std::string& adapter = "") {
    api::GenerateRequest request;
    request.set_name("contexts/" + id);
    request.set_max_tokens(max_tokens);
    request.set_adapter_id(adapter);
    request.set_ignore_eos(true);
    auto job = *simulation_.core().Generate(request, std::move(prompt));
    simulation_.Collect();
    return job;
  }
  void Step() {
    for (auto& link : simulation_.links()) {
      if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
    }
    for (auto& link : simulation_.links()) {
      while (!link.outbox.empty()) simulation_.StepAnswer(link);
    }
  }
  // The next decode command that waits at rank 0; empty: none.
  wire::DecodeSteps NextDecode() {
    for (const auto& message : simulation_.links()[0].inbox) {
      if (message.command().has_decode_steps()) return message.command().decode_steps();
    }
    return {};
  }
  // Until `n` sequences decode together.
  bool StepUntil(int n) {
    for (int i = 0; i < 1000 && NextDecode().sequences_size() != n; ++i) Step();
    return NextDecode().sequences_size() == n;
  }
  Simulation simulation_;
};

TEST_F(BatchTest, AllAnswersShareACommandWhateverContextAndAdapter) {
  simulation_.CreateReady("a", 600);
  simulation_.CreateReady("b", 700);
  ASSERT_TRUE(simulation_.Adapt(Simulation::AdaptRequest("a", 2)).ok());
  simulation_.Run();
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.04;
  std::vector<std::shared_ptr<GenerateJob>> together;
  const auto ask = [&](int i) {
    return Ask(i % 3 == 0 ? "b" : "a", std::vector<int32_t>(i % 5, i), 200 + i, i % 3 == 1 ? "default" : "");
  };
  for (int i = 0; i < 12; ++i) together.push_back(ask(i));
  EXPECT_TRUE(StepUntil(12));
  simulation_.Run();
  for (int i = 0; i < 12; ++i) {
    const auto job = ask(i);
    simulation_.Run();
    EXPECT_EQ(Tokens(*together[i]), Tokens(*job)) << i;
  }
}

TEST_F(BatchTest, GrowsAndShrinksWithEveryCommand) {
  simulation_.CreateReady("a", 600);
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.04;
  const auto first = Ask("a", {1}, 60);
  EXPECT_TRUE(StepUntil(1));
  const auto second = Ask("a", {2}, 10);
  EXPECT_TRUE(StepUntil(2));
  EXPECT_TRUE(StepUntil(1));
  while (!second->ended()) Step();
  EXPECT_FALSE(first->ended());
  simulation_.Run();
  EXPECT_EQ(Tokens(*first).size(), 60u);
  EXPECT_EQ(Tokens(*second).size(), 10u);
}

TEST_F(BatchTest, HundredAnswersTakeFairTurns) {
  simulation_.CreateReady("a", 600);
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.04;
  std::vector<std::shared_ptr<GenerateJob>> jobs;
  for (int i = 0; i < 100; ++i) jobs.push_back(Ask("a", {i}, 20'000));
  std::vector<size_t> counts(jobs.size());
  const auto take = [&] {
    for (size_t i = 0; i < jobs.size(); ++i) counts[i] += Tokens(*jobs[i]).size();
  };
  for (int i = 0; i < 1000 && *std::min_element(counts.begin(), counts.end()) == 0; ++i) {
    Step();
    take();
  }
  std::fill(counts.begin(), counts.end(), 0);
  for (int i = 0; i < 300; ++i) {
    Step();
    take();
  }
  const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
  EXPECT_GT(*least, 150u);
  EXPECT_LE(static_cast<double>(*most), 1.1 * static_cast<double>(*least));
  for (const auto& job : jobs) simulation_.Stop(*job);
  simulation_.DeliverCancels();
}

TEST_F(BatchTest, ACancelledAndAFailingSequenceLeaveTheOthersAlone) {
  simulation_.CreateReady("a", 600);
  std::vector<std::shared_ptr<GenerateJob>> jobs;
  for (int i = 0; i < 5; ++i) jobs.push_back(Ask("a", {i}, 200));
  const uint64_t failing = jobs[3]->id();
  for (int32_t rank = 0; rank < 2; ++rank) {
    simulation_.rank(rank).not_finite = [=](uint64_t sequence, int64_t position) {
      return sequence == failing && position >= 650;
    };
  }
  ASSERT_TRUE(StepUntil(5));
  Step();
  simulation_.Stop(*jobs[1]);
  simulation_.DeliverCancels();
  simulation_.Run();
  EXPECT_EQ(jobs[1]->status().code(), StatusCode::kCancelled);
  EXPECT_EQ(ReasonOf(jobs[3]->status()), "NON_FINITE_LOGITS");
  EXPECT_EQ(jobs[3]->status().code(), StatusCode::kInternal);
  for (const int i : {0, 2, 4}) {
    ASSERT_TRUE(jobs[i]->status().ok()) << jobs[i]->status();
    const auto alone = Ask("a", {i}, 200);
    simulation_.Run();
    EXPECT_EQ(Tokens(*jobs[i]), Tokens(*alone));
  }
}

TEST_F(BatchTest, ASequenceThatCouldNotBeOpenedNeverJoins) {
  simulation_.CreateReady("a", 600);
  const auto good = Ask("a", {1}, 300);
  ASSERT_TRUE(StepUntil(1));
  const auto bad = Ask("a", {2}, 300);
  while (!bad->ended()) {
    for (const auto& message : simulation_.links()[0].inbox) {
      if (message.command().open_sequence().sequence() != bad->id()) continue;
      for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).refuse_seq = message.command().seq();
    }
    Step();
  }
  simulation_.Run();
  EXPECT_EQ(ReasonOf(bad->status()), "REFUSED");
  ASSERT_TRUE(good->status().ok()) << good->status();
  EXPECT_EQ(Tokens(*good).size(), 300u);
}

}  // namespace
}  // namespace refocus
