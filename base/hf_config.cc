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
  const std::string& source() const { return source_; }

 private:
  const json& object_;
  std::string source_, prefix_;
};

StatusOr<Family> FamilyOf(const Fields& fields) {
  constexpr char kAllowed[] = "LlamaForCausalLM (llama), Qwen3ForCausalLM (qwen3)";
  REFOCUS_ASSIGN_OR_RETURN(const std::string type, fields.StringOr("model_type", ""));
  std::string architecture;
  if (const json* list = fields.Find("architectures")) {
    if (!list->is_array() || list->size() != 1 || !list->front().is_string()) {
      return fields.Refuse("architectures", Text(*list), std::string("a list with one of ") + kAllowed);
    }
    architecture = list->front().get<std::string>();
  }
  if (architecture.empty() && type.empty()) return fields.Refuse("architectures", "nothing", kAllowed);
  for (const Family family : {Family::kLlama, Family::kQwen3}) {
    const std::string name = FamilyName(family);
    const std::string expected = family == Family::kLlama ? "LlamaForCausalLM" : "Qwen3ForCausalLM";
    if ((architecture.empty() || architecture == expected) && (type.empty() || type == name)) return family;
  }
  return fields.Refuse("architectures", Quoted(architecture) + " with model_type " + Quoted(type), kAllowed);
}

// One of rope_scaling (older files) and rope_parameters (newer ones). Sets *theta when the object states it.
Status ReadRope(const Fields& fields, const std::string& name, std::optional<double>* theta) {
  const json* object = fields.Find(name);
  if (object == nullptr) return absl::OkStatus();
  if (!object->is_object()) return fields.Refuse(name, Text(*object), "an object or null");
  const Fields rope(*object, fields.source(), name + ".");
  for (const char* key : {"rope_type", "type"}) {
    REFOCUS_ASSIGN_OR_RETURN(const std::string type, rope.StringOr(key, "default"));
    if (type != "default") return rope.Refuse(key, Quoted(type), "default (scaled RoPE is not supported)");
  }
  REFOCUS_ASSIGN_OR_RETURN(const double factor, rope.FloatOr("factor", 1.0));
  if (factor != 1.0) return rope.Refuse("factor", Text(*rope.Find("factor")), "1 (scaled RoPE is not supported)");
  REFOCUS_ASSIGN_OR_RETURN(const double part, rope.FloatOr("partial_rotary_factor", 1.0));
  if (part != 1.0) return rope.Refuse("partial_rotary_factor", Text(*rope.Find("partial_rotary_factor")), "1");
  for (const auto& [key, value] : object->items()) {
    // Per-layer-type settings ("full_attention": {...}) would pass unseen otherwise.
    if (value.is_object()) return rope.Refuse(key, "an object", "one setting for all layers");
  }
  if (rope.Find("rope_theta") != nullptr) {
    REFOCUS_ASSIGN_OR_RETURN(*theta, rope.FloatOr("rope_theta", 0));
  }
  return absl::OkStatus();
}

StatusOr<double> RopeThetaOf(const Fields& fields) {
  constexpr double kDefault = 10000.0;
  std::optional<double> theta;
  REFOCUS_RETURN_IF_ERROR(ReadRope(fields, "rope_scaling", &theta));
  REFOCUS_RETURN_IF_ERROR(ReadRope(fields, "rope_parameters", &theta));
  REFOCUS_ASSIGN_OR_RETURN(const double top, fields.FloatOr("rope_theta", theta.value_or(kDefault)));
  if (theta && top != *theta) {
    return fields.Refuse("rope_theta", Text(*fields.Find("rope_theta")), "the value in rope_parameters");
  }
  REFOCUS_ASSIGN_OR_RETURN(const double part, fields.FloatOr("partial_rotary_factor", 1.0));
  if (part != 1.0) return fields.Refuse("partial_rotary_factor", Text(*fields.Find("partial_rotary_factor")), "1");
  return top;
}

Status RefuseUnsupported(const Fields& fields) {
  for (const char* name : {"attention_bias", "mlp_bias", "use_sliding_window"}) {
    REFOCUS_ASSIGN_OR_RETURN(const bool used, fields.BoolOr(name, false));
    if (used) return fields.Refuse(name, "true", "false (not supported)");
  }
  REFOCUS_ASSIGN_OR_RETURN(const std::string activation, fields.StringOr("hidden_act", "silu"));
  if (activation != "silu") return fields.Refuse("hidden_act", Quoted(activation), "silu");
  if (const json* quantized = fields.Find("quantization_config")) {
    return fields.Refuse("quantization_config", Text(*quantized), "none: weights in F32, F16 or BF16");
  }
  if (const json* types = fields.Find("layer_types")) {
    if (!types->is_array()) return fields.Refuse("layer_types", Text(*types), "a list");
    for (const json& type : *types) {
      if (type != "full_attention") return fields.Refuse("layer_types", Text(type), "full_attention");
    }
  }
  for (const char* name : {"auto_map", "custom_pipelines"}) {
    if (fields.Find(name) != nullptr)
      LogWarning(fields.source() + ": " + name + ": ignored, code from a model is never run");
  }
  return absl::OkStatus();
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
  // What transformers assumes for files that leave these out.
  const bool qwen3 = config.family == Family::kQwen3;
  REFOCUS_ASSIGN_OR_RETURN(config.max_positions, fields.IntOr("max_position_embeddings", qwen3 ? 32768 : 2048));
  REFOCUS_ASSIGN_OR_RETURN(config.rms_eps, fields.FloatOr("rms_norm_eps", 1e-6));
  REFOCUS_ASSIGN_OR_RETURN(config.tied_embeddings, fields.BoolOr("tie_word_embeddings", false));
  REFOCUS_ASSIGN_OR_RETURN(config.rope_theta, RopeThetaOf(fields));
  config.qk_norm = qwen3;
  std::vector<int32_t> bos;
  REFOCUS_RETURN_IF_ERROR(ReadTokens(fields, "bos_token_id", &bos));
  if (!bos.empty()) config.bos_token = bos.front();
  REFOCUS_RETURN_IF_ERROR(ReadTokens(fields, "eos_token_id", &config.eos_tokens));
  REFOCUS_RETURN_IF_ERROR(ReadGenerationConfig(folder + "/generation_config.json", &config.eos_tokens));
  return config;
}

}  // namespace refocus
