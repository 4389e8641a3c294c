// An NCCL communicator and what is known about its health: every call into NCCL, the watchdog, the end of a lost group.
// Part of collective_nccl.cc alone.
//
// NCCL allows one thread at a time inside a communicator, polls and abort included: every call of it holds
// `nccl_mutex_`. The communicator does not block, so the lock is never held for long: a call that NCCL has not finished
// is asked for again.
//
// A kernel of NCCL whose peer is gone spins for ever and nobody is told. A watchdog looks at NCCL's own errors and at
// the time since the last call whose end was not seen, and then makes NCCL give up, which ends the kernel and so every
// wait for the stream. Graphs with such kernels would have to be destroyed first, which no other thread can do: they are
// leaked on purpose, since a lost group ends the process.
#pragma once

#include <nccl.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/status.h"
#include "worker/collective.h"

namespace refocus::nccl {

using Clock = std::chrono::steady_clock;

inline constexpr double kCreateSeconds = 60.0;   // at least: ranks meet, look at the machine and allocate
inline constexpr double kFinalizeSeconds = 5.0;
inline constexpr double kReleaseSeconds = 10.0;  // from giving up until the thread that waits must have noticed
inline constexpr std::chrono::milliseconds kLook{50};
inline constexpr std::chrono::seconds kLockPatience{5};
inline constexpr std::chrono::milliseconds kPatience{2};  // of spinning, before a wait sleeps between its polls
inline constexpr std::chrono::microseconds kNap{20};
inline constexpr uint32_t kGiveUp = 1;  // kernels take any number but 0

inline int64_t NowNs() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }

inline std::string Text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g s", seconds);
  return text;
}

// Between two polls: spins at first, for the shortest latency, then leaves the core to others.
class Pause {
 public:
  void Once() {
    if (Clock::now() - begin_ < kPatience) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }

 private:
  const Clock::time_point begin_ = Clock::now();
};

// The NCCL communicator and what is known about its health. Shared by the collective and its watchdog, so that neither
// needs to wait for the other once the group is lost.
class Communicator {
 public:
  Communicator(int rank, int size, double deadline_seconds)
      : where_("rank " + std::to_string(rank) + " of " + std::to_string(size)), deadline_seconds_(deadline_seconds) {}

  void Create(const std::string& id, int rank, int size) {
    ncclUniqueId key;
    REFOCUS_CHECK_EQ(id.size(), sizeof(key.internal));
    std::memcpy(key.internal, id.data(), sizeof(key.internal));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const double patience = std::max(kCreateSeconds, deadline_seconds_);
    const Clock::time_point begin = Clock::now();
    ncclResult_t result = ncclCommInitRankConfig(&comm_, size, key, rank, &config);
    while (result == ncclInProgress && std::chrono::duration<double>(Clock::now() - begin).count() < patience) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      const ncclResult_t asked = ncclCommGetAsyncError(comm_, &result);
      if (asked != ncclSuccess) result = asked;
    }
    if (result == ncclSuccess) return;
    const std::string why = result == ncclInProgress ? "the other ranks did not come within " + Text(patience)
                                                     : ErrorText(result);
    if (comm_ != nullptr) ncclCommAbort(comm_);
    comm_ = nullptr;
    throw CollectiveError("NCCL communicator of " + where_ + ": " + why + "; NCCL_DEBUG=INFO tells more");
  }

  // The word through which kernels are told to give up, and tell that they did (kernels/exchange.h). Outlives this.
  void Guard(uint32_t* given_up) { given_up_ = given_up; }

  // ---- The owner's thread.

  void ThrowIfLost() {
    LoseIfGivenUp();
    if (!lost_) return;
    told_ = true;
    const std::lock_guard<std::mutex> lock(mutex_);
    throw CollectiveError(reason_);
  }

  [[noreturn]] void Fail(const std::string& reason) {
    Lose(reason);
    told_ = true;
    const std::lock_guard<std::mutex> lock(mutex_);
    throw CollectiveError(reason_);
  }

  // Something is under way from now on; the deadline counts from the last time this was called.
  void Begin(const char* op, int64_t call) {
    ThrowIfLost();
    op_ = op;
    call_ = call;
    busy_since_ns_ = NowNs();
  }
  void Idle() { busy_since_ns_ = 0; }

  // Makes NCCL's calls of one operation; returns when they are on the stream.
  template <typename Enqueue>
  void Run(const Enqueue& enqueue) {
    ncclResult_t result = Locked([&] { return enqueue(comm_); });
    for (Pause pause; result == ncclInProgress; pause.Once()) {
      result = Locked([&] {
        ncclResult_t state = ncclSuccess;
        const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
        return asked == ncclSuccess ? state : asked;
      });
    }
    if (result != ncclSuccess) Fail(Doing() + ": " + Locked([&] { return ErrorText(result); }));
    busy_since_ns_ = NowNs();
  }

  // A planned end: all ranks come here. True when the watchdog may be waited for.
  bool Close() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (lost_) return false;
      stop_ = true;
    }
    wake_.notify_all();
    const std::lock_guard<std::timed_mutex> lock(nccl_mutex_);
    if (comm_ == nullptr) return true;
    const Clock::time_point begin = Clock::now();
    ncclResult_t result = ncclCommFinalize(comm_);
    while (result == ncclInProgress && std::chrono::duration<double>(Clock::now() - begin).count() < kFinalizeSeconds) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      const ncclResult_t asked = ncclCommGetAsyncError(comm_, &result);
      if (asked != ncclSuccess) result = asked;
    }
    result == ncclSuccess ? ncclCommDestroy(comm_) : ncclCommAbort(comm_);
    comm_ = nullptr;
    return true;
  }

  // ---- Any thread.

  void Lose(const std::string& reason) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (lost_ || stop_) return;
      reason_ = reason;
      lost_ = true;
    }
    wake_.notify_all();
  }

  // ---- The watchdog's thread.

  static void Watch(const std::shared_ptr<Communicator>& self) {
    std::unique_lock<std::mutex> lock(self->mutex_);
    while (!self->stop_ && !self->lost_) {
      self->wake_.wait_for(lock, kLook, [&] { return self->stop_ || self->lost_; });
      if (self->stop_ || self->lost_) break;
      lock.unlock();
      self->Look();
      lock.lock();
    }
    if (!self->lost_) return;
    lock.unlock();
    std::thread([self] { self->EndProcessUnlessTold(); }).detach();
    self->GiveUp();
  }

 private:
  std::string Doing() const { return std::string(op_) + " (collective " + std::to_string(call_) + ") of " + where_; }

  std::string ErrorText(ncclResult_t result) const {
    const char* last = comm_ == nullptr ? nullptr : ncclGetLastError(comm_);
    const std::string more = last == nullptr || *last == '\0' ? "" : ": " + std::string(last);
    return std::string(ncclGetErrorString(result)) + more;
  }

  // The owner never waits for a watchdog that is giving up.
  template <typename F>
  auto Locked(const F& call) {
    for (Pause pause; !nccl_mutex_.try_lock(); pause.Once()) ThrowIfLost();
    const std::lock_guard<std::timed_mutex> lock(nccl_mutex_, std::adopt_lock);
    ThrowIfLost();
    return call();
  }

  void LoseIfGivenUp() {
    uint32_t* const word = given_up_;
    if (word == nullptr || std::atomic_ref<uint32_t>(*word) == 0 || lost_) return;
    Lose(Doing() + ": waited beyond the deadline of " + Text(deadline_seconds_) + " on the GPU");
  }

  void Look() {
    LoseIfGivenUp();
    const int64_t since = busy_since_ns_;
    if (since != 0 && static_cast<double>(NowNs() - since) * 1e-9 > deadline_seconds_) {
      return Lose(Doing() + ": waited beyond the deadline of " + Text(deadline_seconds_));
    }
    if (!nccl_mutex_.try_lock()) return;
    const std::lock_guard<std::timed_mutex> lock(nccl_mutex_, std::adopt_lock);
    if (comm_ == nullptr) return;
    ncclResult_t state = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
    const ncclResult_t result = asked == ncclSuccess ? state : asked;
    if (result != ncclSuccess && result != ncclInProgress) Lose(Doing() + ": " + ErrorText(result));
  }

  void GiveUp() {
    uint32_t* const word = given_up_;
    if (word != nullptr) std::atomic_ref<uint32_t>(*word).store(kGiveUp);
    // Only if NCCL broke its word and blocks inside a call is the lock not to be had.
    const bool locked = nccl_mutex_.try_lock_for(kLockPatience);
    ncclComm_t comm = std::exchange(comm_, nullptr);
    if (comm != nullptr) ncclCommAbort(comm);
    if (locked) nccl_mutex_.unlock();
  }

  // A host thread may be inside the driver, waiting for a device that does not let go.
  void EndProcessUnlessTold() {
    const int64_t begin = NowNs();
    while (!told_ && busy_since_ns_ != 0) {
      if (static_cast<double>(NowNs() - begin) * 1e-9 > kReleaseSeconds) {
        LogError("FATAL " + reason_ + "; the GPU did not let go of the host (WORKER_LOST, exit " +
                 std::to_string(kExitGroup) + ")");
        std::_Exit(kExitGroup);
      }
      std::this_thread::sleep_for(kLook);
    }
  }

  const std::string where_;
  const double deadline_seconds_;
  std::timed_mutex nccl_mutex_;
  ncclComm_t comm_ = nullptr;  // nccl_mutex_

  std::atomic<uint32_t*> given_up_{nullptr};
  std::atomic<const char*> op_{"nothing"};
  std::atomic<int64_t> call_{0};
  std::atomic<int64_t> busy_since_ns_{0};  // 0: nothing is under way
  std::atomic<bool> lost_{false};          // written with mutex_
  std::atomic<bool> told_{false};          // the owner was thrown at
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::string reason_;  // first cause; constant once lost_
};

}  // namespace refocus::nccl
