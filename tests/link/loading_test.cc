// Loading when the machine gives neither memory nor threads, and the hash that tells two models' weights apart.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <new>
#include <thread>

#include "tests/base/model_files.h"
#include "worker/weights.h"

namespace {

std::atomic<bool> refuse_memory{false};  // to every thread but main
std::atomic<int> threads_left{1 << 30};
const std::thread::id main_thread = std::this_thread::get_id();

}  // namespace

// This program's own, in place of the library's.
void* operator new(size_t bytes) {
  if (refuse_memory && std::this_thread::get_id() != main_thread) throw std::bad_alloc();
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

#pragma GCC visibility push(default)
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*),
                              void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto next = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  if (threads_left-- <= 0) return EAGAIN;
  return next(thread, attributes, run, argument);
}
#pragma GCC visibility pop

namespace refocus {
namespace {

constexpr char kModel[] = REFOCUS_SOURCE_DIR "/tests/golden/llama";
constexpr char kShard[] = "/model-00001-of-00003.safetensors";

StatusOr<Weights> Load(const std::string& folder, int threads) {
  auto config = LoadModelConfig(folder);
  if (!config.ok()) return config.status();
  LoadOptions options;
  options.threads = threads;
  return LoadWeights(folder, *config, options);
}

uint64_t ContentHash(const std::string& folder, int threads) {
  const auto weights = Load(folder, threads);
  EXPECT_TRUE(weights.ok()) << weights.status();
  return weights.ok() ? weights->content_hash : 0;
}

// A copy of the model whose first shard `change` has changed.
template <typename Change>
uint64_t ContentHashAfter(const Change& change) {
  TempDir dir;
  std::filesystem::copy(kModel, dir.path());
  std::ifstream in(std::string(kModel) + kShard, std::ios::binary);
  std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  change(bytes);
  dir.Write(kShard + 1, bytes);
  return ContentHash(dir.path(), 2);
}

TEST(LoadingTest, MemoryThatAThreadLacksIsAnError) {
  auto config = LoadModelConfig(kModel);
  ASSERT_TRUE(config.ok());
  LoadOptions options;
  options.threads = 3;
  // The main thread's first report waits for the others to fail: it cannot have loaded everything before they begin.
  options.progress = [](int64_t, int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  refuse_memory = true;
  const auto weights = LoadWeights(kModel, *config, options);
  refuse_memory = false;
  ASSERT_FALSE(weights.ok());
  EXPECT_EQ(weights.status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(DetailOf(weights.status()).reason, "HARDWARE");
  EXPECT_NE(weights.status().message().find("bad_alloc"), absl::string_view::npos) << weights.status();
}

TEST(LoadingTest, ExceptionsOfTheCallerAreErrorsToo) {
  auto config = LoadModelConfig(kModel);
  ASSERT_TRUE(config.ok());
  LoadOptions options;
  for (const bool last : {false, true}) {
    options.progress = [last](int64_t done, int64_t total) {
      if ((done == total) == last) throw std::runtime_error("no room to report");
    };
    options.threads = last ? 3 : 1;
    const auto weights = LoadWeights(kModel, *config, options);
    ASSERT_FALSE(weights.ok());
    EXPECT_EQ(DetailOf(weights.status()).reason, "HARDWARE");
  }
}

TEST(LoadingTest, FewerThreadsThanAskedForDoTheWork) {
  const uint64_t hash = ContentHash(kModel, 1);
  for (const int left : {0, 1}) {
    threads_left = left;
    const auto weights = Load(kModel, 4);
    EXPECT_EQ(threads_left.exchange(1 << 30), -1) << "asked for another number of threads";
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ(weights->content_hash, hash);
  }
}

TEST(LoadingTest, ContentHashDependsOnTheBytesAndTheirPlaces) {
  const uint64_t hash = ContentHash(kModel, 1);
  EXPECT_NE(hash, 0U);
  EXPECT_EQ(ContentHash(kModel, 3), hash);
  EXPECT_EQ(ContentHashAfter([](std::string&) {}), hash);
  EXPECT_NE(ContentHashAfter([](std::string& bytes) { bytes.back() ^= 1; }), hash);
  EXPECT_NE(ContentHashAfter([](std::string& bytes) {
              const size_t k = bytes.find("layers.0.self_attn.k_proj");
              const size_t v = bytes.find("layers.0.self_attn.v_proj");
              ASSERT_NE(k, std::string::npos);
              ASSERT_NE(v, std::string::npos);
              bytes[k + 19] = 'v';  // the two change places
              bytes[v + 19] = 'k';
            }),
            hash);
}

}  // namespace
}  // namespace refocus
