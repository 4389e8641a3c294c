// A streaming RPC as a plain function on a thread of its own, over gRPC's callback API: reads and writes never block
// it, so that it can give up waiting for a slow or silent peer, notice a disconnect at once, and always end with its
// own status.
//
//   Status Body(call): while (...) { if (call.Take(&request)) ...; if (call.CanWrite()) call.Write(...);
//   call.Wait(seconds); }
//
// The body runs on one thread; Wakeup::Notify may be called from any.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>

#include <grpcpp/support/server_callback.h>

#include "base/status.h"
#include "coordinator/rpc_status.h"

namespace refocus {

class Wakeup {
 public:
  void Notify() {
    const std::lock_guard<std::mutex> lock(mutex_);
    set_ = true;
    wake_.notify_one();
  }
  // Until notified since the last Wait, or `seconds` passed.
  void Wait(double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return set_; });
    set_ = false;
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  bool set_ = false;
};

// What `f` returns; an exception becomes a Status, so that one call cannot end the process.
template <typename F>
Status Guarded(F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return Error(StatusCode::kResourceExhausted, "SERVER_MEMORY",
                 "the server has no memory for this call; retry later");
  } catch (const std::exception& error) {
    return Error(StatusCode::kInternal, "EXCEPTION", std::string("the call failed unexpectedly: ") + error.what());
  } catch (...) {
    return Error(StatusCode::kInternal, "EXCEPTION", "the call failed unexpectedly");
  }
}

inline constexpr double kReadWithinSeconds = 30;  // an event that was sent; slower callers lose their call

// Threads of running calls; bounded. Outlives the server.
class CallPool {
 public:
  explicit CallPool(int most, double read_within_seconds = kReadWithinSeconds)
      : read_within_seconds(read_within_seconds), most_(most) {}
  ~CallPool() { WaitUntilEmpty(); }

  // UNAVAILABLE QUEUE_FULL: too many run already. RESOURCE_EXHAUSTED SERVER_THREADS: the system gives no thread.
  Status Run(std::function<void()> body) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (running_ >= most_) {
        return Error(StatusCode::kUnavailable, "QUEUE_FULL", "too many calls at once; retry");
      }
      ++running_;
    }
    try {
      std::thread([this, body = std::move(body)]() mutable {
        body();
        body = nullptr;  // what it holds must be gone before the pool may be
        Leave();
      }).detach();
    } catch (const std::exception&) {  // std::system_error, std::bad_alloc
      Leave();
      return Error(StatusCode::kResourceExhausted, "SERVER_THREADS",
                   "the server has no thread for this call; retry later");
    }
    return absl::OkStatus();
  }
  void WaitUntilEmpty() {
    std::unique_lock<std::mutex> lock(mutex_);
    empty_.wait(lock, [this] { return running_ == 0; });
  }
  int running() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return running_;
  }

  const double read_within_seconds;

 private:
  void Leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --running_;
    empty_.notify_all();
  }

  const int most_;
  std::mutex mutex_;
  std::condition_variable empty_;
  int running_ = 0;
};

inline constexpr double kStreamCapSeconds = 3600;  // of a call without a deadline, or with a later one

// What all three kinds of stream share. Deletes itself when gRPC is done with it.
template <typename Reactor>
class Call : public Reactor {
 public:
  Call() : wakeup_(std::make_shared<Wakeup>()), began_(std::chrono::steady_clock::now()) {}

  const std::shared_ptr<Wakeup>& wakeup() const { return wakeup_; }
  void Wait(double seconds) { wakeup_->Wait(seconds); }
  bool cancelled() const {  // the caller went away, or its deadline passed
    const std::lock_guard<std::mutex> lock(mutex_);
    return cancelled_;
  }
  double age_seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
  }
  // CANCELLED or DEADLINE_EXCEEDED when there is nobody to work for any more.
  Status Gone() const {
    if (cancelled()) return absl::CancelledError("the caller went away");
    if (age_seconds() < kStreamCapSeconds) return absl::OkStatus();
    return Error(StatusCode::kDeadlineExceeded, "DEADLINE", "the call lasted longer than 3600 s");
  }

 protected:
  // Runs `body`, then ends the RPC with its status. Nothing of the call may be touched afterwards.
  template <typename Self, typename Body>
  static void Launch(Self* self, CallPool& pool, Body body) {
    self->read_within_seconds_ = pool.read_within_seconds;
    const Status started = pool.Run([self, body = std::move(body)] {
      const Status status = Guarded([&] { return body(*self); });
      self->Finish(ToGrpc(status));
    });
    if (!started.ok()) self->Finish(ToGrpc(started));
  }

  void FirstRead() {}  // of the kinds that read

  void OnCancel() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      cancelled_ = true;
    }
    wakeup_->Notify();
  }
  void OnDone() override { delete this; }

  mutable std::mutex mutex_;
  const std::shared_ptr<Wakeup> wakeup_;
  const std::chrono::steady_clock::time_point began_;
  bool cancelled_ = false;
  double read_within_seconds_ = kReadWithinSeconds;
};

template <typename Base, typename Request>
class WithReads : public Base {
 public:
  // A message that has arrived. false: none yet; see read_closed().
  bool Take(Request* out) {
    {
      const std::lock_guard<std::mutex> lock(this->mutex_);
      if (!here_) return false;
      std::swap(*out, read_);
      here_ = false;
    }
    this->StartRead(&read_);
    return true;
  }
  // No further message will come: the caller half-closed, went away, or sent what is no message.
  bool read_closed() const {
    const std::lock_guard<std::mutex> lock(this->mutex_);
    return closed_;
  }

 protected:
  void FirstRead() { this->StartRead(&read_); }
  void OnReadDone(bool ok) override {
    {
      const std::lock_guard<std::mutex> lock(this->mutex_);
      (ok ? here_ : closed_) = true;
    }
    this->wakeup_->Notify();
  }

 private:
  Request read_;
  bool here_ = false;
  bool closed_ = false;
};

template <typename Base, typename Response>
class WithWrites : public Base {
 public:
  // As in Call, and RESOURCE_EXHAUSTED SLOW_READER when the caller has stopped reading.
  Status Gone() const {
    REFOCUS_RETURN_IF_ERROR(Base::Gone());
    const std::lock_guard<std::mutex> lock(this->mutex_);
    const double limit = this->read_within_seconds_;
    if (!writing_ || this->age_seconds() - writing_since_ < limit) return absl::OkStatus();
    const std::string seconds = std::to_string(static_cast<int>(limit));
    return Error(StatusCode::kResourceExhausted, "SLOW_READER", "no event was read for " + seconds + " s",
                 {{"limit_seconds", seconds}});
  }
  bool CanWrite() const {  // the last message was taken by the transport
    const std::lock_guard<std::mutex> lock(this->mutex_);
    return !writing_;
  }
  // Only when CanWrite().
  void Write(std::shared_ptr<const Response> response) {
    {
      const std::lock_guard<std::mutex> lock(this->mutex_);
      writing_ = true;
      writing_since_ = this->age_seconds();
    }
    write_ = std::move(response);
    this->StartWrite(write_.get());
  }
  void Write(Response response) { Write(std::make_shared<const Response>(std::move(response))); }

 protected:
  void OnWriteDone(bool ok) override {
    {
      const std::lock_guard<std::mutex> lock(this->mutex_);
      writing_ = false;
      if (!ok) this->cancelled_ = true;
    }
    this->wakeup_->Notify();
  }

 private:
  std::shared_ptr<const Response> write_;
  bool writing_ = false;
  double writing_since_ = 0;
};

template <typename Kind>
class Running : public Kind {
 public:
  template <typename Body>
  static Running* Start(CallPool& pool, Body body) {
    auto* call = new Running;
    call->FirstRead();
    Running::Launch(call, pool, std::move(body));
    return call;
  }
};

template <typename Request>
using ReadCall = Running<WithReads<Call<grpc::ServerReadReactor<Request>>, Request>>;
template <typename Response>
using WriteCall = Running<WithWrites<Call<grpc::ServerWriteReactor<Response>>, Response>>;
template <typename Request, typename Response>
using BidiCall = Running<WithWrites<WithReads<Call<grpc::ServerBidiReactor<Request, Response>>, Request>, Response>>;

inline constexpr double kCallPollSeconds = 0.05;

// The next message of an upload. OUT_OF_RANGE: the caller half-closed.
template <typename Call, typename Message>
Status NextMessage(Call& call, double stall_seconds, Message* message) {
  const double waiting_since = call.age_seconds();
  while (!call.Take(message)) {
    REFOCUS_RETURN_IF_ERROR(call.Gone());
    if (call.read_closed()) return absl::OutOfRangeError("half-closed");
    if (call.age_seconds() - waiting_since > stall_seconds) {
      return Error(StatusCode::kDeadlineExceeded, "UPLOAD_STALLED",
                   "no message for " + std::to_string(static_cast<int>(stall_seconds)) + " s; upload again",
                   {{"limit_seconds", std::to_string(static_cast<int>(stall_seconds))}});
    }
    call.Wait(kCallPollSeconds * 10);
  }
  return absl::OkStatus();
}

inline bool HalfClosed(const Status& status) {
  return status.code() == StatusCode::kOutOfRange && DetailOf(status).reason.empty();
}

// Until the transport took the last message, or the caller is gone.
template <typename Call>
Status Flush(Call& call) {
  while (!call.CanWrite()) {
    REFOCUS_RETURN_IF_ERROR(call.Gone());
    call.Wait(kCallPollSeconds);
  }
  return absl::OkStatus();
}

}  // namespace refocus
