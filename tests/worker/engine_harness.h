// Whole groups inside a test: N ranks as threads of this process, with the local collectives, the CPU backend and a
// checkpoint folder's weights.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "base/memory_plan.h"
#include "worker/command.h"
#include "worker/engine.h"
#include "worker/weights.h"

namespace refocus {

// Loaded once per process. Aborts the test program when the folder cannot be read.
std::shared_ptr<const Weights> TestWeights(const std::string& name);  // "llama", "qwen3": tests/golden/<name>
std::string GoldenPath(const std::string& name);                      // below tests/golden

using Body = decltype(Command::body);

// What one rank is made of.
struct RankParts {
  std::shared_ptr<const Weights> weights;
  std::unique_ptr<Backend> backend;
  std::shared_ptr<Collective> collective;
};

// What a group answered to one command.
struct Answer {
  std::vector<Result> ranks;  // the final result of every rank
  std::vector<Token> tokens;  // of rank 0, streamed and final, in order
  std::vector<SequenceEnd> ended;  // likewise
  std::vector<float> masses;  // likewise
  const Result& result() const { return ranks[0]; }
  bool ok() const;
  std::string reason() const;  // of rank 0's status
};

class Group {
 public:
  // Every slot of K/V starts as NaN. One thread per rank. CPU backend, local collectives.
  Group(std::shared_ptr<const Weights> weights, int ranks, int64_t kv_capacity_bytes = int64_t{1} << 30,
        KvType kv = KvType::kDevice);
  // The same with other parts, made on each rank's thread.
  Group(int ranks, const std::function<RankParts(int)>& make, int64_t kv_capacity_bytes = int64_t{1} << 30);
  // Stops and joins. A rank that ended on its own is a test failure, unless the test took its status with Ended().
  ~Group();

  int size() const { return static_cast<int>(ranks_.size()); }

  // Sends to every rank and waits for every final result (60 s). Test failure when a rank ends instead.
  Answer Call(Body body, uint64_t job = 0);
  // The same; test failure unless every rank says OK.
  Answer Do(Body body, uint64_t job = 0);

  // The two halves of Call. on_token runs on rank 0's engine thread.
  int64_t Send(Body body, uint64_t job = 0);
  Answer Wait(int64_t seq);
  void OnToken(std::function<void(const Token&)> on_token) {
    const std::lock_guard<std::mutex> lock(mutex_);
    on_token_ = std::move(on_token);
  }
  Engine& engine(int rank) { return *ranks_[rank]->engine; }

  // Waits until every rank's Run() has returned; its statuses.
  std::vector<Status> Ended();

  // Open and prefill a context with these tokens in chunks of at most `chunk`.
  void Prefill(uint64_t context, const std::vector<int32_t>& ids, int64_t chunk = 300);
  // Greedy answer of `tokens` tokens after context and question; adapter 0: base. An empty question queries the last
  // context token, which the caller gives as `last`, again. The sequence is closed.
  std::vector<Token> Ask(uint64_t context, int64_t context_tokens, const std::vector<int32_t>& question, int32_t last,
                         int tokens, uint64_t adapter = 0, int64_t revision = 0, int32_t top_logprobs = 0);
  // Rows for question and targets but the last; log-probabilities of the targets. The sequence is closed.
  Result Score(uint64_t context, const std::vector<int32_t>& question, int64_t context_tokens,
               const std::vector<int32_t>& targets, uint64_t adapter = 0, int64_t revision = 0);

 private:
  struct Rank {
    std::unique_ptr<Engine> engine;
    std::thread thread;
    std::vector<Result> finals;  // by seq - 1
    std::vector<Token> tokens;   // since the last final; rank 0 only
    std::vector<std::vector<Token>> tokens_of;  // by seq - 1
    std::vector<SequenceEnd> ends;              // as tokens
    std::vector<std::vector<SequenceEnd>> ended_of;
    std::vector<float> masses;                  // as tokens
    std::vector<std::vector<float>> masses_of;
    bool ended = false;
    Status status;
  };
  void Receive(int rank, Result result);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::function<void(const Token&)> on_token_;
  int64_t last_seq_ = 0;
  uint64_t last_sequence_ = 1000;
  bool end_expected_ = false;
};

}  // namespace refocus
