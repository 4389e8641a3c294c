// Decode batches, forks and shared prefixes on 1 to 3 ranks: who decodes with whom, and who shares what, changes nothing.
#include <ATen/TensorOperators.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/limits.h"
#include "tests/worker/engine_harness.h"
#include "tests/worker/golden.h"

namespace refocus {
namespace {

constexpr uint64_t kContext = 1;
constexpr uint64_t kOther = 2;
constexpr uint64_t kAdapter = 11;
constexpr uint64_t kOtherAdapter = 12;
constexpr float kLogprobBound = 1e-5f;
using Why = SequenceEnd::Why;

// One request: what is asked, and what came back.
struct Asked {
  uint64_t context = kContext;
  uint64_t adapter = 0;
  std::vector<int32_t> question = {7, 8, 9};
  int64_t capacity = 40;
  SamplingConfig sampling;
  uint64_t job = 0;
};

void ExpectSameTokens(const std::vector<Token>& got, const std::vector<Token>& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(got[i].id, want[i].id) << what << ", token " << i;
    EXPECT_NEAR(got[i].logprob, want[i].logprob, kLogprobBound) << what << ", token " << i;
  }
}

class DecodeBatchTest : public ::testing::TestWithParam<int> {
 protected:
  DecodeBatchTest() : golden_(LoadGolden("qwen3")), group_(TestWeights("qwen3"), GetParam()) {}

  std::vector<int32_t> Ids(int64_t first, int64_t count) const {
    const std::vector<int32_t> all = golden_.context();
    return {all.begin() + first, all.begin() + first + count};
  }

  // Two contexts with an adapter each (kAdapter, kOtherAdapter), of one step that is felt; a second one on kContext.
  void MakeContexts() {
    Open(kContext, Ids(0, 600));
    Open(kOther, Ids(100, 300));
    Adapt(kContext, kAdapter, 1e-2f, 30);
    Adapt(kContext, kAdapter + 10, 2e-2f, 90);
    Adapt(kOther, kOtherAdapter, 1e-2f, 50);
  }
  void Open(uint64_t context, const std::vector<int32_t>& ids) {
    tokens_[context] = static_cast<int64_t>(ids.size());
    group_.Prefill(context, ids);
  }
  void Adapt(uint64_t context, uint64_t adapter, float rate, int64_t start) {
    BeginAdapt begin{context, adapter};
    if (adapter == kAdapter + 10) begin.delta = {.lora_rank = 4, .lora_alpha = 32.0f};  // full deltas and one LoRA
    group_.Do(begin);
    group_.Do(AdaptStep{adapter, 1, {Span{start, Ids(start, 20)}}, rate});
    group_.Do(EndAdapt{adapter, true, 1});
  }

  // Opens and asks; tokens, and what ended, are kept by sequence.
  void Begin(uint64_t sequence, const Asked& asked) {
    OpenSequence open{sequence, asked.context, asked.adapter, asked.adapter == 0 ? 0 : 1, asked.capacity};
    open.sampling = asked.sampling;
    open.job = asked.job;
    group_.Do(open);
    Collect(group_.Do(ExtendSequence{sequence, tokens_.at(asked.context), asked.question, true}));
  }
  void Decode(std::vector<uint64_t> sequences, int32_t steps) {
    Collect(group_.Do(DecodeSteps{std::move(sequences), steps}));
  }
  void Collect(const Answer& answer) {
    for (const Token& token : answer.tokens) answers_[token.sequence].push_back(token);
    for (const SequenceEnd& end : answer.ended) {
      EXPECT_FALSE(ended_.count(end.sequence)) << "ends once: " << end.sequence;
      ended_.emplace(end.sequence, end.why);
    }
  }
  std::optional<Why> EndOf(uint64_t sequence) const {
    const auto found = ended_.find(sequence);
    return found == ended_.end() ? std::nullopt : std::optional<Why>(found->second);
  }
  // The same request by itself: `tokens` tokens, or until it ends.
  std::vector<Token> Alone(const Asked& asked, int64_t tokens) {
    const uint64_t sequence = ++last_alone_;
    Begin(sequence, asked);
    if (tokens > 1) Decode({sequence}, static_cast<int32_t>(tokens - 1));
    group_.Do(CloseSequence{sequence});
    return answers_[sequence];
  }

  const Golden& golden_;
  Group group_;
  std::map<uint64_t, int64_t> tokens_;
  std::map<uint64_t, std::vector<Token>> answers_;
  std::map<uint64_t, Why> ended_;
  uint64_t last_alone_ = 10'000;
};

// Other knobs for each of nine.
void SetKnobs(int which, SamplingConfig& sampling) {
  if (which == 1) sampling.top_k = 5;
  if (which == 2) sampling.repetition_penalty = 1.7;
  if (which == 3) sampling.top_p = 0.6;
  if (which == 5) {
    sampling.min_p = 0.2;
    sampling.presence_penalty = 0.5;
  }
  if (which == 6) sampling.frequency_penalty = 0.7;
  if (which == 7) {
    sampling.temperature = 1.6;
    sampling.top_k = 40;
    sampling.top_p = 0.9;
    sampling.min_p = 0.01;
    sampling.repetition_penalty = 1.3;
  }
  if (which == 8) {
    sampling.bias_ids = {3, 40, 77};
    sampling.bias_values = {2.0f, -100.0f, 3.0f};
    sampling.presence_penalty = 1.5;
  }
}

// Contexts, adapters, lengths, seeds, knobs, stop points all differ; requests join and leave.
std::vector<Asked> Mixed() {
  std::vector<Asked> all;
  for (int i = 0; i < 9; ++i) {
    Asked asked;
    asked.context = i % 3 == 2 ? kOther : kContext;
    asked.adapter =
        std::vector<uint64_t>{0, kAdapter, 0, kAdapter + 10, kAdapter, kOtherAdapter, 0, 0, kOtherAdapter}[i];
    asked.question.clear();
    for (int token = 0; token <= 5 * i; ++token) asked.question.push_back((13 * i + token) % 90);
    asked.capacity = static_cast<int64_t>(asked.question.size()) + (i == 4 ? 5 : 30);
    if (i % 2 == 1) {
      asked.sampling.temperature = 0.8;
      asked.sampling.seed = 100 + static_cast<uint64_t>(i);
    }
    asked.sampling.top_logprobs = i == 3 ? 2 : 0;
    SetKnobs(i, asked.sampling);
    all.push_back(asked);
  }
  return all;
}

TEST_P(DecodeBatchTest, BatchedEqualsAlone) {
  MakeContexts();
  std::vector<Asked> all = Mixed();
  std::vector<std::vector<Token>> alone;
  for (Asked& asked : all) alone.push_back(Alone(asked, 14));
  all[6].sampling.stop_ids = {alone[6][5].id};  // leaves in the middle
  const auto& stopping = alone[6];
  const auto stop = std::find_if(stopping.begin(), stopping.end(),
                                 [&](const Token& token) { return token.id == stopping[5].id; });
  const auto until = static_cast<size_t>(stop - stopping.begin()) + 1;

  for (uint64_t i = 0; i < 5; ++i) Begin(100 + i, all[i]);
  Decode({104, 100, 103, 101, 102}, 4);
  for (uint64_t i = 5; i < 9; ++i) Begin(100 + i, all[i]);
  Decode({100, 101, 102, 103, 104, 105, 106, 107, 108}, 3);  // 104 has room for 5 tokens
  Decode({108, 107, 106, 105, 104, 103, 102}, 1);            // ended ones are skipped
  Decode({100, 101, 102, 103, 104, 105, 106, 107, 108}, 20);
  for (uint64_t i = 0; i < 9; ++i) {
    std::vector<Token> got = answers_[100 + i];
    std::vector<Token> want = alone[i];
    if (i == 6) want.resize(until);
    if (got.size() > want.size()) got.resize(want.size());
    ExpectSameTokens(got, want, "request " + std::to_string(i));
  }
  EXPECT_EQ(answers_[106].size(), until);
  EXPECT_EQ(EndOf(106), Why::kFinished);
  EXPECT_EQ(answers_[104].size(), 6u) << "the sixth has no room for its row";
  EXPECT_EQ(EndOf(104), Why::kCapacity);
  EXPECT_FALSE(EndOf(100));
  for (const Token& token : answers_[103]) EXPECT_EQ(token.top_ids.size(), 2u);
  // Adapters are felt: otherwise nothing above would tell one from another.
  EXPECT_NE(Alone(all[0], 2)[0].logprob, [&] {
    Asked adapted = all[0];
    adapted.adapter = kAdapter;
    return Alone(adapted, 2)[0].logprob;
  }());
}

TEST_P(DecodeBatchTest, AFullBatchDecodes) {
  Open(kContext, Ids(0, 300));
  std::vector<uint64_t> uids;
  for (uint64_t i = 0; i < kMaxDecodeRows; ++i) {
    Asked asked;
    asked.capacity = 8;
    asked.sampling = {.temperature = 5.0, .seed = i};
    Begin(100 + i, asked);
    uids.push_back(100 + i);
  }
  Decode(uids, 3);
  for (const uint64_t i : {uint64_t{0}, uint64_t{31}, uint64_t{63}}) {
    Asked asked;
    asked.sampling = {.temperature = 5.0, .seed = i};
    ExpectSameTokens(answers_[100 + i], Alone(asked, 4), std::to_string(i));
  }
  uids.push_back(99);
  EXPECT_EQ(group_.Call(DecodeSteps{uids, 1}).result().status.code(), StatusCode::kInvalidArgument);
}

TEST_P(DecodeBatchTest, RefusedAsAWhole) {
  Open(kContext, Ids(0, 300));
  Begin(5, {});
  group_.Do(OpenSequence{6, kContext, 0, 0, 10});
  const auto refused = [&](std::vector<uint64_t> uids) {
    const Answer answer = group_.Call(DecodeSteps{std::move(uids), 1});
    EXPECT_TRUE(answer.tokens.empty());
    return answer.result().status.code();
  };
  EXPECT_EQ(refused({5, 77}), StatusCode::kNotFound);
  EXPECT_EQ(refused({5, 6}), StatusCode::kFailedPrecondition) << "6 has sampled nothing";
  EXPECT_EQ(refused({5, 5}), StatusCode::kInvalidArgument);
  EXPECT_EQ(refused({}), StatusCode::kInvalidArgument);
  Decode({5}, 4);
  ExpectSameTokens(answers_[5], Alone({}, 5), "untouched by what was refused");
}

TEST_P(DecodeBatchTest, OneCancelLeavesTheOthers) {
  MakeContexts();
  Asked cancelled, other;
  cancelled.job = 7;
  cancelled.capacity = 5000;
  other.job = 8;
  other.adapter = kAdapter;
  Begin(5, cancelled);
  Begin(6, other);
  int seen = 0;
  group_.OnToken([&](const Token& token) {
    if (token.sequence == 5 && ++seen == 4) group_.engine(0).Cancel(7);
  });
  Decode({5, 6}, 20);
  group_.OnToken(nullptr);
  EXPECT_EQ(answers_[5].size(), 5u) << "within one token";
  EXPECT_EQ(EndOf(5), Why::kCancelled);
  EXPECT_EQ(answers_[6].size(), 21u);
  ExpectSameTokens(answers_[6], Alone(other, 21), "the other");
  // A question that was skipped has nothing to decode from; its place in a batch that is on the way harms nobody.
  OpenSequence open{9, kContext, 0, 0, 9};
  open.job = 7;
  group_.Do(open);
  EXPECT_TRUE(group_.Call(ExtendSequence{9, 600, {7, 8, 9}, true}, 7).result().cancelled);
  Decode({9, 6}, 2);
  EXPECT_EQ(answers_[6].size(), 23u);
  EXPECT_TRUE(answers_[9].empty());
}

// One token's embedding is not finite: whoever samples it fails at the next step, in the midst of others.
TEST_P(DecodeBatchTest, NonFiniteLogitsFailTheirSequenceAlone) {
  const std::vector<int32_t> ids = Ids(0, 300);
  Open(kContext, ids);
  const std::vector<Token> alone = Alone({}, 5);
  const auto read = [&](int32_t id) {
    const auto sampled = [&](const Token& token) { return token.id == id; };
    return id < 10 || std::find(ids.begin(), ids.end(), id) != ids.end() ||
           std::any_of(alone.begin(), alone.end(), sampled);
  };
  Asked wild;  // nearly uniform: what comes first depends on the seed
  wild.sampling.temperature = 1000.0;
  int32_t bad = 0;
  while (read(bad)) {
    ++wild.sampling.seed;
    ASSERT_LT(wild.sampling.seed, 1000u);
    bad = Alone(wild, 1)[0].id;
  }
  auto poisoned = std::make_shared<Weights>(*TestWeights("qwen3"));
  poisoned->output = poisoned->output.clone();
  poisoned->embedding = poisoned->embedding.clone();
  poisoned->embedding.select(0, bad).fill_(std::numeric_limits<float>::quiet_NaN());
  Group group(poisoned, GetParam());
  group.Prefill(kContext, ids);
  for (const uint64_t uid : {5, 6, 7}) {
    OpenSequence open{uid, kContext, 0, 0, 40};
    if (uid == 6) open.sampling = wild.sampling;
    group.Do(open);
    const Answer first = group.Do(ExtendSequence{uid, 300, {7, 8, 9}, true});
    ASSERT_EQ(first.tokens.size(), 1u);
    EXPECT_EQ(first.tokens[0].id == bad, uid == 6);
  }
  const Answer answer = group.Do(DecodeSteps{{5, 6, 7}, 4});
  ASSERT_EQ(answer.ended.size(), 1u);
  EXPECT_EQ(answer.ended[0].sequence, 6u);
  EXPECT_EQ(answer.ended[0].why, Why::kFailed);
  EXPECT_EQ(DetailOf(answer.ended[0].status).reason, "NON_FINITE_LOGITS");
  EXPECT_EQ(answer.tokens.size(), 8u);
  for (const uint64_t uid : {5, 7}) {
    std::vector<Token> got;
    for (const Token& token : answer.tokens) {
      if (token.sequence == uid) got.push_back(token);
    }
    ExpectSameTokens(got, {alone.begin() + 1, alone.end()}, std::to_string(uid));
  }
}

TEST_P(DecodeBatchTest, ForcedTokensReplaceWhatFollows) {
  Open(kContext, Ids(0, 300));
  Begin(5, {});
  Decode({5}, 2);
  const std::vector<Token> before = answers_[5];
  EXPECT_EQ(group_.Call(ExtendSequence{5, 305, {before[2].id + 1, 3}, true}).result().status.code(),
            StatusCode::kFailedPrecondition)
      << "not the sampled token";
  Collect(group_.Do(ExtendSequence{5, 305, {before[2].id, 3, 4}, true}));
  Decode({5}, 3);
  Asked whole;
  whole.question = {7, 8, 9, before[0].id, before[1].id, before[2].id, 3, 4};
  const std::vector<Token> rest(answers_[5].begin() + 3, answers_[5].end());
  ExpectSameTokens(rest, Alone(whole, 4), "as if it had been asked so");
}

class ForkTest : public DecodeBatchTest {
 protected:
  // The fork queries the last row of the parent's prompt again.
  void Fork(uint64_t sequence, uint64_t parent, const Asked& asked, int64_t first, int32_t last_id) {
    OpenSequence open{sequence, asked.context, asked.adapter, asked.adapter == 0 ? 0 : 1, asked.capacity};
    open.sampling = asked.sampling;
    open.parent = parent;
    group_.Do(open);
    Collect(group_.Do(ExtendSequence{sequence, first - 1, {last_id}, true}));
  }
};

TEST_P(ForkTest, ForksEqualRequestsOfTheirOwn) {
  MakeContexts();
  Asked asked;
  asked.adapter = kAdapter;
  for (int i = 0; i < 280; ++i) asked.question.push_back(i % 90);  // crosses a block: two ranks hold the prompt
  asked.capacity = static_cast<int64_t>(asked.question.size()) + 20;
  asked.sampling = {.temperature = 1.5, .seed = 1};
  const int64_t behind = 600 + static_cast<int64_t>(asked.question.size());
  Begin(100, asked);
  std::vector<Asked> forks;
  for (uint64_t i = 1; i < 5; ++i) {
    Asked fork = asked;
    fork.sampling.seed = 1 + i;
    fork.capacity = 20;
    Fork(100 + i, 100, fork, behind, asked.question.back());
    forks.push_back(fork);
  }
  Decode({100, 101, 102, 103, 104}, 6);
  group_.Do(CloseSequence{100});  // the prompt lives on
  Decode({101, 102, 103, 104}, 5);
  for (uint64_t i = 1; i < 5; ++i) {
    Asked alone = forks[i - 1];
    alone.capacity = asked.capacity;
    ExpectSameTokens(answers_[100 + i], Alone(alone, 12), "fork " + std::to_string(i));
  }
  EXPECT_NE(answers_[101][0].id * 1000 + answers_[101][1].id, answers_[102][0].id * 1000 + answers_[102][1].id);
}

// Each with knobs of its own. Penalties count the prompt that all share, then each what it drew; so do least lengths.
TEST_P(ForkTest, ForksHaveTheirOwnKnobs) {
  MakeContexts();
  Asked asked;
  asked.question = {7, 8, 9, 31, 32, 33};
  asked.sampling.repetition_penalty = 100;
  const int64_t behind = 600 + static_cast<int64_t>(asked.question.size());
  Begin(100, asked);
  std::vector<Asked> forks(3, asked);
  forks[1].sampling = {.temperature = 3, .seed = 5, .top_k = 30, .top_p = 0.9, .frequency_penalty = 2};
  forks[1].sampling.repetition_penalty = 1.5;
  forks[2].sampling = {.stop_ids = {Alone({.question = asked.question}, 1)[0].id}, .min_tokens = 5};
  for (uint64_t i = 0; i < forks.size(); ++i) Fork(101 + i, 100, forks[i], behind, asked.question.back());
  Decode({100, 101, 102, 103}, 4);
  group_.Do(CloseSequence{100});
  Decode({103, 101, 102}, 6);
  for (uint64_t i = 0; i < forks.size(); ++i) {
    ExpectSameTokens(answers_[101 + i], Alone(forks[i], 11), "fork " + std::to_string(i));
  }
  std::set<int32_t> seen(asked.question.begin(), asked.question.end());
  for (const Token& token : answers_[101]) EXPECT_TRUE(seen.insert(token.id).second) << token.id << " again";
  const std::vector<Token>& late = answers_[103];
  for (size_t i = 0; i < 5; ++i) EXPECT_NE(late[i].id, forks[2].sampling.stop_ids[0]) << "token " << i;
}

// What a parent answered before it was forked is the fork's prompt.
TEST_P(ForkTest, AnAnswerBecomesAForksPrompt) {
  MakeContexts();
  Asked asked;
  Begin(100, asked);
  Decode({100}, 5);
  Asked fork;
  fork.sampling.repetition_penalty = 100;
  std::set<int32_t> answered;
  for (int i = 0; i < 5; ++i) {
    fork.question.push_back(answers_[100][i].id);
    answered.insert(answers_[100][i].id);
  }
  fork.sampling.bias_ids.assign(answered.begin(), answered.end());
  fork.sampling.bias_values.assign(answered.size(), 20.0f);  // wins, unless it is penalised
  fork.question.push_back(60);
  OpenSequence open{101, kContext, 0, 0, 20};
  open.sampling = fork.sampling;
  open.parent = 100;
  group_.Do(open);
  Collect(group_.Do(ExtendSequence{101, 608, {60}, true}));
  Decode({101, 100}, 7);
  ExpectSameTokens(answers_[101], Alone(fork, 8), "as if asked by itself");
  std::set<int32_t> seen(fork.question.begin(), fork.question.end());
  for (const Token& token : answers_[101]) EXPECT_TRUE(seen.insert(token.id).second) << token.id << " again";
}

// A fork goes on with rows of its own, and is forked again.
TEST_P(ForkTest, ForksOfForks) {
  MakeContexts();
  Asked asked;
  Begin(100, asked);
  OpenSequence open{101, kContext, 0, 0, 30};
  open.parent = 100;
  group_.Do(open);
  Collect(group_.Do(ExtendSequence{101, 603, {20, 21}, true}));
  std::vector<int32_t> prompt = {7, 8, 9, 20, 21};
  uint64_t last = 101;
  for (uint64_t uid = 102; uid <= 103; ++uid) {
    const int32_t id = 30 + static_cast<int32_t>(uid);
    OpenSequence again{uid, kContext, 0, 0, 30};
    again.parent = last;
    group_.Do(again);
    Collect(group_.Do(ExtendSequence{uid, 600 + static_cast<int64_t>(prompt.size()), {id % 90}, true}));
    prompt.push_back(id % 90);
    last = uid;
  }
  OpenSequence deep{104, kContext, 0, 0, 30};
  deep.parent = 103;
  EXPECT_EQ(group_.Call(deep).result().status.code(), StatusCode::kFailedPrecondition) << "four prompts behind another";
  group_.Do(CloseSequence{101});
  Decode({103, 102, 100}, 6);
  asked.question = prompt;
  ExpectSameTokens(answers_[103], Alone(asked, 7), "the fork of a fork of a fork");
  OpenSequence wrong{104, kContext, kAdapter, 1, 30};
  wrong.parent = 100;
  EXPECT_EQ(group_.Call(wrong).result().status.code(), StatusCode::kInvalidArgument) << "another adapter";
  wrong = {104, kContext, 0, 0, 30};
  wrong.parent = 999;
  EXPECT_EQ(group_.Call(wrong).result().status.code(), StatusCode::kNotFound);
}

class PrefixTest : public DecodeBatchTest {
 protected:
  void Share(uint64_t context, uint64_t from, int64_t prefix, const std::vector<int32_t>& ids) {
    const auto tokens = static_cast<int64_t>(ids.size());
    tokens_[context] = tokens;
    group_.Do(OpenContext{context, tokens, from, prefix});
    for (int64_t first = prefix; first < tokens; first += 150) {
      const int64_t end = std::min(first + 150, tokens);
      group_.Do(PrefillChunk{context, first, {ids.begin() + first, ids.begin() + end}});
    }
  }
};

TEST_P(PrefixTest, SharedEqualsOwn) {
  const std::vector<int32_t> ids = Ids(0, 700);
  std::vector<int32_t> other = ids;
  for (size_t i = 500; i < other.size(); ++i) other[i] = (other[i] + 1) % 90;
  Open(1, ids);
  Open(2, other);
  Share(3, 1, 500, other);
  Share(4, 3, 600, {other.begin(), other.begin() + 650});  // of the shared part and its own
  Share(5, 1, 700, ids);                                   // nothing of its own
  Open(6, {other.begin(), other.begin() + 650});
  // Adapted alike, they end alike.
  const auto adapt = [&](uint64_t context, uint64_t adapter) {
    group_.Do(BeginAdapt{context, adapter});
    const Answer step = group_.Do(AdaptStep{adapter, 1, {Span{480, {other.begin() + 480, other.begin() + 520}}}});
    group_.Do(EndAdapt{adapter, true, 1});
    return step.result();
  };
  const Result own = adapt(2, 20), shared = adapt(3, 21);
  EXPECT_NEAR(own.loss, shared.loss, 1e-5);
  EXPECT_NEAR(own.grad_norm, shared.grad_norm, 1e-4);
  const auto asked = [](uint64_t context, uint64_t adapter) {
    Asked request;
    request.context = context;
    request.adapter = adapter;
    return request;
  };
  const std::vector<Token> want = Alone(asked(2, 0), 8), adapted = Alone(asked(2, 20), 8);
  const std::vector<Token> whole = Alone(asked(1, 0), 8), shorter = Alone(asked(6, 0), 8);
  group_.Do(CloseContext{1});  // what others share stays
  group_.Do(CloseContext{2});
  Begin(50, asked(3, 0));
  Begin(51, asked(3, 21));
  Begin(52, asked(4, 0));
  Begin(53, asked(5, 0));
  Decode({50, 51, 52, 53}, 3);
  Begin(54, asked(3, 0));
  Decode({50, 51, 52, 53, 54}, 4);
  ExpectSameTokens(answers_[50], want, "shared prefix");
  ExpectSameTokens(answers_[51], adapted, "shared prefix, adapted");
  ExpectSameTokens(answers_[52], shorter, "prefix of a prefix");
  ExpectSameTokens(answers_[53], whole, "all shared");
}

TEST_P(PrefixTest, WrongPrefixesAreRefused) {
  Open(1, Ids(0, 300));
  group_.Do(OpenContext{2, 100});
  group_.Do(PrefillChunk{2, 0, Ids(0, 40)});
  const auto code = [&](const OpenContext& open) { return group_.Call(open).result().status.code(); };
  EXPECT_EQ(code({3, 400, 77, 100}), StatusCode::kNotFound);
  EXPECT_EQ(code({3, 400, 1, 301}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({3, 400, 1, 0}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({3, 100, 1, 101}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({3, 100, 2, 41}), StatusCode::kInvalidArgument) << "prefilled so far: 40";
  EXPECT_EQ(code({3, 100, 2, 40}), StatusCode::kOk);
  EXPECT_EQ(group_.Call(PrefillChunk{3, 0, {1}}).result().status.code(), StatusCode::kFailedPrecondition);
  // At most kMaxContextExtents one behind the other; sharing all of the last is no further extent.
  Share(10, 1, 300, Ids(0, 310));
  Share(11, 10, 310, Ids(0, 320));
  Share(12, 11, 320, Ids(0, 330));
  EXPECT_EQ(code({13, 340, 12, 330}), StatusCode::kFailedPrecondition);
  EXPECT_EQ(code({13, 330, 12, 330}), StatusCode::kOk);
  Asked asked;
  asked.context = 13;
  tokens_[13] = 330;
  Open(14, Ids(0, 330));
  Asked plain;
  plain.context = 14;
  ExpectSameTokens(Alone(asked, 5), Alone(plain, 5), "four extents");
}

INSTANTIATE_TEST_SUITE_P(Ranks, DecodeBatchTest, ::testing::Values(1, 2, 3),
                         [](const auto& info) { return std::to_string(info.param) + "_ranks"; });
INSTANTIATE_TEST_SUITE_P(Ranks, ForkTest, ::testing::Values(1, 2, 3),
                         [](const auto& info) { return std::to_string(info.param) + "_ranks"; });
INSTANTIATE_TEST_SUITE_P(Ranks, PrefixTest, ::testing::Values(1, 2, 3),
                         [](const auto& info) { return std::to_string(info.param) + "_ranks"; });

}  // namespace
}  // namespace refocus
