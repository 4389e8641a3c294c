// Weights that go to a GPU are those that stay on the CPU as bf16, bit for bit.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "tests/base/model_files.h"
#include "worker/weights.h"

namespace refocus {
namespace {

constexpr char kGolden[] = REFOCUS_SOURCE_DIR "/tests/base/golden/";

class WeightsCudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!c10::impl::hasDeviceGuardImpl(at::kCUDA)) GTEST_SKIP() << "no CUDA device: LibTorch has no CUDA part here";
    const int count = c10::impl::getDeviceGuardImpl(at::kCUDA)->deviceCount();
    if (count < 1) GTEST_SKIP() << "no CUDA device: LibTorch finds none";
    gpu_ = at::Device(at::kCUDA, static_cast<at::DeviceIndex>(count - 1));  // not the one that is current by itself
  }

  void ExpectSame(const std::string& path, const ModelConfig& config, LoadOptions options) {
    options.type = at::kBFloat16;
    const auto expected = LoadWeights(path, config, options);
    ASSERT_TRUE(expected.ok()) << expected.status();
    options.type.reset();
    options.device = gpu_;
    for (const int threads : {1, 3, 16}) {
      options.threads = threads;
      const auto actual = LoadWeights(path, config, options);
      ASSERT_TRUE(actual.ok()) << actual.status();
      EXPECT_EQ(actual->embedding.device(), gpu_);
      EXPECT_EQ(actual->embedding.scalar_type(), at::kBFloat16);
      EXPECT_EQ(actual->output.is_same(actual->embedding), config.tied_embeddings);
      EXPECT_EQ(actual->bytes, expected->bytes);
      EXPECT_EQ(actual->content_hash, expected->content_hash);
      EXPECT_EQ(HashWeights(*actual), HashWeights(*expected)) << path << ", " << threads << " threads";
    }
  }

  at::Device gpu_ = at::kCPU;
};

TEST_F(WeightsCudaTest, EveryFormat) {
  for (const std::string name : {"llama", "qwen3", "llama.gguf", "qwen3.gguf"}) {
    const auto config = LoadModelConfig(kGolden + name);
    ASSERT_TRUE(config.ok()) << config.status();
    ExpectSame(kGolden + name, *config, {.check_finite = true});
  }
}

TEST_F(WeightsCudaTest, RealModel) {
  const std::string path = REFOCUS_SOURCE_DIR "/.deps/data/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is absent: run ./setup";
  const auto config = LoadModelConfig(path);
  ASSERT_TRUE(config.ok()) << config.status();
  ExpectSame(path, *config, {.check_finite = true});
}

// Two billion bytes, for the rates that this prints: more pieces than buffers on every thread, uneven ends.
TEST_F(WeightsCudaTest, RandomValuesAndTheirRate) {
  ModelConfig config = *LoadModelConfig(std::string(kGolden) + "llama");
  config.vocab = 50'021;
  config.hidden = 2048;
  config.heads = 16;
  config.kv_heads = 8;
  config.head_dim = 128;
  config.mlp = 6151;
  config.layers = 18;
  LoadOptions options;
  options.threads = 16;
  options.random_seed = 5;
  options.type = at::kBFloat16;
  const auto expected = LoadWeights(std::string(kGolden) + "llama", config, options);
  ASSERT_TRUE(expected.ok()) << expected.status();
  options.device = gpu_;
  for (int run = 0; run < 2; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    const auto actual = LoadWeights(std::string(kGolden) + "llama", config, options);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    ASSERT_TRUE(actual.ok()) << actual.status();
    std::printf("made and sent %.2f GB in %.3f s: %.2f GB/s\n", static_cast<double>(actual->bytes) / 1e9, seconds,
                static_cast<double>(actual->bytes) / 1e9 / seconds);
    EXPECT_EQ(HashWeights(*actual), HashWeights(*expected));
  }
}

// The same weights as a bf16 file in the page cache.
TEST_F(WeightsCudaTest, FileAndItsRate) {
  const TempDir dir;
  ModelConfig config = *LoadModelConfig(std::string(kGolden) + "llama");
  config.layers = 1;
  config.hidden = 2048;
  config.heads = config.kv_heads = 1;
  config.head_dim = 2;
  config.mlp = 1;
  // 1.6 GB, or what the folder takes; memory disks of containers may be small.
  const auto room = static_cast<int64_t>(std::filesystem::space(dir.path()).available);
  config.vocab = std::min<int64_t>(400'009, room / 2 / (2 * config.hidden));
  config.tied_embeddings = true;
  LoadOptions options;
  options.threads = 16;
  options.type = at::kBFloat16;
  options.random_seed = 6;
  const auto made = LoadWeights(std::string(kGolden) + "llama", config, options);
  ASSERT_TRUE(made.ok()) << made.status();
  std::string header = "{", data;
  const LayerWeights& l = made->layers[0];
  const std::pair<const char*, at::Tensor> tensors[] = {{"model.embed_tokens.weight", made->embedding},
                                                        {"model.norm.weight", made->final_norm},
                                                        {"model.layers.0.input_layernorm.weight", l.attn_norm},
                                                        {"model.layers.0.self_attn.q_proj.weight", l.wq},
                                                        {"model.layers.0.self_attn.k_proj.weight", l.wk},
                                                        {"model.layers.0.self_attn.v_proj.weight", l.wv},
                                                        {"model.layers.0.self_attn.o_proj.weight", l.wo},
                                                        {"model.layers.0.post_attention_layernorm.weight", l.mlp_norm},
                                                        {"model.layers.0.mlp.gate_proj.weight", l.gate},
                                                        {"model.layers.0.mlp.up_proj.weight", l.up},
                                                        {"model.layers.0.mlp.down_proj.weight", l.down}};
  for (const auto& [name, tensor] : tensors) {
    std::string shape;
    for (const int64_t size : tensor.sizes()) shape += (shape.empty() ? "" : ",") + std::to_string(size);
    header += std::string(header.size() > 1 ? "," : "") + "\"" + name + R"(":{"dtype":"BF16","shape":[)" + shape +
              "],\"data_offsets\":[" + std::to_string(data.size()) + ",";
    data.append(static_cast<const char*>(tensor.data_ptr()), tensor.nbytes());
    header += std::to_string(data.size()) + "]}";
  }
  dir.Write("config.json", "{}");
  dir.Write("model.safetensors", Safetensors(header + "}", data));
  options.random_seed.reset();
  options.device = gpu_;
  for (int run = 0; run < 2; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    const auto actual = LoadWeights(dir.path(), config, options);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    ASSERT_TRUE(actual.ok()) << actual.status();
    const double rate = static_cast<double>(actual->bytes) / 1e9 / seconds;
    std::printf("read and sent %.2f GB in %.3f s: %.2f GB/s\n", rate * seconds, seconds, rate);
    EXPECT_EQ(HashWeights(*actual), HashWeights(*made));
    EXPECT_EQ(actual->content_hash, made->content_hash);
  }
}

TEST_F(WeightsCudaTest, TooLargeForTheDevice) {
  ModelConfig config = *LoadModelConfig(std::string(kGolden) + "llama");
  config.hidden = 1 << 16;
  config.vocab = 1 << 22;  // 512 GiB
  LoadOptions options;
  options.device = gpu_;
  options.random_seed = 1;
  EXPECT_TRUE(FailsWith(LoadWeights(std::string(kGolden) + "llama", config, options).status(), "HARDWARE",
                        "bytes as bf16, more than " + gpu_.str() + " gives"));
}

TEST_F(WeightsCudaTest, ABrokenFileAndAFailingCallerAreErrors) {
  const TempDir dir;
  std::filesystem::copy(std::string(kGolden) + "llama", dir.path(), std::filesystem::copy_options::recursive);
  const auto config = LoadModelConfig(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  LoadOptions options;
  options.device = gpu_;
  options.threads = 1;
  options.progress = [](int64_t, int64_t) { throw std::runtime_error("no room to report"); };
  EXPECT_TRUE(FailsWith(LoadWeights(dir.path(), *config, options).status(), "HARDWARE", "no room to report"));
  options.progress = [&](int64_t, int64_t) { std::filesystem::resize_file(dir.path() + "/model.safetensors", 100); };
  EXPECT_TRUE(FailsWith(LoadWeights(dir.path(), *config, options).status(), "WEIGHTS_INVALID", "file ends at byte"));
}

}  // namespace
}  // namespace refocus
