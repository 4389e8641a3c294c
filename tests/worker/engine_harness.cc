#include "tests/worker/engine_harness.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <map>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "base/model_config.h"
#include "worker/backend.h"
#include "worker/collective.h"

namespace refocus {
namespace {

constexpr double kCollectiveSeconds = 30.0;
constexpr std::chrono::seconds kAnswerTime{60};

[[noreturn]] void Die(const std::string& path, const Status& status) {
  std::cerr << path << ": " << status << std::endl;
  std::abort();
}

}  // namespace

std::string GoldenPath(const std::string& name) { return std::string(REFOCUS_SOURCE_DIR) + "/tests/golden/" + name; }

std::shared_ptr<const Weights> TestWeights(const std::string& name) {
  static std::map<std::string, std::shared_ptr<const Weights>> loaded;
  std::shared_ptr<const Weights>& weights = loaded[name];
  if (weights == nullptr) {
    const std::string path = GoldenPath(name);
    const StatusOr<ModelConfig> config = LoadModelConfig(path);
    if (!config.ok()) Die(path, config.status());
    StatusOr<Weights> read = LoadWeights(path, *config, LoadOptions{});
    if (!read.ok()) Die(path, read.status());
    weights = std::make_shared<const Weights>(*std::move(read));
  }
  return weights;
}

bool Answer::ok() const {
  return std::all_of(ranks.begin(), ranks.end(), [](const Result& r) { return r.status.ok(); });
}

std::string Answer::reason() const { return DetailOf(result().status).reason; }

Group::Group(std::shared_ptr<const Weights> weights, int ranks, int64_t kv_capacity_bytes, KvType kv)
    : Group(
          ranks,
          [&weights, kv, collectives = MakeLocalCollectives(ranks, kCollectiveSeconds)](int rank) {
            return RankParts{weights, MakeCpuBackend(weights->config, kv), collectives[rank]};
          },
          kv_capacity_bytes) {}

Group::Group(int ranks, const std::function<RankParts(int)>& make, int64_t kv_capacity_bytes) {
  EngineOptions options;
  options.kv_capacity_bytes = kv_capacity_bytes;
  options.poison_memory = true;
  for (int r = 0; r < ranks; ++r) ranks_.push_back(std::make_unique<Rank>());
  for (int r = 0; r < ranks; ++r) {
    ranks_[r]->thread = std::thread([this, r, options, make, &rank = *ranks_[r]] {
      at::set_num_threads(1);
      RankParts parts = make(r);
      auto engine = std::make_unique<Engine>(options, parts.weights, std::move(parts.backend), parts.collective,
                                             [this, r](Result result) { Receive(r, std::move(result)); });
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        rank.engine = std::move(engine);
        changed_.notify_all();
      }
      Status status = rank.engine->Run();
      const std::lock_guard<std::mutex> lock(mutex_);
      rank.status = std::move(status);
      rank.ended = true;
      changed_.notify_all();
    });
  }
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] {
    return std::all_of(ranks_.begin(), ranks_.end(), [](const auto& rank) { return rank->engine != nullptr; });
  });
}

Group::~Group() {
  for (const std::unique_ptr<Rank>& rank : ranks_) rank->engine->Stop();
  for (const std::unique_ptr<Rank>& rank : ranks_) {
    rank->thread.join();
    EXPECT_TRUE(end_expected_ || rank->status.ok()) << rank->status;
  }
}

void Group::Receive(int rank_index, Result result) {
  std::function<void(const Token&)> on_token;
  if (rank_index == 0) {
    const std::lock_guard<std::mutex> lock(mutex_);
    on_token = on_token_;
  }
  if (on_token) {
    for (const Token& token : result.tokens) on_token(token);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  Rank& rank = *ranks_[rank_index];
  rank.tokens.insert(rank.tokens.end(), result.tokens.begin(), result.tokens.end());
  rank.ends.insert(rank.ends.end(), result.ended.begin(), result.ended.end());
  rank.masses.insert(rank.masses.end(), result.masses.begin(), result.masses.end());
  if (!result.final) return;
  EXPECT_EQ(result.seq, static_cast<int64_t>(rank.finals.size()) + 1) << "finals must come in order";
  rank.finals.push_back(std::move(result));
  rank.tokens_of.push_back(std::exchange(rank.tokens, {}));
  rank.ended_of.push_back(std::exchange(rank.ends, {}));
  rank.masses_of.push_back(std::exchange(rank.masses, {}));
  changed_.notify_all();
}

int64_t Group::Send(Body body, uint64_t job) {
  Command command;
  command.epoch = 1;
  command.seq = ++last_seq_;
  command.job = job;
  command.body = std::move(body);
  for (const std::unique_ptr<Rank>& rank : ranks_) rank->engine->Submit(command);
  return command.seq;
}

Answer Group::Wait(int64_t seq) {
  Answer answer;
  std::unique_lock<std::mutex> lock(mutex_);
  for (const std::unique_ptr<Rank>& rank : ranks_) {
    const auto done = [&] { return static_cast<int64_t>(rank->finals.size()) >= seq; };
    changed_.wait_for(lock, kAnswerTime, [&] { return done() || rank->ended; });
    if (done()) {
      answer.ranks.push_back(rank->finals[seq - 1]);
    } else {
      ADD_FAILURE() << "no answer to command " << seq << "; rank ended: " << rank->ended << " " << rank->status;
      Result lost;
      lost.status = Error(StatusCode::kUnavailable, "NO_ANSWER", "no answer");
      answer.ranks.push_back(lost);
    }
  }
  if (static_cast<int64_t>(ranks_[0]->tokens_of.size()) >= seq) {
    answer.tokens = ranks_[0]->tokens_of[seq - 1];
    answer.ended = ranks_[0]->ended_of[seq - 1];
    answer.masses = ranks_[0]->masses_of[seq - 1];
  }
  for (const Result& r : answer.ranks) {
    EXPECT_EQ(r.status.code(), answer.ranks[0].status.code()) << "ranks must refuse alike";
    EXPECT_EQ(r.cancelled, answer.ranks[0].cancelled) << "ranks must leave together";
    EXPECT_EQ(r.agree, answer.ranks[0].agree) << "ranks must hold the same bits";
    EXPECT_EQ(r.loss, answer.ranks[0].loss);
    EXPECT_EQ(r.grad_norm, answer.ranks[0].grad_norm);
  }
  return answer;
}

Answer Group::Call(Body body, uint64_t job) { return Wait(Send(std::move(body), job)); }

Answer Group::Do(Body body, uint64_t job) {
  Answer answer = Call(std::move(body), job);
  for (const Result& r : answer.ranks) EXPECT_TRUE(r.status.ok()) << r.status;
  return answer;
}

std::vector<Status> Group::Ended() {
  end_expected_ = true;
  std::vector<Status> statuses;
  std::unique_lock<std::mutex> lock(mutex_);
  for (const std::unique_ptr<Rank>& rank : ranks_) {
    changed_.wait_for(lock, kAnswerTime, [&] { return rank->ended; });
    EXPECT_TRUE(rank->ended);
    statuses.push_back(rank->status);
  }
  return statuses;
}

void Group::Prefill(uint64_t context, const std::vector<int32_t>& ids, int64_t chunk) {
  const int64_t tokens = static_cast<int64_t>(ids.size());
  Do(OpenContext{context, tokens});
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t end = std::min(begin + chunk, tokens);
    Do(PrefillChunk{context, begin, {ids.begin() + begin, ids.begin() + end}});
  }
}

std::vector<Token> Group::Ask(uint64_t context, int64_t context_tokens, const std::vector<int32_t>& question,
                              int32_t last, int tokens, uint64_t adapter, int64_t revision, int32_t top_logprobs) {
  OpenSequence open{++last_sequence_, context, adapter, revision};
  open.capacity = static_cast<int64_t>(question.size()) + tokens;
  open.sampling.top_logprobs = top_logprobs;
  Do(open);
  ExtendSequence extend{open.sequence, context_tokens, question};
  if (question.empty()) extend = ExtendSequence{open.sequence, context_tokens - 1, {last}};
  extend.sample = true;
  std::vector<Token> all = Do(extend).tokens;
  // In two commands: the answer must not depend on the cut.
  const int first = std::min(tokens - 1, 3);
  for (const int steps : {first, tokens - 1 - first}) {
    if (steps == 0) continue;
    const Answer answer = Do(DecodeSteps{{open.sequence}, steps});
    all.insert(all.end(), answer.tokens.begin(), answer.tokens.end());
  }
  Do(CloseSequence{open.sequence});
  return all;
}

Result Group::Score(uint64_t context, const std::vector<int32_t>& question, int64_t context_tokens,
                    const std::vector<int32_t>& targets, uint64_t adapter, int64_t revision) {
  ExtendSequence extend{++last_sequence_, context_tokens, question};
  extend.ids.insert(extend.ids.end(), targets.begin(), targets.end() - 1);
  extend.score_ids = targets;
  Do(OpenSequence{extend.sequence, context, adapter, revision, static_cast<int64_t>(extend.ids.size())});
  Result result = Do(extend).result();
  Do(CloseSequence{extend.sequence});
  return result;
}

}  // namespace refocus
