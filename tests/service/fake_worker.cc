#include "tests/service/fake_worker.h"

#include <chrono>

namespace refocus {

FakeWorker::FakeWorker(const std::string& address, std::shared_ptr<FakeLaunch> launch, int32_t rank,
                       const std::string& fingerprint, std::function<void(FakeRank&)> setup)
    : launch_(std::move(launch)), rank_(rank, launch_->size, launch_->agreement) {
  if (setup) setup(rank_);
  rank_.emit = [this](const wire::Result& partial) {
    wire::WorkerMessage message;
    *message.mutable_result() = partial;
    ++progress_;
    Send(message);
  };
  stub_ = wire::GroupService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  stream_ = stub_->Join(&context_);
  wire::WorkerMessage hello;
  *hello.mutable_hello() = rank_.Hello(launch_->nonce, fingerprint);
  Send(hello);
  reader_ = std::thread([this] { ReadLoop(); });
  engine_ = std::thread([this] { EngineLoop(); });
  beats_ = std::thread([this] { BeatLoop(); });
}

FakeWorker::~FakeWorker() {
  Kill();
  reader_.join();
  engine_.join();
  beats_.join();
}

void FakeWorker::Kill() { context_.TryCancel(); }

std::string FakeWorker::shutdown_reason() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return shutdown_reason_;
}

grpc::Status FakeWorker::WaitUntilEnded() {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait(lock, [this] { return stop_; });
  return ended_;
}

void FakeWorker::Send(const wire::WorkerMessage& message) {
  const std::lock_guard<std::mutex> lock(write_mutex_);
  stream_->Write(message);  // false after the end: the reader notices
}

void FakeWorker::ReadLoop() {
  wire::CoordinatorMessage message;
  while (stream_->Read(&message)) {
    if (message.has_form_group()) {
      epoch_ = message.form_group().epoch();
      wire::WorkerMessage ready;
      ready.mutable_ready()->set_epoch(epoch_);
      Send(ready);
    } else if (message.has_cancel()) {
      rank_.Cancel(message.cancel().job());
    } else {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (message.has_command()) queue_.push_back(message.command());
      if (message.has_shutdown()) shutdown_reason_ = message.shutdown().reason();
      wake_.notify_all();
    }
  }
  const grpc::Status status = stream_->Finish();
  const std::lock_guard<std::mutex> lock(mutex_);
  ended_ = status;
  stop_ = true;
  wake_.notify_all();
  launch_->executed.notify_all();
}

void FakeWorker::EngineLoop() {
  while (true) {
    wire::Command command;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      command = queue_.front();
      queue_.pop_front();
    }
    while (frozen_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      const std::lock_guard<std::mutex> lock(mutex_);
      if (stop_) return;
    }
    running_seq_ = command.seq();
    std::vector<wire::Result> results;
    {
      std::unique_lock<std::mutex> turn(launch_->turn);
      while (!rank_.CanExecute(command.seq())) {
        launch_->executed.wait_for(turn, std::chrono::milliseconds(20));
        const std::lock_guard<std::mutex> lock(mutex_);
        if (stop_) return;
      }
      results = rank_.Execute(command);
      launch_->executed.notify_all();
    }
    running_seq_ = 0;
    ++progress_;
    for (const wire::Result& result : results) {
      wire::WorkerMessage message;
      *message.mutable_result() = result;
      Send(message);
    }
  }
}

void FakeWorker::BeatLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!wake_.wait_for(lock, std::chrono::milliseconds(50), [this] { return stop_; })) {
    wire::WorkerMessage message;
    message.mutable_heartbeat()->set_epoch(epoch_);
    message.mutable_heartbeat()->set_progress(progress_);
    message.mutable_heartbeat()->set_running_seq(running_seq_);
    message.mutable_heartbeat()->set_resident_bytes(1 << 20);
    lock.unlock();
    Send(message);
    lock.lock();
  }
}

}  // namespace refocus
