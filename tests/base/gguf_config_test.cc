#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "base/model_config.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

// The metadata of a small model, each key replaceable.
class GgufConfigTest : public ::testing::Test {
 protected:
  using Edit = std::function<void(GgufBuilder&)>;

  // Writes all keys but `without`, then `edit`.
  StatusOr<ModelConfig> Load(const std::string& without, const Edit& edit, const std::string& family = "llama",
                             bool output = false, uint64_t vocab = 37) {
    GgufBuilder builder;
    const auto u32 = [&](const std::string& key, uint32_t value) {
      if (key != without) builder.U32(family + "." + key, value);
    };
    if (without != "general.architecture") builder.Text("general.architecture", family);
    u32("block_count", 2);
    u32("embedding_length", 96);
    u32("attention.head_count", 6);
    u32("attention.head_count_kv", 2);
    u32("feed_forward_length", 160);
    u32("context_length", 4096);
    if (without != "attention.layer_norm_rms_epsilon")
      builder.F32(family + ".attention.layer_norm_rms_epsilon", 0.125f);
    if (without != "rope.freq_base") builder.F32(family + ".rope.freq_base", 50000.0f);
    builder.U32("tokenizer.ggml.bos_token_id", 1);
    if (without != "eos") builder.U32("tokenizer.ggml.eos_token_id", 2);
    if (edit) edit(builder);
    if (without != "token_embd") builder.Tensor("token_embd.weight", {96, vocab}, 1, std::string(96 * vocab * 2, 'x'));
    if (output) builder.Tensor("output.weight", {96, vocab}, 1, std::string(96 * vocab * 2, 'x'));
    return LoadModelConfig(dir_.Write("small.gguf", builder.File()));
  }
  StatusOr<ModelConfig> With(const Edit& edit) { return Load("", edit); }
  ::testing::AssertionResult Refused(const StatusOr<ModelConfig>& config, const std::string& part) {
    return FailsWith(config.status(), "CONFIG_INVALID", part);
  }

  TempDir dir_;
};

TEST_F(GgufConfigTest, Llama) {
  const auto config = Load("", nullptr);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, Family::kLlama);
  EXPECT_EQ(config->layers, 2);
  EXPECT_EQ(config->hidden, 96);
  EXPECT_EQ(config->heads, 6);
  EXPECT_EQ(config->kv_heads, 2);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->mlp, 160);
  EXPECT_EQ(config->vocab, 37);
  EXPECT_EQ(config->max_positions, 4096);
  EXPECT_EQ(config->rms_eps, 0.125);
  EXPECT_EQ(config->rope_theta, 50000.0);
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_FALSE(config->qk_norm);
  EXPECT_EQ(config->bos_token, 1);
  EXPECT_EQ(config->eos_tokens, std::vector<int32_t>{2});
  EXPECT_EQ(config->name, "small.gguf");
}

TEST_F(GgufConfigTest, Qwen3AndOutput) {
  const auto config = Load(
      "", [](GgufBuilder& b) { b.U32("qwen3.attention.key_length", 32); }, "qwen3", true);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, Family::kQwen3);
  EXPECT_TRUE(config->qk_norm);
  EXPECT_EQ(config->head_dim, 32);
  EXPECT_FALSE(config->tied_embeddings);
}

TEST_F(GgufConfigTest, Defaults) {
  EXPECT_EQ(Load("attention.head_count_kv", nullptr)->kv_heads, 6);
  EXPECT_EQ(Load("rope.freq_base", nullptr)->rope_theta, 10000.0);
  EXPECT_TRUE(Load("eos", nullptr)->eos_tokens.empty());
  const auto turn = With([](GgufBuilder& b) { b.U32("tokenizer.ggml.eot_token_id", 5); });
  EXPECT_EQ(turn->eos_tokens, (std::vector<int32_t>{2, 5}));
  const auto same = With([](GgufBuilder& b) { b.U32("tokenizer.ggml.eot_token_id", 2); });
  EXPECT_EQ(same->eos_tokens, (std::vector<int32_t>{2}));
}

TEST_F(GgufConfigTest, MissingKeysAreNamed) {
  for (const char* key : {"block_count", "embedding_length", "attention.head_count", "feed_forward_length",
                          "context_length", "attention.layer_norm_rms_epsilon"}) {
    EXPECT_TRUE(Refused(Load(key, nullptr), std::string("llama.") + key + ": got nothing"));
  }
  EXPECT_TRUE(Refused(Load("general.architecture", nullptr), "allowed llama (Mistral too), qwen2, qwen3"));
  EXPECT_TRUE(Refused(Load("token_embd", nullptr), "token_embd.weight: got nothing"));
  EXPECT_TRUE(Refused(Load("", nullptr, "gemma3"), "general.architecture: got 'gemma3', allowed llama"));
}

TEST_F(GgufConfigTest, WrongTypesAndRanges) {
  const auto replaced = [&](const std::string& key, const Edit& edit) { return Load(key, edit); };
  EXPECT_TRUE(Refused(replaced("block_count", [](GgufBuilder& b) { b.Text("llama.block_count", "2"); }),
                      "llama.block_count: got another type"));
  EXPECT_TRUE(
      Refused(replaced("block_count", [](GgufBuilder& b) { b.F32("llama.block_count", 2.0f); }), "another type"));
  EXPECT_TRUE(Refused(replaced("block_count", [](GgufBuilder& b) { b.U32("llama.block_count", 0); }), "layers: got 0"));
  EXPECT_TRUE(Refused(replaced("attention.head_count", [](GgufBuilder& b) { b.U32("llama.attention.head_count", 0); }),
                      "head_count: got 0"));
  EXPECT_TRUE(Refused(replaced("attention.head_count", [](GgufBuilder& b) { b.U32("llama.attention.head_count", 7); }),
                      "multiples of the 7 heads"));
  EXPECT_TRUE(
      Refused(replaced("attention.head_count_kv", [](GgufBuilder& b) { b.U32("llama.attention.head_count_kv", 4); }),
              "key/value heads: got 4"));
  EXPECT_TRUE(Refused(replaced("rope.freq_base", [](GgufBuilder& b) { b.F32("llama.rope.freq_base", 0); }),
                      "rope_theta: got 0"));
  EXPECT_TRUE(
      Refused(replaced("rope.freq_base", [](GgufBuilder& b) { b.Raw("llama.rope.freq_base", 6, Bytes(0x7fc00000u)); }),
              "rope_theta: got nan"));
  EXPECT_TRUE(Refused(replaced("eos", [](GgufBuilder& b) { b.U32("tokenizer.ggml.eos_token_id", 37); }),
                      "eos_token_id: got 37"));
  EXPECT_TRUE(
      Refused(replaced("eos", [](GgufBuilder& b) { b.U32("tokenizer.ggml.eos_token_id", 1u << 31); }), "eos_token_id"));
}

TEST_F(GgufConfigTest, VocabularyMustAgree) {
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.U32("llama.vocab_size", 36); }), "vocab_size: got 36, allowed 37"));
  const std::vector<std::string> tokens(38, "t");
  EXPECT_TRUE(Refused(With([&](GgufBuilder& b) { b.Texts("tokenizer.ggml.tokens", tokens); }),
                      "got 38 tokens, allowed at most 37"));
  const std::vector<std::string> fewer(30, "t");
  EXPECT_TRUE(With([&](GgufBuilder& b) { b.Texts("tokenizer.ggml.tokens", fewer); }).ok());
}

TEST_F(GgufConfigTest, UnsupportedFeaturesByName) {
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.U32("llama.expert_count", 8); }), "expert_count: got 8"));
  EXPECT_TRUE(
      Refused(With([](GgufBuilder& b) { b.U32("llama.attention.sliding_window", 512); }), "sliding_window: got 512"));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.Text("llama.rope.scaling.type", "longrope"); }),
                      "rope.scaling.type: got 'longrope', allowed none, linear, yarn"));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.F32("llama.attn_logit_softcapping", 50.0f); }),
                      "attn_logit_softcapping: got 50"));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.F32("llama.rope.scaling.attn_factor", 0.5f); }),
                      "rope.scaling.attn_factor: got 0.5"));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.Tensor("rope_factors_long.weight", {8}, 0, std::string(32, 'x')); }),
                      "rope_factors_long.weight"));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.U32("llama.rope.dimension_count", 8); }),
                      "rope.dimension_count: got 8, allowed 16"));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.U32("llama.attention.value_length", 8); }),
                      "value_length: got 8, allowed 16"));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) { b.U32("split.count", 2); }), "split.count: got 2"));
  EXPECT_TRUE(With([](GgufBuilder& b) {
                b.Text("llama.rope.scaling.type", "none").U32("llama.rope.dimension_count", 16);
              }).ok());
}

TEST_F(GgufConfigTest, ScaledRope) {
  EXPECT_EQ(With([](GgufBuilder& b) { b.F32("llama.rope.scaling.factor", 4.0f); })->rope.Text(), "linear:4");
  EXPECT_EQ(With([](GgufBuilder& b) { b.F32("llama.rope.scale_linear", 2.0f); })->rope.Text(), "linear:2");
  EXPECT_EQ(With([](GgufBuilder& b) {
              b.Text("llama.rope.scaling.type", "none").F32("llama.rope.scaling.factor", 4.0f);
            })->rope.Text(),
            "none");
  const auto yarn = With([](GgufBuilder& b) {
    b.Text("llama.rope.scaling.type", "yarn").F32("llama.rope.scaling.factor", 4.0f);
    b.U32("llama.rope.scaling.original_context_length", 2048).F32("llama.rope.scaling.attn_factor", 0.5f);
    b.F32("llama.rope.scaling.yarn_beta_fast", 16.0f);
  });
  ASSERT_TRUE(yarn.ok()) << yarn.status();
  EXPECT_EQ(yarn->rope.Text(), "yarn:4:2048");
  EXPECT_EQ(yarn->max_positions, 8192);
  EXPECT_EQ(yarn->rope.beta_fast, 16.0);
  EXPECT_DOUBLE_EQ(yarn->rope.attention_factor, 0.5 * (0.1 * std::log(4.0) + 1.0));
  EXPECT_TRUE(Refused(With([](GgufBuilder& b) {
                        b.Text("llama.rope.scaling.type", "yarn").F32("llama.rope.scaling.factor", 0.5f);
                      }),
                      "rope scaling yarn: factor: got 0.5"));
}

TEST_F(GgufConfigTest, RopeFactors) {
  const std::vector<float> factors = {1, 1, 1, 1, 2, 4, 8, 8};
  const auto with = [&](const std::vector<uint64_t>& shape, uint32_t type, const std::string& data) {
    return With([&](GgufBuilder& b) { b.Tensor("rope_freqs.weight", shape, type, data); });
  };
  const auto config = with({8}, 0, FloatBytes(factors));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.factors, factors);
  EXPECT_EQ(config->rope.Text(), "factors");
  EXPECT_TRUE(Refused(with({4}, 0, FloatBytes({1, 1, 1, 1})), "rope_freqs.weight: got another type or shape"));
  EXPECT_TRUE(Refused(with({8}, 1, std::string(16, '1')), "rope_freqs.weight: got another type or shape"));
  for (const float bad : {0.0f, -1.0f, INFINITY, NAN}) {
    EXPECT_TRUE(Refused(with({8}, 0, FloatBytes({1, 1, 1, 1, 2, 4, 8, bad})), "rope scaling factors: factor: got"));
  }
  EXPECT_TRUE(Refused(With([&](GgufBuilder& b) {
                        b.Text("llama.rope.scaling.type", "linear").F32("llama.rope.scaling.factor", 2.0f);
                        b.Tensor("rope_freqs.weight", {8}, 0, FloatBytes(factors));
                      }),
                      "one of them"));
}

TEST_F(GgufConfigTest, Qwen2HasBiases) {
  const auto config = Load("", nullptr, "qwen2");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, Family::kQwen2);
  EXPECT_TRUE(config->qkv_bias);
  EXPECT_FALSE(config->qk_norm);
}

TEST_F(GgufConfigTest, ABrokenContainerIsAWeightFault) {
  EXPECT_TRUE(FailsWith(LoadModelConfig(dir_.Write("x.gguf", "GGUF")).status(), "WEIGHTS_INVALID", "version"));
}

}  // namespace
}  // namespace refocus
