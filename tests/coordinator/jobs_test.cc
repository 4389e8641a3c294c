// Prefill, adapt, generate and score as the ranks see them: order, fairness, cancellation, atomicity.
#include <limits>

#include "base/limits.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

class JobsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    simulation_.Launch(2);
    simulation_.Run();
    ASSERT_TRUE(simulation_.core().serving());
  }
  void TearDown() override {
    simulation_.Run();
    simulation_.ExpectConsistent();
  }
  // Commands that wait at rank 0.
  std::vector<wire::Command> Waiting() {
    std::vector<wire::Command> commands;
    for (const auto& message : simulation_.links()[0].inbox) {
      if (message.has_command()) commands.push_back(message.command());
    }
    return commands;
  }
  // Both ranks do their next command and answer.
  void Step() {
    for (auto& link : simulation_.links()) {
      if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
    }
    for (auto& link : simulation_.links()) {
      while (!link.outbox.empty()) simulation_.StepAnswer(link);
    }
  }
  Simulation simulation_;
};

TEST_F(JobsTest, TwoCommandsInFlightInOrder) {
  ASSERT_TRUE(simulation_.Create("a", 5000).ok());
  const auto job = *simulation_.Prefill("a");
  ASSERT_EQ(Waiting().size(), 2u);
  EXPECT_TRUE(Waiting()[0].has_open_context());
  EXPECT_EQ(Waiting()[0].open_context().capacity(), 5000);
  EXPECT_EQ(Waiting()[1].prefill_chunk().ids_size(), 512);
  EXPECT_EQ(Waiting()[1].seq(), Waiting()[0].seq() + 1);
  simulation_.StepRank(simulation_.links()[0]);
  simulation_.StepAnswer(simulation_.links()[0]);
  EXPECT_EQ(simulation_.core().scheduler().in_flight(), 2u);  // one rank's answer does not count
  simulation_.StepRank(simulation_.links()[1]);
  simulation_.StepAnswer(simulation_.links()[1]);
  EXPECT_EQ(simulation_.core().scheduler().in_flight(), 2u);
  EXPECT_EQ(Waiting().size(), 2u);
  simulation_.Run();
  EXPECT_TRUE(job->ended());
  EXPECT_TRUE(job->status().ok());
  EXPECT_EQ(job->event().prefilled_tokens(), 5000);
  const auto& ids = simulation_.rank(1).contexts.begin()->second.tokens;
  ASSERT_EQ(ids.size(), 5000u);
  for (size_t i = 0; i < ids.size(); ++i) ASSERT_EQ(ids[i], i % 200);
}

TEST_F(JobsTest, ChunksAreMultiplesOfTheGroupsBlockAndGrow) {
  ASSERT_TRUE(simulation_.Create("a", 60'001).ok());
  const auto job = *simulation_.Prefill("a");
  int64_t largest = 0, total = 0;
  while (!job->ended()) {
    for (const wire::Command& command : Waiting()) {
      if (!command.has_prefill_chunk()) continue;
      const int64_t rows = command.prefill_chunk().ids_size();
      EXPECT_TRUE(rows % 512 == 0 || command.prefill_chunk().first_pos() + rows == 60'001);
      EXPECT_LE(rows, kMaxChunkRows);
      largest = std::max(largest, rows);
    }
    Step();
    total = job->event().prefilled_tokens();
  }
  EXPECT_EQ(total, 60'001);
  EXPECT_GT(largest, 4096);  // 1 ms a chunk: far below the time a chunk may take
}

TEST_F(JobsTest, GenerateReadsTheLastContextTokenAgainAndStopsAtMaxTokens) {
  simulation_.CreateReady("a", 601);  // last id 0
  const auto job = *simulation_.Generate("a", 3, 5);
  simulation_.StepRank(simulation_.links()[0]);
  const wire::ExtendSequence extend = Waiting()[0].extend_sequence();
  EXPECT_EQ(extend.first_pos(), 600);
  ASSERT_EQ(extend.ids_size(), 4);
  EXPECT_EQ(extend.ids(0), 0u);
  EXPECT_EQ(extend.ids(1), 100u);
  EXPECT_TRUE(extend.sample());
  simulation_.Run();
  std::vector<uint32_t> ids;
  api::GenerateSummary summary;
  for (const auto& event : job->TakeEvents()) {
    ids.insert(ids.end(), event.token_ids().begin(), event.token_ids().end());
    if (event.has_summary()) summary = event.summary();
  }
  EXPECT_EQ(ids, (std::vector<uint32_t>{101, 102, 103, 104, 105}));
  EXPECT_EQ(summary.finish_reason(), api::FINISH_LENGTH);
  EXPECT_EQ(summary.generated_tokens(), 5);
}

TEST_F(JobsTest, EndTokenEndsAndIsNoPartOfTheAnswer) {
  simulation_.CreateReady("a", 601);
  api::GenerateRequest request;
  request.set_name("contexts/a");
  request.set_max_tokens(500);
  const auto job = *simulation_.core().Generate(request, {253});
  simulation_.Collect();
  simulation_.Run();
  const auto events = job->TakeEvents();
  std::vector<uint32_t> ids;
  for (const auto& event : events) ids.insert(ids.end(), event.token_ids().begin(), event.token_ids().end());
  EXPECT_EQ(ids, (std::vector<uint32_t>{254, 255}));
  EXPECT_EQ(events.back().summary().finish_reason(), api::FINISH_EOS);
  request.set_ignore_eos(true);
  request.set_max_tokens(4);
  const auto through = *simulation_.core().Generate(request, {253});
  simulation_.Collect();
  simulation_.Run();
  EXPECT_EQ(through->TakeEvents().back().summary().finish_reason(), api::FINISH_LENGTH);
}

TEST_F(JobsTest, CancelStopsWithinOneCommandAndClosesTheSequence) {
  simulation_.CreateReady("a", 600);
  const auto job = *simulation_.Generate("a", 0, 60'000);
  for (int i = 0; i < 6; ++i) Step();
  const size_t before = simulation_.rank(0).executed.size();
  simulation_.Stop(*job);
  simulation_.DeliverCancels();
  simulation_.Run();
  EXPECT_TRUE(job->ended());
  EXPECT_EQ(job->status().code(), StatusCode::kCancelled);
  EXPECT_LE(simulation_.rank(0).executed.size() - before, 3u);  // two on the way, and the close
}

TEST_F(JobsTest, ACancelledPrefillLeavesNothing) {
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.4;  // chunks stay small
  for (int steps = 0; steps < 6; ++steps) {
    const std::string id = "c" + std::to_string(steps);
    ASSERT_TRUE(simulation_.Create(id, 30'000).ok());
    const auto job = *simulation_.Prefill(id);
    for (int i = 0; i < steps; ++i) Step();
    simulation_.Stop(*job);
    simulation_.Run();
    EXPECT_TRUE(job->ended()) << steps;
    EXPECT_EQ(simulation_.State(id), api::Context::CREATED) << steps;
    EXPECT_EQ(simulation_.core().kv_used_bytes(), 0) << steps;
    EXPECT_TRUE(simulation_.rank(0).contexts.empty()) << steps;
  }
  ASSERT_TRUE(simulation_.Prefill("c0").ok());
  simulation_.Run();
  EXPECT_EQ(simulation_.State("c0"), api::Context::READY);
}

TEST_F(JobsTest, LastCallerWithCancelTakesThePrefillWithIt) {
  ASSERT_TRUE(simulation_.Create("a", 30'000).ok());
  const auto cancelled = *simulation_.Prefill("a", api::CANCEL);
  EXPECT_EQ(*simulation_.Prefill("a", api::CANCEL), cancelled);
  simulation_.core().Detach(*cancelled, true, api::CANCEL);
  EXPECT_FALSE(cancelled->stopping());  // somebody else still waits
  simulation_.core().Detach(*cancelled, true, api::CANCEL);
  EXPECT_TRUE(cancelled->stopping());
  simulation_.Run();
  EXPECT_EQ(simulation_.State("a"), api::Context::CREATED);
  // Work that a caller chose to keep is kept, whoever leaves last.
  const auto job = *simulation_.Prefill("a", api::CONTINUE);
  EXPECT_EQ(*simulation_.Prefill("a", api::CANCEL), job);
  simulation_.core().Detach(*job, true, api::CONTINUE);
  simulation_.core().Detach(*job, true, api::CANCEL);
  EXPECT_FALSE(job->stopping());
  simulation_.Run();
  EXPECT_EQ(simulation_.State("a"), api::Context::READY);
}

TEST_F(JobsTest, AdaptCommitsTheNextRevision) {
  simulation_.CreateReady("a", 600);
  for (int revision = 1; revision <= 2; ++revision) {
    api::AdaptContextRequest request = Simulation::AdaptRequest("a", 3);
    request.set_continue_adapter(revision == 2);
    const auto job = *simulation_.Adapt(request);
    EXPECT_EQ(simulation_.State("a"), api::Context::ADAPTING);
    simulation_.Run();
    ASSERT_TRUE(job->status().ok()) << job->status();
    EXPECT_EQ(simulation_.Get("a").adapters(0).revision(), revision);
    EXPECT_EQ(simulation_.Get("a").adapters(0).steps(), 3 * revision);
    EXPECT_EQ(simulation_.rank(1).adapters.begin()->second.revision, revision);
    EXPECT_EQ(simulation_.rank(1).adapters.begin()->second.steps, 3 * revision);
  }
  const auto answer = *simulation_.Generate("a", 1, 3, "default");
  simulation_.Run();
  EXPECT_EQ(Text(*answer), "gjm");  // 'd' and three more each
}

TEST_F(JobsTest, AnAnswerDuringACommitUsesTheNewRevision) {
  simulation_.CreateReady("a", 600);
  ASSERT_TRUE(simulation_.Adapt(Simulation::AdaptRequest("a", 2)).ok());
  simulation_.Run();
  const auto adapt = *simulation_.Adapt(Simulation::AdaptRequest("a", 2));
  while (Waiting().empty() || !Waiting().back().has_end_adapt()) Step();
  const auto answer = *simulation_.Generate("a", 1, 3, "default");
  const auto base = *simulation_.Generate("a", 1, 3);
  for (const wire::Command& command : Waiting()) {
    EXPECT_TRUE(command.has_end_adapt() || command.open_sequence().sequence() == base->id());
  }
  simulation_.Run();
  ASSERT_TRUE(adapt->status().ok()) << adapt->status();
  ASSERT_TRUE(answer->status().ok()) << answer->status();
  EXPECT_EQ(answer->TakeEvents().back().summary().adapter_revision(), 2);
  EXPECT_EQ(Text(*base), "efg");
}

TEST_F(JobsTest, AdaptersAreAccountedAndCapped) {
  simulation_.CreateReady("a", 600);
  const int64_t delta = 2 * AdapterBytes(simulation_.core().model(), DeviceKind::kCpu);  // both ranks
  const int64_t before = simulation_.core().kv_used_bytes();
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 1);
  for (int i = 0; i < kMaxAdaptersPerContext; ++i) {
    request.set_adapter_id("n" + std::to_string(i));
    ASSERT_TRUE(simulation_.Adapt(request).ok());
    EXPECT_EQ(simulation_.core().kv_used_bytes(), before + (i + 5) * delta);
    simulation_.Run();
    EXPECT_EQ(simulation_.core().kv_used_bytes(), before + (i + 1) * delta);
  }
  request.set_adapter_id("one-more");
  EXPECT_EQ(ReasonOf(simulation_.Adapt(request).status()), "TOO_MANY_ADAPTERS");
  request.set_adapter_id("n3");
  const auto again = *simulation_.Adapt(request);
  simulation_.Stop(*again);
  simulation_.DeliverCancels();
  simulation_.Run();
  EXPECT_EQ(simulation_.core().kv_used_bytes(), before + kMaxAdaptersPerContext * delta);
  api::DeleteAdapterRequest drop;
  drop.set_name("contexts/a");
  drop.set_adapter_id("n3");
  ASSERT_TRUE(simulation_.core().DeleteAdapter(drop).ok());
  simulation_.Collect();
  EXPECT_EQ(simulation_.core().kv_used_bytes(), before + (kMaxAdaptersPerContext - 1) * delta);
}

// On a GPU a delta has a rounded copy beside it: 18 and 6 bytes a parameter instead of 16 and 4.
TEST_F(JobsTest, AnAdaptationThatDoesNotFitIsRefusedBeforeAnyCommand) {
  struct Case {
    std::string device;
    int64_t working, committed;  // bytes a parameter
  };
  for (const Case& on : {Case{"cpu", 16, 4}, Case{"cuda (NVIDIA H200)", 18, 6}}) {
    SCOPED_TRACE(on.device);
    Simulation small;
    const int64_t parameters = small.core().model().query_parameters();
    const int64_t need = (on.working + on.committed) * parameters;
    const int64_t room = 100 * kFakeKvBytesPerToken + need;
    small.Launch(1, [&](FakeRank& rank, int32_t) {
      rank.kv_capacity_bytes = room;
      rank.device = on.device;
    });
    small.Run();
    small.CreateReady("a", 101);
    const size_t before = small.rank(0).executed.size();
    const Status status = small.Adapt(Simulation::AdaptRequest("a", 1)).status();
    EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
    ASSERT_EQ(ReasonOf(status), "ADAPT_OUT_OF_MEMORY");
    EXPECT_EQ(DetailOf(status).metadata[0], (std::pair<std::string, std::string>("need_bytes", std::to_string(need))));
    EXPECT_EQ(DetailOf(status).metadata[1].second, std::to_string(need - kFakeKvBytesPerToken));
    EXPECT_EQ(small.rank(0).executed.size(), before);
    api::DeleteContextRequest drop;
    drop.set_name("contexts/a");
    ASSERT_TRUE(small.core().DeleteContext(drop).ok());
    small.Run();
    small.CreateReady("b", 100);
    EXPECT_TRUE(small.Adapt(Simulation::AdaptRequest("b", 1)).ok());
    EXPECT_EQ(small.core().kv_used_bytes(), room);
    small.Run();
    EXPECT_EQ(small.core().kv_used_bytes(), 100 * kFakeKvBytesPerToken + on.committed * parameters);
    small.ExpectConsistent();
  }
}

// Whatever goes wrong, and wherever: r or r + 1, on all ranks alike.
TEST_F(JobsTest, AdaptIsAtomicWhenAnyCommandFails) {
  simulation_.CreateReady("a", 600);
  ASSERT_TRUE(simulation_.Adapt(Simulation::AdaptRequest("a", 2)).ok());
  simulation_.Run();
  for (int victim = 0; victim < 7; ++victim) {  // begin, probe, 3 steps, probe, commit
    const int64_t first_seq = static_cast<int64_t>(simulation_.rank(0).executed.size()) + 1;
    // A command that fails changed nothing on any rank: refuse before execution by making the books say no.
    for (int32_t rank = 0; rank < 2; ++rank) {
      simulation_.rank(rank).refuse_seq = first_seq + victim;
    }
    const auto job = *simulation_.Adapt(Simulation::AdaptRequest("a", 3));
    simulation_.Run();
    EXPECT_TRUE(job->ended()) << victim;
    EXPECT_FALSE(job->status().ok()) << victim;
    EXPECT_EQ(simulation_.Get("a").adapters(0).revision(), 1) << victim;
    for (int32_t rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(simulation_.rank(rank).adapters.begin()->second.revision, 1) << victim;
      EXPECT_EQ(simulation_.rank(rank).adapters.begin()->second.steps, 2) << victim;
    }
    simulation_.ExpectConsistent();
  }
}

TEST_F(JobsTest, NonFiniteLossRollsBack) {
  simulation_.CreateReady("a", 600);
  for (int32_t rank = 0; rank < 2; ++rank) {
    simulation_.rank(rank).tamper = [](const wire::Command& command, wire::Result& result) {
      if (command.has_adapt_step() && command.adapt_step().step() == 3) {
        result.set_loss(std::numeric_limits<double>::quiet_NaN());
      }
    };
  }
  const auto job = *simulation_.Adapt(Simulation::AdaptRequest("a", 5));
  simulation_.Run();
  EXPECT_EQ(job->status().code(), StatusCode::kAborted);
  const ErrorDetail detail = DetailOf(job->status());
  EXPECT_EQ(detail.reason, "NON_FINITE_LOSS");
  EXPECT_EQ(detail.metadata, (ErrorMetadata{{"step", "3"}, {"kept_revision", "0"}}));
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 0);
  EXPECT_EQ(simulation_.State("a"), api::Context::READY);
}

TEST_F(JobsTest, RisingProbeLossRollsBackUnlessAllowed) {
  simulation_.CreateReady("a", 600);
  for (int32_t rank = 0; rank < 2; ++rank) {
    simulation_.rank(rank).tamper = [seen = 0](const wire::Command& command, wire::Result& result) mutable {
      if (command.has_probe_loss()) result.set_loss(++seen % 2 == 1 ? 2.0 : 2.2);
    };
  }
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 2);
  const auto diverged = *simulation_.Adapt(request);
  simulation_.Run();
  EXPECT_EQ(ReasonOf(diverged->status()), "LOSS_DIVERGED");
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 0);
  request.set_max_probe_rise(0.3);
  const auto allowed = *simulation_.Adapt(request);
  simulation_.Run();
  EXPECT_TRUE(allowed->status().ok()) << allowed->status();
}

// Probe losses by steps made: 2.0 at the start, best behind 4.
TEST_F(JobsTest, TheBestIsKeptAndPatienceEnds) {
  simulation_.CreateReady("a", 600);
  const std::vector<double> losses = {2.0, 1.8, 1.5, 1.6, 1.2, 1.4, 1.3, 1.25};
  for (int32_t rank = 0; rank < 2; ++rank) {
    simulation_.rank(rank).probe_loss = [&](int64_t steps, double) {
      return losses.at(std::min<size_t>(steps, losses.size() - 1));
    };
  }
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 40);
  request.set_keep_best(true);
  request.set_probe_every(1);
  request.set_patience(3);
  const auto job = *simulation_.Adapt(request);
  simulation_.Run();
  ASSERT_TRUE(job->status().ok()) << job->status();
  std::vector<int64_t> probed, best;
  for (const api::AdaptEvent& event : job->events()) {
    if (!event.has_probe()) continue;
    probed.push_back(event.probe().step());
    EXPECT_EQ(event.probe().loss(), losses.at(std::min<size_t>(probed.back(), losses.size() - 1)));
    if (event.probe().best()) best.push_back(event.probe().step());
  }
  EXPECT_EQ(best, (std::vector<int64_t>{1, 2, 4}));
  ASSERT_GE(probed.size(), 7u);
  EXPECT_LE(probed.size(), 9u) << "two may be on the way when patience ends";
  const api::AdaptEvent& last = job->events().back();
  EXPECT_TRUE(last.out_of_patience());
  EXPECT_EQ(last.adapter().steps(), 4);
  EXPECT_EQ(last.adapter().probe_loss_before(), 2.0);
  EXPECT_EQ(last.adapter().probe_loss_after(), 1.2);
  EXPECT_EQ(last.adapter().delta_hash(), Hex(0x1004));
  for (int32_t rank = 0; rank < 2; ++rank) EXPECT_EQ(simulation_.rank(rank).adapters.begin()->second.steps, 4);
  simulation_.ExpectConsistent();
}

TEST_F(JobsTest, NothingBetterLeavesWhatItStartedFrom) {
  simulation_.CreateReady("a", 600);
  for (int32_t rank = 0; rank < 2; ++rank) {
    simulation_.rank(rank).probe_loss = [](int64_t steps, double) { return 1.0 + static_cast<double>(steps); };
  }
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 6);
  request.set_keep_best(true);
  const auto job = *simulation_.Adapt(request);
  simulation_.Run();
  ASSERT_TRUE(job->status().ok()) << job->status();
  const api::Adapter& adapter = job->events().back().adapter();
  EXPECT_EQ(adapter.steps(), 0);
  EXPECT_EQ(adapter.probe_loss_after(), adapter.probe_loss_before());
  EXPECT_EQ(adapter.revision(), 1);
  EXPECT_EQ(simulation_.rank(1).adapters.begin()->second.steps, 0);
  simulation_.ExpectConsistent();
}

TEST_F(JobsTest, DifferentDeltasOnTheRanksAreNeverCommitted) {
  simulation_.CreateReady("a", 600);
  simulation_.rank(1).tamper = [](const wire::Command& command, wire::Result& result) {
    if (command.has_probe_loss() && result.agree() != 0x1000) result.set_agree(42);
  };
  const auto job = *simulation_.Adapt(Simulation::AdaptRequest("a", 2));
  simulation_.Run();
  EXPECT_EQ(job->status().code(), StatusCode::kInternal);
  EXPECT_EQ(ReasonOf(job->status()), "RANK_DIVERGENCE");
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 0);
  EXPECT_TRUE(simulation_.core().serving());  // what differed was dropped
}

TEST_F(JobsTest, RanksThatEndDifferentlyLoseTheGroup) {
  simulation_.CreateReady("a", 600);
  simulation_.rank(1).tamper = [](const wire::Command& command, wire::Result& result) {
    if (command.has_extend_sequence()) result.set_code(13);
  };
  const auto job = *simulation_.Generate("a", 1, 4);
  simulation_.Run();
  EXPECT_TRUE(job->ended());
  EXPECT_EQ(ReasonOf(job->status()), "RANK_DIVERGENCE");
  EXPECT_FALSE(simulation_.core().serving());
  EXPECT_EQ(simulation_.State("a"), api::Context::CREATED);
}

TEST_F(JobsTest, LossOfTheGroupAtAnyPointEndsEveryJob) {
  for (int steps = 0; steps < 14; ++steps) {
    Simulation simulation;
    simulation.Launch(3);
    simulation.Run();
    simulation.CreateReady("a", 600);
    ASSERT_TRUE(simulation.Create("b", 20'000).ok());
    const auto adapt = *simulation.Adapt(Simulation::AdaptRequest("a", 3));
    const auto generate = *simulation.Generate("a", 2, 30);
    const auto prefill = *simulation.Prefill("b");
    for (int i = 0; i < steps; ++i) {
      for (auto& link : simulation.links()) {
        if (simulation.CanStepRank(link)) simulation.StepRank(link);
      }
      for (auto& link : simulation.links()) {
        while (!link.outbox.empty()) simulation.StepAnswer(link);
      }
    }
    simulation.Kill(2);
    for (const Job* job :
         {static_cast<Job*>(adapt.get()), static_cast<Job*>(generate.get()), static_cast<Job*>(prefill.get())}) {
      EXPECT_TRUE(job->ended()) << steps;
      if (!job->status().ok()) {
        EXPECT_EQ(job->status().code(), StatusCode::kUnavailable);
        EXPECT_EQ(ReasonOf(job->status()), "WORKER_LOST");
      }
    }
    EXPECT_EQ(simulation.State("a"), api::Context::CREATED);
    EXPECT_EQ(simulation.State("b"), api::Context::CREATED);
    EXPECT_EQ(simulation.core().kv_used_bytes(), 0);
    simulation.ExpectConsistent();
  }
}

TEST_F(JobsTest, SlowReaderLosesItsAnswerOnly) {
  simulation_.CreateReady("a", 600);
  const auto slow = *simulation_.Generate("a", 0, 60'000);
  simulation_.Run();  // stops by itself: the queue is full
  EXPECT_FALSE(slow->stopping());
  simulation_.Advance(29);
  EXPECT_FALSE(slow->stopping());
  const auto other = *simulation_.Generate("a", 0, 5);
  simulation_.Run();
  EXPECT_TRUE(other->ended());
  simulation_.Advance(2);
  simulation_.Run();
  EXPECT_EQ(ReasonOf(slow->status()), "SLOW_READER");
  EXPECT_EQ(slow->status().code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(slow->ended());
}

TEST_F(JobsTest, AReaderThatCatchesUpKeepsItsAnswer) {
  simulation_.CreateReady("a", 600);
  const auto job = *simulation_.Generate("a", 0, 3000);
  size_t events = 0;
  while (!job->answered()) {
    simulation_.Run();
    simulation_.Advance(20);
    events += job->TakeEvents().size();
    simulation_.core().Tick();
    simulation_.Collect();
  }
  EXPECT_TRUE(job->status().ok()) << job->status();
  EXPECT_GE(events, 2u);
}

}  // namespace
}  // namespace refocus
