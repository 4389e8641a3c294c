// Thousands of damaged files, the same on every run: a reader either refuses one or hands out ranges that lie inside
// it.
#include <cmath>
#include <random>

#include "base/gguf.h"
#include "base/model_config.h"
#include "base/safetensors.h"
#include "tests/base/largest_allocation.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

constexpr int kMutations = 10'000;

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  // One to three edits: bytes, numbers that parsers dislike, cuts, repeated and moved ranges, digits and brackets.
  std::string Mutate(std::string bytes) {
    for (uint64_t edits = 1 + Below(3); edits > 0 && !bytes.empty(); --edits) Edit(bytes);
    return bytes;
  }

 private:
  uint64_t Below(uint64_t limit) { return random_() % limit; }

  void Edit(std::string& bytes) {
    constexpr uint64_t kNumbers[] = {0,
                                     1,
                                     2,
                                     7,
                                     0xff,
                                     0x7fff,
                                     0xffff,
                                     0x7fffffff,
                                     0x80000000,
                                     0xffffffff,
                                     uint64_t{1} << 32,
                                     uint64_t{1} << 62,
                                     INT64_MAX,
                                     uint64_t{1} << 63,
                                     ~uint64_t{0},
                                     ~uint64_t{7}};
    constexpr std::string_view kText = "{}[]\",:0123456789-e.\\\xff";
    const size_t at = Below(bytes.size());
    switch (Below(7)) {
      case 0: bytes[at] = static_cast<char>(Below(256)); return;
      case 1: bytes[at] = static_cast<char>(bytes[at] ^ (1 << Below(8))); return;
      case 2: {
        const std::string number = Bytes(kNumbers[Below(std::size(kNumbers))]);
        const size_t width = Below(2) == 0 ? 4 : 8;
        for (size_t i = 0; i < width && at + i < bytes.size(); ++i) bytes[at + i] = number[i];
        return;
      }
      case 3: bytes.resize(at); return;
      case 4: bytes.insert(Below(bytes.size()), bytes.substr(at, 1 + Below(64))); return;
      case 5: bytes.erase(at, 1 + Below(16)); return;
      default: bytes[at] = kText[Below(kText.size())]; return;
    }
  }

  std::mt19937_64 random_;
};

// What a reader may hand out for a file of `size` bytes.
void CheckTable(const TensorTable& table, int64_t size) {
  for (const auto& [name, info] : table) {
    ASSERT_GE(info.offset, 0);
    ASSERT_GE(info.bytes, 0);
    ASSERT_LE(info.offset, size);
    ASSERT_LE(info.bytes, size - info.offset);
    ASSERT_EQ(*TensorBytes(info.type, info.elements()), info.bytes);
    std::string encoded(static_cast<size_t>(info.bytes), '\0');
    ASSERT_TRUE(ReadTensorBytes(info, encoded.data()).ok());
    std::vector<float> values(static_cast<size_t>(info.elements()));
    DecodeToFloat(info.type, encoded.data(), info.elements(), values.data());
  }
}

// Runs `read` on every mutation of `bytes`; it returns whether the file was accepted. Both outcomes must occur.
template <typename Read>
void RunMutations(const std::string& bytes, uint64_t seed, Read read) {
  Mutator mutator(seed);
  int accepted = 0;
  for (int i = 0; i < kMutations && !testing::Test::HasFatalFailure(); ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed) + ", mutation " + std::to_string(i));
    accepted += read(mutator.Mutate(bytes)) ? 1 : 0;
  }
  EXPECT_LT(TakeLargestAllocation(), 1u << 20);
  EXPECT_GT(accepted, kMutations / 100);
  EXPECT_LT(accepted, kMutations);
}

// Whatever a configuration says that is accepted: positions turn by finite angles.
void CheckFrequencies(const ModelConfig& config) {
  const std::vector<float> frequencies = InverseFrequencies(config.rope_theta, config.head_dim, config.rope);
  ASSERT_EQ(static_cast<int64_t>(frequencies.size()), config.head_dim / 2);
  for (const float frequency : frequencies) ASSERT_TRUE(std::isfinite(frequency) && frequency >= 0) << frequency;
  ASSERT_TRUE(std::isfinite(config.rope.attention_factor));
}

std::string SmallGguf() {
  GgufBuilder builder;
  builder.Text("general.architecture", "llama").U32("llama.block_count", 1).U32("llama.embedding_length", 32);
  builder.U32("llama.attention.head_count", 2).U32("llama.feed_forward_length", 32).U32("llama.context_length", 64);
  builder.F32("llama.attention.layer_norm_rms_epsilon", 1e-5f).Texts("tokenizer.ggml.tokens", {"a", "b", "cc"});
  builder.Raw("tokenizer.ggml.scores", 9, Bytes<uint32_t>(6) + Bytes<uint64_t>(2) + Bytes(1.0f) + Bytes(2.0f));
  builder.U32("tokenizer.ggml.eos_token_id", 2);
  builder.Tensor("token_embd.weight", {32, 3}, 8, std::string(3 * 34, 'e'));
  builder.Tensor("output_norm.weight", {32}, 0, std::string(128, 'n'));
  builder.Tensor("blk.0.attn_q.weight", {32, 2}, 3, std::string(40, 'q'));
  return builder.File();
}

// Stretched RoPE, biases, blocks of 256.
std::string SmallStretchedGguf(bool factors) {
  GgufBuilder builder;
  const std::string arch = factors ? "llama" : "qwen2";
  builder.Text("general.architecture", arch).U32(arch + ".block_count", 1).U32(arch + ".embedding_length", 256);
  builder.U32(arch + ".attention.head_count", 32).U32(arch + ".feed_forward_length", 32);
  builder.U32(arch + ".context_length", 64).F32(arch + ".attention.layer_norm_rms_epsilon", 1e-5f);
  if (!factors) {
    builder.Text(arch + ".rope.scaling.type", "yarn").F32(arch + ".rope.scaling.factor", 4.0f);
    builder.U32(arch + ".rope.scaling.original_context_length", 16).F32(arch + ".rope.scaling.attn_factor", 1.0f);
  }
  builder.Tensor("token_embd.weight", {256, 2}, 12, std::string(2 * 144, 'e'));
  builder.Tensor("output.weight", {256, 2}, 14, std::string(2 * 210, 'o'));
  builder.Tensor("blk.0.attn_q.weight", {32, 2}, 2, std::string(36, 'q'));
  builder.Tensor("blk.0.attn_q.bias", {32}, 0, std::string(128, 'b'));
  if (factors) builder.Tensor("rope_freqs.weight", {4}, 0, FloatBytes({1, 1, 2, 8}));
  return builder.File();
}

void RunGgufMutations(const std::string& good, uint64_t seed) {
  const TempDir dir;
  ASSERT_TRUE(LoadModelConfig(dir.Write("m.gguf", good)).ok());
  RunMutations(good, seed, [&](const std::string& bytes) {
    const std::string path = dir.Write("m.gguf", bytes);
    const auto file = ReadGguf(path);
    if (file.ok()) {
      CheckTable(file->tensors, static_cast<int64_t>(bytes.size()));
    } else {
      EXPECT_EQ(DetailOf(file.status()).reason, "WEIGHTS_INVALID");
    }
    const auto config = LoadModelConfig(path);
    EXPECT_TRUE(config.ok() || ExitCodeOf(config.status()) != kExitError) << config.status();
    if (config.ok()) CheckFrequencies(*config);
    return file.ok();
  });
}

TEST(MutationTest, Gguf) { RunGgufMutations(SmallGguf(), 1); }
TEST(MutationTest, GgufWithStretchedRope) { RunGgufMutations(SmallStretchedGguf(false), 5); }
TEST(MutationTest, GgufWithRopeFactors) { RunGgufMutations(SmallStretchedGguf(true), 6); }

TEST(MutationTest, SafetensorsHeader) {
  const TempDir dir;
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
      R"("b":{"dtype":"BF16","shape":[5],"data_offsets":[24,34]},)"
      R"("c":{"dtype":"F16","shape":[],"data_offsets":[34,36]}})";
  RunMutations(Safetensors(header, std::string(36, 'd')), 2, [&](const std::string& bytes) {
    const auto table = ReadSafetensorsHeader(dir.Write("m.safetensors", bytes));
    if (table.ok()) {
      CheckTable(*table, static_cast<int64_t>(bytes.size()));
    } else {
      EXPECT_EQ(DetailOf(table.status()).reason, "WEIGHTS_INVALID");
    }
    return table.ok();
  });
}

TEST(MutationTest, SafetensorsIndex) {
  const TempDir dir;
  dir.Write("a.safetensors", Safetensors(R"({"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "1234"));
  RunMutations(R"({"metadata": {"total_size": 4}, "weight_map": {"t": "a.safetensors"}})", 3,
               [&](const std::string& bytes) {
                 dir.Write("model.safetensors.index.json", bytes);
                 const auto table = ReadSafetensorsFolder(dir.path());
                 EXPECT_TRUE(table.ok() || DetailOf(table.status()).reason == "WEIGHTS_INVALID") << table.status();
                 return table.ok();
               });
}

void RunConfigMutations(const std::string& text, uint64_t seed) {
  const TempDir dir;
  RunMutations(text, seed, [&](const std::string& bytes) {
    dir.Write("config.json", bytes);
    const auto config = LoadModelConfig(dir.path());
    if (config.ok()) {
      EXPECT_TRUE(config->Validate("again").ok());
      CheckFrequencies(*config);
    } else {
      EXPECT_EQ(DetailOf(config.status()).reason, "CONFIG_INVALID");
    }
    return config.ok();
  });
}

TEST(MutationTest, HuggingFaceConfig) {
  const std::string text =
      R"({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 64,)"
      R"( "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,)"
      R"( "vocab_size": 50,)"
      R"( "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "eos_token_id": [1, 2],)"
      R"( "rms_norm_eps": 1e-6})";
  RunConfigMutations(text, 4);
}

TEST(MutationTest, HuggingFaceConfigWithStretchedRope) {
  const std::string start =
      R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64,)"
      R"( "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 50,)"
      R"( "use_sliding_window": false, "sliding_window": 64, "max_position_embeddings": 256, "rope_theta": 1e6,)";
  RunConfigMutations(start +
                         R"( "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1,)"
                         R"( "mscale": 0.7, "mscale_all_dim": 1.5, "original_max_position_embeddings": 64}})",
                     7);
  RunConfigMutations(start +
                         R"( "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,)"
                         R"( "high_freq_factor": 4.0, "original_max_position_embeddings": 64}})",
                     8);
}

}  // namespace
}  // namespace refocus
