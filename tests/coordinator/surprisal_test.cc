// Spans by surprisal: candidates are measured before the first step, and the steps train on the band that was asked for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

class SurprisalTest : public ::testing::Test {
 protected:
  void SetUp() override {
    simulation_.Launch(2);
    simulation_.Run();
    simulation_.CreateReady("a", 600);
    // Distinct losses that do not follow the text.
    Losses([](int64_t start) { return static_cast<double>(start * 37 % 601); });
  }

  void Losses(const std::function<double(int64_t start)>& loss) {
    for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).span_loss = loss;
  }
  static api::AdaptContextRequest Request(const std::function<void(api::AdaptContextRequest&)>& set) {
    api::AdaptContextRequest request = Simulation::AdaptRequest("a", 6);
    request.mutable_surprisal_spans();
    request.set_seed(5);
    set(request);
    return request;
  }
  std::shared_ptr<AdaptJob> Adapt(const std::function<void(api::AdaptContextRequest&)>& set = [](auto&) {}) {
    const auto job = simulation_.Adapt(Request(set));
    EXPECT_TRUE(job.ok()) << job.status();
    if (!job.ok()) return nullptr;
    simulation_.Run();
    simulation_.ExpectConsistent();
    return *job;
  }

  // Each rank handles one message.
  void Step() {
    for (Simulation::Link& link : simulation_.links()) {
      if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
      while (!link.outbox.empty()) simulation_.StepAnswer(link);
    }
  }

  struct Seen {
    std::vector<int64_t> starts, chosen, trained;  // candidates, those chosen, those of the steps in order
  };
  static Seen Look(const AdaptJob& job) {
    Seen seen;
    for (const api::AdaptEvent& event : job.events()) {
      if (event.has_candidates()) {
        EXPECT_TRUE(seen.starts.empty()) << "once";
        EXPECT_TRUE(seen.trained.empty()) << "before the steps";
        const auto& candidates = event.candidates();
        for (int i = 0; i < candidates.starts_size(); ++i) {
          seen.starts.push_back(candidates.starts(i));
          EXPECT_EQ(candidates.losses(i), static_cast<double>(candidates.starts(i) * 37 % 601));
          if (candidates.chosen(i)) seen.chosen.push_back(candidates.starts(i));
        }
      }
      if (!event.has_step()) continue;
      seen.trained.insert(seen.trained.end(), event.step().span_starts().begin(), event.step().span_starts().end());
    }
    EXPECT_TRUE(std::is_sorted(seen.starts.begin(), seen.starts.end()));
    return seen;
  }

  Simulation simulation_;
};

TEST_F(SurprisalTest, TrainsOnTheWorstPredicted) {
  const auto job = Adapt();
  ASSERT_NE(job, nullptr);
  ASSERT_TRUE(job->status().ok()) << job->status();
  EXPECT_EQ(job->events()[0].effective().candidates(), 24);
  const Seen seen = Look(*job);
  ASSERT_EQ(seen.starts.size(), 24u);
  std::vector<int64_t> by_loss = seen.starts;
  std::sort(by_loss.begin(), by_loss.end(), [](int64_t a, int64_t b) { return a * 37 % 601 > b * 37 % 601; });
  const std::set<int64_t> worst(by_loss.begin(), by_loss.begin() + 6);
  EXPECT_EQ(std::set<int64_t>(seen.chosen.begin(), seen.chosen.end()), worst);
  ASSERT_EQ(seen.trained.size(), 6u);
  EXPECT_EQ(std::set<int64_t>(seen.trained.begin(), seen.trained.end()), worst) << "each once in six steps";
  EXPECT_NE(seen.trained, seen.chosen) << "not in the text's order";
  EXPECT_EQ(job->events().back().usage().tokens(), (24 + 6) * 5);
  EXPECT_EQ(Look(*Adapt()).trained, seen.trained) << "the same seed, the same spans";
}

TEST_F(SurprisalTest, SkipsWhatMayBeNoiseAndGoesRound) {
  const auto job = Adapt([](auto& r) {
    r.mutable_surprisal_spans()->set_candidates(8);
    r.mutable_surprisal_spans()->set_skip(0.25);
    r.set_spans_per_step(2);
  });
  ASSERT_NE(job, nullptr);
  const Seen seen = Look(*job);
  std::vector<int64_t> by_loss = seen.starts;
  std::sort(by_loss.begin(), by_loss.end(), [](int64_t a, int64_t b) { return a * 37 % 601 > b * 37 % 601; });
  ASSERT_EQ(by_loss.size(), 8u);
  EXPECT_EQ(std::set<int64_t>(seen.chosen.begin(), seen.chosen.end()), (std::set<int64_t>{by_loss[2], by_loss[3]}));
  ASSERT_EQ(seen.trained.size(), 12u);
  for (size_t i = 2; i < 12; ++i) EXPECT_EQ(seen.trained[i], seen.trained[i % 2]) << i;
}

// With and without probe spans, and where the best of the probes is kept.
TEST_F(SurprisalTest, HeldOutSpansStayAsTheyAre) {
  for (const int64_t probes : {0, 2}) {
    const auto job = Adapt([=](auto& r) {
      r.set_probe_spans(probes);
      r.set_keep_best(probes > 0);
      r.mutable_surprisal_spans()->set_candidates(4096);
    });
    ASSERT_NE(job, nullptr);
    ASSERT_TRUE(job->status().ok()) << job->status();
    const api::Adapter& adapter = job->events().back().adapter();
    EXPECT_EQ(adapter.has_probe_loss_before(), probes > 0);
    EXPECT_EQ(adapter.steps(), 6);
    if (probes == 0) continue;
    EXPECT_NEAR(adapter.probe_loss_before(), 2.0, 1e-9) << "of two spans, not of a candidate";
    EXPECT_NEAR(adapter.probe_loss_after(), 2.0 - 0.01 * 6, 1e-9);
    for (const SpanRange& probe : ProbeSpans(600, 5, 2)) {
      for (const int64_t start : Look(*job).starts) EXPECT_TRUE(start + 5 < probe.start || probe.start + 5 < start);
    }
  }
}

// A command takes half a virtual second: measuring ends at 5 of 10 seconds, steps at 10.
TEST_F(SurprisalTest, ALimitOfTimeLeavesHalfOfItForSteps) {
  const auto job = *simulation_.Adapt(Request([](auto& r) {
    r.mutable_surprisal_spans()->set_candidates(80);
    r.set_steps(500);
    r.set_max_seconds(10);
  }));
  for (Simulation::Link& link : simulation_.links()) link.rank->command_seconds = 0.5;
  for (int turn = 0; turn < 1000 && !job->ended(); ++turn) {
    Step();
    simulation_.Advance(0.5);
  }
  simulation_.ExpectConsistent();
  ASSERT_TRUE(job->status().ok()) << job->status();
  const Seen seen = Look(*job);
  EXPECT_GE(seen.starts.size(), 5u);
  EXPECT_LE(seen.starts.size(), 13u);
  EXPECT_GT(seen.starts.back() - seen.starts.front(), 200) << "from all over the text";
  EXPECT_EQ(seen.chosen.size(), static_cast<size_t>(std::lround(0.25 * static_cast<double>(seen.starts.size()))));
  EXPECT_GE(seen.trained.size(), 5u);
  EXPECT_LE(seen.trained.size(), 13u);
  EXPECT_TRUE(job->events().back().out_of_time());
}

TEST_F(SurprisalTest, ALossThatIsNotFiniteRollsBack) {
  Losses([](int64_t) { return std::numeric_limits<double>::quiet_NaN(); });
  const auto job = Adapt([](auto& r) { r.set_probe_spans(0); });
  ASSERT_NE(job, nullptr);
  EXPECT_EQ(ReasonOf(job->status()), "NON_FINITE_LOSS");
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 0);
}

// Candidates are commands like steps: a question in between does not wait for them all.
TEST_F(SurprisalTest, OthersAreServedMeanwhile) {
  const auto job = *simulation_.Adapt(Request([](auto& r) { r.mutable_surprisal_spans()->set_candidates(80); }));
  for (int i = 0; i < 5; ++i) Step();
  const auto answer = *simulation_.Generate("a", 3, 5);
  for (int turn = 0; turn < 40 && !answer->answered(); ++turn) Step();
  EXPECT_TRUE(answer->answered());
  EXPECT_TRUE(Look(*job).starts.empty()) << "still measuring";
  simulation_.Run();
  EXPECT_EQ(Look(*job).starts.size(), 80u);
  simulation_.ExpectConsistent();
}

TEST_F(SurprisalTest, CanBeCancelledWhileItMeasures) {
  const auto job = simulation_.Adapt(Request([](auto& r) { r.mutable_surprisal_spans()->set_candidates(80); }));
  ASSERT_TRUE(job.ok());
  for (int i = 0; i < 20; ++i) Step();
  EXPECT_FALSE((*job)->stopping());
  simulation_.Stop(**job);
  simulation_.Run();
  simulation_.ExpectConsistent();
  EXPECT_TRUE(Look(**job).starts.empty());
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 0);
}

}  // namespace
}  // namespace refocus
