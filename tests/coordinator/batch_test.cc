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
  EXPECT_EQ(batch.Next({Row(1), Row(2, 100, 0.02)}).steps, 2);  // the slowest counts
  EXPECT_EQ(batch.Next({Row(1), Row(2, 100, 0)}).steps, 1);     // so does a newcomer
  EXPECT_EQ(batch.Next({Row(1), Row(2, 3)}).steps, 3);          // nobody takes more than it may
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

// Several samples of one prompt: answers that fork from the first.
class SamplesTest : public BatchTest {
 protected:
  api::GenerateRequest Request(int32_t n, int64_t max_tokens, uint64_t seed = 7) {
    api::GenerateRequest request;
    request.set_name("contexts/a");
    request.set_max_tokens(max_tokens);
    request.set_temperature(1);
    request.set_seed(seed);
    request.set_n(n);
    return request;
  }
  std::vector<std::shared_ptr<GenerateJob>> AskAll(const api::GenerateRequest& request, std::vector<int32_t> prompt) {
    const auto first = simulation_.core().Generate(request, std::move(prompt));
    EXPECT_TRUE(first.ok()) << first.status();
    simulation_.Collect();
    std::vector<std::shared_ptr<GenerateJob>> samples = {*first};
    samples.insert(samples.end(), (*first)->forks().begin(), (*first)->forks().end());
    return samples;
  }
  struct Said {
    std::vector<uint32_t> ids;
    api::GenerateSummary summary;
    bool operator==(const Said& other) const { return ids == other.ids; }
  };
  static Said Read(GenerateJob& job, int32_t sample) {
    Said said;
    for (const api::GenerateEvent& event : job.TakeEvents()) {
      EXPECT_EQ(event.sample(), sample);
      said.ids.insert(said.ids.end(), event.token_ids().begin(), event.token_ids().end());
      if (event.has_summary()) said.summary = event.summary();
    }
    return said;
  }
};

TEST_F(SamplesTest, EachIsWhatItsSeedGivesAlone) {
  simulation_.CreateReady("a", 600);
  for (const size_t prompt : {0u, 1u, 700u}) {
    const std::vector<int32_t> ids(prompt, 9);
    const auto samples = AskAll(Request(5, 60, 11 + prompt), ids);
    ASSERT_EQ(samples.size(), 5u);
    simulation_.Run();
    std::set<std::vector<uint32_t>> different;
    for (size_t i = 0; i < samples.size(); ++i) {
      ASSERT_TRUE(samples[i]->status().ok()) << samples[i]->status();
      const Said said = Read(*samples[i], static_cast<int32_t>(i));
      EXPECT_EQ(said.summary.n(), 5);
      different.insert(said.ids);
      const auto alone = AskAll(Request(1, 60, said.summary.seed()), ids);
      simulation_.Run();
      EXPECT_EQ(said, Read(*alone[0], 0)) << i;
    }
    EXPECT_EQ(different.size(), 5u);
  }
}

TEST_F(SamplesTest, ThePromptIsComputedAndKeptOnceAndEachTailGoesAtItsEnd) {
  simulation_.CreateReady("a", 600);
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.04;
  api::GenerateRequest request = Request(4, 40);
  request.set_ignore_eos(true);
  const int64_t before = simulation_.core().kv_used_bytes();
  const auto used = [&] { return (simulation_.core().kv_used_bytes() - before) / kFakeKvBytesPerToken; };
  const auto samples = AskAll(request, std::vector<int32_t>(300, 9));
  EXPECT_EQ(used(), 300 + 4 * 40);
  ASSERT_TRUE(StepUntil(4));  // all in one batch
  EXPECT_EQ(simulation_.rank(0).held_tokens(), 600 + 300 + 4 * 40);
  simulation_.Stop(*samples[2]);
  simulation_.DeliverCancels();
  while (!samples[2]->ended()) Step();
  EXPECT_EQ(used(), 300 + 3 * 40);
  simulation_.Stop(*samples[0]);  // the prompt stays for the others
  simulation_.DeliverCancels();
  while (!samples[0]->ended()) Step();
  EXPECT_EQ(used(), 300 + 3 * 40);  // its tail is one piece with the prompt
  EXPECT_EQ(simulation_.rank(0).held_tokens(), 600 + 300 + 3 * 40);
  simulation_.Run();
  EXPECT_EQ(Read(*samples[1], 1).ids.size(), 40u);
  EXPECT_EQ(Read(*samples[3], 3).ids.size(), 40u);
  EXPECT_EQ(used(), 0);
}

TEST_F(SamplesTest, AFirstSampleThatEndsAtOnceIsStillForkedFrom) {
  simulation_.CreateReady("a", 600);
  int ended_at_once = 0;
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    const auto samples = AskAll(Request(3, 2, seed), {5});
    simulation_.Run();
    const Said first = Read(*samples[0], 0);
    ended_at_once += first.ids.empty() ? 1 : 0;
    for (const auto& sample : samples) ASSERT_TRUE(sample->status().ok()) << sample->status();
  }
  EXPECT_GT(ended_at_once, 0);
}

TEST_F(SamplesTest, CancelledAnywhereTheyLeaveNothing) {
  simulation_.CreateReady("a", 600);
  for (int steps = 0; steps < 20; ++steps) {
    for (const bool first_only : {false, true}) {
      const auto samples = AskAll(Request(3, 50), std::vector<int32_t>(40, 3));
      for (int i = 0; i < steps; ++i) Step();
      for (const auto& sample : samples) {
        if (sample == samples[0] || !first_only) simulation_.Stop(*sample);
      }
      simulation_.DeliverCancels();
      simulation_.Run();
      for (const auto& sample : samples) EXPECT_TRUE(sample->ended()) << steps;
      simulation_.ExpectConsistent();
    }
  }
}

TEST_F(SamplesTest, TooManyForMemoryOrQueueAreRefusedWhole) {
  simulation_.CreateReady("a", 600);
  api::GenerateRequest request = Request(2, 10);
  request.clear_temperature();
  EXPECT_EQ(ReasonOf(simulation_.core().Generate(request, {1}).status()), "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(ReasonOf(simulation_.core().Generate(Request(65, 10), {1}).status()), "FIELD_OUT_OF_RANGE");
  for (int i = 0; i < 4; ++i) AskAll(Request(64, 10), {1});
  EXPECT_EQ(ReasonOf(simulation_.core().Generate(Request(2, 10), {1}).status()), "QUEUE_FULL");
  simulation_.Run();
  Simulation small;
  small.Launch(1, [](FakeRank& rank, int32_t) { rank.kv_capacity_bytes = 1000 * kFakeKvBytesPerToken; });
  small.Run();
  small.CreateReady("a", 600);
  const int64_t before = small.core().kv_used_bytes();
  EXPECT_EQ(ReasonOf(small.core().Generate(Request(5, 90), {1}).status()), "KV_CAPACITY");
  EXPECT_EQ(small.core().kv_used_bytes(), before);
  EXPECT_TRUE(small.core().Generate(Request(4, 90), {1}).ok());
  small.Collect();
  // Now it is answers that hold the memory: asking again makes sense, and the refusal says when.
  const Status full = small.core().Generate(Request(1, 90), {1}).status();
  ASSERT_EQ(ReasonOf(full), "KV_CAPACITY");
  EXPECT_EQ(DetailOf(full).metadata.back().first, "retry_seconds");
  small.Run();
  small.ExpectConsistent();
}

}  // namespace
}  // namespace refocus
