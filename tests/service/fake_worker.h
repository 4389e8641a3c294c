// Fake ranks (tests/coordinator/fake_rank.h) behind real streams: what the coordinator sees of a group of worker
// processes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "refocus/internal/v1/group.grpc.pb.h"
#include "tests/coordinator/fake_rank.h"

namespace refocus {

// One launch: its ranks take turns at computing, as if they shared a collective.
struct FakeLaunch {
  std::string nonce;
  int32_t size = 1;
  std::mutex turn;  // held while a rank executes a command
  std::condition_variable executed;
  std::shared_ptr<FakeAgreement> agreement = std::make_shared<FakeAgreement>();
};

class FakeWorker {
 public:
  FakeWorker(const std::string& address, std::shared_ptr<FakeLaunch> launch, int32_t rank,
             const std::string& fingerprint, std::function<void(FakeRank&)> setup);
  ~FakeWorker();

  void Kill();                       // the stream breaks, as when the process dies
  void Freeze() { frozen_ = true; }  // heartbeats go on, nothing else does
  std::string shutdown_reason();     // empty: was not told to leave
  grpc::Status WaitUntilEnded();     // the stream's status
  FakeRank& rank() { return rank_; }
  // Runs f(rank) while no command runs.
  template <typename F>
  auto Inspect(F f) {
    const std::lock_guard<std::mutex> lock(launch_->turn);
    return f(rank_);
  }

 private:
  void ReadLoop();
  void EngineLoop();
  void BeatLoop();
  void Send(const wire::WorkerMessage& message);

  const std::shared_ptr<FakeLaunch> launch_;
  FakeRank rank_;
  std::unique_ptr<wire::GroupService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<wire::WorkerMessage, wire::CoordinatorMessage>> stream_;
  std::mutex mutex_;
  std::mutex write_mutex_;
  std::condition_variable wake_;
  std::deque<wire::Command> queue_;
  std::string shutdown_reason_;
  grpc::Status ended_;
  bool stop_ = false;
  std::atomic<bool> frozen_{false};
  std::atomic<int64_t> epoch_{0};
  std::atomic<int64_t> progress_{0};
  std::atomic<int64_t> running_seq_{0};
  std::thread reader_, engine_, beats_;
};

}  // namespace refocus
