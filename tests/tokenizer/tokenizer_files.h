// Folders and GGUF files for tests: the golden tokenizers of this folder, changed and written anew.
#pragma once

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "coordinator/tokenizer.h"
#include "tests/base/model_files.h"

namespace refocus {

using Json = nlohmann::json;

inline const std::string kGoldens = std::string(REFOCUS_SOURCE_DIR) + "/tests/tokenizer/";

inline Json ReadJsonOf(const std::string& path) {
  std::ifstream in(path);
  return Json::parse(in);
}

inline Json GoldenTree(const std::string& kind) { return ReadJsonOf(kGoldens + kind + "/tokenizer.json"); }

inline StatusOr<std::unique_ptr<Tokenizer>> LoadTree(const Json& tree) {
  const TempDir folder;
  folder.Write("tokenizer.json", tree.dump());
  return Tokenizer::Load(folder.path());
}

// GGUF metadata, written by hand so that the reader is not tested against itself.
class GgufWriter {
 public:
  void Add(const std::string& key, uint32_t type) {
    ++count_;
    Text(key);
    Number<uint32_t>(type);
  }
  void Bool(const std::string& key, bool value) { Add(key, 7), Number<uint8_t>(value); }
  void Int(const std::string& key, uint32_t value) { Add(key, 4), Number(value); }
  void String(const std::string& key, const std::string& value) { Add(key, 8), Text(value); }
  void Strings(const std::string& key, const std::vector<std::string>& values) {
    Add(key, 9), Number<uint32_t>(8), Number<uint64_t>(values.size());
    for (const std::string& value : values) Text(value);
  }
  void Ints(const std::string& key, const std::vector<int32_t>& values) {
    Add(key, 9), Number<uint32_t>(5), Number<uint64_t>(values.size());
    for (const int32_t value : values) Number(value);
  }
  std::string Bytes() const {
    GgufWriter head;
    head.Number<uint32_t>(3), head.Number<uint64_t>(0), head.Number<uint64_t>(count_);
    std::string bytes = "GGUF" + head.body_ + body_;
    bytes.resize((bytes.size() + 31) / 32 * 32, '\0');
    return bytes;
  }

 private:
  template <typename T>
  void Number(T value) {
    body_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void Text(const std::string& text) { Number<uint64_t>(text.size()), body_ += text; }

  std::string body_;
  uint64_t count_ = 0;
};

// The same tokenizer as a GGUF file says it.
inline GgufWriter ToGguf(const Json& tree, const std::string& pre) {
  const Json& vocab = tree["model"]["vocab"];
  std::vector<std::string> tokens(vocab.size());
  for (const auto& [text, id] : vocab.items()) tokens[id.get<size_t>()] = text;
  std::vector<int32_t> types(tokens.size(), 1);
  for (const Json& added : tree["added_tokens"]) {
    const auto id = added["id"].get<size_t>();
    if (id >= tokens.size()) tokens.resize(id + 1), types.resize(id + 1);
    tokens[id] = added["content"].get<std::string>();
    types[id] = added["special"].get<bool>() ? 3 : 4;
  }
  std::vector<std::string> merges;
  for (const Json& pair : tree["model"]["merges"]) {
    merges.push_back(pair[0].get<std::string>() + " " + pair[1].get<std::string>());
  }
  GgufWriter out;
  out.String("tokenizer.ggml.model", "gpt2");
  out.String("tokenizer.ggml.pre", pre);
  out.Strings("tokenizer.ggml.tokens", tokens);
  out.Ints("tokenizer.ggml.token_type", types);
  out.Strings("tokenizer.ggml.merges", merges);
  return out;
}

}  // namespace refocus
