// The automatic policy: which rates are tried, what follows from the probes, and when nothing is done.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "coordinator/core/rate_search.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

// The rates that are tried when a rate's loss is the square of its logarithm's distance from that of `optimum`.
std::vector<double> Tried(double first, double optimum, int64_t most, double* best) {
  RateSearch search(first, most);
  std::vector<double> rates;
  while (search.Next()) {
    rates.push_back(*search.Next());
    search.Measured(std::pow(std::log(rates.back() / optimum), 2));
  }
  *best = search.best();
  return rates;
}

TEST(RateSearchTest, ClimbsUntilItGetsWorse) {
  double best = 0;
  EXPECT_EQ(Tried(1e-3, 1.7e-2, 9, &best), (std::vector<double>{1e-3, 4e-3, 1.6e-2, 6.4e-2, 2.56e-1}));
  EXPECT_NEAR(best, 1.7e-2, 1e-9) << "between the rates tried";
  EXPECT_EQ(Tried(1e-3, 1.3e-3, 9, &best), (std::vector<double>{1e-3, 4e-3, 1.6e-2, 2.5e-4}));
  EXPECT_NEAR(best, 1.3e-3, 1e-9);
  RateSearch stumbles(1e-3, 9);
  for (const double loss : {3.0, 3.1, 2.0, 2.1, 2.2}) {
    ASSERT_TRUE(stumbles.Next());
    stumbles.Measured(loss);
  }
  EXPECT_FALSE(stumbles.Next());
  EXPECT_GT(stumbles.best(), 1.6e-2);
  EXPECT_EQ(Tried(1e-3, 5e-5, 9, &best), (std::vector<double>{1e-3, 4e-3, 1.6e-2, 2.5e-4, 6.25e-5, 1.5625e-5}));
  EXPECT_NEAR(best, 5e-5, 1e-9);
}

TEST(RateSearchTest, EndsAtItsLimits) {
  double best = 0;
  EXPECT_EQ(Tried(1e-3, 1, 1, &best), std::vector<double>{1e-3});
  EXPECT_EQ(best, 1e-3);
  EXPECT_EQ(Tried(1e-3, 1, 2, &best), (std::vector<double>{1e-3, 4e-3}));
  EXPECT_EQ(best, 4e-3);
  EXPECT_EQ(Tried(0.5, 8, 9, &best), (std::vector<double>{0.5, 0.125})) << "a rate is at most 1";
  RateSearch search(1e-3, 3);
  search.Measured(std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(search.best(), 1e-3);
  search.Measured(2.0);
  EXPECT_EQ(search.best(), 4e-3) << "anything is better than NaN, which has no place in a parabola";
  search.Measured(2.5);
  EXPECT_EQ(search.best(), 4e-3);
  EXPECT_FALSE(search.Next());
}

TEST(RateSearchTest, TurnsDownWhereAHigherRateWouldPassOne) {
  RateSearch search(0.1, 8);
  search.Measured(2.0);
  ASSERT_EQ(search.Next(), 0.4);
  search.Measured(3.0);
  ASSERT_TRUE(search.Next());
  EXPECT_DOUBLE_EQ(*search.Next(), 0.025);
}

class AutomaticTest : public ::testing::Test {
 protected:
  void SetUp() override {
    simulation_.Launch(2);
    simulation_.Run();
    simulation_.CreateReady("a", 600);
  }

  void Losses(const std::function<double(int64_t steps, double rate)>& loss) {
    for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).probe_loss = loss;
  }
  std::shared_ptr<AdaptJob> Adapt(const std::function<void(api::AdaptContextRequest&)>& set = [](auto&) {}) {
    api::AdaptContextRequest request = Simulation::AdaptRequest("a", 24);
    request.clear_learning_rate();
    request.mutable_automatic();
    set(request);
    const auto job = simulation_.Adapt(request);
    if (!job.ok()) return nullptr;
    simulation_.Run();
    simulation_.ExpectConsistent();
    return *job;
  }

  Simulation simulation_;
};

// A single step at 0.02 or more does harm; below, the higher the better.
TEST_F(AutomaticTest, TriesRatesAndGoesOnFromTheStart) {
  Losses([](int64_t steps, double rate) {
    if (steps == 0) return 2.0;
    return rate < 0.02 ? 2.0 - rate * static_cast<double>(steps) : 3.0;
  });
  const auto job = Adapt([](auto& r) {
    r.set_learning_rate(1e-3);
  });
  ASSERT_NE(job, nullptr);
  ASSERT_TRUE(job->status().ok()) << job->status();
  EXPECT_EQ(job->events()[0].effective().trial_steps(), 6);
  EXPECT_TRUE(job->events()[0].effective().keep_best());
  std::vector<double> rates;
  std::vector<int64_t> steps, trials;
  for (const api::AdaptEvent& event : job->events()) {
    if (event.has_step()) {
      rates.push_back(event.step().learning_rate());
      steps.push_back(event.step().step());
    }
    if (event.has_probe() && event.probe().trial()) trials.push_back(event.probe().step());
  }
  ASSERT_EQ(rates.size(), 24u);
  EXPECT_EQ(std::vector<double>(rates.begin(), rates.begin() + 5),
            (std::vector<double>{1e-3, 4e-3, 1.6e-2, 6.4e-2, 2.56e-1}));
  const double chosen = rates[5];
  EXPECT_NEAR(chosen, 0.8e-2 * std::pow(4, -0.5 * (1.016 - 0.012) / (1.016 + 0.012)), 1e-6) << "half of the best";
  for (size_t i = 5; i < rates.size(); ++i) EXPECT_EQ(rates[i], chosen);
  for (int64_t i = 0; i < 24; ++i) EXPECT_EQ(steps[i], i + 1);
  EXPECT_EQ(trials, (std::vector<int64_t>{1, 2, 3, 4, 5}));
  const api::Adapter& adapter = job->events().back().adapter();
  EXPECT_EQ(adapter.steps(), 19) << "trials were taken back";
  EXPECT_NEAR(adapter.probe_loss_after(), 2.0 - 19 * chosen, 1e-5);
  EXPECT_EQ(simulation_.rank(1).adapters.begin()->second.steps, 19);
}

TEST_F(AutomaticTest, ADecayingScheduleBeginsAtTheWholeRate) {
  Losses([](int64_t steps, double) { return 2.0 - 0.01 * static_cast<double>(steps); });
  const auto job = Adapt([](auto& r) {
    r.set_learning_rate(1e-3);
    r.set_schedule(api::COSINE);
  });
  ASSERT_NE(job, nullptr);
  std::vector<double> rates;
  std::vector<std::vector<int64_t>> starts;
  for (const api::AdaptEvent& event : job->events()) {
    if (!event.has_step()) continue;
    rates.push_back(event.step().learning_rate());
    starts.emplace_back(event.step().span_starts().begin(), event.step().span_starts().end());
  }
  // All rates are alike here, so it tries two above and one below.
  ASSERT_GE(rates.size(), 5u);
  EXPECT_EQ(std::vector<double>(rates.begin(), rates.begin() + 5), (std::vector<double>{1e-3, 4e-3, 1.6e-2, 2.5e-4, 1e-3}));
  EXPECT_EQ(starts[1], starts[0]) << "trials are compared on the same rows";
  EXPECT_EQ(starts[2], starts[0]);
  EXPECT_EQ(starts[3], starts[0]);
  EXPECT_NE(starts[4], starts[3]);
  EXPECT_LT(rates.back(), 1e-4);
}

// Probes of a whole adaptation with 48 held-out rows and more, behind the text: what was sent and what came back.
struct SentProbe {
  int64_t rows = 0;
  bool near = false;  // where they stand
  bool keep = false;
};

TEST_F(AutomaticTest, TrialsAreComparedOnEarlyRowsWhereTheyStand) {
  for (const bool early_known : {false, true}) {
    std::vector<SentProbe> probes;
    for (int32_t rank = 0; rank < 2; ++rank) {
      simulation_.rank(rank).trained.clear();
      simulation_.rank(rank).tamper = [&, rank, early_known](const wire::Command& command, wire::Result& result) {
        if (!command.has_probe_loss()) return;
        const auto& probe = command.probe_loss();
        const bool near = probe.spans(0).behind() == 0;
        int64_t rows = 0;
        for (const wire::Span& span : probe.spans()) rows += span.ids_size() - 1;
        if (rank == 0) probes.push_back({rows, near, probe.keep_best()});
        // Behind the text the first quarter of the steps shows nothing.
        result.set_loss(near ? (early_known ? 0.5 : 2.0) : 4.0);
      };
    }
    const auto job = Adapt([](auto& r) {
      r.set_span_tokens(64);
      r.set_probe_every(1);
      r.set_steps(40);
      r.set_behind(100);
    });
    ASSERT_NE(job, nullptr);
    ASSERT_TRUE(job->status().ok()) << job->status();
    ASSERT_GT(job->events()[0].effective().recall_rows(), 0);
    ASSERT_GT(probes.size(), 5u);
    const int64_t all = probes[0].rows;
    ASSERT_GE(all, 40);
    EXPECT_FALSE(probes[0].near);
    EXPECT_TRUE(probes[0].keep);
    int64_t compared = 0;
    for (size_t i = 1; i < probes.size(); ++i) {
      EXPECT_EQ(probes[i].keep, !probes[i].near) << "losses of other rows are not compared with those that decide";
      if (!probes[i].near) continue;
      if (i > 1 && early_known) {
        EXPECT_EQ(probes[i].rows, all) << i;
      } else {
        EXPECT_LT(probes[i].rows, all / 2) << i;
      }
      ++compared;
    }
    int64_t trials = 0, steps = 0;
    for (const api::AdaptEvent& event : job->events()) {
      if (event.has_probe() && event.probe().trial()) {
        EXPECT_EQ(event.probe().step(), 2 * trials++) << "trials of two steps, a quarter of a quarter of 40";
      }
      steps += event.has_step() ? 1 : 0;
    }
    EXPECT_EQ(trials, compared);
    EXPECT_EQ(trials, 5) << "the start, and four rates of the same loss";
    // A quarter of the 32 steps behind the trials is near; three probes behind that, and up to two more on the way.
    EXPECT_TRUE(job->events().back().out_of_patience());
    EXPECT_GE(steps, 8 + 8 + 3);
    EXPECT_LE(steps, 8 + 8 + 3 + 3);
    const auto starts = [&](int64_t number) {
      std::vector<int64_t> all_starts;
      for (const api::AdaptEvent& event : job->events()) {
        if (!event.has_step() || event.step().step() != number) continue;
        all_starts.assign(event.step().span_starts().begin(), event.step().span_starts().end());
      }
      return all_starts;
    };
    EXPECT_NE(starts(1), starts(2));
    EXPECT_EQ(starts(1), starts(3)) << "trials are compared on the same rows";
    EXPECT_EQ(starts(2), starts(8));
    EXPECT_NE(starts(9), starts(1));
    std::vector<bool> near;
    for (const wire::Span& span : simulation_.rank(0).trained) near.push_back(span.behind() == 0);
    EXPECT_TRUE(std::is_partitioned(near.begin(), near.end(), [](bool stands) { return stands; }));
    EXPECT_FALSE(near.back());
  }
}

TEST_F(AutomaticTest, WhatIsKnownNeedsNoStep) {
  Losses([](int64_t, double) { return 0.005; });
  for (const int64_t steps : {24, 1}) {  // one is too few for a trial
    const auto job = Adapt([=](auto& r) { r.set_steps(steps); });
    ASSERT_NE(job, nullptr);
    ASSERT_TRUE(job->status().ok()) << job->status();
    for (const api::AdaptEvent& event : job->events()) EXPECT_FALSE(event.has_step()) << steps;
    EXPECT_EQ(job->events().back().adapter().steps(), 0);
    EXPECT_EQ(job->events().back().adapter().revision(), steps == 24 ? 1 : 2);
  }
}

TEST_F(AutomaticTest, HarmIsTakenBack) {
  Losses([](int64_t steps, double) { return steps == 0 ? 2.0 : std::numeric_limits<double>::infinity(); });
  const auto job = Adapt([](auto& r) { r.set_steps(4); });  // one trial, which is not finite
  ASSERT_NE(job, nullptr);
  EXPECT_EQ(ReasonOf(job->status()), "NON_FINITE_LOSS") << "behind the trial";
  Losses([](int64_t steps, double) { return 2.0 + static_cast<double>(steps); });
  const auto worse = Adapt();
  ASSERT_NE(worse, nullptr);
  ASSERT_TRUE(worse->status().ok()) << worse->status();
  EXPECT_EQ(worse->events().back().adapter().steps(), 0);
  EXPECT_TRUE(worse->events().back().out_of_patience());
}

// A rate at which the second step of a trial overflows is a bad one, and no more.
TEST_F(AutomaticTest, ATrialThatDivergesIsNoEnd) {
  Losses([](int64_t steps, double rate) { return 2.0 - std::min(0.5, rate * static_cast<double>(steps)); });
  for (int32_t rank = 0; rank < 2; ++rank) {
    simulation_.rank(rank).tamper = [](const wire::Command& command, wire::Result& result) {
      if (command.has_adapt_step() && command.adapt_step().learning_rate() > 0.005f && command.adapt_step().step() > 1)
        result.set_loss(std::numeric_limits<double>::quiet_NaN());
    };
  }
  const auto job = Adapt([](auto& r) {
    r.set_learning_rate(1e-3);
    r.set_steps(40);
  });
  ASSERT_NE(job, nullptr);
  ASSERT_TRUE(job->status().ok()) << job->status();
  EXPECT_GT(job->events().back().adapter().steps(), 0);
  double last = 0;
  for (const api::AdaptEvent& event : job->events()) {
    if (event.has_step()) last = event.step().learning_rate();
  }
  EXPECT_DOUBLE_EQ(last, 2e-3) << "half of the best, 4e-3";
}

// Held-out rows are few: a hundredth of their loss may be chance.
TEST_F(AutomaticTest, SmallGainsAreNotKept) {
  for (const double after : {1.97, 1.95}) {
    Losses([=](int64_t steps, double) { return steps == 0 ? 2.0 : after; });
    const auto job = Adapt();
    ASSERT_NE(job, nullptr);
    ASSERT_TRUE(job->status().ok()) << job->status();
    const api::Adapter& adapter = job->events().back().adapter();
    EXPECT_EQ(adapter.steps() > 0, after < 1.96) << after;
    EXPECT_EQ(adapter.probe_loss_after(), adapter.steps() > 0 ? after : 2.0);
  }
}

TEST_F(AutomaticTest, ContinuesFromWhatThereIs) {
  Losses([](int64_t steps, double) { return 2.0 - 0.01 * static_cast<double>(steps); });
  ASSERT_NE(Adapt([](auto& r) { r.clear_automatic(); }), nullptr);
  const auto job = Adapt([](auto& r) { r.set_continue_adapter(true); });
  ASSERT_NE(job, nullptr);
  ASSERT_TRUE(job->status().ok()) << job->status();
  EXPECT_EQ(job->events().back().adapter().steps(), simulation_.rank(0).adapters.begin()->second.steps);
  EXPECT_GT(job->events().back().adapter().steps(), 24);
}

}  // namespace
}  // namespace refocus
