// Base weights of one rank: read-only after loading, shared by every context and adapter.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/model_config.h"

namespace refocus {

// Matrices are [out, in], row-major, as Hugging Face stores them; rotary halves are split (element i pairs with
// i + head_dim / 2), GGUF's interleaving is undone on load.
struct LayerWeights {
  at::Tensor attn_norm;  // [hidden]
  at::Tensor wq;         // [heads * head_dim, hidden]
  at::Tensor wk;         // [kv_heads * head_dim, hidden]
  at::Tensor wv;         // [kv_heads * head_dim, hidden]
  at::Tensor wo;         // [hidden, heads * head_dim]
  at::Tensor q_bias;     // [heads * head_dim], only with qkv_bias
  at::Tensor k_bias;     // [kv_heads * head_dim], only with qkv_bias
  at::Tensor v_bias;     // the same
  at::Tensor q_norm;     // [head_dim], only with qk_norm
  at::Tensor k_norm;     // [head_dim], only with qk_norm
  at::Tensor mlp_norm;   // [hidden]
  at::Tensor gate;       // [mlp, hidden]
  at::Tensor up;         // [mlp, hidden]
  at::Tensor down;       // [hidden, mlp]
};

struct Weights {
  ModelConfig config;
  at::Tensor embedding;   // [vocab, hidden]
  at::Tensor final_norm;  // [hidden]
  at::Tensor output;      // [vocab, hidden]; the same tensor as embedding when tied
  std::vector<LayerWeights> layers;
  int64_t bytes = 0;  // held by the tensors above, shared ones once
  // Of the tensors' names and encoded bytes; does not depend on how they are spread over files. Tells two models of one
  // shape apart, and another encoding of the same values too.
  uint64_t content_hash = 0;
};

// fp32 on the CPU, bf16 on a GPU.
at::ScalarType WeightType(const at::Device& device);

struct LoadOptions {
  int threads = 2;
  bool check_finite = false;                                              // refuse NaN and Inf, naming the tensor
  std::function<void(int64_t done_bytes, int64_t total_bytes)> progress;  // from the calling thread; may be empty
  at::Device device = at::kCPU;               // where the tensors shall live
  std::optional<at::ScalarType> type;         // fp32 or bf16; unset: WeightType(device)
  std::optional<uint64_t> random_seed;        // values of worker/random_weights.h instead of what files hold
};

// Loads every tensor of `config` from `path`. Values are rounded to nearest where the type is narrower than the file's.
// All names and shapes are checked before the first byte of data is read or allocated; everything has arrived on the
// device when it returns. WEIGHTS_INVALID naming tensor, found, expected; HARDWARE when memory is short. With
// random_seed no file but the configuration is read, which the caller did.
StatusOr<Weights> LoadWeights(const std::string& path, const ModelConfig& config, const LoadOptions& options);

// The weights' bytes, hashed; equal before and after everything the service does. The same on every device; a GPU's
// tensors are copied to the CPU one by one.
uint64_t HashWeights(const Weights& weights);

}  // namespace refocus
