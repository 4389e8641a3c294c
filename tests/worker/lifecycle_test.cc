// Contexts, adapters and sequences over their lives, on 1 to 4 ranks: who must not influence whom, cancels, refusals.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
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

// Ids and log-probabilities, bit for bit.
std::vector<std::pair<int32_t, float>> Bits(const std::vector<Token>& tokens) {
  std::vector<std::pair<int32_t, float>> bits;
  for (const Token& token : tokens) bits.emplace_back(token.id, token.logprob);
  return bits;
}

class LifecycleTest : public ::testing::TestWithParam<int> {
 protected:
  LifecycleTest() : golden_(LoadGolden("qwen3")), group_(TestWeights("qwen3"), GetParam()) {}

  std::vector<int32_t> Ids(int64_t first, int64_t count) const {
    const std::vector<int32_t> all = golden_.context();
    return {all.begin() + first, all.begin() + first + count};
  }

  // Steps on one span each and commits.
  void Adapt(uint64_t context, uint64_t adapter, int64_t revision, const std::vector<Span>& spans, float rate = 1e-2f) {
    group_.Do(BeginAdapt{context, adapter, revision > 1 ? adapter : 0});
    for (size_t i = 0; i < spans.size(); ++i) {
      group_.Do(AdaptStep{adapter, static_cast<int64_t>(i) + 1, {spans[i]}, rate});
    }
    group_.Do(EndAdapt{adapter, true, revision});
  }

  std::vector<std::pair<int32_t, float>> Ask(uint64_t context, int64_t tokens, uint64_t adapter = 0,
                                             int64_t revision = 0) {
    return Bits(group_.Ask(context, tokens, {7, 8, 9}, 0, 8, adapter, revision));
  }

  void ExpectRefused(Body body, StatusCode code, const std::string& what) {
    const Answer answer = group_.Call(std::move(body));
    EXPECT_EQ(answer.result().status.code(), code) << what << ": " << answer.result().status;
    EXPECT_FALSE(answer.reason().empty()) << what;
    EXPECT_FALSE(answer.result().status.message().empty()) << what;
  }

  const Golden& golden_;
  Group group_;
};

TEST_P(LifecycleTest, FewerTokensThanRanks) {
  for (const int64_t tokens : {1, 2, 3}) {
    const uint64_t context = static_cast<uint64_t>(tokens);
    group_.Prefill(context, Ids(0, tokens), 1);
    const auto base = Ask(context, tokens);
    EXPECT_EQ(base.size(), 8u);
    EXPECT_EQ(group_.Ask(context, tokens, {}, Ids(tokens - 1, 1)[0], 2).size(), 2u);
    if (tokens == 1) {  // nothing to predict inside the context: no legal span
      group_.Do(BeginAdapt{context, kAdapter});
      ExpectRefused(AdaptStep{kAdapter, 1, {Span{0, {5, 6}}}}, StatusCode::kInvalidArgument, "span in one token");
      group_.Do(EndAdapt{kAdapter, false});
    } else {
      Adapt(context, kAdapter, 1, {Span{0, Ids(0, tokens)}, Span{tokens - 2, Ids(tokens - 2, 2)}});
      EXPECT_NE(Ask(context, tokens, kAdapter, 1), base);
      group_.Do(DropAdapter{kAdapter});
    }
    EXPECT_EQ(Ask(context, tokens), base);
  }
}

// Answers across block edges: written token by token, as in one go. 300 rows are split over ranks, few are not.
TEST_P(LifecycleTest, DecodingEqualsScoringAcrossBlocks) {
  for (const int64_t tokens : {1, 251, 255, 256, 257, 511, 512, 513}) {
    const int count = tokens == 251 ? 300 : 12;
    const uint64_t context = static_cast<uint64_t>(tokens);
    group_.Prefill(context, Ids(0, tokens), 200);
    const std::vector<Token> answer = group_.Ask(context, tokens, Ids(600, 2), 0, count);
    ASSERT_EQ(static_cast<int>(answer.size()), count);
    std::vector<int32_t> ids;
    for (const Token& token : answer) ids.push_back(token.id);
    const Result scores = group_.Score(context, Ids(600, 2), tokens, ids);
    ASSERT_EQ(scores.score_logprobs.size(), answer.size());
    for (size_t i = 0; i < ids.size(); ++i) {
      EXPECT_NEAR(scores.score_logprobs[i], answer[i].logprob, 1e-4) << tokens << " tokens, answer's " << i;
    }
    group_.Do(CloseContext{context});
  }
}

TEST_P(LifecycleTest, DroppedAdapterLeavesNothing) {
  group_.Prefill(kContext, golden_.context());
  const auto base = Ask(kContext, 700);
  const Span span{300, Ids(300, 38)};
  Adapt(kContext, kAdapter, 1, {span, span});
  const auto adapted = Ask(kContext, 700, kAdapter, 1);
  EXPECT_NE(adapted, base);
  EXPECT_EQ(Ask(kContext, 700), base) << "base answers beside an adapter";
  EXPECT_EQ(Ask(kContext, 700, kAdapter, 1), adapted) << "the same question twice";

  group_.Do(BeginAdapt{kContext, kAdapter, kAdapter});  // a second adaptation, rolled back
  group_.Do(AdaptStep{kAdapter, 1, {span}});
  EXPECT_EQ(Ask(kContext, 700, kAdapter, 1), adapted) << "answers see the committed revision";
  group_.Do(EndAdapt{kAdapter, false});
  EXPECT_EQ(Ask(kContext, 700, kAdapter, 1), adapted) << "after a rollback";

  Adapt(kContext, kAdapter, 2, {span});
  EXPECT_NE(Ask(kContext, 700, kAdapter, 2), adapted);
  group_.Do(DropAdapter{kAdapter});
  EXPECT_EQ(Ask(kContext, 700), base) << "after the adapter is gone";
  Adapt(kContext, kAdapter, 1, {span, span});
  EXPECT_EQ(Ask(kContext, 700, kAdapter, 1), adapted) << "same spans, same result";
}

TEST_P(LifecycleTest, ZeroRateAnswersLikeTheBase) {
  group_.Prefill(kContext, golden_.context());
  Adapt(kContext, kAdapter, 1, {Span{100, Ids(100, 30)}, Span{0, Ids(0, 20)}}, 0.0f);
  EXPECT_EQ(Ask(kContext, 700, kAdapter, 1), Ask(kContext, 700));
  Adapt(kContext, kOtherAdapter, 1, {});  // no step at all
  EXPECT_EQ(Ask(kContext, 700, kOtherAdapter, 1), Ask(kContext, 700));
}

TEST_P(LifecycleTest, ContextsAndAdaptersSideBySide) {
  // Alone: what each must give.
  const Span span{40, Ids(40, 30)};
  const std::vector<int32_t> other = Ids(300, 257);
  const Span other_span{40, {other.begin() + 40, other.begin() + 70}};
  group_.Prefill(kContext, Ids(0, 300));
  Adapt(kContext, kAdapter, 1, {span, span});
  const auto base_alone = Ask(kContext, 300), adapted_alone = Ask(kContext, 300, kAdapter, 1);
  group_.Do(CloseContext{kContext});
  group_.Prefill(kOther, other);
  Adapt(kOther, kOtherAdapter, 1, {other_span});
  const auto other_base_alone = Ask(kOther, 257), other_adapted_alone = Ask(kOther, 257, kOtherAdapter, 1);
  group_.Do(CloseContext{kOther});

  // Together: prefill chunks, steps and open sequences interleaved.
  group_.Do(OpenContext{kContext, 300});
  group_.Do(OpenContext{kOther, 257});
  group_.Do(PrefillChunk{kContext, 0, Ids(0, 300)});
  group_.Do(PrefillChunk{kOther, 0, {other.begin(), other.begin() + 257}});
  group_.Do(OpenSequence{5, kContext, 0, 0, 11});
  group_.Do(BeginAdapt{kContext, kAdapter});
  group_.Do(BeginAdapt{kOther, kOtherAdapter});
  group_.Do(AdaptStep{kAdapter, 1, {span}, 1e-2f});
  group_.Do(AdaptStep{kOtherAdapter, 1, {other_span}, 1e-2f});
  ExtendSequence extend{5, 300, {7, 8, 9}, true};
  std::vector<Token> slow = group_.Do(extend).tokens;
  group_.Do(AdaptStep{kAdapter, 2, {span}, 1e-2f});
  group_.Do(EndAdapt{kOtherAdapter, true, 1});
  group_.Do(EndAdapt{kAdapter, true, 1});
  for (int i = 0; i < 7; ++i) {
    if (i == 3) {
      EXPECT_EQ(Ask(kContext, 300, kAdapter, 1), adapted_alone);
    } else if (i == 5) {
      EXPECT_EQ(Ask(kOther, 257, kOtherAdapter, 1), other_adapted_alone);
    }
    const std::vector<Token> next = group_.Do(DecodeSteps{{5}, 1}).tokens;
    slow.insert(slow.end(), next.begin(), next.end());
  }
  EXPECT_EQ(Bits(slow), base_alone) << "an answer in eight pieces while others work";
  EXPECT_EQ(Ask(kOther, 257), other_base_alone);
  group_.Do(CloseContext{kContext});
  EXPECT_EQ(Ask(kOther, 257, kOtherAdapter, 1), other_adapted_alone) << "after the other context was closed";
}

// A request keeps the delta it was opened with.
TEST_P(LifecycleTest, SequenceOutlivesItsAdapter) {
  group_.Prefill(kContext, golden_.context());
  const Span span{300, Ids(300, 38)};
  Adapt(kContext, kAdapter, 1, {span, span});
  const auto adapted = Ask(kContext, 700, kAdapter, 1);
  group_.Do(OpenSequence{5, kContext, kAdapter, 1, 11});
  std::vector<Token> tokens = group_.Do(ExtendSequence{5, 700, {7, 8, 9}, true}).tokens;
  Adapt(kContext, kAdapter, 2, {span});
  group_.Do(DropAdapter{kAdapter});
  for (const Token& token : group_.Do(DecodeSteps{{5}, 7}).tokens) tokens.push_back(token);
  EXPECT_EQ(Bits(tokens), adapted);
}

TEST_P(LifecycleTest, StopTokensAndSeeds) {
  group_.Prefill(kContext, Ids(0, 300));
  const auto greedy = Ask(kContext, 300);
  OpenSequence open{5, kContext, 0, 0, 20};
  open.sampling.stop_ids = {9999, greedy[2].first};
  const auto stops = [&](const auto& token) { return token.first == greedy[2].first; };
  const size_t until = static_cast<size_t>(std::find_if(greedy.begin(), greedy.end(), stops) - greedy.begin());
  group_.Do(open);
  const Answer first = group_.Do(ExtendSequence{5, 300, {7, 8, 9}, true});
  const Answer rest = group_.Do(DecodeSteps{{5}, 10});
  EXPECT_EQ(first.tokens.size() + rest.tokens.size(), until + 1);
  ASSERT_EQ(rest.ended.size(), 1u);
  EXPECT_EQ(rest.ended[0].why, SequenceEnd::Why::kFinished);
  EXPECT_FALSE(rest.result().cancelled);
  EXPECT_TRUE(group_.Do(DecodeSteps{{5}, 10}).tokens.empty()) << "nothing follows a stop token";

  std::vector<std::vector<std::pair<int32_t, float>>> sampled;
  for (const uint64_t seed : {3, 3, 4}) {
    OpenSequence random{6, kContext, 0, 0, 20};
    random.sampling.temperature = 1000.0f;  // nearly uniform: each draw shows its random number
    random.sampling.seed = seed;
    group_.Do(random);
    std::vector<Token> tokens = group_.Do(ExtendSequence{6, 300, {7, 8, 9}, true}).tokens;
    const int pieces = sampled.empty() ? 1 : 3;  // the draw does not depend on how the answer is cut
    for (int piece = 0; piece < pieces; ++piece) {
      for (const Token& token : group_.Do(DecodeSteps{{6}, 12 / pieces}).tokens) tokens.push_back(token);
    }
    group_.Do(CloseSequence{6});
    sampled.push_back(Bits(tokens));
  }
  EXPECT_EQ(sampled[0], sampled[1]);
  EXPECT_NE(sampled[0], sampled[2]);
  std::set<int32_t> distinct;
  for (const auto& token : sampled[0]) distinct.insert(token.first);
  EXPECT_GE(distinct.size(), 8u) << "of 13: every token has a draw of its own";
}

// Tokens put in behind sampled ones: what follows is what follows the same tokens in a prompt, and who decodes in the same
// batch before and after, and alone meanwhile, does not see it.
TEST_P(LifecycleTest, ForcedTokensAreContinued) {
  group_.Prefill(kContext, Ids(0, 300));
  group_.Do(OpenSequence{4, kContext, 0, 0, 16});
  std::vector<Token> others = group_.Do(ExtendSequence{4, 300, {3}, true}).tokens;
  for (const Token& token : group_.Do(DecodeSteps{{4}, 9}).tokens) others.push_back(token);
  group_.Do(OpenSequence{7, kContext, 0, 0, 16});
  std::vector<Token> beside = group_.Do(ExtendSequence{7, 300, {3}, true}).tokens;
  const auto decode = [&](std::vector<uint64_t> sequences, int32_t steps, std::vector<Token>* out) {
    for (const Token& token : group_.Do(DecodeSteps{std::move(sequences), steps}).tokens) {
      (token.sequence == 7 ? beside : *out).push_back(token);
    }
  };
  group_.Do(OpenSequence{5, kContext, 0, 0, 16});
  std::vector<Token> tokens = group_.Do(ExtendSequence{5, 300, {7, 8, 9}, true}).tokens;
  decode({5, 7}, 3, &tokens);
  ASSERT_EQ(tokens.size(), 4u);
  decode({7}, 2, &tokens);
  const int32_t last = tokens[3].id;
  ExpectRefused(ExtendSequence{5, 306, {last + 1, 11, 12}, true}, StatusCode::kFailedPrecondition, "another token");
  ExpectRefused(ExtendSequence{5, 307, {last, 11, 12}, true}, StatusCode::kFailedPrecondition, "behind it");
  ExpectRefused(ExtendSequence{5, 306, {}, true}, StatusCode::kInvalidArgument, "nothing");
  std::vector<Token> forced = group_.Do(ExtendSequence{5, 306, {last, 11, 12}, true}).tokens;
  decode({7, 5}, 4, &forced);

  std::vector<int32_t> prompt = {7, 8, 9};
  for (const Token& token : tokens) prompt.push_back(token.id);
  prompt.insert(prompt.end(), {11, 12});
  group_.Do(OpenSequence{6, kContext, 0, 0, 16});
  std::vector<Token> written = group_.Do(ExtendSequence{6, 300, prompt, true}).tokens;
  for (const Token& token : group_.Do(DecodeSteps{{6}, 4}).tokens) written.push_back(token);
  ASSERT_EQ(forced.size(), 5u);
  ASSERT_EQ(written.size(), 5u);
  for (size_t i = 0; i < written.size(); ++i) {
    EXPECT_EQ(forced[i].id, written[i].id) << i;
    EXPECT_NEAR(forced[i].logprob, written[i].logprob, 1e-4) << i;
  }
  ASSERT_EQ(beside.size(), others.size());
  for (size_t i = 0; i < others.size(); ++i) {
    EXPECT_EQ(beside[i].id, others[i].id) << i;
    EXPECT_NEAR(beside[i].logprob, others[i].logprob, 1e-4) << i;
  }
}

// The prompt's rows, in two commands, are scored beside the token that is sampled after the last of them.
TEST_P(LifecycleTest, PromptsAreScoredBesideTheFirstToken) {
  group_.Prefill(kContext, Ids(0, 300));
  const std::vector<int32_t> prompt = Ids(600, 9);
  group_.Do(OpenSequence{5, kContext, 0, 0, 20});
  ExtendSequence alone{5, 299, {Ids(299, 1)[0]}, false, prompt};
  alone.ids.insert(alone.ids.end(), prompt.begin(), prompt.end() - 1);
  const std::vector<float> want = group_.Do(alone).result().score_logprobs;
  group_.Do(CloseSequence{5});
  group_.Do(OpenSequence{5, kContext, 0, 0, 20});
  ExtendSequence rows{5, 299, {Ids(299, 1)[0], prompt[0], prompt[1]}, false, {prompt[0], prompt[1], prompt[2]}};
  std::vector<float> got = group_.Do(rows).result().score_logprobs;
  rows = {5, 302, {prompt.begin() + 2, prompt.end()}, true, {prompt.begin() + 3, prompt.end()}};
  const Answer last = group_.Do(rows);
  EXPECT_EQ(last.tokens.size(), 1u);
  got.insert(got.end(), last.result().score_logprobs.begin(), last.result().score_logprobs.end());
  ASSERT_EQ(got.size(), prompt.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-4) << i;
  group_.Do(CloseSequence{5});
  group_.Do(OpenSequence{5, kContext, 0, 0, 20});
  ExpectRefused(ExtendSequence{5, 300, {1, 2}, true, {2, 3}}, StatusCode::kInvalidArgument, "a score of the last row");
}

// A penalty counts the prompt and what was drawn, not the context; a bias forbids; end tokens wait for min_tokens.
TEST_P(LifecycleTest, KnobsReachTheDraws) {
  group_.Prefill(kContext, Ids(0, 300));
  const auto ask = [&](const SamplingConfig& sampling, const std::vector<int32_t>& prompt) {
    OpenSequence open{5, kContext, 0, 0, 40};
    open.sampling = sampling;
    group_.Do(open);
    std::vector<int32_t> ids;
    for (const Token& token : group_.Do(ExtendSequence{5, 300, prompt, true}).tokens) ids.push_back(token.id);
    for (const Token& token : group_.Do(DecodeSteps{{5}, 12}).tokens) ids.push_back(token.id);
    group_.Do(CloseSequence{5});
    return ids;
  };
  const auto base = ask({}, {7, 8, 9});
  ASSERT_EQ(base.size(), 13u);
  SamplingConfig repeat;
  repeat.repetition_penalty = 100;
  const auto distinct = ask(repeat, {7, 8, base[0]});
  const std::set<int32_t> seen(distinct.begin(), distinct.end());
  EXPECT_EQ(seen.size(), distinct.size()) << "nothing twice";
  for (const int32_t id : {7, 8, base[0]}) EXPECT_EQ(seen.count(id), 0u) << "of the prompt";
  const auto context = Ids(0, 300);
  EXPECT_TRUE(std::any_of(seen.begin(), seen.end(), [&](int32_t id) {
    return std::count(context.begin(), context.end(), id) > 0;
  })) << "the context's tokens are free";
  SamplingConfig bias;
  bias.bias_ids = {base[0], 3};
  bias.bias_values = {-1000.0f, 0.0f};
  const auto without = ask(bias, {7, 8, 9});
  EXPECT_EQ(std::count(without.begin(), without.end(), base[0]), 0);
  SamplingConfig late;
  late.stop_ids = {base[0]};
  EXPECT_EQ(ask(late, {7, 8, 9}), std::vector<int32_t>{base[0]});
  late.min_tokens = 6;
  const auto longer = ask(late, {7, 8, 9});
  EXPECT_GE(longer.size(), 6u);
  EXPECT_EQ(std::count(longer.begin(), longer.begin() + 6, base[0]), 0);
  SamplingConfig narrow;
  narrow.temperature = 50;
  narrow.top_k = 1;
  EXPECT_EQ(ask(narrow, {7, 8, 9}), base);
}

TEST_P(LifecycleTest, CancelLeavesTogetherAndSkipsTheRest) {
  group_.Prefill(kContext, Ids(0, 300));
  const auto base = Ask(kContext, 300);
  constexpr int32_t kSteps = 20'000;
  group_.Do(OpenSequence{5, kContext, 0, 0, kSteps + 3, {}, 7});
  group_.Do(ExtendSequence{5, 300, {7, 8, 9}, true});
  int seen = 0;
  group_.OnToken([&](const Token&) {
    // Another rank's word does not count; it only makes this test hang or fail if it does.
    if (++seen == 2 && group_.size() > 1) group_.engine(1).Cancel(7);
    if (seen == 5) group_.engine(0).Cancel(7);
  });
  const int64_t running = group_.Send(DecodeSteps{{5}, kSteps}, 7);
  const int64_t queued = group_.Send(OpenContext{kOther, 100}, 7);
  const int64_t unrelated = group_.Send(CloseSequence{5}, 8);
  const Answer answer = group_.Wait(running);
  group_.OnToken(nullptr);
  EXPECT_TRUE(answer.ok());
  ASSERT_EQ(answer.ended.size(), 1u);
  EXPECT_EQ(answer.ended[0].why, SequenceEnd::Why::kCancelled);
  EXPECT_EQ(answer.tokens.size(), 5u) << "within one token";
  EXPECT_TRUE(group_.Wait(queued).result().cancelled);
  EXPECT_FALSE(group_.Wait(unrelated).result().cancelled);
  ExpectRefused(CloseContext{kOther}, StatusCode::kNotFound, "the cancelled open did nothing");
  EXPECT_EQ(Ask(kContext, 300), base);
}

// Queued chunks, steps and questions of a cancelled job do nothing, on all ranks.
TEST_P(LifecycleTest, CancelSkipsChunksStepsAndQuestions) {
  group_.Prefill(kContext, Ids(0, 300));
  const auto base = Ask(kContext, 300);
  group_.Do(OpenContext{kOther, 300});
  group_.Do(BeginAdapt{kContext, kAdapter});
  group_.Do(OpenSequence{5, kContext, 0, 0, 9});
  group_.engine(0).Cancel(7);
  EXPECT_TRUE(group_.Call(PrefillChunk{kOther, 0, Ids(0, 300)}, 7).result().cancelled);
  EXPECT_TRUE(group_.Call(AdaptStep{kAdapter, 1, {Span{30, Ids(30, 20)}}}, 7).result().cancelled);
  EXPECT_TRUE(group_.Call(ExtendSequence{5, 300, {7, 8, 9}, true}, 7).result().cancelled);
  EXPECT_FALSE(group_.Do(PrefillChunk{kOther, 0, Ids(0, 300)}, 8).result().cancelled)
      << "from the start: nothing was kept";
  EXPECT_FALSE(group_.Do(AdaptStep{kAdapter, 1, {Span{30, Ids(30, 20)}}}, 8).result().cancelled);
  group_.Do(EndAdapt{kAdapter, false});
  group_.Do(CloseSequence{5});
  EXPECT_EQ(Ask(kContext, 300), base);
  EXPECT_EQ(Ask(kOther, 300), base);
}

// A step of many rows goes through the model in parts: the loss is the mean over all rows, the update that of one
// gradient.
TEST_P(LifecycleTest, LargeStepEqualsItsMean) {
  group_.Prefill(kContext, golden_.context());
  const std::vector<Span> spans = {{0, Ids(0, 400)}, {20, Ids(20, 301)}, {350, Ids(350, 350)}};
  group_.Do(BeginAdapt{kContext, kAdapter});
  double sum = 0.0;
  int64_t rows = 0;
  for (const Span& span : spans) {
    sum += group_.Do(ProbeLoss{kAdapter, {span}}).result().loss * static_cast<double>(span.rows());
    rows += span.rows();
  }
  EXPECT_NEAR(group_.Do(ProbeLoss{kAdapter, spans}).result().loss, sum / static_cast<double>(rows), 1e-6);
  EXPECT_NEAR(group_.Do(AdaptStep{kAdapter, 1, spans}).result().loss, sum / static_cast<double>(rows), 1e-6);
  group_.Do(EndAdapt{kAdapter, false});
}

TEST_P(LifecycleTest, AdaptersCountAsMemory) {
  const ModelConfig& config = TestWeights("qwen3")->config;
  const int64_t delta = 4 * config.query_parameters();
  const int64_t context = 40 * config.kv_bytes_per_token(4);
  Group small(TestWeights("qwen3"), GetParam(), context + 5 * delta);
  small.Prefill(1, Ids(0, 40));
  for (const uint64_t adapter : {1, 2}) {  // 4 + 0, then 4 + 1
    small.Do(BeginAdapt{1, adapter});
    EXPECT_EQ(small.Call(BeginAdapt{1, 9}).reason(), "ADAPT_OUT_OF_MEMORY");
    small.Do(EndAdapt{adapter, true, 1});
  }
  EXPECT_EQ(small.Call(BeginAdapt{1, 3}).reason(), "ADAPT_OUT_OF_MEMORY") << "two are kept";
  small.Do(DropAdapter{2});
  small.Do(BeginAdapt{1, 3});
  small.Do(EndAdapt{3, false});
  small.Do(BeginAdapt{1, 1, 1});
  small.Do(AdaptStep{1, 1, {Span{3, Ids(3, 9)}}});
  small.Do(EndAdapt{1, true, 2});
  small.Do(CloseContext{1});
  small.Prefill(1, Ids(0, 40));
  small.Do(BeginAdapt{1, 1});
}

TEST_P(LifecycleTest, NonFiniteAnswersAreRefused) {
  group_.Prefill(kContext, Ids(0, 300));
  const auto base = Ask(kContext, 300);
  Adapt(kContext, kAdapter, 1, {Span{30, Ids(30, 20)}}, std::numeric_limits<float>::infinity());
  group_.Do(OpenSequence{5, kContext, kAdapter, 1, 9});
  ExtendSequence extend{5, 300, {7, 8, 9}, true};
  const Answer answer = group_.Call(extend);
  EXPECT_EQ(answer.reason(), "NON_FINITE_LOGITS");
  EXPECT_TRUE(answer.tokens.empty());
  group_.Do(CloseSequence{5});
  group_.Do(DropAdapter{kAdapter});
  EXPECT_EQ(Ask(kContext, 300), base);
}

TEST_P(LifecycleTest, MemoryIsAdmittedAndGivenBack) {
  const ModelConfig& config = TestWeights("qwen3")->config;
  const int64_t per_token = config.kv_bytes_per_token(4);
  Group small(TestWeights("qwen3"), GetParam(), 300 * per_token);
  small.Do(OpenContext{1, 256});  // all on rank 0
  const Answer full = small.Call(OpenContext{2, 45});
  EXPECT_EQ(full.result().status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(full.reason(), "KV_CAPACITY");
  EXPECT_EQ(full.result().kv_used_bytes, 256 * per_token);
  EXPECT_EQ(small.Do(OpenContext{2, 44}).result().kv_used_bytes, 300 * per_token);
  EXPECT_EQ(small.Do(CloseContext{1}).result().kv_used_bytes, 44 * per_token);
  EXPECT_EQ(small.Call(OpenContext{3, 300 * GetParam()}).reason(), "KV_CAPACITY");
  small.Do(PrefillChunk{2, 0, Ids(0, 44)});
  EXPECT_EQ(small.Do(OpenSequence{9, 2, 0, 0, 10}).result().kv_used_bytes, 54 * per_token);
  EXPECT_EQ(small.Do(CloseContext{2}).result().kv_used_bytes, 0) << "with its sequences";
}

TEST_P(LifecycleTest, BadCommandsAreRefusedWithoutHarm) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  const int32_t vocab = static_cast<int32_t>(TestWeights("qwen3")->config.vocab);
  const auto invalid = StatusCode::kInvalidArgument;
  const auto precondition = StatusCode::kFailedPrecondition;
  const auto absent = StatusCode::kNotFound;
  group_.Prefill(kContext, Ids(0, 300));
  const Span span{30, Ids(30, 20)};
  Adapt(kContext, kAdapter, 1, {span});
  const auto base = Ask(kContext, 300), adapted = Ask(kContext, 300, kAdapter, 1);
  group_.Do(OpenContext{kOther, 10});
  group_.Do(PrefillChunk{kOther, 0, Ids(0, 4)});
  group_.Do(OpenSequence{5, kContext, 0, 0, 4});
  const int64_t used = group_.Do(BeginAdapt{kContext, kOtherAdapter}).result().kv_used_bytes;

  ExpectRefused(OpenContext{kContext, 5}, precondition, "context uid in use");
  for (const int64_t capacity : {int64_t{0}, int64_t{-1}, kMaxContextTokens + 1, kMax}) {
    ExpectRefused(OpenContext{77, capacity}, invalid, "context capacity");
  }
  ExpectRefused(CloseContext{77}, absent, "close unknown");
  ExpectRefused(PrefillChunk{77, 0, {1}}, absent, "prefill unknown");
  ExpectRefused(PrefillChunk{kOther, 3, {1}}, precondition, "prefill twice");
  ExpectRefused(PrefillChunk{kOther, 5, {1}}, precondition, "prefill with a gap");
  ExpectRefused(PrefillChunk{kOther, 4, {}}, invalid, "prefill of nothing");
  ExpectRefused(PrefillChunk{kOther, 4, Ids(0, 7)}, invalid, "prefill beyond the end");
  ExpectRefused(PrefillChunk{kOther, 4, {1, vocab}}, invalid, "id = vocabulary");
  ExpectRefused(PrefillChunk{kOther, 4, {-1}}, invalid, "id -1");
  ExpectRefused(PrefillChunk{kContext, 300, {1}}, invalid, "prefill of a full context");

  ExpectRefused(BeginAdapt{kOther, 78}, precondition, "adapt before the end of prefill");
  ExpectRefused(BeginAdapt{77, 78}, absent, "adapt unknown");
  ExpectRefused(BeginAdapt{kContext, kOtherAdapter}, precondition, "begin twice");
  ExpectRefused(AdaptStep{kAdapter, 1, {span}}, precondition, "step without begin");
  ExpectRefused(AdaptStep{78, 1, {span}}, absent, "step of unknown");
  ExpectRefused(AdaptStep{kOtherAdapter, 1, {}}, invalid, "step without spans");
  for (const Span& bad : {Span{-1, {1, 2}}, Span{0, {1}}, Span{0, {}}, Span{299, {1, 2}}, Span{280, Ids(280, 21)},
                          Span{kMax, {1, 2}}, Span{kMax - 1, {1, 2, 3}}, Span{0, {1, vocab}}, Span{0, {-1, 1}}}) {
    ExpectRefused(AdaptStep{kOtherAdapter, 1, {span, bad}}, invalid, "span at " + std::to_string(bad.start));
    ExpectRefused(ProbeLoss{kOtherAdapter, {bad}}, invalid, "probe at " + std::to_string(bad.start));
  }
  ExpectRefused(EndAdapt{kAdapter, true, 2}, precondition, "end without begin");
  ExpectRefused(EndAdapt{kOtherAdapter, true, 2}, precondition, "wrong revision");
  ExpectRefused(DropAdapter{78}, absent, "drop unknown");

  ExpectRefused(OpenSequence{5, kContext, 0, 0, 4}, precondition, "sequence uid in use");
  ExpectRefused(OpenSequence{6, kOther, 0, 0, 4}, precondition, "sequence before the end of prefill");
  ExpectRefused(OpenSequence{6, kContext, 78, 1, 4}, absent, "sequence with unknown adapter");
  ExpectRefused(OpenSequence{6, kContext, kAdapter, 2, 4}, precondition, "sequence with another revision");
  ExpectRefused(OpenSequence{6, kContext, 0, 0, -1}, invalid, "sequence capacity");
  ExpectRefused(OpenSequence{6, kContext, 0, 0, kMax}, invalid, "sequence capacity");
  ExpectRefused(ExtendSequence{6, 300, {1}}, absent, "extend unknown");
  for (const int64_t first : {int64_t{-1}, int64_t{298}, int64_t{301}, kMax}) {  // 298: one row does not reach the end
    ExpectRefused(ExtendSequence{5, first, {1}}, precondition, "extend at " + std::to_string(first));
  }
  ExpectRefused(ExtendSequence{5, 300, {}}, invalid, "extend by nothing");
  ExpectRefused(ExtendSequence{5, 300, {1, 2, 3, 4, 5}}, invalid, "extend beyond the capacity");
  ExpectRefused(ExtendSequence{5, 300, {1, vocab}}, invalid, "extend by id = vocabulary");
  ExpectRefused(ExtendSequence{5, 300, {1}, false, {1, 2}}, invalid, "more scores than rows");
  ExpectRefused(ExtendSequence{5, 300, {1}, false, {vocab}}, invalid, "score id = vocabulary");
  ExpectRefused(DecodeSteps{{5}, 1}, precondition, "decode before a sample");
  ExpectRefused(DecodeSteps{{6}, 1}, absent, "decode unknown");
  ExpectRefused(CloseSequence{6}, absent, "close unknown sequence");

  EXPECT_EQ(group_.Do(EndAdapt{kOtherAdapter, false}).result().kv_used_bytes, used);
  EXPECT_EQ(Ask(kContext, 300), base);
  EXPECT_EQ(Ask(kContext, 300, kAdapter, 1), adapted);
  group_.Do(PrefillChunk{kOther, 4, Ids(4, 6)});  // and the half-filled context goes on
  EXPECT_EQ(Ask(kOther, 10).size(), 8u);
}

TEST_P(LifecycleTest, CommandsOutOfOrderEndTheGroup) {
  group_.Do(OpenContext{kContext, 10});
  for (int r = 0; r < group_.size(); ++r) {
    Command command;
    command.seq = r == group_.size() - 1 ? 5 : 2;  // the last rank missed some
    command.body = OpenContext{kOther, 10};
    group_.engine(r).Submit(command);
  }
  const std::vector<Status> statuses = group_.Ended();
  for (const Status& status : statuses) EXPECT_FALSE(status.ok());
  EXPECT_EQ(statuses.back().code(), StatusCode::kFailedPrecondition);
}

INSTANTIATE_TEST_SUITE_P(Ranks, LifecycleTest, ::testing::Values(1, 2, 3, 4),
                         [](const auto& info) { return std::to_string(info.param) + "_ranks"; });

}  // namespace
}  // namespace refocus
