// Every family with every kind of RoPE, as Hugging Face folders and as GGUF, over one and two ranks, against what
// transformers computes (tests/golden/make_families.py).
#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ops/log_softmax.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/base/model_files.h"
#include "tests/worker/engine_harness.h"

namespace refocus {
namespace {

using nlohmann::json;

constexpr double kLogprobBound = 2e-4;  // absolute, nats
constexpr uint64_t kContext = 1;
constexpr uint64_t kAdapter = 2;

const json& Cases() {
  static const json cases = json::parse(std::ifstream(GoldenPath("families/families.golden.json"))).at("cases");
  return cases;
}

// The case's folder, with its fields in config.json; or its GGUF file.
std::string ModelOf(const json& golden, const TempDir& dir) {
  const std::string path = GoldenPath("families/" + golden.at("model").get<std::string>());
  if (path.ends_with(".gguf")) return path;
  std::filesystem::copy(path, dir.path(), std::filesystem::copy_options::recursive);
  json config = json::parse(std::ifstream(path + "/config.json"));
  config.update(golden.at("config"));
  dir.Write("config.json", config.dump());  // in place of the copied one
  return dir.path();
}

class FamiliesTest : public ::testing::TestWithParam<std::tuple<size_t, int>> {
 protected:
  FamiliesTest() : golden_(Cases().at(std::get<0>(GetParam()))), context_(golden_.at("context")) {
    const TempDir dir;
    const std::string path = ModelOf(golden_, dir);
    const StatusOr<ModelConfig> config = LoadModelConfig(path);
    if (!config.ok()) throw std::runtime_error(std::string(config.status().message()));
    StatusOr<Weights> weights = LoadWeights(path, *config, {.check_finite = true});
    if (!weights.ok()) throw std::runtime_error(std::string(weights.status().message()));
    weights_ = std::make_shared<const Weights>(*std::move(weights));
    group_ = std::make_unique<Group>(weights_, std::get<1>(GetParam()));
  }

  // Log-probabilities of the whole vocabulary behind the context's first `tokens` tokens.
  std::vector<float> LogprobsBehind(int64_t tokens) {
    const uint64_t context = static_cast<uint64_t>(100 + tokens);
    const std::vector<int32_t> ids(context_.begin(), context_.begin() + tokens);
    group_->Prefill(context, ids, 97);
    const int32_t vocab = static_cast<int32_t>(weights_->config.vocab);
    const Token token = group_->Ask(context, tokens, {}, ids.back(), 1, 0, 0, vocab).at(0);
    group_->Do(CloseContext{context});
    std::vector<float> logprobs(static_cast<size_t>(vocab), NAN);
    for (size_t i = 0; i < token.top_ids.size(); ++i) {
      logprobs[static_cast<size_t>(token.top_ids[i])] = token.top_logprobs[i];
    }
    return logprobs;
  }

  const json& golden_;
  const std::vector<int32_t> context_;
  std::shared_ptr<const Weights> weights_;
  std::unique_ptr<Group> group_;
};

TEST_P(FamiliesTest, Logits) {
  for (size_t i = 0; i < golden_.at("rows").size(); ++i) {
    const int64_t row = golden_.at("rows").at(i);
    const auto logits = golden_.at("logits").at(i).get<std::vector<double>>();
    const at::Tensor expected = at::log_softmax(at::tensor(logits, at::kDouble), 0);
    const std::vector<float> actual = LogprobsBehind(row + 1);
    ASSERT_EQ(actual.size(), logits.size());
    for (size_t k = 0; k < actual.size(); ++k) {
      const double logprob = expected.const_data_ptr<double>()[k];
      ASSERT_NEAR(actual[k], logprob, kLogprobBound * std::max(1.0, std::abs(logprob) / 10))
          << "row " << row << " " << k;
    }
  }
}

TEST_P(FamiliesTest, LossGradientAndAnswer) {
  group_->Prefill(kContext, context_);
  group_->Do(BeginAdapt{kContext, kAdapter});
  const int64_t start = golden_.at("span").at(0), rows = golden_.at("span").at(1);
  const Span span{start, {context_.begin() + start, context_.begin() + start + rows + 1}};
  const Result step = group_->Do(AdaptStep{kAdapter, 1, {span}}).result();
  EXPECT_NEAR(step.loss, golden_.at("loss").get<double>(), 1e-4);
  const double norm = golden_.at("norm");
  EXPECT_NEAR(step.grad_norm, norm, 5e-4 * norm);
  const auto tokens = golden_.at("tokens").get<std::vector<int32_t>>();
  const std::vector<Token> answer =
      group_->Ask(kContext, static_cast<int64_t>(context_.size()), golden_.at("question").get<std::vector<int32_t>>(),
                  context_.back(), static_cast<int>(tokens.size()));
  ASSERT_EQ(answer.size(), tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) EXPECT_EQ(answer[i].id, tokens[i]) << i;
}

INSTANTIATE_TEST_SUITE_P(Cases, FamiliesTest,
                         ::testing::Combine(::testing::Range(size_t{0}, Cases().size()), ::testing::Values(1, 2)),
                         [](const auto& info) {
                           return Cases().at(std::get<0>(info.param)).at("name").template get<std::string>() + "_" +
                                  std::to_string(std::get<1>(info.param)) + "_ranks";
                         });

// What --rope-scaling asks of the plain model is what the case's config.json says.
TEST(FamiliesRequestTest, TheRequestIsTheSameModel) {
  int compared = 0;
  for (const json& golden : Cases()) {
    const std::string request = golden.at("rope_scaling");
    if (request.empty()) continue;
    SCOPED_TRACE(golden.at("name").get<std::string>());
    const TempDir dir;
    const auto stated = LoadModelConfig(ModelOf(golden, dir));
    const auto asked = LoadModelConfig(GoldenPath("families/" + golden.at("model").get<std::string>()), request);
    ASSERT_TRUE(stated.ok() && asked.ok()) << stated.status() << asked.status();
    EXPECT_EQ(stated->Fingerprint(), asked->Fingerprint());
    EXPECT_EQ(stated->max_positions, 512);
    ++compared;
  }
  EXPECT_EQ(compared, 16);
}

}  // namespace
}  // namespace refocus
