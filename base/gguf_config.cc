#include "base/config_sources.h"
#include "base/gguf.h"
#include "base/input_file.h"

namespace refocus {
namespace {

class Keys {
 public:
  Keys(const GgufFile& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  // `key` without the architecture's prefix.
  StatusOr<int64_t> Int(const std::string& key) const { return Checked(key, file_.Int(prefix_ + key), "an integer"); }
  StatusOr<double> Float(const std::string& key) const { return Checked(key, file_.Float(prefix_ + key), "a number"); }
  StatusOr<int64_t> IntOr(const std::string& key, int64_t absent) const {
    return Has(key) ? Int(key) : StatusOr<int64_t>(absent);
  }
  StatusOr<double> FloatOr(const std::string& key, double absent) const {
    return Has(key) ? Float(key) : StatusOr<double>(absent);
  }
  bool Has(const std::string& key) const { return file_.Has(prefix_ + key); }
  Status Refuse(const std::string& key, const std::string& got, const std::string& allowed) const {
    return ConfigError(file_.path, prefix_ + key, got, allowed);
  }

 private:
  template <typename T>
  StatusOr<T> Checked(const std::string& key, StatusOr<T> value, const char* expected) const {
    if (value.ok()) return value;
    return Refuse(key, Has(key) ? "another type" : "nothing", expected);
  }

  const GgufFile& file_;
  std::string prefix_;
};

StatusOr<Family> FamilyOf(const GgufFile& file) {
  const StatusOr<std::string> name = file.String("general.architecture");
  if (name.ok() && *name == "llama") return Family::kLlama;
  if (name.ok() && *name == "qwen3") return Family::kQwen3;
  return ConfigError(file.path, "general.architecture", name.ok() ? Quoted(*name) : "nothing or another type",
                     "llama, qwen3");
}

// What would change the forward pass in a way this service does not compute.
Status RefuseUnsupported(const GgufFile& file, const Keys& keys, int64_t head_dim) {
  for (const char* key : {"expert_count", "attention.sliding_window"}) {
    REFOCUS_ASSIGN_OR_RETURN(const int64_t value, keys.IntOr(key, 0));
    if (value != 0) return keys.Refuse(key, std::to_string(value), "0 (not supported)");
  }
  if (keys.Has("rope.scaling.type")) {
    const StatusOr<std::string> type = file.String(FamilyName(*FamilyOf(file)) + ".rope.scaling.type");
    if (!type.ok() || *type != "none")
      return keys.Refuse("rope.scaling.type", type.ok() ? Quoted(*type) : "another type", "none");
  }
  for (const char* key : {"rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"}) {
    REFOCUS_ASSIGN_OR_RETURN(const double factor, keys.FloatOr(key, 1.0));
    if (factor != 1.0) return keys.Refuse(key, std::to_string(factor), "1 (scaled RoPE is not supported)");
  }
  if (file.tensors.count("rope_freqs.weight") != 0) {
    return ConfigError(file.path, "rope_freqs.weight", "a tensor of RoPE factors",
                       "none (scaled RoPE is not supported)");
  }
  REFOCUS_ASSIGN_OR_RETURN(const int64_t value_dim, keys.IntOr("attention.value_length", head_dim));
  if (value_dim != head_dim) {
    return keys.Refuse("attention.value_length", std::to_string(value_dim),
                       std::to_string(head_dim) + " (the key length)");
  }
  REFOCUS_ASSIGN_OR_RETURN(const int64_t turned, keys.IntOr("rope.dimension_count", head_dim));
  if (turned != head_dim) {
    return keys.Refuse("rope.dimension_count", std::to_string(turned), std::to_string(head_dim) + " (the head size)");
  }
  const Keys split(file, "split.");
  REFOCUS_ASSIGN_OR_RETURN(const int64_t parts, split.IntOr("count", 0));
  if (parts > 1) return split.Refuse("count", std::to_string(parts), "1 (merge the parts of a split file first)");
  return absl::OkStatus();
}

StatusOr<int64_t> VocabOf(const GgufFile& file, const Keys& keys) {
  const auto embedding = file.tensors.find("token_embd.weight");
  if (embedding == file.tensors.end() || embedding->second.shape.size() != 2) {
    return ConfigError(file.path, "token_embd.weight", "nothing or another shape", "a matrix");
  }
  const int64_t vocab = embedding->second.shape[0];
  REFOCUS_ASSIGN_OR_RETURN(const int64_t stated, keys.IntOr("vocab_size", vocab));
  if (stated != vocab) {
    return keys.Refuse("vocab_size", std::to_string(stated), std::to_string(vocab) + " (rows of token_embd.weight)");
  }
  const auto* tokens = file.Strings("tokenizer.ggml.tokens");
  if (tokens != nullptr && static_cast<int64_t>(tokens->size()) > vocab) {
    return ConfigError(file.path, "tokenizer.ggml.tokens", std::to_string(tokens->size()) + " tokens",
                       "at most " + std::to_string(vocab) + " (rows of token_embd.weight)");
  }
  return vocab;
}

Status ReadTokens(const GgufFile& file, ModelConfig* config) {
  const Keys keys(file, "tokenizer.ggml.");
  if (keys.Has("bos_token_id")) {
    REFOCUS_ASSIGN_OR_RETURN(const int64_t bos, keys.Int("bos_token_id"));
    REFOCUS_ASSIGN_OR_RETURN(config->bos_token, ToTokenId(file.path, "tokenizer.ggml.bos_token_id", bos));
  }
  for (const char* key : {"eos_token_id", "eot_token_id"}) {  // eot: end of a chat turn, where it differs
    if (!keys.Has(key)) continue;
    REFOCUS_ASSIGN_OR_RETURN(const int64_t value, keys.Int(key));
    REFOCUS_ASSIGN_OR_RETURN(const int32_t token, ToTokenId(file.path, std::string("tokenizer.ggml.") + key, value));
    if (config->eos_tokens.empty() || config->eos_tokens.front() != token) config->eos_tokens.push_back(token);
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<ModelConfig> ReadGgufConfig(const std::string& path) {
  REFOCUS_ASSIGN_OR_RETURN(const GgufFile file, ReadGguf(path));
  ModelConfig config;
  REFOCUS_ASSIGN_OR_RETURN(config.family, FamilyOf(file));
  const Keys keys(file, FamilyName(config.family) + ".");
  REFOCUS_ASSIGN_OR_RETURN(config.layers, keys.Int("block_count"));
  REFOCUS_ASSIGN_OR_RETURN(config.hidden, keys.Int("embedding_length"));
  REFOCUS_ASSIGN_OR_RETURN(config.heads, keys.Int("attention.head_count"));
  REFOCUS_ASSIGN_OR_RETURN(config.kv_heads, keys.IntOr("attention.head_count_kv", config.heads));
  REFOCUS_ASSIGN_OR_RETURN(config.mlp, keys.Int("feed_forward_length"));
  REFOCUS_ASSIGN_OR_RETURN(config.max_positions, keys.Int("context_length"));
  REFOCUS_ASSIGN_OR_RETURN(config.rms_eps, keys.Float("attention.layer_norm_rms_epsilon"));
  REFOCUS_ASSIGN_OR_RETURN(config.rope_theta, keys.FloatOr("rope.freq_base", 10000.0));
  if (config.heads < 1) return keys.Refuse("attention.head_count", std::to_string(config.heads), "at least 1");
  if (keys.Has("attention.key_length")) {
    REFOCUS_ASSIGN_OR_RETURN(config.head_dim, keys.Int("attention.key_length"));
  } else if (config.hidden % config.heads == 0) {
    config.head_dim = config.hidden / config.heads;
  } else {
    return keys.Refuse("embedding_length", std::to_string(config.hidden),
                       "multiples of the " + std::to_string(config.heads) + " heads, or a key_length");
  }
  REFOCUS_RETURN_IF_ERROR(RefuseUnsupported(file, keys, config.head_dim));
  REFOCUS_ASSIGN_OR_RETURN(config.vocab, VocabOf(file, keys));
  REFOCUS_RETURN_IF_ERROR(ReadTokens(file, &config));
  config.qk_norm = config.family == Family::kQwen3;
  config.tied_embeddings = file.tensors.count("output.weight") == 0;
  return config;
}

}  // namespace refocus
