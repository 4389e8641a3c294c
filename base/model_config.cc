#include "base/model_config.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/config_sources.h"
#include "base/input_file.h"

namespace refocus {
namespace {

// Above every known model, low enough that no product of them leaves 64 bits.
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHidden = 1 << 17;
constexpr int64_t kMaxHeads = 1024;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxMlp = 1 << 20;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxPositions = int64_t{1} << 31;

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

bool EndsWith(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() && text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

// The last part of the path; of the resolved path for "." and "..".
std::string NameOf(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  fs::path name = fs::path(path).filename();
  if (name.empty() || name == "." || name == "..") {
    const fs::path full = fs::weakly_canonical(path, ignored);
    name = full.has_filename() ? full.filename() : full.parent_path().filename();
  }
  return name.empty() ? path : name.string();
}

}  // namespace

Status ConfigError(const std::string& source, const std::string& field, const std::string& got,
                   const std::string& allowed) {
  return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
               source + ": " + field + ": got " + got + ", allowed " + allowed,
               {{"file", source}, {"field", field}, {"got", got}, {"allowed", allowed}});
}

StatusOr<int32_t> ToTokenId(const std::string& source, const std::string& field, int64_t value) {
  if (value < 0 || value > INT32_MAX) return ConfigError(source, field, std::to_string(value), "token ids from 0");
  return static_cast<int32_t>(value);
}

std::string FamilyName(Family family) {
  switch (family) {
    case Family::kLlama: return "llama";
    case Family::kMistral: return "mistral";
    case Family::kQwen2: return "qwen2";
    case Family::kQwen3: return "qwen3";
  }
  return "?";
}

int64_t ModelConfig::parameters() const {
  const int64_t biases = qkv_bias ? q_dim() + 2 * kv_dim() : 0;
  const int64_t attention = 2 * q_dim() * hidden + 2 * kv_dim() * hidden + biases + (qk_norm ? 2 * head_dim : 0);
  const int64_t layer = attention + 3 * mlp * hidden + 2 * hidden;
  return layers * layer + hidden + (tied_embeddings ? 1 : 2) * vocab * hidden;
}

std::string ModelConfig::Fingerprint() const {
  // Names and stop tokens change nothing that a rank computes. The kernels see floats, so floats are what must agree.
  std::string text;
  for (const int64_t size : {layers, hidden, heads, kv_heads, head_dim, mlp, vocab, max_positions}) {
    text += std::to_string(size) + " ";
  }
  char rest[96];
  std::snprintf(rest, sizeof(rest), "%a %a %d %d %d ", rope_theta, static_cast<double>(static_cast<float>(rms_eps)),
                qk_norm ? 1 : 0, qkv_bias ? 1 : 0, tied_embeddings ? 1 : 0);
  text += rest + rope.ExactText();
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(text.data(), text.size())));
  return digits;
}

Status ModelConfig::Validate(const std::string& source) const {
  struct Range {
    const char* field;
    int64_t value;
    int64_t most;
  };
  for (const Range& range : {Range{"layers", layers, kMaxLayers}, Range{"hidden size", hidden, kMaxHidden},
                             Range{"attention heads", heads, kMaxHeads}, Range{"key/value heads", kv_heads, kMaxHeads},
                             Range{"head size", head_dim, kMaxHeadDim}, Range{"MLP size", mlp, kMaxMlp},
                             Range{"vocabulary", vocab, kMaxVocab}, Range{"positions", max_positions, kMaxPositions}}) {
    if (range.value < 1 || range.value > range.most) {
      return ConfigError(source, range.field, std::to_string(range.value), "1 to " + std::to_string(range.most));
    }
  }
  if (heads % kv_heads != 0) {
    return ConfigError(source, "key/value heads", std::to_string(kv_heads),
                       "divisors of the " + std::to_string(heads) + " attention heads");
  }
  if (head_dim % 2 != 0)
    return ConfigError(source, "head size", std::to_string(head_dim), "even sizes (RoPE turns pairs)");
  if (!std::isfinite(rope_theta) || rope_theta < 1 || rope_theta > 1e15) {
    return ConfigError(source, "rope_theta", Number(rope_theta), "1 to 1e15");
  }
  if (sliding_window != 0 && sliding_window < max_positions) {
    return ConfigError(source, "sliding_window", std::to_string(sliding_window),
                       "none, or one of at least the " + std::to_string(max_positions) +
                           " positions (sliding windows are not supported)");
  }
  REFOCUS_RETURN_IF_ERROR(rope.Validate(source, rope_theta, head_dim));
  if (!std::isfinite(rms_eps) || rms_eps <= 0 || rms_eps >= 1) {
    return ConfigError(source, "rms_norm_eps", Number(rms_eps), "above 0, below 1");
  }
  if (bos_token && (*bos_token < 0 || *bos_token >= vocab)) {
    return ConfigError(source, "bos_token_id", std::to_string(*bos_token), "0 to " + std::to_string(vocab - 1));
  }
  for (const int32_t token : eos_tokens) {
    if (token < 0 || token >= vocab) {
      return ConfigError(source, "eos_token_id", std::to_string(token), "0 to " + std::to_string(vocab - 1));
    }
  }
  return absl::OkStatus();
}

StatusOr<ModelFormat> DetectModelFormat(const std::string& path) {
  const std::string allowed = "a folder with config.json and safetensors, or a .gguf file";
  struct stat info {};
  if (path.find('\0') != std::string::npos || stat(path.c_str(), &info) != 0) {
    return ConfigError(path, "model", std::strerror(errno), allowed);
  }
  if (S_ISDIR(info.st_mode)) {
    struct stat config {};
    if (lstat((path + "/config.json").c_str(), &config) == 0) return ModelFormat::kHuggingFace;
    return ConfigError(path, "model", "a folder without config.json", allowed);
  }
  if (EndsWith(path, ".gguf")) return ModelFormat::kGguf;
  for (const char* suffix : {".bin", ".pt", ".pth", ".pkl", ".ckpt"}) {
    if (EndsWith(path, suffix)) {
      return ConfigError(path, "model", std::string("a ") + suffix + " file (may run code when read)", allowed);
    }
  }
  return ConfigError(path, "model", EndsWith(path, ".safetensors") ? "a single .safetensors file" : "another file",
                     allowed);
}

void WidenWindow(ModelConfig* config) {
  const double window = static_cast<double>(config->rope.original_positions) * config->rope.factor;
  if (window >= 1 && window <= static_cast<double>(kMaxPositions)) {
    config->max_positions = std::max(config->max_positions, static_cast<int64_t>(window));
  }
}

namespace {

Status RequestRopeScaling(const std::string& source, const std::string& request, ModelConfig* config) {
  REFOCUS_ASSIGN_OR_RETURN(RopeScaling scaling, ParseRopeScaling(request));
  if (scaling.type == RopeType::kDefault) return absl::OkStatus();
  if (scaling.original_positions == 0) {
    if (config->rope.type != RopeType::kDefault && config->rope.original_positions == 0) {
      return ConfigError(source, "--rope-scaling", Quoted(request),
                         request + ":WINDOW: the file stretches RoPE (" + config->rope.Text() +
                             ") and does not say from which window");
    }
    scaling.original_positions =
        config->rope.original_positions > 0 ? config->rope.original_positions : config->max_positions;
  }
  config->rope = std::move(scaling);
  WidenWindow(config);
  return absl::OkStatus();
}

}  // namespace

StatusOr<ModelConfig> LoadModelConfig(const std::string& path, const std::string& rope_scaling) {
  REFOCUS_ASSIGN_OR_RETURN(const ModelFormat format, DetectModelFormat(path));
  StatusOr<ModelConfig> config = format == ModelFormat::kGguf ? ReadGgufConfig(path) : ReadHfConfig(path);
  if (!config.ok()) return config.status();
  config->name = NameOf(path);
  const std::string source = format == ModelFormat::kGguf ? path : path + "/config.json";
  REFOCUS_RETURN_IF_ERROR(config->Validate(source));
  REFOCUS_RETURN_IF_ERROR(RequestRopeScaling(source, rope_scaling, &*config));
  REFOCUS_RETURN_IF_ERROR(config->Validate(source));
  return config;
}

}  // namespace refocus
