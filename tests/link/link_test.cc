// The worker's link at work, against a coordinator in this process.
#include <unistd.h>

#include "tests/link/link_harness.h"

namespace refocus {
namespace {

TEST(LinkTest, SaysHelloAndForms) {
  pb::Hello hello;
  FakeCoordinator coordinator([&](Stream& stream) {
    hello = FormOn(stream);
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
  ASSERT_TRUE(link.Join().ok());
  link.Close(5.0);
  coordinator.Stop();
  EXPECT_EQ(hello.nonce(), "0123456789abcdef");
  EXPECT_EQ(hello.rank(), 1);
  EXPECT_EQ(hello.size(), 2);
  EXPECT_FALSE(hello.host().empty());
  EXPECT_EQ(hello.pid(), getpid());
  EXPECT_EQ(hello.version(), kProtocolVersion);
  EXPECT_EQ(hello.model_fingerprint(), "00ff00ff00ff00ff");
  EXPECT_EQ(hello.weights_hash(), "0123012301230123");
  EXPECT_EQ(hello.device(), "cpu");
  EXPECT_EQ(hello.kv_capacity_bytes(), 1'000'000);
  EXPECT_EQ(hello.kv_bytes_per_token(), 46'080);
  EXPECT_EQ(hello.kv_dtype(), "int8");
  EXPECT_EQ(hello.weight_bytes(), 5'000'000'000);
  EXPECT_EQ(hello.parameters(), 1'250'000'000);
  EXPECT_TRUE(engine.losses.empty());
  EXPECT_TRUE(engine.shutdowns.empty());
}

// A refused command keeps its place: its answer comes between those of its neighbours, and the engine sees every
// number.
TEST(LinkTest, BadCommandIsAnsweredInItsPlace) {
  std::vector<pb::Result> results;
  FakeCoordinator coordinator([&](Stream& stream) {
    FormOn(stream);
    stream.Write(CommandMessage(1, [](pb::Command& c) { c.mutable_close_context()->set_context(3); }));
    stream.Write(CommandMessage(2, [](pb::Command& c) {
      c.mutable_prefill_chunk()->set_context(3);
      c.mutable_prefill_chunk()->add_ids(4);
      c.mutable_prefill_chunk()->add_ids(kVocab);
    }));
    stream.Write(CommandMessage(3, [](pb::Command&) {}));
    stream.Write(CommandMessage(4, [](pb::Command& c) { c.mutable_drop_adapter()->set_adapter(8); }));
    while (results.size() < 4) {
      const auto result = NextResult(stream);
      if (!result) break;
      results.push_back(*result);
    }
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
  ASSERT_TRUE(link.Join().ok());
  ASSERT_TRUE(engine.WaitFor([&] { return engine.commands.size() == 4; }));
  for (const Command& command : engine.commands) {
    Result result = FinalOk(command);
    // As the engine answers what stands for a refused command.
    if (command.seq == 2) result.status = Error(StatusCode::kNotFound, "UNKNOWN_UID", "context 0");
    link.Send(result);
  }
  link.Close(5.0);
  coordinator.Stop();

  ASSERT_EQ(results.size(), 4U);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(results[i].seq(), i + 1);
    EXPECT_EQ(results[i].epoch(), kEpoch);
    EXPECT_TRUE(results[i].final());
    EXPECT_EQ(engine.commands[i].seq, i + 1);
  }
  EXPECT_EQ(results[0].code(), 0);
  EXPECT_EQ(results[1].code(), static_cast<int>(StatusCode::kInvalidArgument));
  EXPECT_EQ(results[1].reason(), "TOKEN_ID_OUT_OF_RANGE");
  EXPECT_EQ(results[1].metadata().at("index"), "1");
  EXPECT_EQ(results[1].metadata().at("got"), "100");
  EXPECT_EQ(results[2].code(), static_cast<int>(StatusCode::kInvalidArgument));
  EXPECT_EQ(results[3].code(), 0);
  // What stands for a refused command must change nothing and meet nobody.
  for (const int i : {1, 2}) {
    ASSERT_TRUE(std::holds_alternative<CloseContext>(engine.commands[i].body));
    EXPECT_EQ(std::get<CloseContext>(engine.commands[i].body).context, 0U);
    EXPECT_EQ(engine.commands[i].job, 0U);
  }
  EXPECT_EQ(std::get<DropAdapter>(engine.commands[3].body).adapter, 8U);
}

TEST(LinkTest, OtherEpochIsRefusedAndNeverExecuted) {
  std::optional<pb::Result> result;
  FakeCoordinator coordinator([&](Stream& stream) {
    FormOn(stream);
    stream.Write(CommandMessage(9, [](pb::Command& c) { c.mutable_close_context()->set_context(3); }, kEpoch - 1));
    pb::CoordinatorMessage cancel;
    cancel.mutable_cancel()->set_epoch(kEpoch - 1);
    cancel.mutable_cancel()->set_job(11);
    stream.Write(cancel);
    cancel.mutable_cancel()->set_epoch(kEpoch);
    cancel.mutable_cancel()->set_job(12);
    stream.Write(cancel);
    result = NextResult(stream);
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
  ASSERT_TRUE(link.Join().ok());
  ASSERT_TRUE(engine.WaitFor([&] { return !engine.cancels.empty(); }));
  link.Close(5.0);
  coordinator.Stop();
  ASSERT_TRUE(result);
  EXPECT_EQ(result->seq(), 9);
  EXPECT_EQ(result->epoch(), kEpoch - 1);
  EXPECT_EQ(result->code(), static_cast<int>(StatusCode::kFailedPrecondition));
  EXPECT_EQ(result->reason(), "STALE_EPOCH");
  EXPECT_TRUE(engine.commands.empty());
  EXPECT_EQ(engine.cancels, std::vector<uint64_t>{12});
}

TEST(LinkTest, HeartbeatsCarryProgressWhileTheEngineIsBusy) {
  std::vector<pb::Heartbeat> beats;
  FakeEngine engine;
  FakeCoordinator coordinator([&](Stream& stream) {
    FormOn(stream);
    stream.Write(CommandMessage(1, [](pb::Command& c) { c.mutable_close_context()->set_context(3); }));
    pb::WorkerMessage message;
    // Beats may queue up before the first is read: as many more as it takes until the progress shows.
    while ((beats.size() < 5 || (beats.back().progress() < 20 && beats.size() < 500)) && stream.Read(&message)) {
      if (!message.has_heartbeat()) continue;
      beats.push_back(message.heartbeat());
      engine.progress = 10 * static_cast<int64_t>(beats.size());
    }
    return grpc::Status::OK;
  });
  engine.running_seq = 1;
  Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
  ASSERT_TRUE(link.Join().ok());
  ASSERT_TRUE(engine.WaitFor([&] { return !engine.losses.empty(); }));
  coordinator.Stop();
  ASSERT_GE(beats.size(), 5U);
  EXPECT_EQ(beats.front().progress(), 0);
  EXPECT_GE(beats.back().progress(), 20);
  for (const pb::Heartbeat& beat : beats) {
    EXPECT_EQ(beat.epoch(), kEpoch);
    EXPECT_EQ(beat.running_seq(), 1);
    EXPECT_GT(beat.resident_bytes(), 1 << 20);
  }
}

TEST(LinkTest, DialsUntilTheCoordinatorIsThere) {
  int port = 0;
  {
    FakeCoordinator first([](Stream&) { return grpc::Status::OK; });
    port = std::stoi(first.address().substr(first.address().find(':') + 1));
  }
  std::atomic<int> streams{0};
  std::unique_ptr<FakeCoordinator> coordinator;
  std::thread late([&] {
    Nap(400);
    coordinator = std::make_unique<FakeCoordinator>(
        [&](Stream& stream) {
          if (++streams == 1) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "still ending the group before");
          FormOn(stream);
          ReadToEnd(stream);
          return grpc::Status::OK;
        },
        port);
  });
  FakeEngine engine;
  Link link(Options("127.0.0.1:" + std::to_string(port)), Identity(), engine.Callbacks());
  const Status status = link.Join();
  late.join();
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(streams, 2);
  link.Close(5.0);
}

// A coordinator that stops reading costs memory, never time of the engine.
TEST(LinkTest, SendDoesNotWaitForTheCoordinator) {
  std::atomic<bool> end{false};
  FakeCoordinator coordinator([&](Stream& stream) {
    FormOn(stream);
    while (!end) Nap(5);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
  ASSERT_TRUE(link.Join().ok());
  Result result;
  result.final = false;
  result.score_logprobs.assign(4000, -1.0f);
  const auto begin = Clock::now();
  for (int i = 0; i < 1000; ++i) link.Send(result);
  EXPECT_LT(SecondsSince(begin), 2.0);
  const auto closing = Clock::now();
  link.Close(0.2);
  EXPECT_LT(SecondsSince(closing), 2.0);
  end = true;
}

}  // namespace
}  // namespace refocus
