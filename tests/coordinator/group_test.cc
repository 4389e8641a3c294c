// Forming, losing and re-forming a group.
#include <map>
#include <set>

#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

constexpr auto kServing = Group::State::kServing;
constexpr auto kWaiting = Group::State::kWaiting;

class GroupTest : public ::testing::Test {
 protected:
  wire::Hello Hello(int32_t rank, int32_t size, const std::string& nonce = "n") {
    return FakeRank(rank, size, nullptr).Hello(nonce, "fake");
  }
  // Of a process that started by itself.
  wire::Hello Nameless(int32_t size, const std::string& nonce = "n") {
    wire::Hello hello = Hello(0, size, nonce);
    hello.set_wants_rank(true);
    hello.set_rank(-5);  // says nothing
    return hello;
  }
  // What has been sent to each link since the last time.
  std::map<uint64_t, std::vector<wire::CoordinatorMessage>> Sent() {
    std::map<uint64_t, std::vector<wire::CoordinatorMessage>> sent;
    for (const auto& outgoing : simulation_.core().TakeOutgoing()) sent[outgoing.link].push_back(*outgoing.message);
    return sent;
  }
  void SendKey(uint64_t link, const std::string& key, int64_t epoch) {
    wire::WorkerMessage message;
    message.mutable_key()->set_epoch(epoch);
    message.mutable_key()->set_key(key);
    simulation_.core().OnMessage(link, message);
  }
  void SendReady(uint64_t link) {
    wire::WorkerMessage ready;
    ready.mutable_ready()->set_epoch(simulation_.core().group().epoch());
    simulation_.core().OnMessage(link, ready);
  }
  Status Join(const wire::Hello& hello) { return simulation_.core().OnHello(next_link_++, hello); }

  Simulation simulation_;
  uint64_t next_link_ = 1;
};

TEST_F(GroupTest, ServesWhenEveryRankIsReady) {
  EXPECT_TRUE(Join(Hello(1, 2)).ok());
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
  EXPECT_TRUE(Join(Hello(0, 2)).ok());
  EXPECT_EQ(simulation_.core().group().state(), Group::State::kForming);
  wire::WorkerMessage ready;
  ready.mutable_ready()->set_epoch(simulation_.core().group().epoch());
  simulation_.core().OnMessage(1, ready);
  simulation_.core().OnMessage(1, ready);
  EXPECT_FALSE(simulation_.core().serving());
  ready.mutable_ready()->set_epoch(99);
  simulation_.core().OnMessage(2, ready);  // of another epoch
  EXPECT_FALSE(simulation_.core().serving());
  ready.mutable_ready()->set_epoch(simulation_.core().group().epoch());
  simulation_.core().OnMessage(2, ready);
  EXPECT_TRUE(simulation_.core().serving());
}

TEST_F(GroupTest, RefusesStrangers) {
  ASSERT_TRUE(Join(Hello(0, 3)).ok());
  EXPECT_EQ(ReasonOf(Join(Hello(0, 3))), "RANK_TAKEN");
  EXPECT_EQ(ReasonOf(Join(Hello(1, 3, "other"))), "GROUP_TAKEN");
  EXPECT_EQ(ReasonOf(Join(Hello(1, 2))), "GROUP_SIZE");
  EXPECT_EQ(ReasonOf(Join(Hello(3, 3))), "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(ReasonOf(Join(Hello(-1, 3))), "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(ReasonOf(Join(Hello(0, 0))), "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(ReasonOf(Join(Hello(1, 3, ""))), "FIELD_OUT_OF_RANGE");
  wire::Hello hello = Hello(1, 3);
  hello.set_version("0");
  EXPECT_EQ(ReasonOf(Join(hello)), "VERSION_SKEW");
  hello = Hello(1, 3);
  hello.set_model_fingerprint("another");
  EXPECT_EQ(ReasonOf(Join(hello)), "MODEL_MISMATCH");
  hello = Hello(1, 3);
  hello.set_kv_bytes_per_token(kFakeKvBytesPerToken + 1);
  EXPECT_EQ(ReasonOf(Join(hello)), "MODEL_MISMATCH");
  hello = Hello(1, 3);
  hello.set_kv_capacity_bytes(-1);
  EXPECT_EQ(ReasonOf(Join(hello)), "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(simulation_.core().group().ranks().size(), 1u);
  EXPECT_TRUE(Join(Hello(1, 3)).ok());
}

TEST_F(GroupTest, RefusesAnotherSizeThanConfigured) {
  CoordinatorOptions options = Simulation::DefaultOptions();
  options.group.size = 2;
  Simulation simulation(1, options);
  EXPECT_EQ(ReasonOf(simulation.core().OnHello(1, Hello(0, 3))), "GROUP_SIZE");
  EXPECT_TRUE(simulation.core().OnHello(2, Hello(0, 2)).ok());
}

TEST_F(GroupTest, ARankThatLeavesBeforeTheGroupIsCompleteMayComeBack) {
  ASSERT_TRUE(Join(Hello(0, 2)).ok());
  simulation_.core().OnClosed(1, "closed");
  EXPECT_TRUE(simulation_.core().group().ranks().empty());
  ASSERT_TRUE(Join(Hello(0, 2, "second launch")).ok());
  ASSERT_TRUE(Join(Hello(1, 2, "second launch")).ok());
  EXPECT_EQ(simulation_.core().group().state(), Group::State::kForming);
}

TEST_F(GroupTest, StreamEndLosesTheGroup) {
  simulation_.Launch(3);
  simulation_.Run();
  ASSERT_TRUE(simulation_.core().serving());
  const int64_t epoch = simulation_.core().group().epoch();
  simulation_.Kill(1);
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
  EXPECT_EQ(simulation_.core().group().epoch(), epoch + 1);
  EXPECT_NE(simulation_.core().GetCluster().last_incident().find("rank 1"), std::string::npos);
  simulation_.Run();
  EXPECT_FALSE(simulation_.links()[0].told_to_leave.empty());
  EXPECT_FALSE(simulation_.links()[2].told_to_leave.empty());
  simulation_.Launch(2);  // another size is fine when none is configured
  simulation_.Run();
  EXPECT_EQ(simulation_.core().group().state(), kServing);
}

TEST_F(GroupTest, SilenceLosesTheGroupAfterFifteenSeconds) {
  simulation_.Launch(2);
  simulation_.Run();
  simulation_.links()[1].silent = true;
  simulation_.Advance(14.5);
  EXPECT_TRUE(simulation_.core().serving());
  simulation_.Advance(1.5);
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
  EXPECT_NE(simulation_.core().GetCluster().last_incident().find("no heartbeat"), std::string::npos);
}

TEST_F(GroupTest, AStuckRankLosesTheGroupOnlyWhileItHasACommand) {
  simulation_.Launch(2);
  simulation_.Run();
  simulation_.links()[1].frozen = true;
  simulation_.Advance(500);
  ASSERT_TRUE(simulation_.core().serving());  // idle for long is fine
  ASSERT_TRUE(simulation_.Create("a", 1000).ok());
  const auto job = *simulation_.Prefill("a");
  simulation_.Run();
  simulation_.Advance(119);
  EXPECT_TRUE(simulation_.core().serving());
  EXPECT_FALSE(job->ended());
  simulation_.Advance(3);
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
  EXPECT_TRUE(job->ended());
  EXPECT_EQ(ReasonOf(job->status()), "WORKER_LOST");
  EXPECT_NE(std::string(job->status().message()).find("rank 1"), std::string::npos);  // not rank 0, which did its part
}

// A frozen process holds up the ranks that wait for it; it, not they, is to blame.
TEST_F(GroupTest, OfSeveralStuckRanksTheSilentOneIsNamed) {
  CoordinatorOptions options = Simulation::DefaultOptions();
  options.group.stuck_seconds = 5;
  for (const int32_t silent : {0, 1, 2}) {
    Simulation simulation(1, options);
    simulation.Launch(3);
    simulation.Run();
    for (Simulation::Link& link : simulation.links()) link.frozen = true;
    simulation.links()[silent].silent = true;
    ASSERT_TRUE(simulation.Create("a", 1000).ok());
    const auto job = *simulation.Prefill("a");
    simulation.Advance(7);
    ASSERT_TRUE(job->ended());
    EXPECT_NE(std::string(job->status().message()).find("rank " + std::to_string(silent) + " is silent"),
              std::string::npos) << job->status();
  }
}

TEST_F(GroupTest, ARankThatNeverGetsReadyEndsTheAttempt) {
  simulation_.Launch(2);
  simulation_.links()[1].frozen = true;
  simulation_.Run();
  simulation_.Advance(299);
  EXPECT_EQ(simulation_.core().group().state(), Group::State::kForming);
  simulation_.Advance(3);
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
  EXPECT_NE(simulation_.core().GetCluster().last_incident().find("rank 1 did not join"), std::string::npos);
}

TEST_F(GroupTest, AnIncompleteLaunchWaitsSilentlyAndIsThenRefused) {
  ASSERT_TRUE(Join(Hello(1, 4)).ok());
  simulation_.Advance(200);  // no heartbeats
  ASSERT_TRUE(Join(Hello(2, 4)).ok());
  simulation_.Advance(99);
  EXPECT_EQ(simulation_.core().group().ranks().size(), 2u);
  simulation_.Advance(2);  // 300 s after the first hello
  EXPECT_TRUE(simulation_.core().group().ranks().empty());
  EXPECT_EQ(simulation_.core().GetCluster().last_incident(), "rank 0, rank 3 did not dial in within 300.0 s");
  ASSERT_TRUE(Join(Hello(0, 1, "next launch")).ok());
  EXPECT_EQ(simulation_.core().group().state(), Group::State::kForming);
}

TEST_F(GroupTest, RanksWithOtherWeightsAreRefused) {
  wire::Hello hello = Hello(1, 3);
  hello.set_weights_hash("aaaa");
  ASSERT_TRUE(Join(hello).ok());
  hello = Hello(2, 3);
  hello.set_weights_hash("bbbb");
  const Status status = Join(hello);
  EXPECT_EQ(ReasonOf(status), "MODEL_MISMATCH");
  EXPECT_NE(std::string(status.message()).find("rank 2 has hash bbbb, rank 1 has aaaa"), std::string::npos) << status;
  hello.set_weights_hash("aaaa");
  EXPECT_TRUE(Join(hello).ok());
}

TEST_F(GroupTest, RanksOnAnotherKindOfDeviceAreRefused) {
  wire::Hello hello = Hello(0, 2);
  EXPECT_EQ(simulation_.core().group().device(), DeviceKind::kCpu);
  hello.set_device("cuda (NVIDIA H200)");
  ASSERT_TRUE(Join(hello).ok());
  EXPECT_EQ(simulation_.core().group().device(), DeviceKind::kCuda);
  EXPECT_EQ(simulation_.core().GetModel().dtype(), "bfloat16");
  hello = Hello(1, 2);
  hello.set_device("cpu");
  const Status status = Join(hello);
  EXPECT_EQ(ReasonOf(status), "GROUP_DEVICE");
  EXPECT_NE(std::string(status.message()).find("device: got cpu, allowed cuda (NVIDIA H200)"), std::string::npos);
  hello.set_device("cuda (NVIDIA H100 80GB HBM3)");
  EXPECT_TRUE(Join(hello).ok());
}

TEST_F(GroupTest, RanksThatKeepKvOtherwiseAreRefused) {
  EXPECT_EQ(simulation_.core().GetModel().kv_dtype(), "");
  wire::Hello hello = Hello(0, 2);
  hello.set_kv_dtype("int8");
  ASSERT_TRUE(Join(hello).ok());
  EXPECT_EQ(simulation_.core().GetModel().kv_dtype(), "int8");
  hello = Hello(1, 2);
  hello.set_kv_dtype("fp32");
  const Status status = Join(hello);
  EXPECT_EQ(ReasonOf(status), "GROUP_KV_DTYPE");
  EXPECT_NE(std::string(status.message()).find("kv_dtype: got fp32, allowed int8"), std::string::npos) << status;
  hello.set_kv_dtype(std::string(17, 'x'));
  EXPECT_EQ(ReasonOf(Join(hello)), "FIELD_OUT_OF_RANGE");
  hello.set_kv_dtype("int8");
  EXPECT_TRUE(Join(hello).ok());
}

TEST_F(GroupTest, EveryRankIsToldItsNumber) {
  ASSERT_TRUE(Join(Hello(2, 3)).ok());
  ASSERT_TRUE(Join(Hello(0, 3)).ok());
  EXPECT_TRUE(Sent().empty());
  ASSERT_TRUE(Join(Hello(1, 3)).ok());
  const auto sent = Sent();
  ASSERT_EQ(sent.size(), 3u);
  const int32_t ranks[] = {2, 0, 1};
  for (const auto& [link, messages] : sent) {
    ASSERT_EQ(messages.size(), 1u);
    EXPECT_EQ(messages[0].form_group().rank(), ranks[link - 1]);
    EXPECT_EQ(messages[0].form_group().size(), 3);
    EXPECT_EQ(messages[0].form_group().epoch(), 1);
  }
}

TEST_F(GroupTest, RanksAreHandedOutAndTheKeyIsPassedOn) {
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Join(Nameless(3)).ok());
  EXPECT_EQ(simulation_.core().group().state(), Group::State::kForming);
  EXPECT_EQ(ReasonOf(Join(Nameless(3))), "RANK_TAKEN");
  auto sent = Sent();
  ASSERT_EQ(sent.size(), 3u);
  for (const auto& [link, messages] : sent) {
    ASSERT_EQ(messages.size(), 1u);
    EXPECT_EQ(messages[0].form_group().rank(), static_cast<int32_t>(link) - 1);
  }
  SendKey(1, "of another epoch", 99);
  EXPECT_TRUE(Sent().empty());
  const std::string key("k\0y", 3);
  SendKey(1, key, 1);
  sent = Sent();
  EXPECT_EQ(sent.count(1), 0u);  // made it
  for (const uint64_t link : {2, 3}) {
    ASSERT_EQ(sent[link].size(), 1u);
    EXPECT_EQ(sent[link][0].key().key(), key);
    EXPECT_EQ(sent[link][0].key().epoch(), 1);
  }
  for (const uint64_t link : {3, 1, 2}) {
    EXPECT_FALSE(simulation_.core().serving());
    SendReady(link);
  }
  EXPECT_TRUE(simulation_.core().serving());
}

// The numbers are given in the order of coming; a place that is left is given again.
TEST_F(GroupTest, AHandedOutRankIsFreeAgainWhenItsProcessLeavesEarly) {
  ASSERT_TRUE(Join(Nameless(3)).ok());
  ASSERT_TRUE(Join(Nameless(3)).ok());
  simulation_.core().OnClosed(1, "closed");
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
  ASSERT_TRUE(Join(Nameless(3)).ok());
  ASSERT_TRUE(Join(Nameless(3)).ok());
  std::set<int32_t> ranks;
  for (const auto& [link, messages] : Sent()) {
    EXPECT_NE(link, 1u);
    for (const auto& message : messages) ranks.insert(message.form_group().rank());
  }
  EXPECT_EQ(ranks, (std::set<int32_t>{0, 1, 2}));
}

TEST_F(GroupTest, LaunchesWithAndWithoutRanksDoNotMix) {
  ASSERT_TRUE(Join(Nameless(2)).ok());
  EXPECT_EQ(ReasonOf(Join(Hello(1, 2))), "GROUP_SIZE");
  EXPECT_EQ(ReasonOf(Join(Nameless(2, "other"))), "GROUP_TAKEN");
  EXPECT_EQ(ReasonOf(Join(Nameless(3))), "GROUP_SIZE");
  wire::Hello hello = Nameless(2);
  hello.set_weights_hash("others");
  EXPECT_EQ(ReasonOf(Join(hello)), "MODEL_MISMATCH");
  EXPECT_TRUE(Join(Nameless(2)).ok());
}

TEST_F(GroupTest, AKeyOutOfPlaceLosesTheGroup) {
  const auto lost = [&] { return simulation_.core().GetCluster().last_incident(); };
  const auto form = [&](bool nameless) {
    const uint64_t first = next_link_;
    for (int i = 0; i < 2; ++i) EXPECT_TRUE(Join(nameless ? Nameless(2) : Hello(i, 2)).ok());
    return first;
  };
  const auto epoch = [&] { return simulation_.core().group().epoch(); };
  uint64_t link = form(true);
  SendKey(link + 1, "key", epoch());  // not rank 0's to send
  EXPECT_EQ(lost(), "rank 1 sent a key out of place");
  link = form(true);
  SendKey(link, "key", epoch());
  SendKey(link, "key", epoch());  // twice
  EXPECT_EQ(lost(), "rank 0 sent a key out of place");
  EXPECT_EQ(epoch(), 3);
  link = form(true);
  SendKey(link, std::string(4097, 'x'), epoch());
  EXPECT_EQ(epoch(), 4);
  link = form(true);
  SendKey(link, "", epoch());
  EXPECT_EQ(epoch(), 5);
  link = form(false);  // ranks of mpirun connect by themselves
  SendKey(link, "key", epoch());
  EXPECT_EQ(epoch(), 6);
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
}

// Connecting may take longer than a heartbeat may be missing; the ranks that were first did not beat while they waited.
TEST_F(GroupTest, HeartbeatsAreExpectedFromFormGroupOn) {
  ASSERT_TRUE(Join(Nameless(2)).ok());
  simulation_.Advance(100);
  ASSERT_TRUE(Join(Nameless(2)).ok());
  simulation_.Advance(14);
  EXPECT_EQ(simulation_.core().group().state(), Group::State::kForming);
  wire::WorkerMessage beat;
  beat.mutable_heartbeat()->set_epoch(1);
  simulation_.core().OnMessage(1, beat);
  simulation_.Advance(2);
  EXPECT_EQ(simulation_.core().group().state(), kWaiting);
  EXPECT_NE(simulation_.core().GetCluster().last_incident().find("rank 1 sent no heartbeat"), std::string::npos);
}

TEST_F(GroupTest, OnlyAPlannedStopIsCalledPlanned) {
  simulation_.Launch(2);
  simulation_.Run();
  simulation_.Kill(1);
  simulation_.Run();
  EXPECT_FALSE(simulation_.links()[0].told_to_leave.empty());
  EXPECT_FALSE(simulation_.links()[0].planned);
  simulation_.Launch(2);
  simulation_.Run();
  testing::internal::CaptureStderr();
  simulation_.core().BeginDrain();
  simulation_.core().FinishDrain();
  const std::string log = testing::internal::GetCapturedStderr();
  simulation_.Collect();
  simulation_.Run();
  EXPECT_FALSE(simulation_.links()[0].told_to_leave.empty());
  EXPECT_TRUE(simulation_.links()[0].planned);
  EXPECT_EQ(log.find("ERROR"), std::string::npos) << log;
}

TEST_F(GroupTest, ResultsOfAnotherEpochOrStrangersAreDropped) {
  simulation_.Launch(2);
  simulation_.Run();
  wire::WorkerMessage message;
  message.mutable_result()->set_epoch(simulation_.core().group().epoch() + 7);
  message.mutable_result()->set_seq(1);
  message.mutable_result()->set_final(true);
  simulation_.core().OnMessage(simulation_.links()[0].id, message);
  message.mutable_result()->set_epoch(simulation_.core().group().epoch());
  simulation_.core().OnMessage(999, message);
  EXPECT_TRUE(simulation_.core().serving());
  simulation_.core().OnMessage(simulation_.links()[0].id, message);  // but a command nobody sent cannot be answered
  EXPECT_FALSE(simulation_.core().serving());
}

TEST_F(GroupTest, TheNextLaunchStartsClean) {
  simulation_.Launch(2);
  simulation_.Run();
  simulation_.CreateReady("a", 700);
  const auto adapt = *simulation_.Adapt(Simulation::AdaptRequest("a", 3));
  simulation_.Run();
  ASSERT_TRUE(adapt->status().ok());
  simulation_.Kill(0);
  const api::Context lost = simulation_.Get("a");
  EXPECT_EQ(lost.state(), api::Context::CREATED);
  EXPECT_EQ(lost.adapters_size(), 0);
  EXPECT_EQ(lost.kv_bytes(), 0);
  EXPECT_EQ(lost.prefilled_tokens(), 0);
  EXPECT_EQ(lost.token_count(), 700);
  EXPECT_NE(lost.state_reason().find("rank 0"), std::string::npos);
  EXPECT_EQ(ReasonOf(simulation_.Prefill("a").status()), "GROUP_REBUILDING");
  EXPECT_EQ(ReasonOf(simulation_.Generate("a", 1, 1).status()), "GROUP_REBUILDING");
  simulation_.Launch(2);
  simulation_.Run();
  EXPECT_EQ(ReasonOf(simulation_.Generate("a", 1, 1).status()), "CONTEXT_NOT_READY");
  ASSERT_TRUE(simulation_.Prefill("a").ok());
  simulation_.Run();
  EXPECT_EQ(simulation_.State("a"), api::Context::READY);
  EXPECT_TRUE(simulation_.Get("a").state_reason().empty());
  simulation_.ExpectConsistent();
}

}  // namespace
}  // namespace refocus
