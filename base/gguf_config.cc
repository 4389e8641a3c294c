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
  StatusOr<std::string> String(const std::string& key) const { return file_.String(prefix_ + key); }
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
  // Files call Mistral llama, which it is but for its name.
  for (const Family family : {Family::kLlama, Family::kQwen2, Family::kQwen3}) {
    if (name.ok() && *name == FamilyName(family)) return family;
  }
  return ConfigError(file.path, "general.architecture", name.ok() ? Quoted(*name) : "nothing or another type",
                     "llama (Mistral too), qwen2, qwen3");
}

// What would change the forward pass in a way this service does not compute.
Status RefuseUnsupported(const GgufFile& file, const Keys& keys, int64_t head_dim) {
  for (const char* key : {"expert_count", "expert_used_count"}) {
    REFOCUS_ASSIGN_OR_RETURN(const int64_t value, keys.IntOr(key, 0));
    if (value != 0) return keys.Refuse(key, std::to_string(value), "0 (experts are not supported)");
  }
  for (const char* key : {"attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "residual_scale",
                          "embedding_scale", "attention.scale", "attention.clamp_kqv"}) {
    REFOCUS_ASSIGN_OR_RETURN(const double value, keys.FloatOr(key, 0));
    if (value != 0) return keys.Refuse(key, std::to_string(value), "none (not supported)");
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

// GGUF's rope_freqs.weight; its shape and type are checked, for nothing else reads it.
StatusOr<std::vector<float>> ReadFactors(const GgufFile& file, const TensorInfo& info, int64_t head_dim) {
  if (info.type != TensorType::kF32 || info.shape != std::vector<int64_t>{head_dim / 2}) {
    return ConfigError(file.path, "rope_freqs.weight", "another type or shape",
                       "F32 of " + std::to_string(head_dim / 2) + " numbers (half a head)");
  }
  std::vector<float> factors(static_cast<size_t>(head_dim / 2));
  REFOCUS_RETURN_IF_ERROR(ReadTensorBytes(info, factors.data()));
  return factors;
}

Status ReadYarn(const Keys& keys, ModelConfig* config) {
  RopeScaling& rope = config->rope;
  rope.type = RopeType::kYarn;
  REFOCUS_ASSIGN_OR_RETURN(rope.beta_fast, keys.FloatOr("rope.scaling.yarn_beta_fast", rope.beta_fast));
  REFOCUS_ASSIGN_OR_RETURN(rope.beta_slow, keys.FloatOr("rope.scaling.yarn_beta_slow", rope.beta_slow));
  REFOCUS_ASSIGN_OR_RETURN(double attention_factor, keys.FloatOr("rope.scaling.attn_factor", 1.0));
  REFOCUS_ASSIGN_OR_RETURN(attention_factor, keys.FloatOr("rope.scaling.yarn_attn_factor", attention_factor));
  rope.attention_factor = attention_factor * YarnAttentionFactor(rope.factor);
  for (const auto& [key, plain] : {std::pair("rope.scaling.yarn_log_multiplier", 0.0),
                                   std::pair("rope.scaling.yarn_ext_factor", 1.0)}) {
    REFOCUS_ASSIGN_OR_RETURN(const double value, keys.FloatOr(key, plain));
    if (value != plain) return keys.Refuse(key, std::to_string(value), "none (not supported)");
  }
  return absl::OkStatus();
}

Status ReadRope(const GgufFile& file, const Keys& keys, ModelConfig* config) {
  REFOCUS_ASSIGN_OR_RETURN(config->rope_theta, keys.FloatOr("rope.freq_base", 10000.0));
  REFOCUS_ASSIGN_OR_RETURN(const double old_factor, keys.FloatOr("rope.scale_linear", 1.0));
  REFOCUS_ASSIGN_OR_RETURN(const double factor, keys.FloatOr("rope.scaling.factor", old_factor));
  std::string type = factor != 1.0 && factor != 0.0 ? "linear" : "none";  // what a file without the key means
  if (keys.Has("rope.scaling.type")) {
    const StatusOr<std::string> stated = keys.String("rope.scaling.type");
    if (!stated.ok()) return keys.Refuse("rope.scaling.type", "another type", "none, linear, yarn");
    type = *stated;
  }
  if (type != "none" && type != "linear" && type != "yarn") {
    return keys.Refuse("rope.scaling.type", Quoted(type), "none, linear, yarn");
  }
  REFOCUS_ASSIGN_OR_RETURN(const double attention_factor, keys.FloatOr("rope.scaling.attn_factor", 1.0));
  if (type != "yarn" && attention_factor != 1.0) {
    return keys.Refuse("rope.scaling.attn_factor", std::to_string(attention_factor), "1, or rope.scaling.type yarn");
  }
  for (const char* name : {"rope_factors_long.weight", "rope_factors_short.weight"}) {
    if (file.tensors.count(name) != 0) return ConfigError(file.path, name, "a tensor", "none (not supported)");
  }
  const auto factors = file.tensors.find("rope_freqs.weight");
  if (factors != file.tensors.end() && type != "none") {
    return ConfigError(file.path, "rope_freqs.weight", "a tensor of RoPE factors with rope.scaling.type " + type,
                       "one of them");
  }
  if (factors != file.tensors.end()) {
    config->rope.type = RopeType::kFactors;
    REFOCUS_ASSIGN_OR_RETURN(config->rope.factors, ReadFactors(file, factors->second, config->head_dim));
  }
  if (type == "none") return absl::OkStatus();
  config->rope.type = RopeType::kLinear;
  config->rope.factor = factor;
  const int64_t window = type == "yarn" ? config->max_positions : 0;
  REFOCUS_ASSIGN_OR_RETURN(config->rope.original_positions,
                           keys.IntOr("rope.scaling.original_context_length", window));
  if (type != "yarn") return absl::OkStatus();
  WidenWindow(config);
  return ReadYarn(keys, config);
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
  REFOCUS_ASSIGN_OR_RETURN(config.sliding_window, keys.IntOr("attention.sliding_window", 0));
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
  REFOCUS_RETURN_IF_ERROR(ReadRope(file, keys, &config));
  REFOCUS_ASSIGN_OR_RETURN(config.vocab, VocabOf(file, keys));
  REFOCUS_RETURN_IF_ERROR(ReadTokens(file, &config));
  config.qk_norm = config.family == Family::kQwen3;
  config.qkv_bias = config.family == Family::kQwen2;
  config.tied_embeddings = file.tensors.count("output.weight") == 0;
  return config;
}

}  // namespace refocus
