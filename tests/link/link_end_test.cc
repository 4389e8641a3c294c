// Every way in which a link does not begin, or ends.
#include "tests/link/link_harness.h"

namespace refocus {
namespace {

TEST(LinkEndTest, ShutdownWaitsForWhatWasSubmitted) {
  FakeCoordinator coordinator([&](Stream& stream) {
    FormOn(stream);
    stream.Write(CommandMessage(1, [](pb::Command& c) { c.mutable_close_context()->set_context(3); }));
    stream.Write(CommandMessage(2, [](pb::Command& c) { c.mutable_close_context()->set_context(4); }));
    stream.Write(Shutdown("drained", true));
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
  ASSERT_TRUE(link.Join().ok());
  ASSERT_TRUE(engine.WaitFor([&] { return engine.commands.size() == 2; }));
  Nap(50);
  link.Send(FinalOk(engine.commands[0]));
  Result partial = FinalOk(engine.commands[1]);
  partial.final = false;
  link.Send(partial);
  Nap(50);
  EXPECT_TRUE(engine.WaitFor([&] { return engine.shutdowns.empty(); }));
  link.Send(FinalOk(engine.commands[1]));
  ASSERT_TRUE(engine.WaitFor([&] { return !engine.shutdowns.empty(); }));
  EXPECT_EQ(engine.shutdowns, std::vector<std::string>{"drained"});
  link.Close(5.0);
  EXPECT_TRUE(engine.losses.empty());
}

// Not planned: nothing is waited for, not even the results that a planned one, received before, is waiting for.
TEST(LinkEndTest, UnplannedShutdownIsALossAtOnce) {
  for (const bool after_planned : {false, true}) {
    FakeCoordinator coordinator([&](Stream& stream) {
      FormOn(stream);
      stream.Write(CommandMessage(1, [](pb::Command& c) { c.mutable_close_context()->set_context(3); }));
      if (after_planned) stream.Write(Shutdown("drained", true));
      stream.Write(Shutdown("rank 0 of 2 on there is gone", false));
      ReadToEnd(stream);
      return grpc::Status::OK;
    });
    FakeEngine engine;
    Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
    ASSERT_TRUE(link.Join().ok());
    ASSERT_TRUE(engine.WaitFor([&] { return !engine.losses.empty(); })) << after_planned;
    ASSERT_EQ(engine.commands.size(), 1U);
    link.Send(FinalOk(engine.commands[0]));
    link.Close(1.0);
    ASSERT_EQ(engine.losses.size(), 1U);
    EXPECT_EQ(engine.losses[0].code(), StatusCode::kUnavailable);
    EXPECT_EQ(DetailOf(engine.losses[0]).reason, "WORKER_LOST");
    EXPECT_NE(engine.losses[0].message().find("rank 0 of 2 on there is gone"), absl::string_view::npos);
    EXPECT_TRUE(engine.shutdowns.empty());
  }
}

TEST(LinkEndTest, ShutdownInsteadOfAGroup) {
  for (const bool planned : {false, true}) {
    FakeCoordinator coordinator([&](Stream& stream) {
      pb::WorkerMessage hello;
      stream.Read(&hello);
      stream.Write(Shutdown("another launch came", planned));
      ReadToEnd(stream);
      return grpc::Status::OK;
    });
    FakeEngine engine;
    Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
    const Status joined = link.Join();
    link.Close(1.0);
    EXPECT_EQ(joined.code(), planned ? StatusCode::kOk : StatusCode::kUnavailable) << joined;
    EXPECT_EQ(DetailOf(joined).reason, planned ? "" : "WORKER_LOST");
    EXPECT_EQ(engine.shutdowns.size(), planned ? 1U : 0U);
    EXPECT_TRUE(engine.losses.empty());
  }
}

TEST(LinkEndTest, EndOfTheStreamIsALossToldOnce) {
  for (const bool polite : {true, false}) {
    std::atomic<bool> formed{false};
    FakeCoordinator coordinator([&](Stream& stream) {
      FormOn(stream);
      formed = true;
      if (!polite) ReadToEnd(stream);
      return grpc::Status::OK;
    });
    FakeEngine engine;
    Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
    ASSERT_TRUE(link.Join().ok());
    // Join returns before its GroupReady is read; the coordinator must go after that, not before.
    while (!formed) std::this_thread::yield();
    if (!polite) coordinator.Stop();
    ASSERT_TRUE(engine.WaitFor([&] { return !engine.losses.empty(); }));
    link.Send(Result{});
    link.Close(1.0);
    ASSERT_EQ(engine.losses.size(), 1U);
    EXPECT_EQ(engine.losses[0].code(), StatusCode::kUnavailable);
    EXPECT_EQ(DetailOf(engine.losses[0]).reason, "COORDINATOR_LOST");
    EXPECT_TRUE(engine.shutdowns.empty());
  }
}

TEST(LinkEndTest, GivesUpWithoutACoordinator) {
  LinkOptions options = Options("127.0.0.1:1");
  options.connect_seconds = 0.5;
  FakeEngine engine;
  Link link(options, Identity(), engine.Callbacks());
  const auto begin = Clock::now();
  const Status status = link.Join();
  EXPECT_EQ(status.code(), StatusCode::kUnavailable);
  EXPECT_GE(SecondsSince(begin), 0.45);
  EXPECT_LT(SecondsSince(begin), 2.0);
}

TEST(LinkEndTest, RefusalIsFinal) {
  FakeCoordinator refusing([](Stream& stream) {
    pb::WorkerMessage hello;
    stream.Read(&hello);
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "version: got 1, allowed 2");
  });
  FakeEngine engine;
  Link link(Options(refusing.address()), Identity(), engine.Callbacks());
  const Status status = link.Join();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("version: got 1, allowed 2"), absl::string_view::npos) << status;

  for (const auto& [epoch, size] : {std::pair{0, 2}, std::pair{7, 3}}) {
    FakeCoordinator wrong([epoch = epoch, size = size](Stream& stream) {
      pb::WorkerMessage hello;
      stream.Read(&hello);
      stream.Write(FormGroup(epoch, size));
      ReadToEnd(stream);
      return grpc::Status::OK;
    });
    Link other(Options(wrong.address()), Identity(), engine.Callbacks());
    EXPECT_EQ(other.Join().code(), StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(engine.losses.empty());
}

TEST(LinkEndTest, InterruptEndsTheWaitForTheGroup) {
  std::atomic<bool> waiting{false};
  FakeCoordinator coordinator([&](Stream& stream) {
    pb::WorkerMessage hello;
    stream.Read(&hello);
    waiting = true;
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Link link(Options(coordinator.address()), Identity(), engine.Callbacks());
  std::thread other([&] {
    while (!waiting) Nap(5);
    link.Interrupt();
  });
  const auto begin = Clock::now();
  EXPECT_EQ(link.Join().code(), StatusCode::kCancelled);
  EXPECT_LT(SecondsSince(begin), 3.0);
  other.join();
  EXPECT_EQ(link.Join().code(), StatusCode::kCancelled);
}

}  // namespace
}  // namespace refocus
