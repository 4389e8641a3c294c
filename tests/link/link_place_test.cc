// Ranks that started by themselves: the coordinator says who they are and passes rank 0's key on before they are ready.
#include "tests/link/link_harness.h"

namespace refocus {
namespace {

RankIdentity Nameless() {
  RankIdentity identity = Identity();
  identity.rank = -1;
  return identity;
}

pb::CoordinatorMessage FormGroupAs(int rank) {
  pb::CoordinatorMessage message = FormGroup(kEpoch, 2);
  message.mutable_form_group()->set_rank(rank);
  return message;
}

pb::CoordinatorMessage Key(const std::string& key, int64_t epoch = kEpoch) {
  pb::CoordinatorMessage message;
  message.mutable_key()->set_epoch(epoch);
  message.mutable_key()->set_key(key);
  return message;
}

pb::Hello ReadHello(Stream& stream) {
  pb::WorkerMessage message;
  EXPECT_TRUE(stream.Read(&message));
  EXPECT_TRUE(message.has_hello());
  return message.hello();
}

// The next message that is no heartbeat.
pb::WorkerMessage Next(Stream& stream, int* beats = nullptr) {
  pb::WorkerMessage message;
  while (stream.Read(&message)) {
    if (!message.has_heartbeat()) return message;
    if (beats != nullptr) ++*beats;
  }
  return {};
}

// What the form callback saw.
struct Formed {
  int32_t rank = -1;
  StatusOr<std::string> key = std::string();
};

LinkCallbacks Forming(FakeEngine& engine, Formed& formed, const std::string& own = "made here") {
  LinkCallbacks callbacks = engine.Callbacks();
  callbacks.form = [&formed, own](int32_t rank, const ShareBytes& share) {
    formed.rank = rank;
    formed.key = share(own);
    return formed.key.status();
  };
  return callbacks;
}

TEST(LinkPlaceTest, RankZeroSendsItsKeyBeforeItIsReady) {
  pb::Hello hello;
  pb::WorkerMessage key, ready;
  FakeCoordinator coordinator([&](Stream& stream) {
    hello = ReadHello(stream);
    stream.Write(FormGroupAs(0));
    key = Next(stream);
    ready = Next(stream);
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Formed formed;
  const std::string own("k\0y", 3);
  Link link(Options(coordinator.address()), Nameless(), Forming(engine, formed, own));
  const Status joined = link.Join();
  ASSERT_TRUE(joined.ok()) << joined;
  link.Close(5.0);
  coordinator.Stop();
  EXPECT_TRUE(hello.wants_rank());
  EXPECT_EQ(hello.size(), 2);
  EXPECT_EQ(formed.rank, 0);
  EXPECT_EQ(*formed.key, own);
  EXPECT_EQ(key.key().key(), own);
  EXPECT_EQ(key.key().epoch(), kEpoch);
  EXPECT_TRUE(ready.has_ready());
  EXPECT_EQ(ready.ready().epoch(), kEpoch);
  EXPECT_TRUE(engine.losses.empty());
}

TEST(LinkPlaceTest, OthersWaitForTheKeyWithHeartbeats) {
  int beats = 0;
  pb::WorkerMessage ready;
  FakeCoordinator coordinator([&](Stream& stream) {
    ReadHello(stream);
    stream.Write(FormGroupAs(1));
    stream.Write(Key("of another epoch", kEpoch + 1));
    pb::WorkerMessage beat;
    for (; beats < 3 && stream.Read(&beat); ++beats) EXPECT_TRUE(beat.has_heartbeat());
    stream.Write(Key("rank 0's"));
    ready = Next(stream);
    // A command is taken from now on.
    stream.Write(CommandMessage(1, [](pb::Command& c) { c.mutable_close_context()->set_context(3); }));
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Formed formed;
  Link link(Options(coordinator.address()), Nameless(), Forming(engine, formed));
  const Status joined = link.Join();
  ASSERT_TRUE(joined.ok()) << joined;
  EXPECT_EQ(formed.rank, 1);
  EXPECT_EQ(*formed.key, "rank 0's");
  ASSERT_TRUE(engine.WaitFor([&] { return engine.commands.size() == 1; }));
  link.Close(5.0);
  coordinator.Stop();
  EXPECT_EQ(beats, 3);
  EXPECT_TRUE(ready.has_ready());
}

TEST(LinkPlaceTest, APlaceOutsideTheGroupIsRefused) {
  for (const int rank : {-1, 2}) {
    FakeCoordinator coordinator([&](Stream& stream) {
      ReadHello(stream);
      stream.Write(FormGroupAs(rank));
      ReadToEnd(stream);
      return grpc::Status::OK;
    });
    FakeEngine engine;
    Formed formed;
    Link link(Options(coordinator.address()), Nameless(), Forming(engine, formed));
    EXPECT_EQ(link.Join().code(), StatusCode::kFailedPrecondition);
    EXPECT_EQ(formed.rank, -1) << "was asked to form";
  }
}

// The group ends while a rank waits for the key: as a loss, or as planned.
TEST(LinkPlaceTest, TheWaitForTheKeyEndsWithTheGroup) {
  for (const char* how : {"unplanned", "planned", "stream"}) {
    FakeCoordinator coordinator([&](Stream& stream) {
      ReadHello(stream);
      stream.Write(FormGroupAs(1));
      if (how != std::string("stream")) {
        stream.Write(Shutdown("rank 0 is gone", how == std::string("planned")));
        ReadToEnd(stream);
      }
      return grpc::Status::OK;
    });
    FakeEngine engine;
    Formed formed;
    Link link(Options(coordinator.address()), Nameless(), Forming(engine, formed));
    const auto begin = Clock::now();
    EXPECT_EQ(link.Join().code(), StatusCode::kUnavailable) << how;
    EXPECT_LT(SecondsSince(begin), 5.0);
    const bool planned = how == std::string("planned");
    ASSERT_TRUE(engine.WaitFor([&] { return planned ? !engine.shutdowns.empty() : !engine.losses.empty(); })) << how;
    link.Close(1.0);
    EXPECT_EQ(engine.shutdowns.size(), planned ? 1U : 0U) << how;
    EXPECT_EQ(engine.losses.size(), planned ? 0U : 1U) << how;
  }
}

TEST(LinkPlaceTest, InterruptEndsTheWaitForTheKey) {
  std::atomic<bool> waiting{false};
  FakeCoordinator coordinator([&](Stream& stream) {
    ReadHello(stream);
    stream.Write(FormGroupAs(1));
    pb::WorkerMessage beat;
    stream.Read(&beat);
    waiting = true;
    ReadToEnd(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  Formed formed;
  Link link(Options(coordinator.address()), Nameless(), Forming(engine, formed));
  std::thread other([&] {
    while (!waiting) Nap(5);
    link.Interrupt();
  });
  EXPECT_EQ(link.Join().code(), StatusCode::kCancelled);
  other.join();
  link.Close(1.0);
  EXPECT_TRUE(engine.losses.empty());
}

TEST(LinkPlaceTest, AFailureToConnectIsThatOfJoin) {
  pb::WorkerMessage after;
  FakeCoordinator coordinator([&](Stream& stream) {
    ReadHello(stream);
    stream.Write(FormGroupAs(0));
    after = Next(stream);
    return grpc::Status::OK;
  });
  FakeEngine engine;
  LinkCallbacks callbacks = engine.Callbacks();
  callbacks.form = [](int32_t, const ShareBytes&) {
    return Error(StatusCode::kUnavailable, "WORKER_LOST", "no way to the others");
  };
  Link link(Options(coordinator.address()), Nameless(), std::move(callbacks));
  const Status joined = link.Join();
  EXPECT_EQ(joined.message(), "no way to the others");
  link.Close(0.5);
  coordinator.Stop();
  EXPECT_FALSE(after.has_ready());
  EXPECT_TRUE(engine.losses.empty());
}

}  // namespace
}  // namespace refocus
