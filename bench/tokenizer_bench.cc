// Text into tokens on one core: `tokenizer_bench MODEL FILE...` prints one Markdown row per file, the best of five
// runs.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <iterator>
#include <string>

#include "coordinator/tokenizer.h"

namespace {

// Of this thread, so that other work on the machine hardly counts.
double CpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr,
                 "usage: tokenizer_bench MODEL FILE...  (MODEL: a folder with tokenizer.json or a .gguf file)\n");
    return 1;
  }
  const auto load_start = CpuSeconds();
  const auto tokenizer = refocus::Tokenizer::Load(argv[1]);
  if (!tokenizer.ok() || *tokenizer == nullptr) {
    std::fprintf(stderr, "%s\n",
                 tokenizer.ok() ? "the model brings no tokenizer" : tokenizer.status().ToString().c_str());
    return 2;
  }
  std::printf("# %s: %lld tokens, loaded in %.3f s\n\n", argv[1], static_cast<long long>((*tokenizer)->vocab_size()),
              CpuSeconds() - load_start);
  std::printf("| text | bytes | tokens | first run | best run | speed | 1M tokens |\n");
  std::printf("|---|---:|---:|---:|---:|---:|---:|\n");
  std::printf("| | B | | ms | ms | MB/s | ms |\n");
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    double first = 0;
    double best = 1e9;
    size_t tokens = 0;
    for (int run = 0; run < 5; ++run) {
      const auto start = CpuSeconds();
      const auto ids = (*tokenizer)->Encode(text, false, INT64_MAX);
      const double seconds = CpuSeconds() - start;
      if (!ids.ok()) {
        std::fprintf(stderr, "%s: %s\n", argv[i], ids.status().ToString().c_str());
        return 1;
      }
      tokens = ids->size();
      if (run == 0) first = seconds;
      best = std::min(best, seconds);
    }
    const double per_million = tokens == 0 ? 0 : best * 1e9 / static_cast<double>(tokens);
    std::printf("| %s | %zu | %zu | %.2f | %.2f | %.1f | %.1f |\n", argv[i], text.size(), tokens, first * 1e3,
                best * 1e3, static_cast<double>(text.size()) / best / 1e6, per_million);
  }
  return 0;
}
