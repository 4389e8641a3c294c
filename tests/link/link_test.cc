// The worker's link against a coordinator in this process. Engines are played by the callbacks.
#include "worker/link.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

#include "base/limits.h"
#include "refocus/internal/v1/group.grpc.pb.h"
#include "worker/link_messages.h"

namespace refocus {
namespace {

namespace pb = internal::v1;
using Clock = std::chrono::steady_clock;
using Stream = grpc::ServerReaderWriter<pb::CoordinatorMessage, pb::WorkerMessage>;
using Script = std::function<grpc::Status(Stream&)>;

constexpr int64_t kVocab = 100;
constexpr int64_t kEpoch = 7;

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

void Nap(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

// Plays a script for every stream.
class FakeCoordinator : public pb::GroupService::Service {
 public:
  explicit FakeCoordinator(Script script, int port = 0) : script_(std::move(script)), port_(port) { Start(); }
  ~FakeCoordinator() override { Stop(); }

  void Stop() {
    if (server_) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }

  grpc::Status Join(grpc::ServerContext*, Stream* stream) override { return script_(*stream); }

 private:
  void Start() {
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(kWorkerMessageBytes);
    builder.AddListeningPort("127.0.0.1:" + std::to_string(port_), grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
  }

  const Script script_;
  int port_;
  std::unique_ptr<grpc::Server> server_;
};

// What the link called, in order, and a way to wait for it.
class FakeEngine {
 public:
  LinkCallbacks Callbacks() {
    LinkCallbacks callbacks;
    callbacks.submit = [this](Command command) { Note([&] { commands.push_back(std::move(command)); }); };
    callbacks.cancel = [this](uint64_t job) { Note([&] { cancels.push_back(job); }); };
    callbacks.shutdown = [this](const std::string& reason) { Note([&] { shutdowns.push_back(reason); }); };
    callbacks.lost = [this](const Status& cause) { Note([&] { losses.push_back(cause); }); };
    callbacks.progress = [this] { return progress.load(); };
    callbacks.running_seq = [this] { return running_seq.load(); };
    return callbacks;
  }

  bool WaitFor(const std::function<bool()>& condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    return wake_.wait_for(lock, std::chrono::seconds(10), condition);
  }

  std::vector<Command> commands;
  std::vector<uint64_t> cancels;
  std::vector<std::string> shutdowns;
  std::vector<Status> losses;
  std::atomic<int64_t> progress{0};
  std::atomic<int64_t> running_seq{0};

 private:
  void Note(const std::function<void()>& change) {
    const std::lock_guard<std::mutex> lock(mutex_);
    change();
    wake_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
};

RankIdentity Identity() {
  RankIdentity identity;
  identity.nonce = "0123456789abcdef";
  identity.rank = 1;
  identity.size = 2;
  identity.model_fingerprint = "00ff00ff00ff00ff";
  identity.vocab = kVocab;
  identity.kv_capacity_bytes = 1'000'000;
  identity.kv_bytes_per_token = 46'080;
  identity.weight_bytes = 5'000'000'000;
  identity.parameters = 1'250'000'000;
  return identity;
}

LinkOptions Options(const std::string& address) {
  LinkOptions options;
  options.coordinator = address;
  options.connect_seconds = 10.0;
  options.heartbeat_seconds = 0.02;
  return options;
}

pb::CoordinatorMessage FormGroup(int64_t epoch, int size) {
  pb::CoordinatorMessage message;
  message.mutable_form_group()->set_epoch(epoch);
  message.mutable_form_group()->set_size(size);
  return message;
}

pb::CoordinatorMessage CommandMessage(int64_t seq, const std::function<void(pb::Command&)>& fill,
                                      int64_t epoch = kEpoch) {
  pb::CoordinatorMessage message;
  message.mutable_command()->set_epoch(epoch);
  message.mutable_command()->set_seq(seq);
  message.mutable_command()->set_job(5);
  fill(*message.mutable_command());
  return message;
}

// Hello, FormGroup, GroupReady.
pb::Hello FormOn(Stream& stream) {
  pb::WorkerMessage message;
  EXPECT_TRUE(stream.Read(&message));
  EXPECT_TRUE(message.has_hello());
  const pb::Hello hello = message.hello();
  EXPECT_TRUE(stream.Write(FormGroup(kEpoch, 2)));
  EXPECT_TRUE(stream.Read(&message));
  EXPECT_TRUE(message.has_ready());
  EXPECT_EQ(message.ready().epoch(), kEpoch);
  return hello;
}

// The next result, past heartbeats; nothing when the worker ended the stream.
std::optional<pb::Result> NextResult(Stream& stream) {
  pb::WorkerMessage message;
  while (stream.Read(&message)) {
    if (message.has_result()) return message.result();
    EXPECT_TRUE(message.has_heartbeat());
  }
  return std::nullopt;
}

void ReadToEnd(Stream& stream) {
  pb::WorkerMessage message;
  while (stream.Read(&message)) {
  }
}

Result FinalOk(const Command& command) {
  Result result;
  result.epoch = command.epoch;
  result.seq = command.seq;
  return result;
}

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
  EXPECT_EQ(hello.device(), "cpu");
  EXPECT_EQ(hello.kv_capacity_bytes(), 1'000'000);
  EXPECT_EQ(hello.kv_bytes_per_token(), 46'080);
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
    while (beats.size() < 5 && stream.Read(&message)) {
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
  ASSERT_EQ(beats.size(), 5U);
  EXPECT_EQ(beats.front().progress(), 0);
  EXPECT_GE(beats.back().progress(), 20);
  for (const pb::Heartbeat& beat : beats) {
    EXPECT_EQ(beat.epoch(), kEpoch);
    EXPECT_EQ(beat.running_seq(), 1);
    EXPECT_GT(beat.resident_bytes(), 1 << 20);
  }
}

TEST(LinkTest, ShutdownWaitsForWhatWasSubmitted) {
  FakeCoordinator coordinator([&](Stream& stream) {
    FormOn(stream);
    stream.Write(CommandMessage(1, [](pb::Command& c) { c.mutable_close_context()->set_context(3); }));
    stream.Write(CommandMessage(2, [](pb::Command& c) { c.mutable_close_context()->set_context(4); }));
    pb::CoordinatorMessage message;
    message.mutable_shutdown()->set_reason("drained");
    stream.Write(message);
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

TEST(LinkTest, EndOfTheStreamIsALossToldOnce) {
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

TEST(LinkTest, GivesUpWithoutACoordinator) {
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

TEST(LinkTest, RefusalIsFinal) {
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

TEST(LinkTest, InterruptEndsTheWaitForTheGroup) {
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

TEST(LinkMessagesTest, ResultKeepsEveryField) {
  Result result;
  result.epoch = 3;
  result.seq = 4;
  result.final = false;
  result.status = Error(StatusCode::kResourceExhausted, "KV_CAPACITY", "caf\xc3\xa9", {{"need_bytes", "12"}});
  result.cancelled = true;
  result.seconds = 0.25;
  result.agree = 0xffff'ffff'ffff'fff1;
  result.kv_used_bytes = int64_t{1} << 40;
  result.loss = 2.5;
  result.grad_norm = 0.125;
  result.tokens = {{9, -0.5f, {9, 8}, {-0.5f, -1.5f}}, {2, -0.25f, {}, {}}};
  result.finished = true;
  result.score_logprobs = {-1.0f, -2.0f};
  result.score_greedy = {true, false};
  const pb::Result m = WriteResult(result);
  EXPECT_EQ(m.epoch(), 3);
  EXPECT_EQ(m.seq(), 4);
  EXPECT_FALSE(m.final());
  EXPECT_EQ(m.code(), 8);
  EXPECT_EQ(m.reason(), "KV_CAPACITY");
  EXPECT_EQ(m.message(), "caf??");
  EXPECT_EQ(m.metadata().at("need_bytes"), "12");
  EXPECT_TRUE(m.cancelled());
  EXPECT_EQ(m.seconds(), 0.25);
  EXPECT_EQ(m.agree(), 0xffff'ffff'ffff'fff1);
  EXPECT_EQ(m.kv_used_bytes(), int64_t{1} << 40);
  EXPECT_EQ(m.loss(), 2.5);
  EXPECT_EQ(m.grad_norm(), 0.125);
  ASSERT_EQ(m.tokens_size(), 2);
  EXPECT_EQ(m.tokens(0).id(), 9U);
  EXPECT_EQ(m.tokens(0).top_ids(1), 8U);
  EXPECT_EQ(m.tokens(0).top_logprobs(1), -1.5f);
  EXPECT_EQ(m.tokens(1).logprob(), -0.25f);
  EXPECT_TRUE(m.finished());
  EXPECT_EQ(m.score_logprobs(1), -2.0f);
  EXPECT_TRUE(m.score_greedy(0));
  EXPECT_FALSE(m.score_greedy(1));
}

}  // namespace
}  // namespace refocus
