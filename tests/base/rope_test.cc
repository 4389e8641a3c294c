// Rotary frequencies against transformers' (tests/base/make_rope_golden.py), from config.json as published models have it;
// what --rope-scaling takes.
#include "base/rope.h"

#include <cmath>
#include <fstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/model_config.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

using nlohmann::json;

json Cases() {
  std::ifstream file(std::string(REFOCUS_SOURCE_DIR) + "/tests/base/golden/rope.json");
  return json::parse(file).at("cases");
}

TEST(RopeTest, FrequenciesAreThoseOfTransformers) {
  const json cases = Cases();
  EXPECT_EQ(cases.size(), 14u);
  for (const json& c : cases) {
    SCOPED_TRACE(c.at("name").get<std::string>());
    const TempDir dir;
    dir.Write("config.json", c.at("config").dump());
    const auto config = LoadModelConfig(dir.path(), c.at("rope_scaling").get<std::string>());
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->max_positions, c.at("window").get<int64_t>());
    EXPECT_NEAR(config->rope.attention_factor, c.at("attention_factor").get<double>(), 1e-12);
    const auto expected = c.at("inverse_frequencies").get<std::vector<double>>();
    const std::vector<float> actual = InverseFrequencies(config->rope_theta, config->head_dim, config->rope);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      // There every step is rounded to fp32, here the result alone.
      EXPECT_NEAR(actual[i] / expected[i], 1.0, 1e-6) << i;
    }
  }
}

TEST(RopeTest, FamiliesOfPublishedConfigurations) {
  for (const json& c : Cases()) {
    SCOPED_TRACE(c.at("name").get<std::string>());
    const TempDir dir;
    dir.Write("config.json", c.at("config").dump());
    const auto config = LoadModelConfig(dir.path());
    ASSERT_TRUE(config.ok()) << config.status();
    const std::string type = c.at("config").at("model_type");
    EXPECT_EQ(FamilyName(config->family), type);
    EXPECT_EQ(config->qkv_bias, type == "qwen2");
    EXPECT_EQ(config->qk_norm, type == "qwen3");
  }
}

TEST(RopeTest, RequestsReplaceWhatTheModelStates) {
  const TempDir dir;
  for (const json& c : Cases()) {
    if (c.at("name") == "llama-3.1-8b") dir.Write("config.json", c.at("config").dump());
  }
  const auto plain = LoadModelConfig(dir.path()), none = LoadModelConfig(dir.path(), "none");
  EXPECT_EQ(plain->Fingerprint(), none->Fingerprint());
  const auto more = LoadModelConfig(dir.path(), "llama3:16");
  EXPECT_EQ(more->rope.Text(), "llama3:16:8192");  // the window that the model states
  EXPECT_EQ(more->max_positions, 131072);          // as before: 16 times 8192
  EXPECT_NE(more->Fingerprint(), plain->Fingerprint());
  const auto yarn = LoadModelConfig(dir.path(), "yarn:4:131072");
  EXPECT_EQ(yarn->rope.Text(), "yarn:4:131072");
  EXPECT_EQ(yarn->max_positions, 524288);
}

TEST(RopeTest, RequestsThatAreRefused) {
  for (const char* text : {"yarn", "yarn:", "yarn:x", "yarn:0.5", "yarn:4:", "yarn:4:0", "yarn:4:-1", "yarn:4:8192:1",
                           "yarn:nan", "yarn:inf", "yarn:1e9", "dynamic:2", "YARN:4", " yarn:4", "yarn:4 ", "4", ":4",
                           "linear:2:99999999999999999999", "factors:2", "default:1"}) {
    EXPECT_TRUE(FailsWith(ParseRopeScaling(text).status(), "CONFIG_INVALID", "allowed none, or TYPE:FACTOR")) << text;
  }
  EXPECT_EQ(ParseRopeScaling("none")->type, RopeType::kDefault);
  EXPECT_EQ(ParseRopeScaling("")->type, RopeType::kDefault);
  EXPECT_EQ(ParseRopeScaling("yarn:4:32768")->Text(), "yarn:4:32768");
  EXPECT_EQ(ParseRopeScaling("linear:2.5")->Text(), "linear:2.5");
}

// A GGUF file carries llama3 as numbers: from which window is for the request to say.
TEST(RopeTest, FactorsDoNotTellTheirWindow) {
  const TempDir dir;
  GgufBuilder builder;
  builder.Text("general.architecture", "llama").U32("llama.block_count", 1).U32("llama.embedding_length", 32);
  builder.U32("llama.attention.head_count", 4).U32("llama.feed_forward_length", 32).U32("llama.context_length", 64);
  builder.F32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  builder.Tensor("token_embd.weight", {32, 3}, 8, std::string(3 * 34, 'e'));
  builder.Tensor("rope_freqs.weight", {4}, 0, FloatBytes({1, 1, 2, 8}));
  const std::string path = dir.Write("m.gguf", builder.File());
  const auto config = LoadModelConfig(path);
  ASSERT_TRUE(config.ok()) << config.status();
  const std::vector<float> frequencies = InverseFrequencies(config->rope_theta, config->head_dim, config->rope);
  const std::vector<float> plain = InverseFrequencies(config->rope_theta, config->head_dim, {});
  EXPECT_EQ(frequencies[1], plain[1]);
  EXPECT_EQ(frequencies[3], plain[3] / 8);
  EXPECT_TRUE(FailsWith(LoadModelConfig(path, "llama3:8").status(), "CONFIG_INVALID", "allowed llama3:8:WINDOW"));
  EXPECT_EQ(LoadModelConfig(path, "llama3:8:32")->max_positions, 256);
}

}  // namespace
}  // namespace refocus
