#include "base/model_config.h"

#include <unistd.h>

#include <cmath>
#include <functional>

#include "tests/base/model_files.h"

namespace refocus {
namespace {

ModelConfig Small() {
  ModelConfig config;
  config.layers = 2;
  config.hidden = 12;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 6;
  config.mlp = 20;
  config.vocab = 11;
  config.max_positions = 64;
  return config;
}

TEST(ModelConfigTest, DerivedSizes) {
  ModelConfig config = Small();
  EXPECT_EQ(config.q_dim(), 24);
  EXPECT_EQ(config.kv_dim(), 12);
  EXPECT_EQ(config.query_parameters(), 2 * 24 * 12);
  EXPECT_EQ(config.kv_bytes_per_token(4), 2 * 2 * 12 * 4);
  // q, o: 24 x 12; k, v: 12 x 12; MLP 3 x 20 x 12; two norms of 12.
  const int64_t layer = 2 * 24 * 12 + 2 * 12 * 12 + 3 * 20 * 12 + 2 * 12;
  EXPECT_EQ(config.parameters(), 2 * layer + 12 + 2 * 11 * 12);
  config.tied_embeddings = true;
  EXPECT_EQ(config.parameters(), 2 * layer + 12 + 11 * 12);
  config.qk_norm = true;
  EXPECT_EQ(config.parameters(), 2 * (layer + 2 * 6) + 12 + 11 * 12);
  config.qkv_bias = true;
  EXPECT_EQ(config.parameters(), 2 * (layer + 2 * 6 + config.q_dim() + 2 * config.kv_dim()) + 12 + 11 * 12);
}

TEST(ModelConfigTest, FingerprintFollowsEveryFieldThatComputes) {
  const std::string base = Small().Fingerprint();
  EXPECT_EQ(base.size(), 16u);
  EXPECT_EQ(base.find_first_not_of("0123456789abcdef"), std::string::npos);
  const std::function<void(ModelConfig&)> edits[] = {[](ModelConfig& c) { c.layers++; },
                                                     [](ModelConfig& c) { c.hidden++; },
                                                     [](ModelConfig& c) { c.heads++; },
                                                     [](ModelConfig& c) { c.kv_heads++; },
                                                     [](ModelConfig& c) { c.head_dim++; },
                                                     [](ModelConfig& c) { c.mlp++; },
                                                     [](ModelConfig& c) { c.vocab++; },
                                                     [](ModelConfig& c) { c.max_positions++; },
                                                     [](ModelConfig& c) { c.rope_theta += 1e-9; },
                                                     [](ModelConfig& c) { c.rms_eps = 1e-6; },
                                                     [](ModelConfig& c) { c.qk_norm = true; },
                                                     [](ModelConfig& c) { c.qkv_bias = true; },
                                                     [](ModelConfig& c) { c.rope = *ParseRopeScaling("linear:2"); },
                                                     [](ModelConfig& c) { c.tied_embeddings = true; }};
  int index = 0;
  for (const auto& edit : edits) {
    ModelConfig config = Small();
    edit(config);
    EXPECT_NE(config.Fingerprint(), base) << index;
    ++index;
  }
  ModelConfig named = Small();
  named.name = "other";
  named.eos_tokens = {3};
  EXPECT_EQ(named.Fingerprint(), base);
  ModelConfig widened = Small();  // GGUF stores it as a float
  widened.rms_eps = static_cast<double>(static_cast<float>(widened.rms_eps));
  EXPECT_EQ(widened.Fingerprint(), base);
}

TEST(ModelConfigTest, ValidateNamesSourceFieldAndLimit) {
  EXPECT_TRUE(Small().Validate("here").ok());
  ModelConfig config = Small();
  config.kv_heads = 3;
  EXPECT_TRUE(FailsWith(config.Validate("here"), "CONFIG_INVALID", "here: key/value heads: got 3"));
  config = Small();
  config.rope_theta = NAN;
  EXPECT_TRUE(FailsWith(config.Validate("here"), "CONFIG_INVALID", "rope_theta: got nan"));
  config = Small();
  config.rms_eps = INFINITY;
  EXPECT_TRUE(FailsWith(config.Validate("here"), "CONFIG_INVALID", "rms_norm_eps: got inf"));
  config = Small();
  config.bos_token = 11;
  EXPECT_TRUE(FailsWith(config.Validate("here"), "CONFIG_INVALID", "bos_token_id: got 11, allowed 0 to 10"));
  config = Small();
  config.eos_tokens = {0, -1};
  EXPECT_TRUE(FailsWith(config.Validate("here"), "CONFIG_INVALID", "eos_token_id: got -1"));
}

TEST(ModelConfigTest, LargestAllowedSizesDoNotOverflow) {
  ModelConfig config = Small();
  config.layers = 1024;
  config.hidden = 1 << 17;
  config.heads = config.kv_heads = 1024;
  config.head_dim = 1024;
  config.mlp = 1 << 20;
  config.vocab = 1 << 22;
  config.max_positions = int64_t{1} << 31;
  ASSERT_TRUE(config.Validate("here").ok());
  const double expected =
      1024.0 * (4 * std::pow(2, 37) + 3 * std::pow(2, 37) + std::pow(2, 18)) + std::pow(2, 17) + 2 * std::pow(2, 39);
  EXPECT_EQ(static_cast<double>(config.parameters()), expected);
  EXPECT_GT(config.kv_bytes_per_token(4), 0);
}

TEST(DetectModelFormatTest, FoldersAndFiles) {
  const TempDir dir;
  const auto refused = [](const std::string& path, const std::string& part) {
    return FailsWith(DetectModelFormat(path).status(), "CONFIG_INVALID", part);
  };
  EXPECT_TRUE(refused(dir.path(), "a folder without config.json"));
  EXPECT_TRUE(refused(dir.path() + "/absent", "No such file"));
  EXPECT_TRUE(refused("", "No such file"));
  for (const char* name : {"pytorch_model.bin", "model.pt", "model.pth"}) {
    const std::string file = dir.Write(name, "x");
    EXPECT_TRUE(refused(file, "allowed a folder with config.json and safetensors, or a .gguf file")) << name;
    EXPECT_EQ(ExitCodeOf(DetectModelFormat(file).status()), 2);
  }
  EXPECT_TRUE(refused(dir.Write("model.safetensors", "x"), "a single .safetensors file"));
  EXPECT_TRUE(refused(dir.Write("model.txt", "x"), "another file"));
  EXPECT_EQ(*DetectModelFormat(dir.Write("m.gguf", "x")), ModelFormat::kGguf);
  dir.Write("config.json", "{}");
  EXPECT_EQ(*DetectModelFormat(dir.path()), ModelFormat::kHuggingFace);
  EXPECT_EQ(*DetectModelFormat(dir.path() + "/"), ModelFormat::kHuggingFace);
  const std::string loop = dir.path() + "/loop.gguf";
  ASSERT_EQ(symlink(loop.c_str(), loop.c_str()), 0);
  EXPECT_TRUE(refused(loop, "symbolic links"));
}

TEST(DetectModelFormatTest, ConfigThatLoopsIsAnErrorAndNoHang) {
  const TempDir dir;
  const std::string config = dir.path() + "/config.json";
  ASSERT_EQ(symlink(config.c_str(), config.c_str()), 0);
  EXPECT_TRUE(FailsWith(LoadModelConfig(dir.path()).status(), "CONFIG_INVALID", "symbolic links"));
}

}  // namespace
}  // namespace refocus
