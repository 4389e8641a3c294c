#include "worker/random_weights.h"

#include <algorithm>
#include <cmath>
#include <ostream>
#include <vector>

#include "tests/base/model_files.h"
#include "worker/weights.h"

namespace refocus {
namespace {

std::string Folder(const std::string& name) {
  return std::string(REFOCUS_SOURCE_DIR) + "/tests/base/golden/" + name;
}

struct Sums {
  uint16_t first, last;
  int64_t sum;  // of all elements' bits
  bool operator==(const Sums&) const = default;
};

void PrintTo(const Sums& s, std::ostream* out) {
  *out << std::hex << s.first << " " << s.last << std::dec << " " << s.sum;
}

Sums SumsOf(const at::Tensor& tensor) {
  const at::Tensor values = tensor.to(at::kBFloat16).cpu().contiguous();
  const auto* bits = static_cast<const uint16_t*>(values.data_ptr());
  Sums sums{bits[0], bits[values.numel() - 1], 0};
  for (int64_t i = 0; i < values.numel(); ++i) sums.sum += bits[i];
  return sums;
}

StatusOr<Weights> Make(const std::string& folder, uint64_t seed, LoadOptions options = {}) {
  auto config = LoadModelConfig(folder);
  if (!config.ok()) return config.status();
  options.random_seed = seed;
  return LoadWeights(folder, *config, options);
}

// What `python3 bench/random_weights.py tests/base/golden/llama --seed 7` and `.../qwen3 --seed 18446744073709551615`
// print for models of transformers.
TEST(RandomWeightsTest, EqualThoseOfTheScript) {
  const auto llama = Make(Folder("llama"), 7);
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_EQ(SumsOf(llama->embedding), (Sums{0xbd07, 0x3c8a, 36851262}));
  EXPECT_EQ(SumsOf(llama->layers[0].wq), (Sums{0x3b14, 0xbc63, 33282334}));
  EXPECT_EQ(SumsOf(llama->layers[0].down), (Sums{0xbc3c, 0xbbcc, 65421262}));
  EXPECT_EQ(SumsOf(llama->layers[1].wk), (Sums{0xbd0c, 0xbcfc, 16461791}));
  EXPECT_EQ(SumsOf(llama->layers[1].wv), (Sums{0x3b3f, 0xbc48, 16456978}));
  EXPECT_EQ(SumsOf(llama->layers[1].wo), (Sums{0xbd09, 0xbd0b, 33433885}));
  EXPECT_EQ(SumsOf(llama->layers[1].gate), (Sums{0x3c34, 0x3c20, 65499740}));
  EXPECT_EQ(SumsOf(llama->layers[1].up), (Sums{0x3aa4, 0xbca7, 66164780}));
  EXPECT_EQ(SumsOf(llama->layers[1].mlp_norm), (Sums{0x3f80, 0x3f80, 520192}));
  EXPECT_TRUE(llama->output.is_same(llama->embedding));

  const auto qwen = Make(Folder("qwen3"), ~uint64_t{0});
  ASSERT_TRUE(qwen.ok()) << qwen.status();
  EXPECT_EQ(SumsOf(qwen->embedding), (Sums{0x3cb7, 0xbc76, 29245990}));
  EXPECT_EQ(SumsOf(qwen->output), (Sums{0xbcf1, 0x3c16, 29798982}));
  EXPECT_EQ(SumsOf(qwen->layers[0].wq), (Sums{0x3c27, 0x3c72, 65971288}));
  EXPECT_EQ(SumsOf(qwen->layers[0].q_norm), (Sums{0x3f80, 0x3f80, 520192}));
  EXPECT_EQ(SumsOf(qwen->final_norm), (Sums{0x3f80, 0x3f80, 520192}));
}

// `python3 bench/random_weights.py tests/golden/families/qwen2 --seed 7`: biases are no ones.
TEST(RandomWeightsTest, BiasesEqualThoseOfTheScript) {
  const auto qwen = Make(std::string(REFOCUS_SOURCE_DIR) + "/tests/golden/families/qwen2", 7);
  ASSERT_TRUE(qwen.ok()) << qwen.status();
  EXPECT_EQ(SumsOf(qwen->layers[0].q_bias), (Sums{0x3cd9, 0x3cfb, 2266703}));
  EXPECT_EQ(SumsOf(qwen->layers[0].k_bias), (Sums{0x3be5, 0xbc12, 920026}));
  EXPECT_EQ(SumsOf(qwen->layers[0].v_bias), (Sums{0xbca1, 0x3d07, 1048598}));
  EXPECT_EQ(SumsOf(qwen->layers[1].q_bias), (Sums{0x3cc9, 0x3c8e, 2038029}));
  EXPECT_EQ(SumsOf(qwen->layers[0].attn_norm), (Sums{0x3f80, 0x3f80, 1040384}));
}

TEST(RandomWeightsTest, AreBf16ValuesOnEveryDeviceWhateverTheThreads) {
  ModelConfig config = *LoadModelConfig(Folder("llama"));
  config.vocab = 100'003;  // a matrix of several parts, the last one uneven
  LoadOptions options;
  options.random_seed = 3;
  options.check_finite = true;
  const auto wide = LoadWeights(Folder("llama"), config, options);
  ASSERT_TRUE(wide.ok()) << wide.status();
  EXPECT_EQ(wide->bytes, 4 * config.parameters());
  std::vector<c10::BFloat16> row(static_cast<size_t>(config.hidden));
  for (const int64_t index : {int64_t{0}, int64_t{54'321}, config.vocab - 1}) {
    RandomValues(RandomKey(3, "model.embed_tokens.weight"), index * config.hidden, config.hidden, row.data());
    const float* made = wide->embedding.data_ptr<float>() + index * config.hidden;
    EXPECT_TRUE(std::equal(row.begin(), row.end(), made)) << index;
  }
  for (const int threads : {1, 5}) {
    options.threads = threads;
    options.type = at::kBFloat16;
    int64_t last = 0;
    options.progress = [&](int64_t done, int64_t total) {
      EXPECT_GE(done, last);
      EXPECT_EQ(total, 2 * config.parameters());
      last = done;
    };
    const auto narrow = LoadWeights(Folder("llama"), config, options);
    ASSERT_TRUE(narrow.ok()) << narrow.status();
    EXPECT_EQ(last, 2 * config.parameters());
    EXPECT_EQ(narrow->bytes, 2 * config.parameters());
    EXPECT_EQ(narrow->embedding.scalar_type(), at::kBFloat16);
    EXPECT_TRUE(narrow->embedding.to(at::kFloat).equal(wide->embedding));
    EXPECT_TRUE(narrow->layers[1].down.to(at::kFloat).equal(wide->layers[1].down));
    EXPECT_EQ(narrow->content_hash, wide->content_hash);
  }
}

TEST(RandomWeightsTest, FollowSeedNameAndIndexAlone) {
  std::vector<c10::BFloat16> all(1000), part(300);
  RandomValues(RandomKey(1, "w"), 0, 1000, all.data());
  RandomValues(RandomKey(1, "w"), 450, 300, part.data());
  EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + 450));
  RandomValues(RandomKey(1, "w"), 5, 0, nullptr);
  EXPECT_NE(RandomKey(1, "w"), RandomKey(2, "w"));
  EXPECT_NE(RandomKey(1, "w"), RandomKey(1, "v"));
  // Beyond 32 bits of index.
  RandomValues(RandomKey(1, "w"), (int64_t{1} << 33) + 450, 300, part.data());
  EXPECT_FALSE(std::equal(part.begin(), part.end(), all.begin() + 450));

  const auto one = Make(Folder("llama"), 1), two = Make(Folder("llama"), 2);
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_NE(one->content_hash, two->content_hash);
  EXPECT_NE(HashWeights(*one), HashWeights(*two));
  EXPECT_FALSE(one->layers[0].wk.equal(one->layers[0].wv));
}

TEST(RandomWeightsTest, AreSpreadLikeAnInitializer) {
  constexpr int64_t kCount = 1 << 20;
  std::vector<c10::BFloat16> values(kCount);
  RandomValues(RandomKey(11, "model.embed_tokens.weight"), 0, kCount, values.data());
  double sum = 0, squares = 0, neighbours = 0;
  for (int64_t i = 0; i < kCount; ++i) {
    const double value = static_cast<float>(values[i]);
    ASSERT_LE(std::abs(value), 0.03472);
    sum += value;
    squares += value * value;
    if (i > 0) neighbours += value * static_cast<float>(values[i - 1]);
  }
  const double variance = squares / kCount;
  EXPECT_NEAR(sum / kCount, 0, 5 * 0.02 / 1024);
  EXPECT_NEAR(std::sqrt(variance), 0.02, 1e-4);
  EXPECT_NEAR(neighbours / kCount / variance, 0, 5.0 / 1024);
}

TEST(RandomWeightsTest, NeedNoWeightFile) {
  const TempDir dir;
  std::filesystem::copy_file(Folder("llama") + "/config.json", dir.path() + "/config.json");
  const auto made = Make(dir.path(), 7);
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_EQ(made->content_hash, Make(Folder("llama"), 7)->content_hash);
  // A GGUF file's names and order of rows play no part either.
  EXPECT_EQ(Make(Folder("llama") + ".gguf", 7)->content_hash, made->content_hash);
  // Without a seed files are wanted.
  EXPECT_TRUE(FailsWith(LoadWeights(dir.path(), made->config, {}).status(), "WEIGHTS_INVALID", "model.safetensors"));
}

}  // namespace
}  // namespace refocus
