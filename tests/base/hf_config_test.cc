#include <gtest/gtest.h>

#include <sys/stat.h>

#include <cmath>
#include <map>

#include "base/model_config.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

using Fields = std::map<std::string, std::string>;  // name, JSON text

Fields Llama() {
  return {{"architectures", R"(["LlamaForCausalLM"])"},
          {"model_type", R"("llama")"},
          {"num_hidden_layers", "3"},
          {"hidden_size", "96"},
          {"num_attention_heads", "6"},
          {"num_key_value_heads", "2"},
          {"intermediate_size", "160"},
          {"vocab_size", "101"},
          {"max_position_embeddings", "4096"},
          {"rms_norm_eps", "1e-05"},
          {"rope_theta", "500000.0"},
          {"eos_token_id", "2"},
          {"bos_token_id", "1"}};
}

Fields Qwen3() {
  Fields fields = Llama();
  fields["architectures"] = R"(["Qwen3ForCausalLM"])";
  fields["model_type"] = R"("qwen3")";
  fields["head_dim"] = "32";
  return fields;
}

Fields Mistral() {
  Fields fields = Llama();
  fields["architectures"] = R"(["MistralForCausalLM"])";
  fields["model_type"] = R"("mistral")";
  fields["sliding_window"] = "4096";
  return fields;
}

class HfConfigTest : public ::testing::Test {
 protected:
  StatusOr<ModelConfig> LoadText(const std::string& text) {
    dir_.Write("config.json", text);
    return LoadModelConfig(dir_.path());
  }
  StatusOr<ModelConfig> Load(const Fields& fields) {
    std::string text = "{\n";
    for (const auto& [name, value] : fields) text += (text.size() > 2 ? ",\n" : "") + ("  \"" + name + "\": ") + value;
    return LoadText(text + "\n}\n");
  }
  // Llama with one field changed; an empty value removes it.
  StatusOr<ModelConfig> With(const std::string& name, const std::string& value) {
    Fields fields = Llama();
    fields[name] = value;
    if (value.empty()) fields.erase(name);
    return Load(fields);
  }
  ::testing::AssertionResult Refused(const StatusOr<ModelConfig>& config, const std::string& part) {
    return FailsWith(config.status(), "CONFIG_INVALID", part);
  }
  ::testing::AssertionResult Refused(const std::string& name, const std::string& value, const std::string& part) {
    return Refused(With(name, value), part);
  }

  TempDir dir_;
};

TEST_F(HfConfigTest, Llama) {
  const auto config = Load(Llama());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, Family::kLlama);
  EXPECT_EQ(config->layers, 3);
  EXPECT_EQ(config->hidden, 96);
  EXPECT_EQ(config->heads, 6);
  EXPECT_EQ(config->kv_heads, 2);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->mlp, 160);
  EXPECT_EQ(config->vocab, 101);
  EXPECT_EQ(config->max_positions, 4096);
  EXPECT_EQ(config->rope_theta, 500000.0);
  EXPECT_EQ(config->rms_eps, 1e-5);
  EXPECT_FALSE(config->qk_norm);
  EXPECT_FALSE(config->tied_embeddings);
  EXPECT_EQ(config->bos_token, 1);
  EXPECT_EQ(config->eos_tokens, std::vector<int32_t>{2});
  EXPECT_EQ(config->name, std::filesystem::path(dir_.path()).filename());
}

TEST_F(HfConfigTest, Qwen3HasItsOwnHeadSizeAndNorms) {
  auto config = Load(Qwen3());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, Family::kQwen3);
  EXPECT_EQ(config->head_dim, 32);
  EXPECT_EQ(config->q_dim(), 192);
  EXPECT_TRUE(config->qk_norm);
  Fields fields = Qwen3();
  fields.erase("head_dim");
  EXPECT_EQ(Load(fields)->head_dim, 128);
}

TEST_F(HfConfigTest, DefaultsOfAbsentAndNullFields) {
  for (const std::string& value : {std::string(), std::string("null")}) {
    EXPECT_EQ(With("num_key_value_heads", value)->kv_heads, 6);
    EXPECT_EQ(With("head_dim", value)->head_dim, 16);
    EXPECT_EQ(With("rope_theta", value)->rope_theta, 10000.0);
    EXPECT_EQ(With("rms_norm_eps", value)->rms_eps, 1e-6);
    EXPECT_EQ(With("max_position_embeddings", value)->max_positions, 2048);
    EXPECT_EQ(With("tie_word_embeddings", value)->tied_embeddings, false);
    EXPECT_EQ(With("bos_token_id", value)->bos_token, std::nullopt);
    EXPECT_TRUE(With("eos_token_id", value)->eos_tokens.empty());
    for (const char* name :
         {"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"}) {
      EXPECT_TRUE(Refused(name, value, std::string(name) + ": got nothing, allowed an integer"));
    }
  }
  EXPECT_TRUE(With("tie_word_embeddings", "true")->tied_embeddings);
}

TEST_F(HfConfigTest, SyntaxErrorsNameLineAndColumn) {
  EXPECT_TRUE(Refused(LoadText(""), "config.json: line 1, column 1: the file is empty"));
  EXPECT_TRUE(Refused(LoadText("\xef\xbb\xbf{}"), "line 1, column 1: got a byte order mark"));
  EXPECT_TRUE(Refused(LoadText("{\n  // why\n}"), "line 2, column 3: "));
  EXPECT_TRUE(Refused(LoadText("{\n \"a\": 1,\n}"), "line 3, column 1: "));
  EXPECT_TRUE(Refused(LoadText("{\"rope_theta\": NaN}"), "line 1, column "));
  EXPECT_TRUE(Refused(LoadText("{\"a\": \"\xff\"}"), "line 1, column 8: "));
  EXPECT_TRUE(Refused(LoadText("[]"), "file: got [], allowed an object"));
  EXPECT_TRUE(Refused(LoadText("{\"a\": 1, \"a\": 2}"), "key 'a' appears twice"));
  EXPECT_TRUE(Refused(LoadText(std::string(10'000, '[')), "nested deeper than 64"));
  EXPECT_TRUE(Refused(LoadText("{} {}"), "line 1, column 4: "));
  EXPECT_TRUE(Refused(LoadText(std::string((4 << 20) + 1, ' ')), "allowed at most 4194304"));
}

TEST_F(HfConfigTest, HeadsThatDoNotDivide) {
  EXPECT_TRUE(Refused("num_key_value_heads", "4", "key/value heads: got 4, allowed divisors of the 6"));
  EXPECT_TRUE(Refused("num_attention_heads", "10", "hidden_size: got 96, allowed multiples of the 10"));
  EXPECT_TRUE(Refused("head_dim", "15", "head size: got 15, allowed even"));
}

TEST_F(HfConfigTest, SizesOutOfRange) {
  for (const char* name : {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                           "intermediate_size", "vocab_size", "max_position_embeddings"}) {
    for (const char* value : {"0", "-1", "1000000000000000000", "9223372036854775807"}) {
      EXPECT_TRUE(Refused(name, value, value)) << name;
    }
    EXPECT_TRUE(Refused(name, "18446744073709551615", "allowed an integer")) << name;
    EXPECT_TRUE(Refused(name, "1e18", std::string(name) + ": got 1e+18, allowed an integer"));
  }
}

TEST_F(HfConfigTest, RopeThetaAndEpsilon) {
  for (const char* value : {"0", "-1.0", "1e300"}) {
    EXPECT_TRUE(Refused("rope_theta", value, "rope_theta: got"));
    EXPECT_TRUE(Refused("rms_norm_eps", value, "rms_norm_eps: got"));
  }
  EXPECT_TRUE(Refused("rope_theta", "1e999", ""));
  EXPECT_TRUE(Refused("rope_theta", "\"10000\"", "rope_theta: got \"10000\", allowed a number"));
  EXPECT_EQ(With("rope_theta", "10000")->rope_theta, 10000.0);  // an integer is a number
}

TEST_F(HfConfigTest, RopeScaling) {
  EXPECT_EQ(With("rope_scaling", "null")->rope.Text(), "none");
  EXPECT_TRUE(With("rope_scaling", R"({"rope_type": "default"})").ok());
  EXPECT_TRUE(With("rope_scaling", R"({"type": "default"})").ok());
  const auto linear = With("rope_scaling", R"({"type": "linear", "factor": 2.0})");
  EXPECT_EQ(linear->rope.Text(), "linear:2");
  EXPECT_EQ(linear->max_positions, 4096);  // as the file says: transformers does not stretch it
  for (const char* type : {"dynamic", "longrope", "su", "mrope", "proportional", "no such"}) {
    EXPECT_TRUE(Refused("rope_scaling", R"({"factor": 2.0, "rope_type": ")" + std::string(type) + "\"}",
                        "rope_scaling.rope_type: got '" + std::string(type) + "', allowed default, linear, llama3, yarn"));
  }
  EXPECT_TRUE(Refused("rope_scaling", R"({"type": "mrope", "mrope_section": [16, 24, 24]})", "mrope"));
  EXPECT_TRUE(Refused("rope_scaling", R"({"type": "yarn", "rope_type": "linear", "factor": 2.0})",
                      "rope_scaling.type: got 'yarn', allowed the same as rope_type ('linear')"));
  EXPECT_TRUE(Refused("rope_scaling", R"({"rope_type": 7})", "a string"));
  EXPECT_TRUE(Refused("rope_scaling", R"({"factor": 2.0})", "rope_scaling.factor: got 2.0, allowed 1, or a rope_type"));
  EXPECT_TRUE(Refused("rope_scaling", "[]", "an object or null"));
  EXPECT_TRUE(Refused("partial_rotary_factor", "0.5", "partial_rotary_factor: got 0.5"));
  EXPECT_TRUE(Refused("rope_scaling", R"({"type": "linear"})", "rope_scaling.factor: got nothing"));
  EXPECT_TRUE(Refused("rope_scaling", R"({"type": "linear", "factor": "2"})", "rope_scaling.factor: got \"2\""));
  for (const char* factor : {"0.5", "0", "-2.0", "1e7"}) {
    EXPECT_TRUE(Refused("rope_scaling", R"({"type": "linear", "factor": )" + std::string(factor) + "}",
                        "rope scaling linear: factor: got"));
  }
}

TEST_F(HfConfigTest, Llama3Scaling) {
  const std::string fields = R"("rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0)";
  const auto config = With("rope_scaling", "{" + fields + R"(, "original_max_position_embeddings": 1024})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.Text(), "llama3:8:1024");
  EXPECT_EQ(config->rope.attention_factor, 1.0);
  EXPECT_EQ(config->max_positions, 4096);  // as stated, though 8 times the original window is more
  EXPECT_EQ(With("rope_scaling", "{" + fields + "}")->rope.original_positions, 4096);
  EXPECT_TRUE(Refused("rope_scaling", R"({"rope_type": "llama3", "factor": 8.0})", "low_freq_factor: got nothing"));
  EXPECT_TRUE(Refused("rope_scaling",
                      R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0})",
                      "high_freq_factor: got 1, allowed above low_freq_factor (4)"));
  EXPECT_TRUE(Refused("rope_scaling", "{" + fields + R"(, "original_max_position_embeddings": 0})", "got 0"));
  EXPECT_TRUE(Refused("rope_scaling", "{" + fields + R"(, "original_max_position_embeddings": 8192.5})", "an integer"));
}

TEST_F(HfConfigTest, YarnScaling) {
  const auto yarn = [&](const std::string& more) {
    return With("rope_scaling", R"({"type": "yarn", "factor": 4.0)" + more + "}");
  };
  const auto config = yarn("");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.Text(), "yarn:4:4096");
  EXPECT_EQ(config->max_positions, 16384);
  EXPECT_DOUBLE_EQ(config->rope.attention_factor, 0.1 * std::log(4.0) + 1.0);
  EXPECT_EQ(config->rope.beta_fast, 32.0);
  EXPECT_EQ(config->rope.beta_slow, 1.0);
  EXPECT_TRUE(config->rope.truncate);
  EXPECT_EQ(yarn(R"(, "attention_factor": 1.5)")->rope.attention_factor, 1.5);
  EXPECT_DOUBLE_EQ(yarn(R"(, "mscale": 0.5, "mscale_all_dim": 2.0)")->rope.attention_factor,
                   (0.05 * std::log(4.0) + 1.0) / (0.2 * std::log(4.0) + 1.0));
  EXPECT_DOUBLE_EQ(yarn(R"(, "mscale": 0.5)")->rope.attention_factor, 0.1 * std::log(4.0) + 1.0);  // both or none
  EXPECT_EQ(yarn(R"(, "beta_fast": 16, "beta_slow": 2)")->rope.beta_fast, 16.0);
  EXPECT_FALSE(yarn(R"(, "truncate": false)")->rope.truncate);
  // The factor follows from both windows where it is left out; one beside rope_scaling counts before one within.
  EXPECT_EQ(With("rope_scaling", R"({"type": "yarn", "original_max_position_embeddings": 1024})")->rope.factor, 4.0);
  Fields fields = Llama();
  fields["original_max_position_embeddings"] = "512";
  fields["rope_scaling"] = R"({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024})";
  EXPECT_EQ(Load(fields)->rope.original_positions, 512);
  EXPECT_TRUE(Refused(yarn(R"(, "beta_fast": 1, "beta_slow": 2)"), "beta_fast: got 1, allowed above beta_slow"));
  EXPECT_TRUE(Refused(yarn(R"(, "attention_factor": 0)"), "attention_factor: got 0"));
  EXPECT_TRUE(Refused(yarn(R"(, "truncate": 1)"), "truncate: got 1, allowed true or false"));
}

TEST_F(HfConfigTest, RopeParameters) {
  Fields fields = Llama();
  fields.erase("rope_theta");
  fields["rope_parameters"] = R"({"rope_type": "default", "rope_theta": 250000.0})";
  EXPECT_EQ(Load(fields)->rope_theta, 250000.0);
  fields["rope_theta"] = "250000";
  EXPECT_EQ(Load(fields)->rope_theta, 250000.0);
  fields["rope_theta"] = "10000.0";
  EXPECT_TRUE(Refused(Load(fields), "rope_theta: got 10000.0"));
  fields.erase("rope_theta");
  fields["rope_parameters"] = R"({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0})";
  EXPECT_EQ(Load(fields)->rope.Text(), "yarn:4:4096");
  EXPECT_EQ(Load(fields)->rope_theta, 1e6);
  fields["rope_scaling"] = R"({"rope_type": "linear", "factor": 4.0})";
  EXPECT_TRUE(Refused(Load(fields), "one of rope_scaling and rope_parameters"));
  fields.erase("rope_scaling");
  fields["rope_parameters"] = R"({"rope_type": "default", "rope_theta": 0})";
  EXPECT_TRUE(Refused(Load(fields), "rope_theta: got 0"));
  fields["rope_parameters"] = R"({"full_attention": {"rope_type": "linear", "rope_theta": 1e6}})";
  EXPECT_TRUE(Refused(Load(fields), "rope_parameters.full_attention"));
  fields["rope_parameters"] = R"({"rope_theta": 1e6, "partial_rotary_factor": 0.5})";
  EXPECT_TRUE(Refused(Load(fields), "partial_rotary_factor"));
}

TEST_F(HfConfigTest, WrongTypes) {
  for (const char* value : {"\"32\"", "32.5", "32.0", "true", "[32]", "{}"}) {
    EXPECT_TRUE(Refused("num_hidden_layers", value, "num_hidden_layers: got ")) << value;
    EXPECT_TRUE(Refused("head_dim", value, "head_dim: got ")) << value;
  }
  EXPECT_TRUE(Refused("tie_word_embeddings", "1", "tie_word_embeddings: got 1, allowed true or false"));
  EXPECT_TRUE(Refused("rms_norm_eps", "\"1e-5\"", "a number"));
}

TEST_F(HfConfigTest, ArchitecturesListTheSupportedOnes) {
  const char* allowed =
      "LlamaForCausalLM (llama), MistralForCausalLM (mistral), Qwen2ForCausalLM (qwen2), Qwen3ForCausalLM (qwen3)";
  Fields fields = Llama();
  fields["architectures"] = R"(["MixtralForCausalLM"])";
  fields["model_type"] = R"("mixtral")";
  EXPECT_TRUE(Refused(Load(fields), "architectures: got 'MixtralForCausalLM' with model_type 'mixtral'"));
  EXPECT_TRUE(Refused(Load(fields), allowed));
  EXPECT_TRUE(Refused("architectures", R"(["LlamaForSequenceClassification"])", allowed));
  EXPECT_TRUE(Refused("architectures", R"(["LlamaForCausalLM", "Qwen3ForCausalLM"])", allowed));
  EXPECT_TRUE(Refused("architectures", "[]", allowed));
  EXPECT_TRUE(Refused("model_type", R"("qwen3")", allowed));  // contradicts the architecture
  EXPECT_TRUE(With("architectures", "").ok());
  EXPECT_TRUE(With("model_type", "").ok());
  fields.erase("architectures");
  fields.erase("model_type");
  EXPECT_TRUE(Refused(Load(fields), allowed));
}

TEST_F(HfConfigTest, UnsupportedFeaturesByName) {
  EXPECT_TRUE(Refused("attention_bias", "true", "attention_bias: got true, allowed false"));
  EXPECT_TRUE(Refused("mlp_bias", "true", "mlp_bias: got true"));
  EXPECT_TRUE(Refused("use_mrope", "true", "use_mrope: got true"));
  EXPECT_TRUE(Refused("num_local_experts", "8", "num_local_experts: got 8, allowed 0 (experts"));
  EXPECT_TRUE(Refused("num_experts", "128", "num_experts: got 128"));
  EXPECT_TRUE(Refused("attn_logit_softcapping", "50.0", "attn_logit_softcapping: got 50.0"));
  EXPECT_TRUE(Refused("final_logit_softcapping", "30.0", "final_logit_softcapping: got 30.0"));
  EXPECT_TRUE(Refused("hidden_act", "\"gelu\"", "hidden_act: got 'gelu', allowed silu"));
  EXPECT_TRUE(Refused("quantization_config", R"({"quant_method": "gptq"})", "quantization_config: got"));
  EXPECT_TRUE(
      Refused("layer_types", R"(["full_attention", "sliding_attention"])", "layer_types: got \"sliding_attention\""));
  EXPECT_TRUE(With("layer_types", R"(["full_attention"])").ok());
  EXPECT_TRUE(With("attention_bias", "false").ok());
  EXPECT_TRUE(With("attn_logit_softcapping", "null").ok());
}

TEST_F(HfConfigTest, SlidingWindowsThatHideKeys) {
  Fields fields = Mistral();
  EXPECT_TRUE(Load(fields).ok());
  EXPECT_TRUE(Refused(LoadModelConfig(dir_.path(), "yarn:4"), "sliding_window: got 4096")) << "the request widens it";
  fields["sliding_window"] = "4095";
  EXPECT_TRUE(Refused(Load(fields), "sliding_window: got 4095, allowed none, or one of at least the 4096 positions"));
  fields["sliding_window"] = "null";
  EXPECT_TRUE(Load(fields).ok());
  EXPECT_TRUE(LoadModelConfig(dir_.path(), "yarn:4").ok());
  fields.erase("sliding_window");  // transformers then takes 4096
  EXPECT_TRUE(Load(fields).ok());
  fields["max_position_embeddings"] = "32768";
  EXPECT_TRUE(Refused(Load(fields), "sliding_window: got 4096"));
  for (const char* family : {"Qwen2", "Qwen3"}) {
    fields = Llama();
    fields["architectures"] = "[\"" + std::string(family) + "ForCausalLM\"]";
    fields["model_type"] = "\"q" + std::string(family + 1) + "\"";
    fields["sliding_window"] = "1024";
    fields["max_window_layers"] = "1";
    EXPECT_TRUE(Load(fields).ok()) << "stated but not used";
    fields["use_sliding_window"] = "true";
    EXPECT_TRUE(Refused(Load(fields), "sliding_window: got 1024"));
    fields["max_window_layers"] = "3";  // all layers come before the first with a window
    EXPECT_TRUE(Load(fields).ok());
    fields["max_window_layers"] = "0";
    fields["layer_types"] = R"(["full_attention", "full_attention", "full_attention"])";
    EXPECT_TRUE(Load(fields).ok()) << "the list decides";
  }
  EXPECT_TRUE(Refused("sliding_window", "1024", "sliding_window: got 1024"));
}

TEST_F(HfConfigTest, RemoteCodeKeysAreIgnoredWithAWarning) {
  testing::internal::CaptureStderr();
  EXPECT_TRUE(With("auto_map", R"({"AutoModelForCausalLM": "modeling.Evil"})").ok());
  EXPECT_NE(testing::internal::GetCapturedStderr().find("auto_map: ignored"), std::string::npos);
}

TEST_F(HfConfigTest, StopTokens) {
  EXPECT_EQ(With("eos_token_id", "[5, 7, 5]")->eos_tokens, (std::vector<int32_t>{5, 7}));
  for (const char* value : {"-1", "101", "2147483648", "1.5", "\"2\"", "[2, null]", "18446744073709551615"}) {
    EXPECT_TRUE(Refused("eos_token_id", value, "eos_token_id: got ")) << value;
    EXPECT_TRUE(Refused("bos_token_id", value, "bos_token_id: got ")) << value;
  }
}

TEST_F(HfConfigTest, GenerationConfigDecidesStopTokens) {
  dir_.Write("generation_config.json", R"({"eos_token_id": [9, 8]})");
  EXPECT_EQ(Load(Llama())->eos_tokens, (std::vector<int32_t>{9, 8}));
  dir_.Write("generation_config.json", R"({"temperature": 0.6})");
  EXPECT_EQ(Load(Llama())->eos_tokens, (std::vector<int32_t>{2}));
  dir_.Write("generation_config.json", R"({"eos_token_id": 300})");
  EXPECT_TRUE(Refused(Load(Llama()), "eos_token_id: got 300, allowed 0 to 100"));
  dir_.Write("generation_config.json", "{");
  EXPECT_TRUE(Refused(Load(Llama()), "generation_config.json: line 1, column "));
  std::filesystem::remove(dir_.path() + "/generation_config.json");
  ASSERT_EQ(mkfifo((dir_.path() + "/generation_config.json").c_str(), 0600), 0);
  EXPECT_TRUE(Refused(Load(Llama()), "got a FIFO"));
}

}  // namespace
}  // namespace refocus
