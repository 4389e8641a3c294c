// How much memory a model, its contexts and its adaptations take on every rank: arithmetic on sizes, before anything is
// allocated. What a rank really reserves follows the same functions.
//
// CPU: everything fp32. CUDA: weights and K/V bf16; a delta as bf16 for the matrix products beside its fp32 master;
// gradient and moments fp32. On both, K/V may be int8 instead (base/kv_int8.h).
#pragma once

#include <cstdint>
#include <string>

#include "base/limits.h"
#include "base/model_config.h"
#include "base/status.h"

namespace refocus {

enum class DeviceKind { kCpu, kCuda };
// "cpu" or "cuda"; anything else is CONFIG_INVALID.
StatusOr<DeviceKind> ParseDevice(const std::string& name);
std::string DeviceName(DeviceKind device);

enum class KvType { kDevice, kInt8 };  // kDevice: what the device computes with
// "int8", or what the device computes with ("fp32" on cpu, "bf16" on cuda; also ""); anything else is CONFIG_INVALID.
StatusOr<KvType> ParseKvType(const std::string& name, DeviceKind device);
std::string KvTypeName(KvType kv, DeviceKind device);

// Of one rank; `config` validated, so none overflows. Every rank holds all weights and all adapters.
int64_t ElementBytes(DeviceKind device);  // of weights and of K/V of type kDevice
int64_t WeightBytes(const ModelConfig& config, DeviceKind device);
// On the rank that owns the token, scales included.
int64_t KvBytesPerToken(const ModelConfig& config, DeviceKind device, KvType kv = KvType::kDevice);

// What an adaptation trains and with what.
struct AdaptationShape {
  int64_t lora_rank = 0;  // 0: a full delta
  int64_t moments = 2;    // that the optimizer keeps for each number: AdamW 2, SGD 0 or, with momentum, 1
  bool keep_best = false;  // a second delta, the best so far
};
int64_t DeltaNumbers(const ModelConfig& config, int64_t lora_rank);  // 0: of a full delta
int64_t AdapterBytes(const ModelConfig& config, DeviceKind device, int64_t lora_rank = 0);  // one committed delta
// One under way: delta, gradient, moments, and what is kept.
int64_t AdaptationBytes(const ModelConfig& config, DeviceKind device, const AdaptationShape& shape = {});

// Rows of an adaptation that go through the model at once.
inline constexpr int64_t kPlannedSpanRows = 512;

struct MemoryQuestion {
  DeviceKind device = DeviceKind::kCpu;
  KvType kv = KvType::kDevice;
  int64_t ranks = 1;
  int64_t memory_bytes = 0;  // that each rank may use
  int64_t chunk_rows = kMaxChunkRows;
  int64_t span_rows = kPlannedSpanRows;
  int64_t tokens = 0;        // of one context with its question and answer
  int64_t adapting = 0;      // adaptations under way at once
  int64_t committed = 0;     // adapters kept
  AdaptationShape shape;     // of all of them
};

// Bytes of each rank, where nothing else is said.
struct MemoryPlan {
  int64_t memory = 0;
  int64_t weights = 0;
  int64_t workspace = 0;  // activations of a prefill chunk or an adaptation's rows, whichever is more, and what logits and
                          // draws of a decode batch take; CPU: simply half of what the weights leave
  int64_t runtime = 0;    // CUDA context, cuBLAS, buffers of NCCL and of peer memory; CPU: 0
  int64_t limit = 0;      // what K/V and adapters may be told to take: negative when the rest alone does not fit
  int64_t pool = 0;       // what they take unless told otherwise, >= 0
  int64_t kv_per_token = 0;
  int64_t kv = 0;         // on the rank that owns most of the context's blocks
  int64_t kv_all_ranks = 0;
  int64_t adaptation = 0;
  int64_t adapters = 0;
  int64_t total = 0;      // sum of weights, workspace, runtime, kv, adaptation, adapters
  int64_t free = 0;       // memory - total
  bool fits = false;      // free >= 0
  int64_t largest_context = 0;       // tokens that fit beside the adaptations and adapters asked for; 0: none
  int64_t largest_context_base = 0;  // beside none
  std::string advice;     // what to change; empty when it fits
};

// FIELD_OUT_OF_RANGE for a question outside the limits, HARDWARE when a sum exceeds 63 bits. `config` validated.
StatusOr<MemoryPlan> PlanMemory(const ModelConfig& config, const MemoryQuestion& question);

// Most tokens of one context of which no rank holds more than `bytes`, at most kMaxContextTokens; 0 for bytes < 0.
int64_t LargestContext(int64_t bytes, int64_t kv_bytes_per_token, int64_t ranks);

}  // namespace refocus
