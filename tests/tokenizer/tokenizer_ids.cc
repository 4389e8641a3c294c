// For compare_reference.py: `tokenizer_ids PATH [special]` reads texts from stdin, each behind its size (int64), and
// writes for each the number of ids (int64, -1 with an error on stderr) and the ids (int32).
#include <cstdint>
#include <cstdio>
#include <string>

#include "coordinator/tokenizer.h"

int main(int argc, char** argv) {
  if (argc < 2) return 1;
  const auto tokenizer = refocus::Tokenizer::Load(argv[1]);
  if (!tokenizer.ok() || *tokenizer == nullptr) {
    std::fprintf(stderr, "%s\n", tokenizer.ok() ? "no tokenizer" : tokenizer.status().ToString().c_str());
    return 2;
  }
  int64_t size = 0;
  std::string text;
  while (std::fread(&size, sizeof size, 1, stdin) == 1) {
    text.resize(static_cast<size_t>(size));
    if (std::fread(text.data(), 1, text.size(), stdin) != text.size()) return 1;
    const auto ids = (*tokenizer)->Encode(text, argc > 2, INT64_MAX);
    if (!ids.ok()) std::fprintf(stderr, "%s\n", ids.status().ToString().c_str());
    const int64_t count = ids.ok() ? static_cast<int64_t>(ids->size()) : -1;
    std::fwrite(&count, sizeof count, 1, stdout);
    if (ids.ok()) std::fwrite(ids->data(), sizeof(int32_t), ids->size(), stdout);
  }
  return 0;
}
