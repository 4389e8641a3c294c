// The engine, driven by commands over 1 to 4 ranks, against stored fp64 outputs: logits, losses, answers, scores.
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ops/log_softmax.h>
#include <gtest/gtest.h>

#include "tests/worker/engine_harness.h"
#include "tests/worker/golden.h"

namespace refocus {
namespace {

using nlohmann::json;

constexpr double kLogprobBound = 1e-4;  // absolute, nats
constexpr double kLossBound = 1e-5;
constexpr uint64_t kContext = 1;
constexpr uint64_t kAdapter = 2;

class GoldenTest : public ::testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  GoldenTest()
      : golden_(LoadGolden(std::get<0>(GetParam()))),
        weights_(TestWeights(std::get<0>(GetParam()))),
        group_(weights_, std::get<1>(GetParam())) {}

  // Worst difference of log-probabilities over the vocabulary, for the row behind the first `tokens` of the context.
  double WorstLogprob(int64_t tokens, const at::Tensor& logits) {
    const uint64_t context = static_cast<uint64_t>(100 + tokens);
    const std::vector<int32_t> ids = golden_.context(tokens);
    group_.Prefill(context, ids, 97);
    const int32_t vocab = static_cast<int32_t>(weights_->config.vocab);
    const Token token = group_.Ask(context, tokens, {}, ids.back(), 1, 0, 0, vocab).at(0);
    group_.Do(CloseContext{context});
    const at::Tensor expected = at::log_softmax(logits.to(at::kDouble), 0).contiguous();
    EXPECT_EQ(static_cast<int32_t>(token.top_ids.size()), vocab);
    double worst = 0.0;
    for (size_t i = 0; i < token.top_ids.size(); ++i) {
      const double error = std::abs(token.top_logprobs[i] - expected.const_data_ptr<double>()[token.top_ids[i]]);
      worst = error <= worst ? worst : error;  // NaN counts as worst
    }
    return worst;
  }

  void ExpectAnswer(const std::string& name, uint64_t adapter, int64_t revision) {
    const json& expected = golden_.json.at("answers").at(name);
    const std::vector<int32_t> context = golden_.context();
    const auto tokens = expected.at("tokens").get<std::vector<int32_t>>();
    const std::vector<Token> actual =
        group_.Ask(kContext, static_cast<int64_t>(context.size()), expected.at("question").get<std::vector<int32_t>>(),
                   context.back(), static_cast<int>(tokens.size()), adapter, revision);
    ASSERT_EQ(actual.size(), tokens.size()) << name;
    for (size_t i = 0; i < tokens.size(); ++i) {
      EXPECT_EQ(actual[i].id, tokens[i]) << name << " token " << i;
      const double logprob = expected.at("logprobs").at(i);
      EXPECT_NEAR(actual[i].logprob, logprob, kLogprobBound) << name << " token " << i;
    }
  }

  void ExpectScores(const std::string& name, uint64_t adapter, int64_t revision) {
    const json& expected = golden_.json.at("scores").at(name);
    const auto targets = expected.at("targets").get<std::vector<int32_t>>();
    const Result result = group_.Score(kContext, expected.at("question").get<std::vector<int32_t>>(),
                                       static_cast<int64_t>(golden_.context().size()), targets, adapter, revision);
    ASSERT_EQ(result.score_logprobs.size(), targets.size());
    for (size_t i = 0; i < targets.size(); ++i) {
      const double logprob = expected.at("logprobs").at(i);
      EXPECT_NEAR(result.score_logprobs[i], logprob, kLogprobBound) << name << " " << i;
      EXPECT_EQ(result.score_greedy[i], expected.at("greedy").at(i).get<bool>()) << name << " " << i;
      EXPECT_EQ(result.score_best_ids[i] == targets[i], result.score_greedy[i]) << name << " " << i;
      if (result.score_greedy[i]) {
        EXPECT_NEAR(result.score_best_logprobs[i], result.score_logprobs[i], 1e-5) << name << " " << i;
      } else {
        EXPECT_GT(result.score_best_logprobs[i], result.score_logprobs[i]) << name << " " << i;
      }
    }
  }

  const Golden& golden_;
  std::shared_ptr<const Weights> weights_;
  Group group_;
};

TEST_P(GoldenTest, LogitsOfRowsAndLengths) {
  const at::Tensor rows = golden_.tensor("logits.rows");
  for (size_t i = 0; i < golden_.json.at("rows").size(); ++i) {
    const int64_t row = golden_.json.at("rows").at(i);
    EXPECT_LE(WorstLogprob(row + 1, rows.select(0, static_cast<int64_t>(i))), kLogprobBound) << "row " << row;
  }
  const at::Tensor last = golden_.tensor("logits.last_of_length");
  for (size_t i = 0; i < golden_.json.at("lengths").size(); ++i) {
    const int64_t tokens = golden_.json.at("lengths").at(i);
    EXPECT_LE(WorstLogprob(tokens, last.select(0, static_cast<int64_t>(i))), kLogprobBound) << tokens << " tokens";
  }
}

// With base queries, tokens after the context compute what tokens of the context would: 450 rows as one long question.
TEST_P(GoldenTest, LongQuestionEqualsContext) {
  const std::vector<int32_t> ids = golden_.context();
  const int64_t tokens = 250;
  group_.Prefill(kContext, golden_.context(tokens));
  const std::vector<int32_t> rest(ids.begin() + tokens, ids.end());
  const Result result = group_.Score(kContext, {ids.begin() + tokens, ids.begin() + tokens + 1}, tokens,
                                     {ids.begin() + tokens + 1, ids.end()});
  ASSERT_EQ(result.score_logprobs.size(), rest.size() - 1);
  // The same as a prompt whose own tokens are scored, with an answer after it.
  group_.Do(OpenSequence{9, kContext, 0, 0, 460});
  ExtendSequence asked{9, tokens - 1, {ids.begin() + tokens - 1, ids.end()}, true, rest};
  const Answer answer = group_.Do(asked);
  const std::vector<float>& prompt = answer.result().score_logprobs;
  ASSERT_EQ(prompt.size(), rest.size());
  const at::Tensor rows = golden_.tensor("logits.rows");
  EXPECT_EQ(answer.tokens.at(0).id, golden_.json.at("answers").at("base.plain").at("tokens").at(0).get<int32_t>());
  int compared = 0;
  for (size_t i = 0; i < golden_.json.at("rows").size(); ++i) {
    const int64_t row = golden_.json.at("rows").at(i);
    if (row < tokens - 1 || row + 1 >= static_cast<int64_t>(ids.size())) continue;
    const at::Tensor logprobs = at::log_softmax(rows.select(0, static_cast<int64_t>(i)).to(at::kDouble), 0);
    const double expected = logprobs[ids[row + 1]].item<double>();
    EXPECT_NEAR(prompt[row + 1 - tokens], expected, kLogprobBound) << "row " << row;
    const Result& scored = answer.result();
    const double best = logprobs.max().item<double>();
    EXPECT_NEAR(scored.score_best_logprobs.at(row + 1 - tokens), best, kLogprobBound) << "row " << row;
    EXPECT_NEAR(logprobs[scored.score_best_ids.at(row + 1 - tokens)].item<double>(), best, kLogprobBound);
    if (row < tokens) continue;
    EXPECT_NEAR(result.score_logprobs[row - tokens], expected, kLogprobBound) << "row " << row;
    ++compared;
  }
  EXPECT_EQ(compared, 8);
}

// Rows of the context queried again, up to the first new token, attend to the cache as it is.
TEST_P(GoldenTest, ContextRowsQueriedAgain) {
  const std::vector<int32_t> ids = golden_.context();
  const int64_t tokens = static_cast<int64_t>(ids.size());
  group_.Prefill(kContext, ids);
  const json& expected = golden_.json.at("answers").at("base.plain");
  for (const int64_t first : {int64_t{0}, int64_t{300}, int64_t{511}, tokens - 1}) {
    const uint64_t sequence = static_cast<uint64_t>(10 + first);
    group_.Do(OpenSequence{sequence, kContext});
    ExtendSequence extend{sequence, first, {ids.begin() + first, ids.end()}};
    extend.score_ids = {expected.at("tokens").at(0).get<int32_t>()};
    const Result result = group_.Do(extend).result();
    ASSERT_EQ(result.score_logprobs.size(), 1u);
    const double logprob = expected.at("logprobs").at(0);
    EXPECT_NEAR(result.score_logprobs[0], logprob, kLogprobBound) << "from " << first;
    group_.Do(CloseSequence{sequence});
  }
}

TEST_P(GoldenTest, BaseAnswersAndScores) {
  group_.Prefill(kContext, golden_.context());
  ExpectAnswer("base.plain", 0, 0);
  ExpectAnswer("base.question", 0, 0);
  ExpectScores("base", 0, 0);
}

TEST_P(GoldenTest, EightStepsThenAdaptedAnswers) {
  const json& adapt = golden_.json.at("adapt");
  group_.Prefill(kContext, golden_.context());
  group_.Do(BeginAdapt{kContext, kAdapter, 0, golden_.optimizer()});
  for (size_t step = 0; step < adapt.at("spans").size(); ++step) {
    const std::vector<Span> spans = golden_.spans(adapt.at("spans").at(step));
    const Result result =
        group_.Do(AdaptStep{kAdapter, static_cast<int64_t>(step) + 1, spans, golden_.learning_rate()}).result();
    EXPECT_NEAR(result.loss, adapt.at("losses").at(step).get<double>(), kLossBound) << "step " << step + 1;
    const double norm = adapt.at("grad_norms").at(step);
    EXPECT_NEAR(result.grad_norm, norm, 1e-4 * norm) << "step " << step + 1;
  }
  const Answer probe = group_.Do(ProbeLoss{kAdapter, golden_.spans(adapt.at("probe").at("spans"))});
  EXPECT_NEAR(probe.result().loss, adapt.at("probe").at("loss").get<double>(), kLossBound);
  EXPECT_NE(probe.result().agree, 0u);
  ExpectAnswer("base.question", 0, 0);  // nobody sees the delta before it is committed
  group_.Do(EndAdapt{kAdapter, true, 1});
  ExpectAnswer("adapted.plain", kAdapter, 1);
  ExpectAnswer("adapted.question", kAdapter, 1);
  ExpectScores("adapted", kAdapter, 1);
  ExpectAnswer("base.plain", 0, 0);
  ExpectScores("base", 0, 0);
}

INSTANTIATE_TEST_SUITE_P(Models, GoldenTest,
                         ::testing::Combine(::testing::Values("llama", "qwen3"), ::testing::Values(1, 2, 3, 4)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" + std::to_string(std::get<1>(info.param)) + "_ranks";
                         });

}  // namespace
}  // namespace refocus
