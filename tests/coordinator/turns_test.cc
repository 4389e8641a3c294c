// Whose turn it is, under a clock: a rank that takes as long as a model of billions of parameters would. How long short
// questions wait beside long work, what long work gets under a flood of questions, and what refuses or expires
// meanwhile.
#include <algorithm>
#include <cstdio>
#include <ctime>

#include "base/limits.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

constexpr double kStepSeconds = 0.0088;  // of decoding, whatever the batch
constexpr double kAdaptSeconds = 0.2;    // of an adaptation step
constexpr double kRoundTrip = 0.001;

CoordinatorOptions LongOptions() {
  CoordinatorOptions options = Simulation::DefaultOptions();
  options.model = FakeModel(2'000'000);
  return options;
}

// Seconds of rows: linear layers, and attention over what came before.
double RowSeconds(int64_t first_pos, int64_t rows) {
  const double middle = static_cast<double>(first_pos) + 0.5 * static_cast<double>(rows);
  return static_cast<double>(rows) * (3e-5 + 3e-10 * middle);
}

double Seconds(const wire::Command& command) {
  if (command.has_prefill_chunk()) {
    return RowSeconds(command.prefill_chunk().first_pos(), command.prefill_chunk().ids_size());
  }
  if (command.has_extend_sequence()) {
    return 0.01 + RowSeconds(command.extend_sequence().first_pos(), command.extend_sequence().ids_size());
  }
  if (command.has_decode_steps()) return kStepSeconds * command.decode_steps().steps();
  if (command.has_adapt_step() || command.has_probe_loss()) return kAdaptSeconds;
  return 1e-4;
}

class ClockedGroup {
 public:
  explicit ClockedGroup(uint64_t seed) : simulation_(seed, LongOptions()), random_(seed) {
    simulation_.Launch(1);
    simulation_.Run();
  }

  // Until `seconds` have passed: commands take their time, one after the other.
  void Pass(double seconds) {
    const double until = simulation_.now() + seconds;
    while (simulation_.now() < until) {
      auto& link = simulation_.links()[0];
      if (!busy_ && simulation_.CanStepRank(link)) {
        const wire::CoordinatorMessage& message = link.inbox.front();
        if (message.has_command()) {
          const double taken = Seconds(message.command());
          link.rank->command_seconds = taken;
          done_at_ = simulation_.now() + taken + kRoundTrip;
          Account(message.command(), taken);
          busy_ = true;
        }
        simulation_.StepRank(link);
        continue;
      }
      const double next = busy_ ? std::min(done_at_, until) : until;
      simulation_.Pass(next - simulation_.now());
      if (!busy_ || simulation_.now() < done_at_) continue;
      busy_ = false;
      while (!link.outbox.empty()) simulation_.StepAnswer(link);
      Look();
    }
  }

  void Ask(const std::string& id, int64_t prompt, int64_t max_tokens) {
    const auto job = simulation_.Generate(id, prompt, max_tokens);
    ASSERT_TRUE(job.ok()) << job.status();
    waiting_.push_back({*job, simulation_.now()});
  }
  void Look() {
    std::erase_if(waiting_, [&](const Asked& asked) {
      if (asked.job->TakeEvents().empty()) return false;
      waits_.push_back(simulation_.now() - asked.at);
      answering_.push_back(asked.job);
      return true;
    });
    std::erase_if(answering_, [](const auto& job) {
      job->TakeEvents();
      return job->ended();
    });
  }

  Simulation& simulation() { return simulation_; }
  double Draw() { return static_cast<double>(random_.Below(1'000'000)) / 1e6; }
  const std::vector<double>& waits() const { return waits_; }  // for the first token
  size_t outstanding() const { return waiting_.size() + answering_.size(); }
  // Seconds of each kind of command since the last call.
  struct Shares {
    double prefill = 0, adapt = 0, prompts = 0, decode = 0;
    double all() const { return prefill + adapt + prompts + decode; }
  };
  Shares TakeShares() { return std::exchange(shares_, {}); }

 private:
  struct Asked {
    std::shared_ptr<GenerateJob> job;
    double at = 0;
  };
  void Account(const wire::Command& command, double taken) {
    if (command.has_prefill_chunk()) shares_.prefill += taken;
    if (command.has_adapt_step() || command.has_probe_loss()) shares_.adapt += taken;
    if (command.has_extend_sequence()) shares_.prompts += taken;
    if (command.has_decode_steps()) shares_.decode += taken;
  }

  Simulation simulation_;
  SplitMix64 random_;
  bool busy_ = false;
  double done_at_ = 0;
  std::vector<Asked> waiting_;
  std::vector<std::shared_ptr<GenerateJob>> answering_;
  std::vector<double> waits_;
  Shares shares_;
};

TEST(LanesTest, SharesFollowTheWeightsAndIdlenessSavesNothingUp) {
  Lanes lanes;
  std::array<double, kLanes> had = {};
  for (int i = 0; i < 1000; ++i) {
    const Lane lane = lanes.Order()[0];
    had[static_cast<size_t>(lane)] += lane == Lane::kWork ? 0.5 : 0.05;
    lanes.Charge(lane, lane == Lane::kWork ? 0.5 : 0.05);
  }
  const double all = had[0] + had[1] + had[2];
  EXPECT_NEAR(had[0] / all, 0.4, 0.02);
  EXPECT_NEAR(had[1] / all, 0.4, 0.02);
  EXPECT_NEAR(had[2] / all, 0.2, 0.02);
  for (int i = 0; i < 1000; ++i) {  // only decoding, for long
    for (const Lane lane : lanes.Order()) {
      if (lane == Lane::kDecode) break;
      lanes.PassOver(lane, Lane::kDecode);
    }
    lanes.Charge(Lane::kDecode, 0.05);
  }
  double work = 0;
  for (int i = 0; i < 10; ++i) {  // then a prefill comes: it does not hold the group for all that it missed
    const Lane lane = lanes.Order()[0];
    lanes.Charge(lane, lane == Lane::kWork ? 0.5 : 0.05);
    work += lane == Lane::kWork ? 0.5 : 0;
  }
  EXPECT_LE(work, 0.5);
}

TEST(TurnsTest, AShortQuestionBesideAMillionTokensWaitsForOneChunk) {
  double worst = 0, sum = 0;
  size_t count = 0;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    ClockedGroup group(seed);
    group.simulation().CreateReady("short", 600);
    ASSERT_TRUE(group.simulation().CreateIds("long", Simulation::Ids(1'000'000, 1)).ok());
    ASSERT_TRUE(group.simulation().Prefill("long").ok());
    group.Pass(20 * group.Draw());
    for (int i = 0; i < 15; ++i) {
      group.Ask("short", static_cast<int64_t>(50 * group.Draw()), 1 + static_cast<int64_t>(20 * group.Draw()));
      group.Pass(2 + 4 * group.Draw());
    }
    EXPECT_EQ(group.waits().size(), 15u);
    EXPECT_GT(group.simulation().Get("long").prefilled_tokens(), 50'000);
    for (const double wait : group.waits()) {
      worst = std::max(worst, wait);
      sum += wait;
      ++count;
    }
  }
  EXPECT_LE(worst, 1.5 * kChunkSeconds);
  std::printf(
      "first token of a short question beside 1M tokens of prefill: mean %.2f s, worst %.2f s; a chunk: %.2f s\n",
      sum / static_cast<double>(count), worst, kChunkSeconds);
}

TEST(TurnsTest, AFloodOfQuestionsLeavesAFifthToPrefillAndAdaptation) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    ClockedGroup group(seed);
    group.simulation().CreateReady("short", 600);
    ASSERT_TRUE(group.simulation().CreateIds("long", Simulation::Ids(1'000'000, 1)).ok());
    ASSERT_TRUE(group.simulation().Prefill("long").ok());
    ASSERT_TRUE(group.simulation().Adapt(Simulation::AdaptRequest("short", 5000)).ok());
    group.Pass(20);
    group.TakeShares();
    for (int i = 0; i < 1000; ++i) {  // always more questions than can be served
      while (group.outstanding() < 150) {
        group.Ask("short", static_cast<int64_t>(50 * group.Draw()), 1 + static_cast<int64_t>(30 * group.Draw()));
      }
      group.Pass(0.1);
    }
    const auto shares = group.TakeShares();
    EXPECT_GT((shares.prefill + shares.adapt) / shares.all(), 0.18);
    EXPECT_LT((shares.prefill + shares.adapt) / shares.all(), 0.25);
    EXPECT_NEAR(shares.prefill / (shares.prefill + shares.adapt), 0.5, 0.05);  // equal turns by time
    EXPECT_GT(shares.prompts / shares.all(), 0.15);
    EXPECT_GT(shares.decode / shares.all(), 0.3);
    const double longest = *std::max_element(group.waits().begin(), group.waits().end());
    EXPECT_LT(longest, 30);  // first come, first served: nobody is overtaken for ever
    EXPECT_GT(group.waits().size(), 500u);
  }
}

TEST(TurnsTest, ALongPromptTakesItsTurnsAsWork) {
  ClockedGroup group(1);
  group.simulation().CreateReady("short", 600);
  ASSERT_TRUE(group.simulation().CreateIds("long", Simulation::Ids(100'000, 1)).ok());
  ASSERT_TRUE(group.simulation().Prefill("long").ok());  // chunks become as long as they may
  group.Pass(20);
  group.Ask("short", 300'000, 1);
  group.Pass(3);
  for (int i = 0; i < 10; ++i) {
    group.Ask("short", 5, 1);
    group.Pass(1.3);
  }
  ASSERT_EQ(group.waits().size(), 10u);  // the long one is still being read
  EXPECT_LE(*std::max_element(group.waits().begin(), group.waits().end()), 1.5 * kChunkSeconds);
}

TEST(TurnsTest, WhatHasWaitedPastItsDeadlineNeverStarts) {
  ClockedGroup group(1);
  group.simulation().CreateReady("short", 600);
  ASSERT_TRUE(group.simulation().CreateIds("long", Simulation::Ids(500'000, 1)).ok());
  ASSERT_TRUE(group.simulation().Prefill("long").ok());
  group.Pass(10);
  api::GenerateRequest request;
  request.set_name("contexts/short");
  request.set_max_tokens(3);
  group.Ask("short", 5, 1);
  ASSERT_EQ(group.simulation().core().scheduler().in_flight(), kCommandsInFlight);  // behind a chunk
  const auto late = *group.simulation().core().Generate(request, {1}, 0.01);
  const auto in_time = *group.simulation().core().Generate(request, {1}, 5.0);
  group.simulation().Collect();
  group.simulation().Pass(0.02);
  group.simulation().core().Tick();
  EXPECT_TRUE(late->ended());
  EXPECT_EQ(late->status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ReasonOf(late->status()), "DEADLINE");
  EXPECT_FALSE(late->started());
  group.Pass(10);
  EXPECT_TRUE(in_time->status().ok()) << in_time->status();
  EXPECT_TRUE(in_time->ended());
}

TEST(TurnsTest, TheQueueTellsPositionWaitAndWhenToRetry) {
  ClockedGroup group(1);
  group.simulation().CreateReady("short", 600);
  ASSERT_TRUE(group.simulation().CreateIds("long", Simulation::Ids(1'000'000, 1)).ok());
  ASSERT_TRUE(group.simulation().Prefill("long").ok());
  group.Pass(10);
  group.Ask("short", 5, 2);
  const auto one = group.simulation().core().GetCluster();
  EXPECT_EQ(one.queue_limit(), kMaxQueuedJobs);
  EXPECT_NEAR(one.work_seconds(), RowSeconds(0, 1'000'000), 0.3 * RowSeconds(0, 1'000'000));
  ASSERT_EQ(one.queue_size(), one.waiting());
  Status refused;
  for (int64_t i = 0; i <= kMaxQueuedJobs && refused.ok(); ++i) {
    refused = group.simulation().Generate("short", 5, 2).status();
  }
  EXPECT_EQ(ReasonOf(refused), "QUEUE_FULL");
  EXPECT_EQ(refused.code(), StatusCode::kUnavailable);
  const ErrorMetadata metadata = DetailOf(refused).metadata;
  ASSERT_EQ(metadata.size(), 2u);
  EXPECT_EQ(metadata[1].first, "retry_seconds");
  EXPECT_GE(std::stoi(metadata[1].second), 1);
  EXPECT_LE(std::stoi(metadata[1].second), 60);
  const auto full = group.simulation().core().GetCluster();
  ASSERT_GT(full.queue_size(), 200);
  for (int i = 0; i < full.queue_size(); ++i) {
    EXPECT_EQ(full.queue(i).position(), i + 1);
    EXPECT_EQ(full.queue(i).kind(), "generate");
    EXPECT_EQ(full.queue(i).context(), "contexts/short");
    EXPECT_GE(full.queue(i).wait_seconds(), full.queue(std::max(i - 1, 0)).wait_seconds());
  }
}

// What the state machine costs for a step of 64 answers, everything but the wire: the result in, the events out, the
// next command; CPU time, for the machine may have other work. 2% of a step of 8.8 ms are 176 us; a debug build or a
// sanitizer is not what is promised.
double CpuSeconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

TEST(TurnsTest, SixtyFourAnswersCostLittle) {
  Simulation simulation;
  simulation.Launch(1);
  simulation.Run();
  simulation.CreateReady("a", 600);
  simulation.rank(0).command_seconds = kStepSeconds * 5;
  std::vector<std::shared_ptr<GenerateJob>> jobs;
  for (int i = 0; i < 64; ++i) jobs.push_back(*simulation.Generate("a", 5, 2000));
  auto& link = simulation.links()[0];
  double seconds = 0;
  int64_t tokens = 0, results = 0;
  while (tokens < 64 * 1000) {
    if (simulation.CanStepRank(link)) simulation.StepRank(link);
    while (!link.outbox.empty()) {
      const double begin = CpuSeconds();
      simulation.StepAnswer(link);
      for (const auto& job : jobs) {
        for (const auto& event : job->TakeEvents()) tokens += event.token_ids_size();
      }
      seconds += CpuSeconds() - begin;
      ++results;
    }
  }
  const double step = seconds / (static_cast<double>(tokens) / 64);
  std::printf("coordinator, 64 answers: %.0f us a decode step (%.2f%% of 8.8 ms), %ld messages\n", step * 1e6,
              step / kStepSeconds * 100, static_cast<long>(results));
#if defined(NDEBUG) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_LT(step, 0.02 * kStepSeconds);
#endif
  for (const auto& job : jobs) simulation.Stop(*job);
  simulation.DeliverCancels();
  simulation.Run();
  simulation.ExpectConsistent();
}

}  // namespace
}  // namespace refocus
