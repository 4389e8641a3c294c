// One rank: executes commands in the order they arrive, on one thread. Start reading the worker here: Run() takes a
// command and hands it to prefill.h, adapt.h or generate.h.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "worker/backend.h"
#include "worker/collective.h"
#include "worker/command.h"
#include "worker/weights.h"

namespace refocus {

struct EngineOptions {
  int64_t kv_capacity_bytes = int64_t{4} << 30;  // K/V that this rank may reserve
  bool poison_memory = false;                    // NaN in every reserved slot: reads of unwritten slots become loud
  bool synthetic_cache = false;  // contexts open with random K/V, prefilled: for timing steps and decode only
};

class EngineState;

class Engine {
 public:
  // Called on the engine thread, in order. Must not block for long.
  using Emit = std::function<void(Result)>;

  // weights is shared, never written. The collective belongs to the thread that calls Run().
  Engine(const EngineOptions& options, std::shared_ptr<const Weights> weights, std::unique_ptr<Backend> backend,
         std::shared_ptr<Collective> collective, Emit emit);
  ~Engine();

  // Any thread; never blocks.
  void Submit(Command command);
  // Any thread. Rank 0's word counts: it is passed to the others with the next collective of that job.
  void Cancel(uint64_t job);
  // Any thread: Run() returns OK after the command in progress.
  void Stop();

  // Executes commands until Stop(). Returns the first fatal error: a failed collective, commands out of order, a
  // failure on this rank alone that leaves the others waiting (the collective is then aborted). After that the process
  // must end.
  Status Run();

  int64_t progress() const { return progress_; }        // grows with every layer of every command
  int64_t running_seq() const { return running_seq_; }  // 0: idle

 private:
  friend class EngineState;
  bool NextCommand(Command* command);
  bool IsCancelled(uint64_t job);

  std::unique_ptr<EngineState> state_;
  Emit emit_;
  std::shared_ptr<Collective> collective_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Command> queue_;
  std::set<uint64_t> cancelled_;
  bool stop_ = false;
  std::atomic<int64_t> progress_{0};
  std::atomic<int64_t> running_seq_{0};
};

}  // namespace refocus
