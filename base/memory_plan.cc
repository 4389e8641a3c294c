#include "base/memory_plan.h"

#include <algorithm>
#include <cstdio>
#include <initializer_list>

#include "base/check.h"
#include "base/shard_plan.h"

namespace refocus {
namespace {

constexpr int64_t kMaxRanks = 4096;
constexpr int64_t kMostRanksAdvised = 256;
constexpr int64_t kBf16 = 2;
constexpr int64_t kFp32 = 4;
constexpr int64_t kIndex = 8;                            // ids, positions, slots
constexpr int64_t kLogitRows = 128;                      // that go through the output matrix at once
constexpr int64_t kFactorRows = 128;                     // whose gradient of a full delta stays in factors
constexpr int64_t kSplitTiles = 512;                     // partial results of attention over few rows, split over keys:
constexpr int64_t kSplitTileRows = 128;                  // so many tiles of so many rows at most
constexpr int64_t kDeviceRuntimeBytes = int64_t{1} << 30;      // CUDA context, kernels, cuBLAS
constexpr int64_t kCollectiveRuntimeBytes = int64_t{1} << 30;  // NCCL's channels and staging

// A sum of products that remembers when it left 63 bits.
class Bytes {
 public:
  Bytes& Add(std::initializer_list<int64_t> factors) {
    int64_t product = 1;
    for (const int64_t factor : factors) overflow_ |= __builtin_mul_overflow(product, factor, &product);
    overflow_ |= __builtin_add_overflow(value_, product, &value_);
    return *this;
  }
  bool overflow() const { return overflow_; }
  int64_t value() const { return value_; }

 private:
  int64_t value_ = 0;
  bool overflow_ = false;
};

// Tensors of one layer while a prefill chunk of `rows` passes it; all that live at some time, as the allocator keeps
// their blocks.
Bytes PrefillActivations(const ModelConfig& c, int64_t ranks, int64_t rows) {
  const int64_t own = ShardPlan{ranks, 0}.CountBelow(rows);  // rows are computed where their K/V live
  const int64_t partial = kFp32 * (c.q_dim() + c.heads);     // out and lse of one row
  Bytes bytes;
  bytes.Add({own, 2 * kFp32 * c.hidden})                     // residual stream before and behind the attention
      .Add({own, 4 * kBf16 * c.hidden})                      // both norms, both blocks' outputs
      .Add({own, (kFp32 + kBf16) * c.q_dim()})               // queries before and after rotation
      .Add({own, (kFp32 + kBf16) * c.kv_dim()})              // keys before rotation, values
      .Add({own, partial + kBf16 * c.q_dim()})               // combined attention, and rounded
      .Add({own, 3 * kBf16 * c.mlp})                         // gate, up, their product
      .Add({rows, partial + 4 * kIndex});                    // this rank's partials of everybody's rows
  if (ranks > 1) {
    bytes.Add({rows, kBf16 * c.q_dim()})                     // everybody's queries
        .Add({own, ranks, partial});                         // everybody's partials of own rows
  }
  return bytes;
}

// What the backward pass of `rows` keeps of every layer, and its temporaries in one. Few rows are not split over ranks, nor
// any that are read behind the context, which have keys of their own.
Bytes SpanActivations(const ModelConfig& c, int64_t ranks, int64_t rows) {
  const int64_t behind = std::min(rows, kMaxBehindRows);
  Bytes bytes;
  if (ranks > 1) bytes.Add({ranks, rows, kFp32 * (c.q_dim() + c.heads)});       // everybody's partials
  bytes.Add({c.layers, behind, 2 * kBf16 * c.kv_dim()})                         // own keys and values
      .Add({2 * behind, behind, kFp32 * c.heads})                               // their weights and these' gradients
      .Add({behind, 6 * kFp32 * c.q_dim()});                                    // fp32 copies, both parts of the attention
  bytes.Add({c.layers, std::min(rows, kFactorRows), kBf16 * c.q_dim()});        // a full delta's gradient in factors
  bytes.Add({c.layers, rows, (2 * kFp32 + 2 * kBf16) * c.hidden})               // x, x_mid and their norms
      .Add({c.layers, rows, 2 * (kFp32 + kBf16) * c.q_dim() + kFp32 * c.heads})  // queries, attention, lse
      .Add({c.layers, rows, 2 * kBf16 * c.mlp})                                  // gate, up
      .Add({rows, 3 * kBf16 * c.mlp + 4 * (kFp32 + kBf16) * c.hidden})
      .Add({rows, 3 * (kFp32 + kBf16) * c.q_dim() + 4 * kFp32 * c.heads + 4 * kIndex});
  return bytes;
}

// Of a GPU.
Bytes Workspace(const ModelConfig& c, const MemoryQuestion& q) {
  const Bytes prefill = PrefillActivations(c, q.ranks, q.chunk_rows);
  const Bytes span = SpanActivations(c, q.ranks, q.span_rows);
  Bytes bytes = prefill.overflow() || (!span.overflow() && prefill.value() >= span.value()) ? prefill : span;
  return bytes.Add({std::min(kLogitRows, q.span_rows), kFp32 + kBf16, c.vocab})
      // A decode batch's logits, adjusted ones, and what penalties count; of several ranks its parts, and the gathered
      // ones.
      .Add({kMaxDecodeRows, (q.ranks > 1 ? 5 : 3) * kFp32, c.vocab})
      .Add({kSplitTiles, kSplitTileRows, kFp32, c.head_dim + 1});
}

Status CheckQuestion(const MemoryQuestion& q) {
  struct Range {
    const char* field;
    int64_t value, least, most;
  };
  for (const Range& range : {Range{"ranks", q.ranks, 1, kMaxRanks}, Range{"memory", q.memory_bytes, 0, INT64_MAX},
                             Range{"chunk rows", q.chunk_rows, 1, kMaxChunkRows},
                             Range{"span rows", q.span_rows, 1, kMaxStepRows},
                             Range{"tokens", q.tokens, 0, kMaxContextTokens},
                             Range{"adapting", q.adapting, 0, INT64_MAX},
                             Range{"committed", q.committed, 0, INT64_MAX},
                             Range{"LoRA rank", q.shape.lora_rank, 0, kMaxLoraRank},
                             Range{"moments", q.shape.moments, 0, 2}}) {
    if (range.value < range.least || range.value > range.most) {
      return FieldError(range.field, std::to_string(range.value),
                        std::to_string(range.least) + " to " + std::to_string(range.most));
    }
  }
  return absl::OkStatus();
}

StatusOr<MemoryPlan> Arithmetic(const ModelConfig& c, const MemoryQuestion& q) {
  MemoryPlan plan;
  plan.memory = q.memory_bytes;
  plan.weights = WeightBytes(c, q.device);
  plan.kv_per_token = KvBytesPerToken(c, q.device, q.kv);
  Bytes workspace;
  if (q.device == DeviceKind::kCuda) {
    workspace = Workspace(c, q);
    plan.runtime = kDeviceRuntimeBytes + (q.ranks > 1 ? kCollectiveRuntimeBytes : 0);
  } else {
    const int64_t left = std::max<int64_t>(q.memory_bytes - plan.weights, 0);
    workspace.Add({left - left / 2});
  }
  const auto product = [](int64_t a, int64_t b) { return Bytes().Add({a, b}); };
  const Bytes kv = product(ShardPlan{q.ranks, 0}.CountBelow(q.tokens), plan.kv_per_token);
  const Bytes kv_all_ranks = product(q.tokens, plan.kv_per_token);
  const Bytes adaptation = product(q.adapting, AdaptationBytes(c, q.device, q.shape));
  const Bytes adapters = product(q.committed, AdapterBytes(c, q.device, q.shape.lora_rank));
  Bytes total;
  for (const Bytes& part : {workspace, kv, adaptation, adapters}) total.Add({part.value()});
  total.Add({plan.weights}).Add({plan.runtime});
  bool overflow = total.overflow();
  for (const Bytes& part : {workspace, kv, kv_all_ranks, adaptation, adapters}) overflow |= part.overflow();
  if (overflow) {
    return Error(StatusCode::kResourceExhausted, "HARDWARE", "memory: the plan needs 2^63 bytes or more on a rank");
  }
  plan.workspace = workspace.value();
  plan.kv = kv.value();
  plan.kv_all_ranks = kv_all_ranks.value();
  plan.adaptation = adaptation.value();
  plan.adapters = adapters.value();
  plan.total = total.value();
  plan.free = plan.memory - plan.total;
  plan.fits = plan.free >= 0;
  const bool gpu = q.device == DeviceKind::kCuda;
  plan.limit = plan.memory - plan.weights - (gpu ? plan.runtime + plan.workspace : 0);
  plan.pool = std::max<int64_t>(gpu ? plan.limit : plan.limit / 2, 0);
  plan.largest_context = LargestContext(plan.pool - plan.adaptation - plan.adapters, plan.kv_per_token, q.ranks);
  plan.largest_context_base = LargestContext(plan.pool, plan.kv_per_token, q.ranks);
  return plan;
}

std::string Gib(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
  return text;
}

// The fewest ranks above the question's with which it fits; 0: none do.
int64_t RanksThatFit(const ModelConfig& config, MemoryQuestion question) {
  while (++question.ranks <= kMostRanksAdvised) {
    const StatusOr<MemoryPlan> plan = Arithmetic(config, question);
    if (plan.ok() && plan->fits) return question.ranks;
  }
  return 0;
}

std::string Advice(const ModelConfig& config, const MemoryQuestion& question, const MemoryPlan& plan) {
  std::string ways;
  const auto add = [&ways](const std::string& way) { ways += (ways.empty() ? "" : ", or ") + way; };
  if (const int64_t ranks = RanksThatFit(config, question); ranks > 0) {
    add("at least " + std::to_string(ranks) + " ranks of this memory");
  }
  if (plan.largest_context > 0) add("at most " + std::to_string(plan.largest_context) + " tokens");
  if (question.kv != KvType::kInt8) {
    MemoryQuestion smaller = question;
    smaller.kv = KvType::kInt8;
    const StatusOr<MemoryPlan> with = Arithmetic(config, smaller);
    if (with.ok() && with->fits) add("--kv-dtype int8");
  }
  const bool adapts = plan.adaptation + plan.adapters > 0;
  if (adapts && plan.largest_context_base >= question.tokens && plan.limit >= 0) add("no adaptation");
  if (!ways.empty()) return "use " + ways;
  return "use ranks with more memory, or a smaller model: each rank holds all weights" +
         std::string(adapts ? " and adapters" : "");
}

}  // namespace

StatusOr<DeviceKind> ParseDevice(const std::string& name) {
  if (name == "cpu") return DeviceKind::kCpu;
  if (name == "cuda") return DeviceKind::kCuda;
  return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", "device: got '" + name + "', allowed cpu, cuda",
               {{"field", "device"}, {"got", name}, {"allowed", "cpu, cuda"}});
}

std::string DeviceName(DeviceKind device) { return device == DeviceKind::kCuda ? "cuda" : "cpu"; }

StatusOr<KvType> ParseKvType(const std::string& name, DeviceKind device) {
  const std::string own = KvTypeName(KvType::kDevice, device);
  if (name.empty() || name == own) return KvType::kDevice;
  if (name == "int8") return KvType::kInt8;
  const std::string allowed = own + ", int8 with --device " + DeviceName(device);
  return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", "--kv-dtype: got " + name + ", allowed " + allowed,
               {{"field", "kv-dtype"}, {"got", name}, {"allowed", allowed}});
}

std::string KvTypeName(KvType kv, DeviceKind device) {
  return kv == KvType::kInt8 ? "int8" : device == DeviceKind::kCuda ? "bf16" : "fp32";
}

int64_t ElementBytes(DeviceKind device) { return device == DeviceKind::kCuda ? kBf16 : kFp32; }

int64_t WeightBytes(const ModelConfig& config, DeviceKind device) {
  return config.parameters() * ElementBytes(device);
}

int64_t KvBytesPerToken(const ModelConfig& config, DeviceKind device, KvType kv) {
  if (kv == KvType::kDevice) return config.kv_bytes_per_token(ElementBytes(device));
  return config.kv_bytes_per_token(1) + 2 * config.layers * config.kv_heads * kBf16;  // codes and scales
}

int64_t DeltaNumbers(const ModelConfig& config, int64_t lora_rank) {
  if (lora_rank == 0) return config.query_parameters();
  return config.layers * (config.hidden + config.q_dim()) * lora_rank;
}

int64_t AdapterBytes(const ModelConfig& config, DeviceKind device, int64_t lora_rank) {
  return DeltaNumbers(config, lora_rank) * (kFp32 + (device == DeviceKind::kCuda ? kBf16 : 0));
}

int64_t AdaptationBytes(const ModelConfig& config, DeviceKind device, const AdaptationShape& shape) {
  return AdapterBytes(config, device, shape.lora_rank) +
         DeltaNumbers(config, shape.lora_rank) * (1 + shape.moments + (shape.keep_best ? 1 : 0)) * kFp32;
}

int64_t LargestContext(int64_t bytes, int64_t kv_bytes_per_token, int64_t ranks) {
  REFOCUS_CHECK_GE(kv_bytes_per_token, 1);
  if (bytes < 0) return 0;
  // Rank 0 owns the first block of every round, so no rank owns more than it. When its own tokens are used up, the
  // other ranks' blocks of that round still fit.
  const int64_t own = bytes / kv_bytes_per_token;
  const int64_t rounds = own / kBlockTokens;
  if (rounds > kMaxContextTokens / (kBlockTokens * ranks)) return kMaxContextTokens;
  return std::min(rounds * kBlockTokens * ranks + own % kBlockTokens, kMaxContextTokens);
}

StatusOr<MemoryPlan> PlanMemory(const ModelConfig& config, const MemoryQuestion& question) {
  REFOCUS_RETURN_IF_ERROR(CheckQuestion(question));
  REFOCUS_ASSIGN_OR_RETURN(MemoryPlan plan, Arithmetic(config, question));
  if (!plan.fits) {
    plan.advice = "short by " + Gib(-plan.free) + " on each rank; " + Advice(config, question, plan);
  }
  return plan;
}

}  // namespace refocus
