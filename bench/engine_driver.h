// Commands to an engine of this process, one after the other.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include "worker/engine.h"

namespace refocus {

// Submits commands to this rank's engine and waits for their final results.
class Driver {
 public:
  explicit Driver(Engine& engine) : engine_(engine) {}

  void OnResult(Result result) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Token& token : result.tokens) tokens_.push_back(std::move(token));
    if (!result.final) return;
    result_ = std::move(result);
    done_ = true;
    wake_.notify_one();
  }

  template <typename Body>
  Result Run(Body body) {
    Command command;
    command.seq = ++seq_;
    command.body = std::move(body);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = false;
    }
    engine_.Submit(std::move(command));
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return done_; });
    if (!result_.status.ok()) {
      std::fprintf(stderr, "%s\n", result_.status.ToString().c_str());
      std::_Exit(1);
    }
    return result_;
  }

  // Of all results since the last call.
  std::vector<Token> TakeTokens() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(tokens_, {});
  }

 private:
  Engine& engine_;
  std::vector<Token> tokens_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool done_ = false;
  int64_t seq_ = 0;
  Result result_;
};

}  // namespace refocus
