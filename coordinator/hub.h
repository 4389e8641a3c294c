// The lock around the state machine, and its connection to the world: outgoing messages go to the workers' streams,
// news of jobs wake the calls that watch them, time passes.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "coordinator/call.h"
#include "coordinator/core/coordinator.h"

namespace refocus {

class Hub {
 public:
  Hub(CoordinatorOptions options, std::shared_ptr<const Tokenizer> tokenizer, Environment environment,
      double read_within_seconds = kReadWithinSeconds);
  ~Hub();

  // Runs `f(Coordinator&)` alone; what it caused is delivered before the lock is released. `f` must be quick.
  template <typename F>
  auto With(F&& f) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if constexpr (std::is_void_v<std::invoke_result_t<F, Coordinator&>>) {
      f(core_);
      Deliver();
    } else {
      auto result = f(core_);
      Deliver();
      return result;
    }
  }

  // A worker's stream: a number for it, and the messages it is to send.
  uint64_t OpenLink(std::shared_ptr<Wakeup> wakeup);
  std::deque<std::shared_ptr<const wire::CoordinatorMessage>> TakeMessages(uint64_t link);
  void CloseLink(uint64_t link);

  // `wakeup` is notified whenever the job has news.
  void Watch(uint64_t job, std::shared_ptr<Wakeup> wakeup);
  void Unwatch(uint64_t job, const std::shared_ptr<Wakeup>& wakeup);

  // Called when the answer to "can it serve?" changes, and once now. Must not call back.
  void OnServing(std::function<void(bool serving)> callback);

  CallPool& calls() { return calls_; }
  CallPool& links() { return links_; }
  // Safe without the lock: never change.
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }
  const ModelConfig& model() const { return model_; }
  const ChatFormat& chat() const { return chat_; }
  int64_t longest_token() const { return longest_token_; }  // bytes; 0 without a tokenizer

 private:
  struct Link {
    std::shared_ptr<Wakeup> wakeup;
    std::deque<std::shared_ptr<const wire::CoordinatorMessage>> messages;
  };
  void Deliver();
  void TickLoop();

  const std::shared_ptr<const Tokenizer> tokenizer_;
  const ModelConfig model_;
  const ChatFormat chat_;
  const int64_t longest_token_;
  std::mutex mutex_;
  Coordinator core_;
  std::map<uint64_t, Link> open_;
  uint64_t next_link_ = 1;
  std::multimap<uint64_t, std::shared_ptr<Wakeup>> watchers_;
  std::function<void(bool)> on_serving_;
  bool was_serving_ = false;
  bool stop_ = false;
  std::condition_variable tick_;
  std::thread ticker_;
  CallPool calls_;  // of clients
  CallPool links_;  // of workers
};

// While alive, `wakeup` is notified about the job.
class Watching {
 public:
  Watching(Hub& hub, uint64_t job, std::shared_ptr<Wakeup> wakeup) : hub_(hub), job_(job), wakeup_(std::move(wakeup)) {
    hub_.Watch(job_, wakeup_);
  }
  ~Watching() { hub_.Unwatch(job_, wakeup_); }
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;

 private:
  Hub& hub_;
  const uint64_t job_;
  const std::shared_ptr<Wakeup> wakeup_;
};

}  // namespace refocus
