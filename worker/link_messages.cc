#include "worker/link_messages.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <utility>

#include "base/limits.h"

namespace refocus {
namespace {

constexpr double kHuge = 1e30;  // no sensible value is larger

namespace pb = internal::v1;
using Ids = google::protobuf::RepeatedField<uint32_t>;
using Spans = google::protobuf::RepeatedPtrField<pb::Span>;

std::string Text(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

// Protobuf strings must be UTF-8; a message that is not would be dropped with the whole stream.
std::string Ascii(absl::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  }
  return out;
}

// Returns the first fault of a command; every check names its field as the protocol does.
class Checker {
 public:
  explicit Checker(int64_t vocab) : vocab_(vocab) {}

  Status status() const { return status_; }

  void InRange(const char* field, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
      Fail(FieldError(field, std::to_string(value), std::to_string(least) + " to " + std::to_string(most)));
    }
  }

  void Uid(const char* field, uint64_t value) {
    if (value == 0) Fail(FieldError(field, "0", "a uid above 0"));
  }

  // [least, most), or (least, most) with `open`; never NaN.
  void Real(const char* field, double value, double least, double most, bool open) {
    if (std::isfinite(value) && value < most && (open ? value > least : value >= least)) return;
    const std::string from = open ? "above " : "from ";
    Fail(FieldError(field, Text(value), from + Text(least) + ", below " + Text(most)));
  }

  std::vector<int32_t> TokenIds(const char* field, const Ids& ids, int64_t least, int64_t most) {
    InRange((std::string(field) + " (count)").c_str(), ids.size(), least, most);
    std::vector<int32_t> out;
    if (!status_.ok()) return out;
    out.reserve(static_cast<size_t>(ids.size()));
    for (int i = 0; i < ids.size(); ++i) {
      if (ids[i] >= vocab_) {
        const std::string index = std::to_string(i);
        const std::string got = std::to_string(ids[i]);
        const std::string allowed = "0 to " + std::to_string(vocab_ - 1);
        Fail(Error(StatusCode::kInvalidArgument, "TOKEN_ID_OUT_OF_RANGE",
                   std::string(field) + "[" + index + "]: got " + got + ", allowed " + allowed,
                   {{"field", field}, {"index", index}, {"got", got}, {"allowed", allowed}}));
        break;
      }
      out.push_back(static_cast<int32_t>(ids[i]));
    }
    return out;
  }

  template <typename Field>
  std::vector<int64_t> Numbers(const char* field, const Field& values, int64_t least, int64_t most) {
    for (const int64_t value : values) InRange(field, value, least, most);
    return {values.begin(), values.end()};
  }

  // At least one; each larger than the one before.
  template <typename Field>
  std::vector<int64_t> Rising(const char* field, const Field& values, int64_t most) {
    InRange((std::string(field) + " (count)").c_str(), values.size(), 1, kMaxChunkRows);
    int64_t least = 0;
    for (const int64_t value : values) {
      InRange(field, value, least, most);
      least = value + 1;
    }
    return {values.begin(), values.end()};
  }

  std::vector<Span> ReadSpans(const Spans& spans, int64_t least) {
    std::vector<Span> out;
    int64_t rows = 0;
    const bool behind = std::any_of(spans.begin(), spans.end(), [](const pb::Span& span) { return span.behind() != 0; });
    for (const pb::Span& span : spans) {
      if (!status_.ok()) break;
      InRange("spans.start", span.start(), 0, kMaxContextTokens);
      InRange("spans.behind", span.behind(), 0, 2 * kMaxContextTokens);
      const int64_t longest = behind ? kMaxBehindRows : kMaxSpanTokens;  // micro-batches then cut no span
      out.push_back({span.start(), TokenIds("spans.ids", span.ids(), 2, longest + 1), span.behind()});
      rows += out.back().rows();
    }
    if (status_.ok()) InRange("spans (rows)", rows, least, kMaxStepRows);
    return out;
  }

 private:
  void Fail(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  const int64_t vocab_;
  Status status_;
};

OpenContext Read(const pb::OpenContext& in, Checker& check) {
  check.Uid("context", in.context());
  check.InRange("capacity", in.capacity(), 1, kMaxContextTokens);
  check.InRange("prefix_tokens", in.prefix_tokens(), in.prefix_context() == 0 ? 0 : 1,
                in.prefix_context() == 0 ? 0 : in.capacity());
  return {in.context(), in.capacity(), in.prefix_context(), in.prefix_tokens()};
}

CloseContext Read(const pb::CloseContext& in, Checker& check) {
  check.Uid("context", in.context());
  return {in.context()};
}

PrefillChunk Read(const pb::PrefillChunk& in, Checker& check) {
  check.Uid("context", in.context());
  check.InRange("first_pos", in.first_pos(), 0, kMaxContextTokens);
  return {in.context(), in.first_pos(), check.TokenIds("ids", in.ids(), 1, kMaxChunkRows)};
}

// Of BeginAdapt and BeginImport.
template <typename Message>
DeltaConfig ReadDeltaConfig(const Message& in, Checker& check) {
  check.InRange("lora_rank", in.lora_rank(), 0, kMaxLoraRank);
  if (in.lora_rank() > 0) check.Real("lora_alpha", in.lora_alpha(), 0.0, 1e30, true);
  return {in.lora_rank(), in.lora_alpha()};
}

BeginAdapt Read(const pb::BeginAdapt& in, Checker& check) {
  check.Uid("context", in.context());
  check.Uid("adapter", in.adapter());
  check.Real("weight_decay", in.weight_decay(), 0.0, kHuge, false);
  check.Real("clip_norm", in.clip_norm(), 0.0, kHuge, true);
  check.Real("beta1", in.beta1(), 0.0, 1.0, false);
  check.Real("beta2", in.beta2(), 0.0, 1.0, false);
  check.Real("epsilon", in.epsilon(), 0.0, kHuge, true);
  check.Real("momentum", in.momentum(), 0.0, 1.0, false);
  const OptimizerConfig optimizer{.weight_decay = in.weight_decay(),
                                  .clip_norm = in.clip_norm(),
                                  .beta1 = in.beta1(),
                                  .beta2 = in.beta2(),
                                  .epsilon = in.epsilon(),
                                  .sgd = in.sgd(),
                                  .momentum = in.momentum()};
  return {in.context(), in.adapter(), in.from_adapter(), optimizer, ReadDeltaConfig(in, check), in.seed(),
          in.keep_best()};
}

BeginImport Read(const pb::BeginImport& in, Checker& check) {
  check.Uid("context", in.context());
  check.Uid("adapter", in.adapter());
  return {in.context(), in.adapter(), ReadDeltaConfig(in, check)};
}

WriteDelta Read(const pb::WriteDelta& in, Checker& check) {
  check.Uid("adapter", in.adapter());
  check.InRange("offset", in.offset(), 0, INT64_MAX / 8);
  const auto bytes = static_cast<int64_t>(in.data().size());
  check.InRange("data (bytes)", bytes, 4, 4 * kDeltaPieceNumbers);
  check.InRange("data (bytes beyond whole numbers)", bytes % 4, 0, 0);
  return {in.adapter(), in.offset(), in.data()};
}

ReadDelta Read(const pb::ReadDelta& in, Checker& check) {
  check.Uid("adapter", in.adapter());
  check.InRange("revision", in.revision(), 1, INT64_MAX);
  check.InRange("offset", in.offset(), 0, INT64_MAX / 8);
  check.InRange("count", in.count(), 1, kDeltaPieceNumbers);
  return {in.adapter(), in.revision(), in.offset(), in.count()};
}

AdaptStep Read(const pb::AdaptStep& in, Checker& check) {
  check.Uid("adapter", in.adapter());
  check.InRange("step", in.step(), 1, kMaxAdaptSteps);
  check.Real("learning_rate", in.learning_rate(), 0.0, 1e30, false);
  return {in.adapter(), in.step(), check.ReadSpans(in.spans(), 1), in.learning_rate(), in.restart()};
}

ProbeLoss Read(const pb::ProbeLoss& in, Checker& check) {
  check.Uid("adapter", in.adapter());
  check.Real("keep_below", in.keep_below(), 0.0, kHuge, false);
  return {in.adapter(), check.ReadSpans(in.spans(), 0), in.keep_best(), in.keep_below()};
}

EndAdapt Read(const pb::EndAdapt& in, Checker& check) {
  check.Uid("adapter", in.adapter());
  if (in.commit()) check.InRange("revision", in.revision(), 1, INT64_MAX);
  return {in.adapter(), in.commit(), in.revision(), in.kept()};
}

DropAdapter Read(const pb::DropAdapter& in, Checker& check) {
  check.Uid("adapter", in.adapter());
  return {in.adapter()};
}

SamplingConfig ReadSampling(const pb::OpenSequence& in, Checker& check) {
  SamplingConfig out;
  out.temperature = in.temperature();
  out.seed = in.seed();
  out.top_logprobs = in.top_logprobs();
  // The request's own beside the model's end tokens.
  out.stop_ids = check.TokenIds("stop_ids", in.stop_ids(), 0, 2 * kMaxStopTokenIds);
  check.InRange("top_k", in.top_k(), 0, kMaxTopK);
  check.Real("top_p", in.top_p(), 0.0, 1.0 + 1e-9, false);
  check.Real("min_p", in.min_p(), 0.0, 1.0 + 1e-9, false);
  check.Real("repetition_penalty", in.repetition_penalty(), 0.0, 1e6, false);
  check.Real("presence_penalty", in.presence_penalty(), -1e6, 1e6, false);
  check.Real("frequency_penalty", in.frequency_penalty(), -1e6, 1e6, false);
  check.InRange("min_tokens", in.min_tokens(), 0, kMaxGeneratedTokens);
  out.top_k = in.top_k();
  if (in.top_p() > 0) out.top_p = in.top_p();
  out.min_p = in.min_p();
  if (in.repetition_penalty() > 0) out.repetition_penalty = in.repetition_penalty();
  out.presence_penalty = in.presence_penalty();
  out.frequency_penalty = in.frequency_penalty();
  out.min_tokens = in.min_tokens();
  out.bias_ids = check.TokenIds("bias_ids", in.bias_ids(), 0, kMaxLogitBias);
  check.InRange("bias_values (count)", in.bias_values_size(), in.bias_ids_size(), in.bias_ids_size());
  for (const float value : in.bias_values()) check.Real("bias_values", value, -1e6, 1e6, false);
  out.bias_values.assign(in.bias_values().begin(), in.bias_values().end());
  const std::set<int32_t> distinct(out.bias_ids.begin(), out.bias_ids.end());
  check.InRange("bias_ids (distinct)", static_cast<int64_t>(distinct.size()), in.bias_ids_size(), in.bias_ids_size());
  return out;
}

OpenSequence Read(const pb::OpenSequence& in, Checker& check) {
  check.Uid("sequence", in.sequence());
  check.Uid("context", in.context());
  check.InRange("revision", in.revision(), 0, INT64_MAX);
  check.InRange("capacity", in.capacity(), 0, kMaxContextTokens);
  check.Real("temperature", in.temperature(), 0.0, 1e6, false);
  check.InRange("top_logprobs", in.top_logprobs(), 0, kMaxTopLogprobs);
  OpenSequence out{in.sequence(), in.context(), in.adapter(), in.revision(), in.capacity(), {}, in.job(), in.parent()};
  out.sampling = ReadSampling(in, check);
  return out;
}

ExtendSequence Read(const pb::ExtendSequence& in, Checker& check) {
  check.Uid("sequence", in.sequence());
  check.InRange("first_pos", in.first_pos(), 0, 2 * kMaxContextTokens);
  ExtendSequence out{in.sequence(), in.first_pos(), check.TokenIds("ids", in.ids(), 1, kMaxChunkRows), in.sample(), {}};
  out.score_ids = check.TokenIds("score_ids", in.score_ids(), 0, in.ids_size());
  return out;
}

DecodeSteps Read(const pb::DecodeSteps& in, Checker& check) {
  check.InRange("sequences (count)", in.sequences_size(), 1, kMaxDecodeRows);
  check.InRange("steps", in.steps(), 1, kMaxGeneratedTokens);
  for (const uint64_t uid : in.sequences()) check.Uid("sequences", uid);
  return {{in.sequences().begin(), in.sequences().end()}, in.steps()};
}

CloseSequence Read(const pb::CloseSequence& in, Checker& check) {
  check.Uid("sequence", in.sequence());
  return {in.sequence()};
}

ProbeAttention Read(const pb::ProbeAttention& in, Checker& check) {
  check.Uid("sequence", in.sequence());
  ProbeAttention out;
  out.sequence = in.sequence();
  out.ids = check.TokenIds("ids", in.ids(), 1, kMaxChunkRows);
  check.InRange("positions (count)", in.positions_size(), in.ids_size(), in.ids_size());
  out.positions = check.Numbers("positions", in.positions(), 0, 2 * kMaxContextTokens);
  out.rows = check.Rising("rows", in.rows(), in.ids_size() - 1);
  check.InRange("ranges (count)", in.ranges_size(), 1, kMaxKeyRanges);
  for (const pb::ProbeAttention::KeyRange& range : in.ranges()) {
    check.InRange("ranges.begin", range.begin(), 0, kMaxContextTokens);
    check.InRange("ranges.end", range.end(), range.begin(), kMaxContextTokens);
    out.ranges.push_back({range.begin(), range.end()});
  }
  out.layers = check.Rising("layers", in.layers(), INT32_MAX);
  out.heads = check.Rising("heads", in.heads(), INT32_MAX);
  return out;
}

bool ReadBody(const pb::Command& message, Checker& check, Command* command) {
  switch (message.command_case()) {
    case pb::Command::kOpenContext: command->body = Read(message.open_context(), check); return true;
    case pb::Command::kCloseContext: command->body = Read(message.close_context(), check); return true;
    case pb::Command::kPrefillChunk: command->body = Read(message.prefill_chunk(), check); return true;
    case pb::Command::kBeginAdapt: command->body = Read(message.begin_adapt(), check); return true;
    case pb::Command::kAdaptStep: command->body = Read(message.adapt_step(), check); return true;
    case pb::Command::kProbeLoss: command->body = Read(message.probe_loss(), check); return true;
    case pb::Command::kEndAdapt: command->body = Read(message.end_adapt(), check); return true;
    case pb::Command::kDropAdapter: command->body = Read(message.drop_adapter(), check); return true;
    case pb::Command::kOpenSequence: command->body = Read(message.open_sequence(), check); return true;
    case pb::Command::kExtendSequence: command->body = Read(message.extend_sequence(), check); return true;
    case pb::Command::kDecodeSteps: command->body = Read(message.decode_steps(), check); return true;
    case pb::Command::kCloseSequence: command->body = Read(message.close_sequence(), check); return true;
    case pb::Command::kProbeAttention: command->body = Read(message.probe_attention(), check); return true;
    case pb::Command::kBeginImport: command->body = Read(message.begin_import(), check); return true;
    case pb::Command::kWriteDelta: command->body = Read(message.write_delta(), check); return true;
    case pb::Command::kReadDelta: command->body = Read(message.read_delta(), check); return true;
    case pb::Command::COMMAND_NOT_SET: return false;
  }
  return false;
}

}  // namespace

StatusOr<Command> ReadCommand(const pb::Command& message, int64_t vocab) {
  Command command;
  command.epoch = message.epoch();
  command.seq = message.seq();
  command.job = message.job();
  Checker check(vocab);
  if (!ReadBody(message, check, &command)) {
    return FieldError("command", "none, or one that this version does not know", "one of the protocol's commands");
  }
  if (!check.status().ok()) return check.status();
  return command;
}

pb::Result WriteResult(const Result& result) {
  pb::Result message;
  message.set_epoch(result.epoch);
  message.set_seq(result.seq);
  message.set_final(result.final);
  message.set_code(static_cast<int32_t>(result.status.code()));
  if (!result.status.ok()) {
    const ErrorDetail detail = DetailOf(result.status);
    message.set_reason(Ascii(detail.reason));
    message.set_message(Ascii(result.status.message()));
    for (const auto& [key, value] : detail.metadata) (*message.mutable_metadata())[Ascii(key)] = Ascii(value);
  }
  message.set_cancelled(result.cancelled);
  message.set_seconds(result.seconds);
  message.set_agree(result.agree);
  message.set_kv_used_bytes(result.kv_used_bytes);
  message.set_loss(result.loss);
  message.set_grad_norm(result.grad_norm);
  for (const Token& token : result.tokens) {
    pb::Token* out = message.add_tokens();
    out->set_id(static_cast<uint32_t>(token.id));
    out->set_logprob(token.logprob);
    for (const int32_t id : token.top_ids) out->add_top_ids(static_cast<uint32_t>(id));
    for (const float logprob : token.top_logprobs) out->add_top_logprobs(logprob);
    out->set_sequence(token.sequence);
  }
  for (const SequenceEnd& end : result.ended) {
    pb::SequenceEnd* out = message.add_ended();
    out->set_sequence(end.sequence);
    out->set_why(static_cast<pb::SequenceEnd::Why>(end.why));
    if (end.status.ok()) continue;
    out->set_code(static_cast<int32_t>(end.status.code()));
    out->set_reason(Ascii(DetailOf(end.status).reason));
    out->set_message(Ascii(end.status.message()));
  }
  for (const float logprob : result.score_logprobs) message.add_score_logprobs(logprob);
  for (const bool greedy : result.score_greedy) message.add_score_greedy(greedy);
  message.mutable_score_best_ids()->Assign(result.score_best_ids.begin(), result.score_best_ids.end());
  message.mutable_score_best_logprobs()->Assign(result.score_best_logprobs.begin(), result.score_best_logprobs.end());
  message.mutable_masses()->Add(result.masses.begin(), result.masses.end());
  message.set_data(result.data);
  return message;
}

}  // namespace refocus
