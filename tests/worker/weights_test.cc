#include "worker/weights.h"

#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "tests/base/model_files.h"

namespace refocus {
namespace {

struct FileTensor {
  std::string name;
  std::vector<int64_t> shape;
};

ModelConfig Small(bool tied = false) {
  ModelConfig config;
  config.layers = 2;
  config.hidden = 12;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 6;
  config.mlp = 10;
  config.vocab = 17;
  config.max_positions = 64;
  config.tied_embeddings = tied;
  return config;
}

std::vector<FileTensor> HfTensors(const ModelConfig& c) {
  std::vector<FileTensor> tensors = {{"model.embed_tokens.weight", {c.vocab, c.hidden}},
                                     {"model.norm.weight", {c.hidden}}};
  if (!c.tied_embeddings) tensors.push_back({"lm_head.weight", {c.vocab, c.hidden}});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string p = "model.layers." + std::to_string(i) + ".";
    tensors.push_back({p + "input_layernorm.weight", {c.hidden}});
    tensors.push_back({p + "self_attn.q_proj.weight", {c.q_dim(), c.hidden}});
    tensors.push_back({p + "self_attn.k_proj.weight", {c.kv_dim(), c.hidden}});
    tensors.push_back({p + "self_attn.v_proj.weight", {c.kv_dim(), c.hidden}});
    tensors.push_back({p + "self_attn.o_proj.weight", {c.hidden, c.q_dim()}});
    if (c.qkv_bias) {
      tensors.push_back({p + "self_attn.q_proj.bias", {c.q_dim()}});
      tensors.push_back({p + "self_attn.k_proj.bias", {c.kv_dim()}});
      tensors.push_back({p + "self_attn.v_proj.bias", {c.kv_dim()}});
    }
    if (c.qk_norm) {
      tensors.push_back({p + "self_attn.q_norm.weight", {c.head_dim}});
      tensors.push_back({p + "self_attn.k_norm.weight", {c.head_dim}});
    }
    tensors.push_back({p + "post_attention_layernorm.weight", {c.hidden}});
    tensors.push_back({p + "mlp.gate_proj.weight", {c.mlp, c.hidden}});
    tensors.push_back({p + "mlp.up_proj.weight", {c.mlp, c.hidden}});
    tensors.push_back({p + "mlp.down_proj.weight", {c.hidden, c.mlp}});
  }
  return tensors;
}

int64_t Elements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

// Follows from the tensor's place in the list and the element's; exact in BF16 and F16.
float Value(size_t tensor, int64_t element) {
  return static_cast<float>((tensor * 37 + static_cast<size_t>(element) * 5) % 251) / 4 - 30;
}

std::string Encode(const std::string& type, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (type == "F32") return Bytes(value);
  if (type == "BF16") return Bytes(static_cast<uint16_t>(bits >> 16));
  if (value == 0) return Bytes(uint16_t{0});  // F16, normal numbers only
  const auto exponent = static_cast<int>((bits >> 23) & 0xff) - 127 + 15;
  return Bytes(
      static_cast<uint16_t>((bits >> 16 & 0x8000) | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ff)));
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text.append(text.size() > 1 ? "," : "").append(std::to_string(size));
  return text + "]";
}

class WeightsTest : public ::testing::Test {
 protected:
  // A folder with these tensors, all of `type`; the values follow Value() unless `special` names a tensor.
  void Write(const std::vector<FileTensor>& tensors, const std::string& type = "F32", const std::string& special = "",
             float special_value = 0) {
    std::string header = "{", data;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const size_t begin = data.size();
      for (int64_t k = 0; k < Elements(tensors[i].shape); ++k) {
        const bool last = k + 1 == Elements(tensors[i].shape);
        data += Encode(type, last && tensors[i].name == special ? special_value : Value(i, k));
      }
      header += (i == 0 ? "\"" : ",\"") + tensors[i].name + "\":{\"dtype\":\"" + type +
                "\",\"shape\":" + ShapeText(tensors[i].shape) + ",\"data_offsets\":[" + std::to_string(begin) + "," +
                std::to_string(data.size()) + "]}";
    }
    dir_.Write("config.json", "{}");
    file_ = dir_.Write("model.safetensors", Safetensors(header + "}", data));
  }
  StatusOr<Weights> Load(const ModelConfig& config, const LoadOptions& options = {}) {
    return LoadWeights(dir_.path(), config, options);
  }
  ::testing::AssertionResult Refused(const ModelConfig& config, const std::string& part) {
    return FailsWith(Load(config).status(), "WEIGHTS_INVALID", part);
  }

  TempDir dir_;
  std::string file_;
};

// In the order of HfTensors().
std::vector<at::Tensor> Listed(const Weights& weights) {
  std::vector<at::Tensor> list = {weights.embedding, weights.final_norm};
  if (!weights.config.tied_embeddings) list.push_back(weights.output);
  for (const LayerWeights& l : weights.layers) {
    list.insert(list.end(), {l.attn_norm, l.wq, l.wk, l.wv, l.wo});
    if (weights.config.qkv_bias) list.insert(list.end(), {l.q_bias, l.k_bias, l.v_bias});
    if (weights.config.qk_norm) list.insert(list.end(), {l.q_norm, l.k_norm});
    list.insert(list.end(), {l.mlp_norm, l.gate, l.up, l.down});
  }
  return list;
}

void ExpectValues(const Weights& weights) {
  const std::vector<FileTensor> tensors = HfTensors(weights.config);
  const std::vector<at::Tensor> list = Listed(weights);
  ASSERT_EQ(list.size(), tensors.size());
  for (size_t i = 0; i < list.size(); ++i) {
    ASSERT_EQ(list[i].sizes().vec(), tensors[i].shape) << tensors[i].name;
    ASSERT_TRUE(list[i].is_contiguous());
    const at::Tensor wide = list[i].to(at::kFloat);
    const float* values = wide.data_ptr<float>();
    for (int64_t k = 0; k < list[i].numel(); ++k) ASSERT_EQ(values[k], Value(i, k)) << tensors[i].name << " " << k;
  }
}

TEST_F(WeightsTest, EveryTensorGoesToItsPlace) {
  for (const char* type : {"F32", "F16", "BF16"}) {
    for (const bool tied : {false, true}) {
      ModelConfig config = Small(tied);
      config.qk_norm = tied;
      config.qkv_bias = !tied;
      config.family = tied ? Family::kQwen3 : Family::kQwen2;
      Write(HfTensors(config), type);
      std::set<uint64_t> hashes;
      for (const int threads : {-1, 1, 2, 7, 100}) {
        for (const at::ScalarType kind : {at::kFloat, at::kBFloat16}) {
          const auto weights = Load(config, {.threads = threads, .type = kind});
          ASSERT_TRUE(weights.ok()) << weights.status();
          ExpectValues(*weights);
          EXPECT_EQ(weights->embedding.scalar_type(), kind);
          EXPECT_EQ(weights->output.is_same(weights->embedding), tied);
          EXPECT_EQ(weights->bytes, (kind == at::kFloat ? 4 : 2) * config.parameters());
          hashes.insert(weights->content_hash);
        }
      }
      EXPECT_EQ(hashes.size(), 1u);
    }
  }
}

TEST_F(WeightsTest, TensorsOfManyPartsAndProgress) {
  ModelConfig config = Small();
  config.vocab = 100'003;  // 4.8 MB a matrix: more than one part
  Write(HfTensors(config), "F32");
  int64_t last = 0, total = 0, calls = 0;
  LoadOptions options;
  options.threads = 3;
  options.progress = [&](int64_t done, int64_t all) {
    EXPECT_GE(done, last);
    last = done;
    total = all;
    ++calls;
  };
  const auto weights = Load(config, options);
  ASSERT_TRUE(weights.ok()) << weights.status();
  ExpectValues(*weights);
  EXPECT_EQ(last, total);
  EXPECT_EQ(total, 4 * config.parameters());
  EXPECT_GE(calls, 1);
  const auto narrow = Load(config, {.threads = 3, .type = at::kBFloat16});
  ASSERT_TRUE(narrow.ok()) << narrow.status();
  ExpectValues(*narrow);
}

TEST_F(WeightsTest, WrongShapeAndMissingTensorNameTensorFoundExpected) {
  const ModelConfig config = Small();
  auto tensors = HfTensors(config);
  tensors[4].shape = {23, 12};
  Write(tensors);
  EXPECT_TRUE(Refused(config, "'model.layers.0.self_attn.q_proj.weight': got [23, 12], expected [24, 12]"));
  tensors = HfTensors(config);
  tensors[4].shape = {12, 24};  // transposed: the same count
  Write(tensors);
  EXPECT_TRUE(Refused(config, "got [12, 24], expected [24, 12]"));
  for (size_t i = 0; i < HfTensors(config).size(); ++i) {
    tensors = HfTensors(config);
    const std::string name = tensors[i].name;
    tensors.erase(tensors.begin() + static_cast<int64_t>(i));
    Write(tensors);
    EXPECT_TRUE(Refused(config, "'" + name + "': got nothing, expected ["));
  }
  EXPECT_EQ(ExitCodeOf(Load(config).status()), kExitWeights);
}

TEST_F(WeightsTest, NothingIsAllocatedBeforeTheChecks) {
  Write(HfTensors(Small()));
  ModelConfig huge = Small();
  huge.vocab = 1 << 22;
  huge.hidden = 1 << 17;  // 4 TiB: an attempt would end as HARDWARE
  EXPECT_TRUE(Refused(huge, "got [17, 12], expected [4194304, 131072]"));
  huge.layers = 0;
  EXPECT_TRUE(FailsWith(Load(huge).status(), "CONFIG_INVALID", "layers"));
}

TEST_F(WeightsTest, TensorsThatTheModelDoesNotUse) {
  ModelConfig config = Small(true);
  auto tensors = HfTensors(config);
  tensors.push_back({"lm_head.weight", {17, 12}});  // a copy of tied embeddings
  tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", {3}});
  Write(tensors);
  EXPECT_TRUE(Load(config).ok());
  tensors.push_back({"model.layers.1.self_attn.q_proj.bias", {24}});
  Write(tensors);
  EXPECT_TRUE(Refused(config, "'model.layers.1.self_attn.q_proj.bias': got a tensor [24], expected none"));
  tensors.back() = {"model.layers.2.input_layernorm.weight", {12}};
  Write(tensors);
  EXPECT_TRUE(Refused(config, "expected none of that name in a llama model of 2 layers"));
}

TEST_F(WeightsTest, CheckFiniteNamesTheTensor) {
  const ModelConfig config = Small();
  for (const auto& [type, value] : std::map<std::string, float>{{"F32", NAN}, {"BF16", INFINITY}}) {
    const std::string name = "model.layers.1.mlp.up_proj.weight";
    Write(HfTensors(config), type, name, value);
    EXPECT_TRUE(Load(config).ok());
    EXPECT_TRUE(FailsWith(Load(config, {.check_finite = true}).status(), "WEIGHTS_INVALID",
                          "'" + name + "': got NaN or infinity"));
    Write(HfTensors(config), type, name, 1.0f);
    EXPECT_TRUE(Load(config, {.check_finite = true}).ok());
  }
  Write(HfTensors(config), "F32", "model.norm.weight", std::numeric_limits<float>::max());
  EXPECT_TRUE(Load(config, {.check_finite = true}).ok());
}

TEST_F(WeightsTest, ValuesOfWiderFilesAreRoundedToNearestEven) {
  const ModelConfig config = Small();
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const auto rounded = [&](float value) {
    Write(HfTensors(config), "F32", name, value);
    const auto weights = Load(config, {.check_finite = true, .type = at::kBFloat16});
    EXPECT_TRUE(weights.ok()) << weights.status();
    return weights.ok() ? weights->layers[1].up.view({-1})[config.mlp * config.hidden - 1].item<float>() : NAN;
  };
  EXPECT_EQ(rounded(1.0f + 0x1p-8f), 1.0f);                    // half way: to even
  EXPECT_EQ(rounded(1.0f + 0x1p-8f + 0x1p-20f), 1.0f + 0x1p-7f);
  EXPECT_EQ(rounded(1.0f + 3 * 0x1p-8f), 1.0f + 2 * 0x1p-7f);  // half way: to even, upwards
  EXPECT_EQ(rounded(-1.0f - 0x1p-9f), -1.0f);
  EXPECT_EQ(rounded(0x1p-133f), 0x1p-133f);                    // subnormal
  // Finite in the file, infinite as bf16.
  Write(HfTensors(config), "F32", name, std::numeric_limits<float>::max());
  EXPECT_TRUE(FailsWith(Load(config, {.check_finite = true, .type = at::kBFloat16}).status(), "WEIGHTS_INVALID",
                        "'" + name + "': got NaN or infinity"));
  Write(HfTensors(config), "F32", name, NAN);
  EXPECT_TRUE(FailsWith(Load(config, {.check_finite = true, .type = at::kBFloat16}).status(), "WEIGHTS_INVALID", name));
}

TEST_F(WeightsTest, AFileCutShortWhileItIsReadIsAnError) {
  const ModelConfig config = Small();
  Write(HfTensors(config));
  LoadOptions options;
  options.threads = 1;
  options.progress = [&](int64_t, int64_t) { std::filesystem::resize_file(file_, 100); };
  EXPECT_TRUE(FailsWith(Load(config, options).status(), "WEIGHTS_INVALID", "file ends at byte"));
}

TEST_F(WeightsTest, HashSeesEveryTensorAndNothingElse) {
  ModelConfig config = Small();
  config.qk_norm = true;
  config.family = Family::kQwen3;
  Write(HfTensors(config));
  const auto weights = Load(config);
  ASSERT_TRUE(weights.ok()) << weights.status();
  const uint64_t hash = HashWeights(*weights);
  EXPECT_EQ(HashWeights(*Load(config, {.threads = 1})), hash);
  std::set<uint64_t> seen = {hash};
  for (const at::Tensor& tensor : Listed(*weights)) {
    float* last = tensor.data_ptr<float>() + tensor.numel() - 1;
    const float kept = *last;
    *last = -kept + 1e-3f;
    EXPECT_TRUE(seen.insert(HashWeights(*weights)).second);
    *last = kept;
  }
  EXPECT_EQ(HashWeights(*weights), hash);
}

TEST_F(WeightsTest, OtherPaths) {
  const LoadOptions options;
  EXPECT_TRUE(
      FailsWith(LoadWeights(dir_.path() + "/absent", Small(), options).status(), "CONFIG_INVALID", "No such file"));
  EXPECT_TRUE(FailsWith(LoadWeights(dir_.Write("x.gguf", ""), Small(), options).status(), "WEIGHTS_INVALID", "magic"));
  dir_.Write("config.json", "{}");
  EXPECT_TRUE(FailsWith(Load(Small()).status(), "WEIGHTS_INVALID", "neither model.safetensors nor"));
}

// One layer whose query matrix (8 heads of 128, 8.4 MB) is read in parts. Element = row number of the file.
TEST_F(WeightsTest, GgufRowsOfLlamaMoveFromPairsToHalves) {
  ModelConfig config = Small(true);
  config.layers = 1;
  config.hidden = 2048;
  config.heads = 8;
  config.kv_heads = 2;
  config.head_dim = 128;
  config.mlp = 1;
  config.vocab = 1;
  GgufBuilder builder;
  const auto rows = [&](const std::string& name, int64_t count, int64_t columns) {
    std::string data;
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t column = 0; column < columns; ++column) data += Bytes(static_cast<float>(row));
    }
    builder.Tensor(name, {static_cast<uint64_t>(columns), static_cast<uint64_t>(count)}, 0, data);
  };
  const auto vector = [&](const std::string& name) {
    builder.Tensor(name, {2048}, 0, FloatBytes(std::vector<float>(2048, 1)));
  };
  builder.Text("general.architecture", "llama");
  rows("token_embd.weight", 1, 2048);
  vector("output_norm.weight");
  vector("blk.0.attn_norm.weight");
  vector("blk.0.ffn_norm.weight");
  rows("blk.0.attn_q.weight", 1024, 2048);
  rows("blk.0.attn_k.weight", 256, 2048);
  rows("blk.0.attn_v.weight", 256, 2048);
  rows("blk.0.attn_output.weight", 2048, 1024);
  rows("blk.0.ffn_gate.weight", 1, 2048);
  rows("blk.0.ffn_up.weight", 1, 2048);
  rows("blk.0.ffn_down.weight", 2048, 1);
  const auto weights = LoadWeights(dir_.Write("m.gguf", builder.File()), config, {.check_finite = true});
  ASSERT_TRUE(weights.ok()) << weights.status();
  const LayerWeights& layer = weights->layers[0];
  for (const at::Tensor& matrix : {layer.wq, layer.wk}) {
    for (int64_t head = 0; head < matrix.size(0) / 128; ++head) {
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t i = 0; i < 64; ++i) {
          const float* row = matrix.data_ptr<float>() + (head * 128 + half * 64 + i) * 2048;
          ASSERT_EQ(row[0], head * 128 + 2 * i + half);
          ASSERT_EQ(row[2047], head * 128 + 2 * i + half);
        }
      }
    }
  }
  for (int64_t row = 0; row < 256; ++row) ASSERT_EQ(layer.wv.data_ptr<float>()[row * 2048], row);
  for (int64_t row = 0; row < 2048; ++row) ASSERT_EQ(layer.wo.data_ptr<float>()[row * 1024], row);
  for (int64_t row = 0; row < 2048; ++row) ASSERT_EQ(layer.down.data_ptr<float>()[row], row);
}

// tests/base/make_golden.py wrote both: every GGUF type against transformers' reading of it.
TEST(GoldenWeightsTest, GgufEqualsWhatTransformersMakesOfIt) {
  for (const std::string name : {"llama", "qwen3"}) {
    const std::string folder = std::string(REFOCUS_SOURCE_DIR) + "/tests/base/golden/" + name;
    const auto config = LoadModelConfig(folder);
    const auto gguf_config = LoadModelConfig(folder + ".gguf");
    ASSERT_TRUE(config.ok()) << config.status();
    ASSERT_TRUE(gguf_config.ok()) << gguf_config.status();
    EXPECT_EQ(config->Fingerprint(), gguf_config->Fingerprint());
    EXPECT_EQ(config->eos_tokens, gguf_config->eos_tokens);
    EXPECT_EQ(config->bos_token, gguf_config->bos_token);
    const auto expected = LoadWeights(folder, *config, {});
    const auto actual = LoadWeights(folder + ".gguf", *gguf_config, {.check_finite = true});
    ASSERT_TRUE(expected.ok()) << expected.status();
    ASSERT_TRUE(actual.ok()) << actual.status();
    const auto expected_list = Listed(*expected), actual_list = Listed(*actual);
    ASSERT_EQ(expected_list.size(), actual_list.size());
    for (size_t i = 0; i < expected_list.size(); ++i) {
      ASSERT_EQ(expected_list[i].sizes(), actual_list[i].sizes());
      EXPECT_EQ(std::memcmp(expected_list[i].data_ptr(), actual_list[i].data_ptr(), expected_list[i].nbytes()), 0)
          << name << ": " << HfTensors(*config)[i].name;
    }
    EXPECT_EQ(HashWeights(*expected), HashWeights(*actual));
    // As bf16: what LibTorch's own rounding makes of the fp32 values.
    const auto narrow = LoadWeights(folder + ".gguf", *gguf_config, {.type = at::kBFloat16});
    ASSERT_TRUE(narrow.ok()) << narrow.status();
    const auto narrow_list = Listed(*narrow);
    for (size_t i = 0; i < expected_list.size(); ++i) {
      EXPECT_TRUE(narrow_list[i].equal(expected_list[i].to(at::kBFloat16))) << HfTensors(*config)[i].name;
    }
  }
}

// The hash was taken when all 162,826,560 values equalled those of transformers 5.23.
TEST(GoldenWeightsTest, RealModel) {
  const std::string path = std::string(REFOCUS_SOURCE_DIR) + "/.deps/data/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is absent: run ./setup";
  const auto config = LoadModelConfig(path);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->parameters(), 134'515'008);
  const auto weights = LoadWeights(path, *config, {.check_finite = true});
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(HashWeights(*weights), 0x903321496e3c0ee2u);
  const auto narrow = LoadWeights(path, *config, {.type = at::kBFloat16});
  ASSERT_TRUE(narrow.ok()) << narrow.status();
  EXPECT_TRUE(narrow->embedding.equal(weights->embedding.to(at::kBFloat16)));
  EXPECT_TRUE(narrow->layers[29].wq.equal(weights->layers[29].wq.to(at::kBFloat16)));
}

}  // namespace
}  // namespace refocus
