// The tokenizer in GGUF metadata: tokenizer.ggml.*. The key `pre` names the rules for cutting text.
#include "base/gguf.h"
#include "base/input_file.h"
#include "base/log.h"
#include "coordinator/tokenizer_spec.h"

namespace refocus {
namespace {

// Values of tokenizer.ggml.token_type.
enum TokenType : int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

constexpr char kLlamaPattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr char kQwenPattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// Mistral's newer vocabularies: words break where upper case follows lower case.
constexpr char kTekkenPattern[] =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

Status SetRules(const std::string& pre, TokenizerSpec* spec) {
  using Kind = SplitRule::Kind;
  if (pre == "default") {
    LogWarning(spec->source + ": tokenizer.ggml.pre is \"default\"; text is cut as GPT-2 does, which need not be how the "
               "model learned it: convert the model anew with a tool that knows its tokenizer");
  }
  if (pre == "gpt-2" || pre == "default") {
    spec->splits = {{Kind::kRegex, kGpt2Pattern}};
  } else if (pre == "smollm") {
    spec->splits = {{Kind::kSingleDigits, ""}, {Kind::kRegex, kGpt2Pattern}};
  } else if (pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3") {
    spec->splits = {{Kind::kRegex, kLlamaPattern}};
    spec->ignore_merges = true;
    spec->adds_bos = true;
  } else if (pre == "qwen2" || pre == "deepseek-r1-qwen") {
    spec->splits = {{Kind::kRegex, kQwenPattern}};
    spec->nfc = true;
  } else if (pre == "tekken") {
    spec->splits = {{Kind::kRegex, kTekkenPattern}};
    spec->ignore_merges = true;
  } else {
    return TokenizerError(spec->source, "tokenizer.ggml.pre", pre.empty() ? "nothing" : Quoted(pre),
                          "gpt-2, default, smollm, llama-bpe, llama3, llama-v3, qwen2, deepseek-r1-qwen, tekken; for "
                          "another one use the model's Hugging Face folder, whose tokenizer.json says how text is cut");
  }
  return absl::OkStatus();
}

StatusOr<std::string> StringOr(const GgufFile& file, const std::string& key, const std::string& otherwise) {
  if (!file.Has(key)) return otherwise;
  return file.String(key);
}

Status SetTokens(const GgufFile& file, TokenizerSpec* spec) {
  const std::string key = "tokenizer.ggml.tokens";
  const std::vector<std::string>* texts = file.Strings(key);
  if (texts == nullptr) return TokenizerError(spec->source, key, "nothing", "an array of strings");
  const std::vector<int64_t>* types = file.Ints("tokenizer.ggml.token_type");
  if (types != nullptr && types->size() != texts->size()) {
    return TokenizerError(spec->source, "tokenizer.ggml.token_type", std::to_string(types->size()) + " entries",
                          std::to_string(texts->size()) + ", one for each token");
  }
  std::vector<bool> literal(texts->size(), false);
  for (size_t id = 0; types != nullptr && id < types->size(); ++id) {
    const int64_t type = (*types)[id];
    if (type < kNormal || type > kByte || type == kByte) {
      return TokenizerError(spec->source, "tokenizer.ggml.token_type[" + std::to_string(id) + "]", std::to_string(type),
                            "1 to 5 (a byte-level vocabulary has no byte tokens)");
    }
    literal[id] = type != kNormal;
    if (type != kControl && type != kUserDefined) continue;
    const std::string& text = (*texts)[id];
    if (text.empty() || static_cast<int64_t>(text.size()) > kMaxAddedTokenBytes) {
      return TokenizerError(spec->source, key + "[" + std::to_string(id) + "]", std::to_string(text.size()) + " bytes",
                            "1 to " + std::to_string(kMaxAddedTokenBytes) + " bytes for a special token");
    }
    spec->added.push_back({static_cast<int32_t>(id), text, type == kControl, false});
    if (static_cast<int64_t>(spec->added.size()) > kMaxAddedTokens) {
      return TokenizerError(spec->source, "tokenizer.ggml.token_type", "more added tokens",
                            "at most " + std::to_string(kMaxAddedTokens));
    }
  }
  REFOCUS_RETURN_IF_ERROR(SetVocabulary(*texts, literal, key, spec));

  const std::vector<std::string>* merges = file.Strings("tokenizer.ggml.merges");
  if (merges == nullptr) return TokenizerError(spec->source, "tokenizer.ggml.merges", "nothing", "an array of strings");
  std::vector<std::pair<std::string, std::string>> pairs(merges->size());
  for (size_t rank = 0; rank < merges->size(); ++rank) {
    if (!CutMerge((*merges)[rank], &pairs[rank])) {
      return TokenizerError(spec->source, "tokenizer.ggml.merges[" + std::to_string(rank) + "]",
                            Quoted((*merges)[rank]), "two tokens with one space between them");
    }
  }
  return SetMerges(*texts, pairs, "tokenizer.ggml.merges", spec);
}

Status SetMarks(const GgufFile& file, TokenizerSpec* spec) {
  const std::string bos = "tokenizer.ggml.bos_token_id";
  if (file.Has(bos)) {
    REFOCUS_ASSIGN_OR_RETURN(const int64_t id, file.Int(bos));
    REFOCUS_ASSIGN_OR_RETURN(spec->bos, CheckTokenId(*spec, spec->source, bos, id));
  }
  for (const char* key :
       {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    if (!file.Has(key)) continue;
    REFOCUS_ASSIGN_OR_RETURN(const int64_t id, file.Int(key));
    REFOCUS_ASSIGN_OR_RETURN(const int32_t checked, CheckTokenId(*spec, spec->source, key, id));
    AddUnique(checked, &spec->eos);
  }
  const auto flag = [&](const char* key, bool otherwise) -> StatusOr<bool> {
    const auto it = file.metadata.find(key);
    if (it == file.metadata.end()) return otherwise;
    if (const bool* value = std::get_if<bool>(&it->second)) return *value;
    return TokenizerError(spec->source, key, "another type", "a boolean");
  };
  REFOCUS_ASSIGN_OR_RETURN(spec->adds_bos, flag("tokenizer.ggml.add_bos_token", spec->adds_bos));
  if (spec->adds_bos && !spec->bos)
    return TokenizerError(spec->source, bos, "nothing", "an id, since add_bos_token is set");
  REFOCUS_ASSIGN_OR_RETURN(const bool adds_eos, flag("tokenizer.ggml.add_eos_token", false));
  if (adds_eos) return TokenizerError(spec->source, "tokenizer.ggml.add_eos_token", "true", "false");
  REFOCUS_ASSIGN_OR_RETURN(const bool prefix_space, flag("tokenizer.ggml.add_space_prefix", false));
  if (prefix_space) spec->splits.insert(spec->splits.end() - 1, {SplitRule::Kind::kPrefixSpace, ""});
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::optional<TokenizerSpec>> ReadTokenizerGguf(const std::string& path) {
  REFOCUS_ASSIGN_OR_RETURN(const GgufFile file, ReadGguf(path));
  if (!file.Has("tokenizer.ggml.model") && !file.Has("tokenizer.ggml.tokens")) return std::optional<TokenizerSpec>();
  TokenizerSpec spec;
  spec.source = path;
  REFOCUS_ASSIGN_OR_RETURN(const std::string model, StringOr(file, "tokenizer.ggml.model", ""));
  if (model != "gpt2") return TokenizerError(path, "tokenizer.ggml.model", Quoted(model), "gpt2 (byte-level BPE)");
  REFOCUS_ASSIGN_OR_RETURN(const std::string pre, StringOr(file, "tokenizer.ggml.pre", ""));
  REFOCUS_RETURN_IF_ERROR(SetRules(pre, &spec));
  REFOCUS_RETURN_IF_ERROR(SetTokens(file, &spec));
  REFOCUS_RETURN_IF_ERROR(SetMarks(file, &spec));
  REFOCUS_ASSIGN_OR_RETURN(spec.chat_template, StringOr(file, "tokenizer.chat_template", ""));
  return std::optional<TokenizerSpec>(std::move(spec));
}

}  // namespace refocus
