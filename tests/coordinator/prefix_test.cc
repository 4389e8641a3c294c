// Contexts that begin alike: what they share, who pays for it, and that it lives as long as one of them needs it.
#include "coordinator/core/prefix.h"

#include "base/limits.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

constexpr int64_t kUnit = 512;  // two ranks

class PrefixTest : public ::testing::Test {
 protected:
  void SetUp() override {
    simulation_.Launch(2);
    simulation_.Run();
  }
  void TearDown() override {
    simulation_.Run();
    simulation_.ExpectConsistent();
  }
  void Ready(const std::string& id, int64_t tokens, int32_t fork) {
    ASSERT_TRUE(simulation_.CreateIds(id, Simulation::Ids(tokens, fork)).ok());
    ASSERT_TRUE(simulation_.Prefill(id).ok());
    simulation_.Run();
    ASSERT_EQ(simulation_.State(id), api::Context::READY);
  }
  void Delete(const std::string& id) {
    api::DeleteContextRequest request;
    request.set_name("contexts/" + id);
    request.set_force(true);
    ASSERT_TRUE(simulation_.core().DeleteContext(request).ok());
    simulation_.Collect();
  }
  void Step() {
    for (auto& link : simulation_.links()) {
      if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
    }
    for (auto& link : simulation_.links()) {
      while (!link.outbox.empty()) simulation_.StepAnswer(link);
    }
  }
  int64_t used() { return simulation_.core().kv_used_bytes() / kFakeKvBytesPerToken; }
  std::vector<uint32_t> Tokens(const std::string& id) {
    const auto session = simulation_.core().catalog().Find("contexts/" + id);
    return simulation_.rank(1).contexts.at(session->cache_uid()).tokens;
  }
  static std::vector<int32_t> Unlike(int64_t tokens) { return std::vector<int32_t>(tokens, 199); }
  Simulation simulation_;
};

TEST_F(PrefixTest, TheLongestCommonBeginningIsSharedInWholeBlocks) {
  Ready("a", 3000, 0);
  ASSERT_TRUE(simulation_.CreateIds("b", Simulation::Ids(4000, 7)).ok());
  const auto job = *simulation_.Prefill("b");
  EXPECT_EQ(job->event().shared_tokens(), 1024);  // of 1500
  EXPECT_EQ(job->event().prefilled_tokens(), 1024);
  simulation_.Run();
  EXPECT_EQ(simulation_.Get("b").shared_tokens(), 1024);
  EXPECT_EQ(simulation_.Get("b").kv_bytes(), (4000 - 1024) * kFakeKvBytesPerToken);
  EXPECT_EQ(job->event().usage().tokens(), 4000 - 1024);
  EXPECT_EQ(used(), 3000 + 4000 - 1024);
  Ready("c", 3500, 7);  // as b, up to its last token but for whole blocks
  EXPECT_EQ(simulation_.Get("c").shared_tokens(), 3072);
  EXPECT_EQ(used(), 3000 + 4000 - 1024 + 3500 - 3072);
  const auto ids = Simulation::Ids(3500, 7);
  EXPECT_EQ(Tokens("c"), std::vector<uint32_t>(ids.begin(), ids.end()));
}

TEST_F(PrefixTest, TooLittleOrNothingInCommonIsNotShared) {
  Ready("a", 1100, 0);  // 1024 in common
  std::vector<int32_t> other = Simulation::Ids(3000);
  other[1000] = 7;
  ASSERT_TRUE(simulation_.CreateIds("b", other).ok());
  EXPECT_EQ((*simulation_.Prefill("b"))->event().shared_tokens(), 0);
  other[0] = 9;
  ASSERT_TRUE(simulation_.CreateIds("c", other).ok());
  EXPECT_EQ((*simulation_.Prefill("c"))->event().shared_tokens(), 0);
  ASSERT_TRUE(simulation_.CreateIds("d", Simulation::Ids(1024)).ok());  // the same, and nothing left to compute
  EXPECT_EQ((*simulation_.Prefill("d"))->event().shared_tokens(), 0);
  ASSERT_TRUE(simulation_.CreateIds("e", Simulation::Ids(1025)).ok());
  EXPECT_EQ((*simulation_.Prefill("e"))->event().shared_tokens(), 1024);
}

TEST_F(PrefixTest, WhatIsPrefilledSoFarCanBeShared) {
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.4;  // chunks stay small
  ASSERT_TRUE(simulation_.CreateIds("a", Simulation::Ids(20'000)).ok());
  ASSERT_TRUE(simulation_.Prefill("a").ok());
  ASSERT_TRUE(simulation_.CreateIds("b", Simulation::Ids(20'000)).ok());
  int64_t done = 0;
  while ((done = simulation_.Get("a").prefilled_tokens()) < 2000) Step();
  const auto job = *simulation_.Prefill("b");
  EXPECT_EQ(job->event().shared_tokens(), done / kUnit * kUnit);
  simulation_.Run();
  EXPECT_TRUE(job->status().ok()) << job->status();
  EXPECT_EQ(Tokens("a"), Tokens("b"));
}

TEST_F(PrefixTest, SharedExtentsLiveUntilTheLastUserIsGone) {
  Ready("a", 3000, 0);
  Ready("b", 4000, 7);
  Delete("a");
  simulation_.Run();
  EXPECT_EQ(used(), 3000 + 4000 - 1024);  // the extent is one piece
  Ready("c", 4100, 7);                    // through b, all of it: 1024 of a's and 2560 behind them
  EXPECT_EQ(simulation_.Get("c").shared_tokens(), 3584);
  Ready("d", 1600, 3);  // only what was a's
  Delete("b");
  Delete("c");
  simulation_.Run();
  EXPECT_EQ(used(), 3000 + 1600 - 1024);
  Delete("d");
  simulation_.Run();
  EXPECT_EQ(used(), 0);
  EXPECT_EQ(simulation_.rank(0).held_tokens(), 0);
}

TEST_F(PrefixTest, ChainsEndWhereTheRanksDo) {
  std::vector<int32_t> ids = Simulation::Ids(2000);
  for (int i = 0; i < 8; ++i) {  // each continues the one before
    ids.resize(ids.size() + 2000, i + 1);
    const std::string id = "c" + std::to_string(i);
    ASSERT_TRUE(simulation_.CreateIds(id, ids).ok());
    ASSERT_TRUE(simulation_.Prefill(id).ok());
    simulation_.Run();
    ASSERT_EQ(simulation_.State(id), api::Context::READY);
    const auto session = simulation_.core().catalog().Find("contexts/" + id);
    EXPECT_LE(session->extents().size(), static_cast<size_t>(kMaxContextExtents));
    EXPECT_GE(session->shared_tokens(), i > 0 ? 1024 : 0);
    EXPECT_EQ(Tokens(id), std::vector<uint32_t>(ids.begin(), ids.end()));
  }
}

TEST_F(PrefixTest, AParentThatGoesBeforeTheOpeningCostsTheSharingOnly) {
  for (const bool while_prefilling : {false, true}) {
    SCOPED_TRACE(while_prefilling);
    for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.4;
    ASSERT_TRUE(simulation_.CreateIds("a", Simulation::Ids(9000)).ok());
    const auto parent = *simulation_.Prefill("a");
    while (simulation_.Get("a").prefilled_tokens() < (while_prefilling ? 2048 : 9000)) Step();
    if (!while_prefilling) simulation_.Run();
    ASSERT_TRUE(simulation_.CreateIds("x", Simulation::Ids(30'000, 1)).ok());
    const auto busy = *simulation_.Prefill("x");  // fills the queue
    ASSERT_TRUE(simulation_.CreateIds("b", Simulation::Ids(8000)).ok());
    const auto child = *simulation_.Prefill("b");
    EXPECT_GE(child->event().shared_tokens(), 1024);
    EXPECT_FALSE(child->started());
    Delete("a");
    simulation_.DeliverCancels();
    simulation_.Run();
    EXPECT_TRUE(child->status().ok()) << child->status();
    const auto ids = Simulation::Ids(8000);
    EXPECT_EQ(Tokens("b"), std::vector<uint32_t>(ids.begin(), ids.end()));
    simulation_.ExpectConsistent();
    Delete("x");
    Delete("b");
    simulation_.Run();
    EXPECT_EQ(used(), 0);
  }
}

// It may yet lose what it wanted to share itself.
TEST_F(PrefixTest, WhatTheRanksHaveNotOpenedIsNotShared) {
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.4;
  Ready("g", 5000, 0);
  ASSERT_TRUE(simulation_.CreateIds("x", Unlike(30'000)).ok());
  ASSERT_TRUE(simulation_.Prefill("x").ok());
  while (simulation_.core().scheduler().in_flight() != 1 || simulation_.Get("x").prefilled_tokens() == 0) Step();
  ASSERT_TRUE(simulation_.CreateIds("a", Simulation::Ids(6000)).ok());
  const auto first = *simulation_.Prefill("a");
  ASSERT_TRUE(simulation_.CreateIds("b", Simulation::Ids(7000)).ok());
  const auto second = *simulation_.Prefill("b");
  EXPECT_EQ(first->event().shared_tokens(), 4608);
  EXPECT_EQ(second->event().shared_tokens(), 4608);
  EXPECT_FALSE(first->started());
  Delete("g");
  simulation_.Run();
  EXPECT_TRUE(first->status().ok()) << first->status();
  EXPECT_TRUE(second->status().ok()) << second->status();
  EXPECT_EQ(used(), simulation_.rank(0).held_tokens());
}

TEST_F(PrefixTest, AContextThatFitsOnlyBecauseItSharesIsAdmitted) {
  Simulation small;
  small.Launch(1, [](FakeRank& rank, int32_t) { rank.kv_capacity_bytes = 5100 * kFakeKvBytesPerToken; });
  small.Run();
  small.CreateReady("a", 4000);
  EXPECT_EQ(ReasonOf(small.CreateIds("b", Simulation::Ids(4000, 1))), "KV_CAPACITY");
  small.CreateReady("c", 4900);
  EXPECT_EQ(small.Get("c").shared_tokens(), 3840);
  EXPECT_EQ(small.core().kv_used_bytes(), (4900 + 160) * kFakeKvBytesPerToken);
  small.ExpectConsistent();
}

}  // namespace
}  // namespace refocus
