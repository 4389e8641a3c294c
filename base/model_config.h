// The shape of a model and what its forward pass does; read from a Hugging Face config.json or from GGUF metadata.
//
// Llama, Mistral, Qwen2 (2.5 too) and Qwen3. What is not supported (sliding windows in effect, experts, other families
// and kinds of RoPE, capped logits) is refused by name with reason CONFIG_INVALID: the message gives file, field, found,
// allowed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/rope.h"
#include "base/status.h"

namespace refocus {

// A name in files and a choice of defaults: what the forward pass does is in the fields of ModelConfig.
enum class Family { kLlama, kMistral, kQwen2, kQwen3 };
std::string FamilyName(Family family);  // "llama", "mistral", "qwen2", "qwen3"

struct ModelConfig {
  Family family = Family::kLlama;
  std::string name;              // for people: the folder's or file's name
  int64_t layers = 0;
  int64_t hidden = 0;
  int64_t heads = 0;             // query heads
  int64_t kv_heads = 0;          // divides heads
  int64_t head_dim = 0;          // even
  int64_t mlp = 0;
  int64_t vocab = 0;
  int64_t max_positions = 0;     // the window, stretched where `rope` says so
  int64_t sliding_window = 0;    // stated by the file; must hide nothing, so 0 or from max_positions
  double rope_theta = 10000.0;
  RopeScaling rope;
  double rms_eps = 1e-5;
  bool qk_norm = false;          // Qwen3: RMSNorm over head_dim of every q and k head before RoPE
  bool qkv_bias = false;         // Qwen2: q, k and v get a bias before QK-norm and RoPE
  bool tied_embeddings = false;  // the output matrix is the embedding matrix
  std::optional<int32_t> bos_token;
  std::vector<int32_t> eos_tokens;

  int64_t q_dim() const { return heads * head_dim; }
  int64_t kv_dim() const { return kv_heads * head_dim; }
  int64_t query_parameters() const { return layers * q_dim() * hidden; }
  int64_t parameters() const;
  // K and V of all layers, for `element_bytes` an element (4: fp32 on CPU).
  int64_t kv_bytes_per_token(int64_t element_bytes) const { return layers * 2 * kv_dim() * element_bytes; }

  // Shape and options as 16 hex digits; ranks with different ones never form a group.
  std::string Fingerprint() const;

  // Every relation between fields above; `source` (a path) begins the message.
  Status Validate(const std::string& source) const;
};

enum class ModelFormat { kHuggingFace, kGguf };

// A path on the command line: a folder with config.json, or a file that ends in .gguf. Anything else is refused
// (CONFIG_INVALID; .bin, .pt, .pth by name: only safetensors and GGUF are read).
StatusOr<ModelFormat> DetectModelFormat(const std::string& path);

// Reads and validates; touches no weight but GGUF's rope_freqs.weight. `rope_scaling` as in ParseRopeScaling: unless
// none, it takes the place of what the model states. Its window is the one that the model states, or max_positions;
// max_positions becomes that window times the factor where this is more. Errors: CONFIG_INVALID, and WEIGHTS_INVALID for
// a broken GGUF container.
StatusOr<ModelConfig> LoadModelConfig(const std::string& path, const std::string& rope_scaling = "");

}  // namespace refocus
