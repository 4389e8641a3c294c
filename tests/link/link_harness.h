// A coordinator in this process that plays a script, and an engine played by the link's callbacks.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/limits.h"
#include "refocus/internal/v1/group.grpc.pb.h"
#include "worker/link.h"

namespace refocus {

namespace pb = internal::v1;
using Clock = std::chrono::steady_clock;
using Stream = grpc::ServerReaderWriter<pb::CoordinatorMessage, pb::WorkerMessage>;
using Script = std::function<grpc::Status(Stream&)>;

inline constexpr int64_t kVocab = 100;
inline constexpr int64_t kEpoch = 7;

inline double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

inline void Nap(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

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

inline RankIdentity Identity() {
  RankIdentity identity;
  identity.nonce = "0123456789abcdef";
  identity.rank = 1;
  identity.size = 2;
  identity.model_fingerprint = "00ff00ff00ff00ff";
  identity.weights_hash = "0123012301230123";
  identity.vocab = kVocab;
  identity.kv_capacity_bytes = 1'000'000;
  identity.kv_bytes_per_token = 46'080;
  identity.kv_dtype = "int8";
  identity.weight_bytes = 5'000'000'000;
  identity.parameters = 1'250'000'000;
  return identity;
}

inline LinkOptions Options(const std::string& address) {
  LinkOptions options;
  options.coordinator = address;
  options.connect_seconds = 10.0;
  options.heartbeat_seconds = 0.02;
  return options;
}

inline pb::CoordinatorMessage FormGroup(int64_t epoch, int size) {
  pb::CoordinatorMessage message;
  message.mutable_form_group()->set_epoch(epoch);
  message.mutable_form_group()->set_size(size);
  return message;
}

inline pb::CoordinatorMessage Shutdown(const std::string& reason, bool planned) {
  pb::CoordinatorMessage message;
  message.mutable_shutdown()->set_reason(reason);
  message.mutable_shutdown()->set_planned(planned);
  return message;
}

inline pb::CoordinatorMessage CommandMessage(int64_t seq, const std::function<void(pb::Command&)>& fill,
                                             int64_t epoch = kEpoch) {
  pb::CoordinatorMessage message;
  message.mutable_command()->set_epoch(epoch);
  message.mutable_command()->set_seq(seq);
  message.mutable_command()->set_job(5);
  fill(*message.mutable_command());
  return message;
}

// Hello, FormGroup, GroupReady.
inline pb::Hello FormOn(Stream& stream) {
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
inline std::optional<pb::Result> NextResult(Stream& stream) {
  pb::WorkerMessage message;
  while (stream.Read(&message)) {
    if (message.has_result()) return message.result();
    EXPECT_TRUE(message.has_heartbeat());
  }
  return std::nullopt;
}

inline void ReadToEnd(Stream& stream) {
  pb::WorkerMessage message;
  while (stream.Read(&message)) {
  }
}

inline Result FinalOk(const Command& command) {
  Result result;
  result.epoch = command.epoch;
  result.seq = command.seq;
  return result;
}

}  // namespace refocus
