#include <algorithm>
#include <cmath>
#include <sys/stat.h>

#include "base/config_sources.h"
#include "base/input_file.h"
#include "base/json_file.h"
#include "base/log.h"

namespace refocus {
namespace {

using nlohmann::json;

constexpr int64_t kMaxConfigBytes = 4 << 20;

std::string Text(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 100) text = text.substr(0, 100) + "...";
  return text;
}

// Fields of one object, each with its exact type: an integer is never a string, a fraction or a boolean. null counts as
// absent.
class Fields {
 public:
  Fields(const json& object, std::string source, std::string prefix = "")
      : object_(object), source_(std::move(source)), prefix_(std::move(prefix)) {}

  const json* Find(const std::string& name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  Status Refuse(const std::string& name, const std::string& got, const std::string& allowed) const {
    return ConfigError(source_, prefix_ + name, got, allowed);
  }

  StatusOr<int64_t> Int(const std::string& name) const {
    const json* value = Find(name);
    if (value == nullptr) return Refuse(name, "nothing", "an integer");
    const bool too_large = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
    if (!value->is_number_integer() || too_large) return Refuse(name, Text(*value), "an integer");
    return value->get<int64_t>();
  }
  StatusOr<int64_t> IntOr(const std::string& name, int64_t absent) const {
    return Find(name) == nullptr ? StatusOr<int64_t>(absent) : Int(name);
  }
  StatusOr<double> FloatOr(const std::string& name, double absent) const {
    const json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_number()) return Refuse(name, Text(*value), "a number");
    return value->get<double>();
  }
  StatusOr<bool> BoolOr(const std::string& name, bool absent) const {
    const json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) return Refuse(name, Text(*value), "true or false");
    return value->get<bool>();
  }
  StatusOr<std::string> StringOr(const std::string& name, const std::string& absent) const {
    const json* value = Find(name);
    if (value == nullptr) return absent;
    if (!value->is_string()) return Refuse(name, Text(*value), "a string");
    return value->get<std::string>();
  }
  bool Has(const std::string& name) const { return object_.contains(name); }  // null too
  const std::string& source() const { return source_; }

 private:
  const json& object_;
  std::string source_, prefix_;
};

struct FamilyNames {
  Family family;
  const char* architecture;
  const char* model_type;
};
constexpr FamilyNames kFamilies[] = {{Family::kLlama, "LlamaForCausalLM", "llama"},
                                     {Family::kMistral, "MistralForCausalLM", "mistral"},
                                     {Family::kQwen2, "Qwen2ForCausalLM", "qwen2"},
                                     {Family::kQwen3, "Qwen3ForCausalLM", "qwen3"}};

StatusOr<Family> FamilyOf(const Fields& fields) {
  std::string allowed;
  for (const FamilyNames& names : kFamilies) {
    allowed += (allowed.empty() ? "" : ", ") + std::string(names.architecture) + " (" + names.model_type + ")";
  }
  REFOCUS_ASSIGN_OR_RETURN(const std::string type, fields.StringOr("model_type", ""));
  std::string architecture;
  if (const json* list = fields.Find("architectures")) {
    if (!list->is_array() || list->size() != 1 || !list->front().is_string()) {
      return fields.Refuse("architectures", Text(*list), "a list with one of " + allowed);
    }
    architecture = list->front().get<std::string>();
  }
  if (architecture.empty() && type.empty()) return fields.Refuse("architectures", "nothing", allowed);
  for (const FamilyNames& names : kFamilies) {
    if ((architecture.empty() || architecture == names.architecture) && (type.empty() || type == names.model_type)) {
      return names.family;
    }
  }
  return fields.Refuse("architectures", Quoted(architecture) + " with model_type " + Quoted(type), allowed);
}

// Of transformers' llama3 and yarn. `top` holds original_max_position_embeddings in some files, which then counts.
Status ReadWindow(const Fields& top, const Fields& rope, int64_t max_positions, RopeScaling* scaling) {
  constexpr char kName[] = "original_max_position_embeddings";
  REFOCUS_ASSIGN_OR_RETURN(scaling->original_positions, rope.IntOr(kName, max_positions));
  REFOCUS_ASSIGN_OR_RETURN(scaling->original_positions, top.IntOr(kName, scaling->original_positions));
  if (scaling->original_positions < 1) {
    return rope.Refuse(kName, std::to_string(scaling->original_positions), "at least 1");
  }
  return absl::OkStatus();
}

Status ReadYarn(const Fields& top, const Fields& rope, int64_t max_positions, RopeScaling* scaling) {
  REFOCUS_RETURN_IF_ERROR(ReadWindow(top, rope, max_positions, scaling));
  const double ratio = static_cast<double>(max_positions) / static_cast<double>(scaling->original_positions);
  REFOCUS_ASSIGN_OR_RETURN(scaling->factor, rope.FloatOr("factor", ratio));
  REFOCUS_ASSIGN_OR_RETURN(scaling->beta_fast, rope.FloatOr("beta_fast", scaling->beta_fast));
  REFOCUS_ASSIGN_OR_RETURN(scaling->beta_slow, rope.FloatOr("beta_slow", scaling->beta_slow));
  REFOCUS_ASSIGN_OR_RETURN(scaling->truncate, rope.BoolOr("truncate", true));
  REFOCUS_ASSIGN_OR_RETURN(const double mscale, rope.FloatOr("mscale", 0));
  REFOCUS_ASSIGN_OR_RETURN(const double mscale_all_dim, rope.FloatOr("mscale_all_dim", 0));
  double attention_factor = YarnAttentionFactor(scaling->factor);
  if (mscale != 0 && mscale_all_dim != 0) {
    attention_factor =
        YarnAttentionFactor(scaling->factor, mscale) / YarnAttentionFactor(scaling->factor, mscale_all_dim);
  }
  REFOCUS_ASSIGN_OR_RETURN(scaling->attention_factor, rope.FloatOr("attention_factor", attention_factor));
  return absl::OkStatus();
}

Status ReadScaling(const Fields& top, const Fields& rope, const std::string& type, int64_t max_positions,
                   RopeScaling* scaling) {
  if (type == "default") return absl::OkStatus();
  if (type == "yarn") {
    scaling->type = RopeType::kYarn;
    return ReadYarn(top, rope, max_positions, scaling);
  }
  if (type != "linear" && type != "llama3") {
    return rope.Refuse("rope_type", Quoted(type), "default, linear, llama3, yarn");
  }
  if (rope.Find("factor") == nullptr) return rope.Refuse("factor", "nothing", "a number");
  REFOCUS_ASSIGN_OR_RETURN(scaling->factor, rope.FloatOr("factor", 1.0));
  if (type == "linear") {
    scaling->type = RopeType::kLinear;
    return absl::OkStatus();
  }
  scaling->type = RopeType::kLlama3;
  for (const char* name : {"low_freq_factor", "high_freq_factor"}) {
    if (rope.Find(name) == nullptr) return rope.Refuse(name, "nothing", "a number");
  }
  REFOCUS_ASSIGN_OR_RETURN(scaling->low_factor, rope.FloatOr("low_freq_factor", 0));
  REFOCUS_ASSIGN_OR_RETURN(scaling->high_factor, rope.FloatOr("high_freq_factor", 0));
  return ReadWindow(top, rope, max_positions, scaling);
}

// One of rope_scaling (older files) and rope_parameters (newer ones). Sets *theta when the object states it.
Status ReadRope(const Fields& fields, const std::string& name, std::optional<double>* theta, ModelConfig* config) {
  const json* object = fields.Find(name);
  if (object == nullptr) return absl::OkStatus();
  if (!object->is_object()) return fields.Refuse(name, Text(*object), "an object or null");
  const Fields rope(*object, fields.source(), name + ".");
  for (const auto& [key, value] : object->items()) {
    // Per-layer-type settings ("full_attention": {...}) would pass unseen otherwise.
    if (value.is_object()) return rope.Refuse(key, "an object", "one setting for all layers");
  }
  if (rope.Find("mrope_section") != nullptr) return rope.Refuse("mrope_section", "it", "none (not supported)");
  REFOCUS_ASSIGN_OR_RETURN(const std::string old_type, rope.StringOr("type", "default"));
  REFOCUS_ASSIGN_OR_RETURN(const std::string type, rope.StringOr("rope_type", old_type));
  if (rope.Find("type") != nullptr && type != old_type) {
    return rope.Refuse("type", Quoted(old_type), "the same as rope_type (" + Quoted(type) + ")");
  }
  REFOCUS_ASSIGN_OR_RETURN(const double factor, rope.FloatOr("factor", 1.0));
  if (type == "default" && factor != 1.0) {
    return rope.Refuse("factor", Text(*rope.Find("factor")), "1, or a rope_type (linear, llama3, yarn)");
  }
  REFOCUS_ASSIGN_OR_RETURN(const double part, rope.FloatOr("partial_rotary_factor", 1.0));
  if (part != 1.0) return rope.Refuse("partial_rotary_factor", Text(*rope.Find("partial_rotary_factor")), "1");
  if (type != "default" && config->rope.type != RopeType::kDefault) {
    return rope.Refuse("rope_type", Quoted(type), "one of rope_scaling and rope_parameters");
  }
  REFOCUS_RETURN_IF_ERROR(ReadScaling(fields, rope, type, config->max_positions, &config->rope));
  if (rope.Find("rope_theta") != nullptr) {
    REFOCUS_ASSIGN_OR_RETURN(*theta, rope.FloatOr("rope_theta", 0));
  }
  return absl::OkStatus();
}

Status ReadRotary(const Fields& fields, ModelConfig* config) {
  constexpr double kDefault = 10000.0;
  std::optional<double> theta;
  REFOCUS_RETURN_IF_ERROR(ReadRope(fields, "rope_scaling", &theta, config));
  REFOCUS_RETURN_IF_ERROR(ReadRope(fields, "rope_parameters", &theta, config));
  REFOCUS_ASSIGN_OR_RETURN(config->rope_theta, fields.FloatOr("rope_theta", theta.value_or(kDefault)));
  if (theta && config->rope_theta != *theta) {
    return fields.Refuse("rope_theta", Text(*fields.Find("rope_theta")), "the value in rope_parameters");
  }
  REFOCUS_ASSIGN_OR_RETURN(const double part, fields.FloatOr("partial_rotary_factor", 1.0));
  if (part != 1.0) return fields.Refuse("partial_rotary_factor", Text(*fields.Find("partial_rotary_factor")), "1");
  return absl::OkStatus();
}

// The window that layers see keys in, where the file says that one is used.
Status ReadSlidingWindow(const Fields& fields, ModelConfig* config) {
  constexpr int64_t kAssumed = 4096;  // by transformers, of files that leave it out
  const bool qwen = config->family == Family::kQwen2 || config->family == Family::kQwen3;
  REFOCUS_ASSIGN_OR_RETURN(const bool used, fields.BoolOr("use_sliding_window", !qwen));
  if (const json* types = fields.Find("layer_types")) {
    if (!types->is_array()) return fields.Refuse("layer_types", Text(*types), "a list");
    for (const json& type : *types) {
      if (type != "full_attention") return fields.Refuse("layer_types", Text(type), "full_attention");
    }
    if (qwen) return absl::OkStatus();  // there the list alone decides
  }
  if (!used) return absl::OkStatus();
  const bool stated = fields.Has("sliding_window");  // null: none
  const bool assumed = !stated && (qwen || config->family == Family::kMistral);
  if (fields.Find("sliding_window") == nullptr && !assumed) return absl::OkStatus();
  REFOCUS_ASSIGN_OR_RETURN(const int64_t window, fields.IntOr("sliding_window", kAssumed));
  REFOCUS_ASSIGN_OR_RETURN(const int64_t full_layers, fields.IntOr("max_window_layers", 28));
  if (window < 0) return fields.Refuse("sliding_window", std::to_string(window), "null, or from 1");
  if (!qwen || full_layers < config->layers) config->sliding_window = window;
  return absl::OkStatus();
}

Status RefuseUnsupported(const Fields& fields) {
  for (const char* name : {"attention_bias", "mlp_bias", "use_mrope"}) {
    REFOCUS_ASSIGN_OR_RETURN(const bool used, fields.BoolOr(name, false));
    if (used) return fields.Refuse(name, "true", "false (not supported)");
  }
  for (const char* name : {"num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"}) {
    REFOCUS_ASSIGN_OR_RETURN(const int64_t count, fields.IntOr(name, 0));
    if (count != 0) return fields.Refuse(name, std::to_string(count), "0 (experts are not supported)");
  }
  for (const char* name : {"attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"}) {
    REFOCUS_ASSIGN_OR_RETURN(const double cap, fields.FloatOr(name, 0));
    if (cap != 0) return fields.Refuse(name, Text(*fields.Find(name)), "null (capped logits are not supported)");
  }
  REFOCUS_ASSIGN_OR_RETURN(const std::string activation, fields.StringOr("hidden_act", "silu"));
  if (activation != "silu") return fields.Refuse("hidden_act", Quoted(activation), "silu");
  if (const json* quantized = fields.Find("quantization_config")) {
    return fields.Refuse("quantization_config", Text(*quantized), "none: weights in F32, F16 or BF16, or a .gguf file");
  }
  for (const char* name : {"auto_map", "custom_pipelines"}) {
    if (fields.Find(name) != nullptr)
      LogWarning(fields.source() + ": " + name + ": ignored, code from a model is never run");
  }
  return absl::OkStatus();
}

// What transformers assumes for files that leave it out.
int64_t AssumedWindow(Family family) {
  switch (family) {
    case Family::kLlama: return 2048;
    case Family::kMistral: return 131072;
    case Family::kQwen2:
    case Family::kQwen3: return 32768;
  }
  return 2048;
}

// An id, a list of ids, or absent (*tokens is then left alone).
Status ReadTokens(const Fields& fields, const std::string& name, std::vector<int32_t>* tokens) {
  const json* value = fields.Find(name);
  if (value == nullptr) return absl::OkStatus();
  const json list = value->is_array() ? *value : json::array({*value});
  std::vector<int32_t> found;
  for (const json& item : list) {
    const bool fits = item.is_number_integer() && (!item.is_number_unsigned() || item.get<uint64_t>() <= INT32_MAX);
    if (!fits) return fields.Refuse(name, Text(item), "a token id or a list of them");
    REFOCUS_ASSIGN_OR_RETURN(const int32_t token, ToTokenId(fields.source(), name, item.get<int64_t>()));
    if (std::find(found.begin(), found.end(), token) == found.end()) found.push_back(token);
  }
  *tokens = std::move(found);
  return absl::OkStatus();
}

StatusOr<json> ReadObject(const std::string& path) {
  REFOCUS_ASSIGN_OR_RETURN(json value, ReadJsonFile(path, "CONFIG_INVALID", kMaxConfigBytes));
  if (!value.is_object()) return ConfigError(path, "file", Text(value), "an object");
  return value;
}

// generation_config.json, where there is one, decides when generation ends.
Status ReadGenerationConfig(const std::string& path, std::vector<int32_t>* eos_tokens) {
  struct stat info {};
  if (lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  REFOCUS_ASSIGN_OR_RETURN(const json object, ReadObject(path));
  return ReadTokens(Fields(object, path), "eos_token_id", eos_tokens);
}

Status ReadHeads(const Fields& fields, ModelConfig* config) {
  REFOCUS_ASSIGN_OR_RETURN(config->heads, fields.Int("num_attention_heads"));
  REFOCUS_ASSIGN_OR_RETURN(config->kv_heads, fields.IntOr("num_key_value_heads", config->heads));
  if (config->heads < 1) return fields.Refuse("num_attention_heads", std::to_string(config->heads), "at least 1");
  if (fields.Find("head_dim") != nullptr) {
    REFOCUS_ASSIGN_OR_RETURN(config->head_dim, fields.Int("head_dim"));
  } else if (config->family == Family::kQwen3) {
    config->head_dim = 128;  // transformers' default there, whatever the hidden size
  } else if (config->hidden % config->heads == 0) {
    config->head_dim = config->hidden / config->heads;
  } else {
    return fields.Refuse("hidden_size", std::to_string(config->hidden),
                         "multiples of the " + std::to_string(config->heads) + " attention heads, or a head_dim");
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<ModelConfig> ReadHfConfig(const std::string& folder) {
  const std::string path = folder + "/config.json";
  REFOCUS_ASSIGN_OR_RETURN(const json object, ReadObject(path));
  const Fields fields(object, path);
  ModelConfig config;
  REFOCUS_ASSIGN_OR_RETURN(config.family, FamilyOf(fields));
  REFOCUS_RETURN_IF_ERROR(RefuseUnsupported(fields));
  REFOCUS_ASSIGN_OR_RETURN(config.layers, fields.Int("num_hidden_layers"));
  REFOCUS_ASSIGN_OR_RETURN(config.hidden, fields.Int("hidden_size"));
  REFOCUS_ASSIGN_OR_RETURN(config.mlp, fields.Int("intermediate_size"));
  REFOCUS_ASSIGN_OR_RETURN(config.vocab, fields.Int("vocab_size"));
  REFOCUS_RETURN_IF_ERROR(ReadHeads(fields, &config));
  REFOCUS_ASSIGN_OR_RETURN(config.max_positions,
                           fields.IntOr("max_position_embeddings", AssumedWindow(config.family)));
  REFOCUS_ASSIGN_OR_RETURN(config.rms_eps, fields.FloatOr("rms_norm_eps", 1e-6));
  REFOCUS_ASSIGN_OR_RETURN(config.tied_embeddings, fields.BoolOr("tie_word_embeddings", false));
  REFOCUS_RETURN_IF_ERROR(ReadRotary(fields, &config));
  // Files state llama3 and linear with the window that comes of it, YaRN often with the one before.
  if (config.rope.type == RopeType::kYarn) WidenWindow(&config);
  REFOCUS_RETURN_IF_ERROR(ReadSlidingWindow(fields, &config));
  config.qk_norm = config.family == Family::kQwen3;
  config.qkv_bias = config.family == Family::kQwen2;
  std::vector<int32_t> bos;
  REFOCUS_RETURN_IF_ERROR(ReadTokens(fields, "bos_token_id", &bos));
  if (!bos.empty()) config.bos_token = bos.front();
  REFOCUS_RETURN_IF_ERROR(ReadTokens(fields, "eos_token_id", &config.eos_tokens));
  REFOCUS_RETURN_IF_ERROR(ReadGenerationConfig(folder + "/generation_config.json", &config.eos_tokens));
  return config;
}

}  // namespace refocus
