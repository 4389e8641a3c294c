// What the coordinator asks of a rank and what the rank answers, as plain structs: worker/link translates protobuf to
// and from these, the engine executes them. Field meanings: proto/refocus/internal/v1/group.proto.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "base/status.h"

namespace refocus {

struct OpenContext {
  uint64_t context = 0;
  int64_t capacity = 0;
  uint64_t prefix_context = 0;
  int64_t prefix_tokens = 0;
};
struct CloseContext {
  uint64_t context = 0;
};
struct PrefillChunk {
  uint64_t context = 0;
  int64_t first_pos = 0;
  std::vector<int32_t> ids;
};

// What an adapter trains: rank 0 is a full delta, else a LoRA of that rank.
struct DeltaConfig {
  int64_t lora_rank = 0;
  float lora_alpha = 0.0f;  // the product of both matrices counts alpha / rank
  bool operator==(const DeltaConfig&) const = default;
};

struct OptimizerConfig {
  float weight_decay = 0.01f;
  float clip_norm = 1.0f;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float epsilon = 1e-8f;
  bool sgd = false;       // else AdamW
  float momentum = 0.0f;  // of SGD
  int64_t moments() const { return !sgd ? 2 : momentum != 0.0f ? 1 : 0; }
};
struct BeginAdapt {
  uint64_t context = 0;
  uint64_t adapter = 0;
  uint64_t from_adapter = 0;
  OptimizerConfig optimizer;
  DeltaConfig delta;
  uint64_t seed = 0;
  bool keep_best = false;
};
struct BeginImport {
  uint64_t context = 0;
  uint64_t adapter = 0;
  DeltaConfig delta;
};
struct WriteDelta {
  uint64_t adapter = 0;
  int64_t offset = 0;
  std::string data;
};
struct ReadDelta {
  uint64_t adapter = 0;
  int64_t revision = 0;
  int64_t offset = 0;
  int64_t count = 0;
};
struct Span {
  int64_t start = 0;
  std::vector<int32_t> ids;  // rows + 1
  int64_t behind = 0;        // not 0: position of the first row, behind the context, where the rows are read again
  int64_t first() const { return behind != 0 ? behind : start; }
  int64_t rows() const { return static_cast<int64_t>(ids.size()) - 1; }
};
struct AdaptStep {
  uint64_t adapter = 0;
  int64_t step = 0;
  std::vector<Span> spans;
  float learning_rate = 1e-5f;
  bool restart = false;
};
struct ProbeLoss {
  uint64_t adapter = 0;
  std::vector<Span> spans;
  bool keep_best = false;
  double keep_below = 0.0;  // 0: no limit
};
struct EndAdapt {
  uint64_t adapter = 0;
  bool commit = false;
  int64_t revision = 0;
  bool kept = false;
};
struct DropAdapter {
  uint64_t adapter = 0;
};

struct SamplingConfig {
  double temperature = 0;    // 0: greedy
  uint64_t seed = 0;
  std::vector<int32_t> stop_ids;
  int32_t top_logprobs = 0;
  int32_t top_k = 0;         // 0: all
  double top_p = 1;
  double min_p = 0;
  double repetition_penalty = 1;
  double presence_penalty = 0;
  double frequency_penalty = 0;
  int64_t min_tokens = 0;    // stop_ids are not drawn before
  std::vector<int32_t> bias_ids;
  std::vector<float> bias_values;
};
struct OpenSequence {
  uint64_t sequence = 0;
  uint64_t context = 0;
  uint64_t adapter = 0;
  int64_t revision = 0;
  int64_t capacity = 0;
  SamplingConfig sampling;
  uint64_t job = 0;
  uint64_t parent = 0;
};
struct ExtendSequence {
  uint64_t sequence = 0;
  int64_t first_pos = 0;
  std::vector<int32_t> ids;
  bool sample = false;
  std::vector<int32_t> score_ids;
};
struct DecodeSteps {
  std::vector<uint64_t> sequences;
  int32_t steps = 1;
};
struct CloseSequence {
  uint64_t sequence = 0;
};

struct KeyRange {  // positions [begin, end)
  int64_t begin = 0;
  int64_t end = 0;
};
struct ProbeAttention {
  uint64_t sequence = 0;
  std::vector<int64_t> positions;
  std::vector<int32_t> ids;
  std::vector<int64_t> rows;
  std::vector<KeyRange> ranges;
  std::vector<int64_t> layers;
  std::vector<int64_t> heads;
};

struct Command {
  int64_t epoch = 0;
  int64_t seq = 0;
  uint64_t job = 0;
  std::variant<OpenContext, CloseContext, PrefillChunk, BeginAdapt, AdaptStep, ProbeLoss, EndAdapt, DropAdapter,
               OpenSequence, ExtendSequence, DecodeSteps, CloseSequence, BeginImport, WriteDelta, ReadDelta,
               ProbeAttention>
      body;
};

struct Token {
  uint64_t sequence = 0;
  int32_t id = 0;
  float logprob = 0.0f;
  std::vector<int32_t> top_ids;
  std::vector<float> top_logprobs;
};

struct SequenceEnd {
  enum class Why { kFinished = 0, kCancelled = 1, kCapacity = 2, kFailed = 3 };
  uint64_t sequence = 0;
  Why why = Why::kFinished;
  Status status;  // kFailed: what for
};

struct Result {
  int64_t epoch = 0;
  int64_t seq = 0;
  bool final = true;
  Status status;
  bool cancelled = false;
  double seconds = 0.0;
  uint64_t agree = 0;
  int64_t kv_used_bytes = 0;
  double loss = 0.0;
  double grad_norm = 0.0;
  std::vector<Token> tokens;
  std::vector<SequenceEnd> ended;
  std::vector<float> score_logprobs;
  std::vector<bool> score_greedy;
  std::vector<int32_t> score_best_ids;  // the most likely tokens
  std::vector<float> score_best_logprobs;
  std::vector<float> masses;
  std::string data;
};

}  // namespace refocus
