#include "coordinator/core/validate.h"

#include <algorithm>
#include <cmath>

#include "base/limits.h"
#include "coordinator/core/check_field.h"

namespace refocus {
namespace {

constexpr size_t kMaxLabels = 32;
constexpr size_t kMaxLabelBytes = 128;
constexpr size_t kMaxRequestIdBytes = 128;
constexpr double kMinTtlSeconds = 60;
constexpr double kMaxTtlSeconds = 7 * 24 * 3600;

// For messages: short, printable.
std::string Shown(const std::string& text) {
  std::string out;
  for (const char c : text.substr(0, 80)) out.push_back(c >= 0x20 && c < 0x7f ? c : '?');
  return "\"" + out + (text.size() > 80 ? "...\"" : "\"");
}

bool LowerAlnum(char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); }

bool IsId(const std::string& id) {
  if (id.empty() || id.size() > 63 || !LowerAlnum(id.front()) || !LowerAlnum(id.back())) return false;
  return std::all_of(id.begin(), id.end(), [](char c) { return LowerAlnum(c) || c == '-'; });
}

}  // namespace

Status CheckContextId(const std::string& id) {
  if (IsId(id)) return absl::OkStatus();
  return FieldError("context_id", Shown(id), "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?");
}

Status CheckContextName(const std::string& name) {
  constexpr char kPrefix[] = "contexts/";
  const size_t prefix = sizeof(kPrefix) - 1;
  if (name.compare(0, prefix, kPrefix) == 0 && IsId(name.substr(prefix))) return absl::OkStatus();
  return FieldError("name", Shown(name), "contexts/{id} with id [a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?");
}

Status CheckAdapterId(const std::string& id) {
  if (IsId(id)) return absl::OkStatus();
  return FieldError("adapter_id", Shown(id), "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?");
}

Status CheckRequestId(const std::string& id) {
  const bool printable = std::all_of(id.begin(), id.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  if (printable && id.size() <= kMaxRequestIdBytes) return absl::OkStatus();
  return FieldError("request_id", Shown(id), "at most 128 printable ASCII characters");
}

Status CheckOnDisconnect(int value) {
  if (api::OnDisconnect_IsValid(value)) return absl::OkStatus();
  return FieldError("on_disconnect", std::to_string(value), "CONTINUE or CANCEL");
}

Status CheckHeader(const api::CreateContextRequest::Header& header) {
  if (!header.context_id().empty()) REFOCUS_RETURN_IF_ERROR(CheckContextId(header.context_id()));
  REFOCUS_RETURN_IF_ERROR(CheckRequestId(header.request_id()));
  if (static_cast<size_t>(header.labels_size()) > kMaxLabels) {
    return FieldError("labels", std::to_string(header.labels_size()) + " entries", "at most 32");
  }
  for (const auto& [key, value] : header.labels()) {
    if (!key.empty() && key.size() <= kMaxLabelBytes && value.size() <= kMaxLabelBytes) continue;
    return FieldError("labels", Shown(key), "keys of 1 to 128 bytes, values of at most 128");
  }
  if (!header.has_ttl()) return absl::OkStatus();
  const auto& ttl = header.ttl();
  const bool in_range = ttl.seconds() >= 0 && ttl.seconds() <= static_cast<int64_t>(kMaxTtlSeconds);
  return CheckReal("ttl", in_range ? TtlSeconds(header, 0) : -1, kMinTtlSeconds, kMaxTtlSeconds);
}

double TtlSeconds(const api::CreateContextRequest::Header& header, double default_seconds) {
  if (!header.has_ttl()) return default_seconds;
  return static_cast<double>(header.ttl().seconds()) + header.ttl().nanos() * 1e-9;
}

StatusOr<std::vector<int32_t>> CheckIds(const google::protobuf::RepeatedField<uint32_t>& ids, int64_t vocab,
                                        int64_t first_index) {
  std::vector<int32_t> out(ids.size());
  for (int i = 0; i < ids.size(); ++i) {
    if (static_cast<int64_t>(ids[i]) >= vocab) {
      const std::string index = std::to_string(first_index + i), got = std::to_string(ids[i]);
      const std::string allowed = "0 to " + std::to_string(vocab - 1);
      return Error(StatusCode::kInvalidArgument, "TOKEN_ID_OUT_OF_RANGE",
                   "ids[" + index + "]: got " + got + ", allowed " + allowed,
                   {{"index", index}, {"got", got}, {"allowed", allowed}});
    }
    out[i] = static_cast<int32_t>(ids[i]);
  }
  return out;
}

StatusOr<std::vector<int32_t>> PromptIds(const char* field, const api::Prompt& prompt, const ModelConfig& model,
                                         const Tokenizer* tokenizer) {
  if (prompt.has_ids()) return CheckIds(prompt.ids().ids(), model.vocab, 0);
  if (prompt.text().empty()) return std::vector<int32_t>();
  if (tokenizer == nullptr) {
    return Error(StatusCode::kFailedPrecondition, "NO_TOKENIZER",
                 std::string(field) + ": got text, but this model has no tokenizer; send ids");
  }
  return tokenizer->Encode(prompt.text(), prompt.allow_special(), model.max_positions);
}

ChatFormat::Opening OpeningOf(const api::CreateContextRequest::Header& header) {
  const api::Prologue& prologue = header.prologue();
  ChatFormat::Opening opening;
  if (prologue.has_system()) opening.system = prologue.system();
  opening.user = prologue.user();
  opening.date = prologue.date();
  opening.no_bos = header.no_bos();
  opening.allow_special = header.allow_special();
  return opening;
}

StatusOr<ChatFormat::Asked> ChatIds(const api::Chat& chat, const ModelConfig& model, const ChatFormat& format) {
  REFOCUS_RETURN_IF_ERROR(CheckInt("chat.earlier", chat.earlier_size(), 0, kMaxExchanges));
  if (chat.has_thinking_budget()) {
    REFOCUS_RETURN_IF_ERROR(CheckInt("chat.thinking_budget", chat.thinking_budget(), 1, kMaxThinkingTokens));
  }
  ChatFormat::Question question;
  for (const auto& exchange : chat.earlier()) question.earlier.push_back({exchange.question(), exchange.answer()});
  question.text = chat.question();
  question.allow_special = chat.allow_special();
  if (chat.has_thinking()) question.thinking = chat.thinking();
  return format.Ask(question, model.max_positions);
}

Status CheckWindow(int64_t context, int64_t prompt, int64_t answer, int64_t window) {
  // Each is bounded by its own check long before the sum could overflow.
  if (context + prompt + answer <= window) return absl::OkStatus();
  return Error(StatusCode::kInvalidArgument, "CONTEXT_TOO_LONG",
               "context + prompt + answer: got " + std::to_string(context) + " + " + std::to_string(prompt) + " + " +
                   std::to_string(answer) + " tokens, allowed " + std::to_string(window) +
                   "; lower max_tokens or shorten",
               {{"context_tokens", std::to_string(context)},
                {"prompt_tokens", std::to_string(prompt)},
                {"answer_tokens", std::to_string(answer)},
                {"limit", std::to_string(window)}});
}

namespace {

Status PlanExplicitSpans(const api::AdaptContextRequest::ExplicitSpans& spans, int64_t token_count, AdaptPlan* plan) {
  REFOCUS_RETURN_IF_ERROR(CheckInt("explicit_spans", spans.spans_size(), 1, kMaxExplicitSpans));
  for (int i = 0; i < spans.spans_size(); ++i) {
    const auto& span = spans.spans(i);
    const std::string field = "explicit_spans[" + std::to_string(i) + "]";
    REFOCUS_RETURN_IF_ERROR(
        CheckInt((field + ".length").c_str(), span.length(), 1, std::min(kMaxSpanTokens, token_count - 1)));
    REFOCUS_RETURN_IF_ERROR(CheckInt((field + ".start").c_str(), span.start(), 0, token_count - 1 - span.length()));
    plan->explicit_spans.push_back({span.start(), span.length()});
  }
  return absl::OkStatus();
}

Status CheckEffective(const api::AdaptEvent::Effective& e) {
  REFOCUS_RETURN_IF_ERROR(CheckInt("steps", e.steps(), 1, kMaxAdaptSteps));
  REFOCUS_RETURN_IF_ERROR(CheckInt("span_tokens", e.span_tokens(), 1, kMaxSpanTokens));
  REFOCUS_RETURN_IF_ERROR(CheckInt("spans_per_step", e.spans_per_step(), 1, kMaxSpansPerStep));
  REFOCUS_RETURN_IF_ERROR(CheckInt("probe_spans", e.probe_spans(), 0, kMaxProbeSpans));
  REFOCUS_RETURN_IF_ERROR(CheckRealOrZero("learning_rate", e.learning_rate(), 1e-12, 1));
  REFOCUS_RETURN_IF_ERROR(CheckRealOrZero("weight_decay", e.weight_decay(), 1e-12, 1));
  REFOCUS_RETURN_IF_ERROR(CheckReal("clip_norm", e.clip_norm(), 1e-6, 1e6));
  REFOCUS_RETURN_IF_ERROR(CheckReal("beta1", e.beta1(), 0, 0.9999999));  // still below 1 as a float
  REFOCUS_RETURN_IF_ERROR(CheckReal("beta2", e.beta2(), 0, 0.9999999));
  REFOCUS_RETURN_IF_ERROR(CheckReal("epsilon", e.epsilon(), 1e-20, 1));
  REFOCUS_RETURN_IF_ERROR(CheckReal("momentum", e.momentum(), 0, 0.9999999));
  REFOCUS_RETURN_IF_ERROR(CheckInt("warmup_steps", e.warmup_steps(), 0, e.steps() - 1));
  REFOCUS_RETURN_IF_ERROR(CheckRealOrZero("max_seconds", e.max_seconds(), 1e-3, 1e6));
  REFOCUS_RETURN_IF_ERROR(CheckInt("probe_every", e.probe_every(), 0, e.steps()));
  REFOCUS_RETURN_IF_ERROR(CheckInt("patience", e.patience(), 0, kMaxAdaptSteps));
  return CheckReal("max_probe_rise", e.max_probe_rise(), 0, 1e6);
}

constexpr double kRecallAfter = 0.5;     // default: the share of the text before which no row is taken
// Automatic. Of prose 4 to 7 % of the rows are to recall, of code 20 to 34, of logs and ledgers 38 to 66.
constexpr int64_t kWorthRecalling = 6;  // one of so many rows must be one to recall;
constexpr int64_t kUniformProbes = 4;   // else so many spans are held out: their losses say less

// The learning rate that `automatic` begins with: what suits 4 million, 135 million and billions of parameters.
double RateBySize(const ModelConfig& model) {
  return std::clamp(1e-5 * std::pow(4e9 / static_cast<double>(model.parameters()), 2.0 / 3.0), 1e-6, 1e-2);
}

// Rows to train on and rows held out, of those that the policy draws from.
Status PlanRecallRows(HeldOutRows* found, AdaptPlan* plan) {
  auto& e = plan->effective;
  if (found->training.empty()) {
    return Error(StatusCode::kFailedPrecondition, "NOTHING_RECURS",
                 "recall_rows: no token of the context can be looked up in what stands before it; use uniform spans");
  }
  e.set_recall_rows(static_cast<int64_t>(found->training.size()));
  plan->probes = AsSpans(found->held_out);
  plan->recall_rows = std::move(found->training);
  return absl::OkStatus();
}

// After the probes, which candidates leave alone.
Status PlanCandidates(const api::AdaptContextRequest::SurprisalSpans& spans, int64_t token_count, AdaptPlan* plan) {
  auto& e = plan->effective;
  const int64_t wanted = std::min(kMaxCandidateSpans, 4 * e.steps() * e.spans_per_step());
  const int64_t count = spans.has_candidates() ? spans.candidates() : wanted;
  REFOCUS_RETURN_IF_ERROR(CheckInt("surprisal_spans.candidates", count, 1, kMaxCandidateSpans));
  e.set_candidate_skip(spans.skip());
  REFOCUS_RETURN_IF_ERROR(CheckReal("surprisal_spans.skip", e.candidate_skip(), 0, 1));
  const double left = 1 - e.candidate_skip();
  e.set_candidate_share(spans.has_share() ? spans.share() : std::min(0.25, left));
  REFOCUS_RETURN_IF_ERROR(CheckReal("surprisal_spans.share", e.candidate_share(), 0, left + 1e-9));  // 0.9 and 0.1
  plan->candidates = CandidateSpans(token_count, e.span_tokens(), plan->probes, count, e.seed());
  e.set_candidates(static_cast<int64_t>(plan->candidates.size()));
  return absl::OkStatus();
}

Status CheckBehind(int64_t behind, int64_t token_count, int64_t window) {
  return CheckInt("behind", behind, 0, std::clamp<int64_t>(window - token_count, 0, kMaxBehind));
}

// Behind the text there is room for the longest span, held-out ones too. Rows to recall stand alone there, also where they
// are neighbours in the text.
Status CheckFitsBehind(const AdaptPlan& plan) {
  if (!plan.recall_rows.empty()) return absl::OkStatus();
  int64_t longest = plan.explicit_spans.empty() ? plan.effective.span_tokens() : 1;
  for (const std::vector<SpanRange>* spans : {&plan.explicit_spans, &plan.probes, &plan.candidates}) {
    for (const SpanRange& span : *spans) longest = std::max(longest, span.rows);
  }
  const int64_t most = std::min(plan.effective.behind(), kMaxBehindRows);
  if (longest <= most) return absl::OkStatus();
  return FieldError("behind", std::to_string(plan.effective.behind()) + " for spans of " + std::to_string(longest) + " tokens",
                    "spans of at most " + std::to_string(most) +
                        " tokens with it, held-out ones included (span_tokens long, unless probe_spans is 0)");
}

Status CheckEnum(const char* field, int value, bool known, const char* allowed) {
  if (known) return absl::OkStatus();
  return FieldError(field, std::to_string(value), allowed);
}

// Full or LoRA: as asked for, as the delta that it starts from, or by the model's size.
Status PlanKind(const api::AdaptContextRequest& r, const ModelConfig& model, const api::Adapter* start,
                api::AdaptEvent::Effective* e) {
  REFOCUS_RETURN_IF_ERROR(CheckEnum("kind", r.kind(), api::AdapterKind_IsValid(r.kind()), "FULL or LORA"));
  const bool large = model.parameters() > kLoraByDefaultParameters;
  const api::AdapterKind kind = r.kind() != api::ADAPTER_KIND_UNSPECIFIED ? r.kind()
                                : start != nullptr                        ? start->kind()
                                : large || r.has_lora_rank() || r.has_lora_alpha() ? api::LORA
                                                                                   : api::FULL;
  e->set_kind(kind);
  if (kind == api::LORA) {
    const bool kept = start != nullptr && start->kind() == api::LORA;
    e->set_lora_rank(r.has_lora_rank() ? r.lora_rank()
                     : kept            ? start->lora_rank()
                                       : std::min<int64_t>(16, model.hidden));
    REFOCUS_RETURN_IF_ERROR(CheckInt("lora_rank", e->lora_rank(), 1, std::min(kMaxLoraRank, model.hidden)));
    e->set_lora_alpha(r.has_lora_alpha() ? r.lora_alpha()
                      : kept             ? start->lora_alpha()
                                         : 2 * static_cast<double>(e->lora_rank()));
    REFOCUS_RETURN_IF_ERROR(CheckReal("lora_alpha", e->lora_alpha(), 1e-3, 1e6));
  } else if (r.has_lora_rank() || r.has_lora_alpha()) {
    return FieldError(r.has_lora_rank() ? "lora_rank" : "lora_alpha", "a value", "none with kind FULL");
  }
  if (start == nullptr) return absl::OkStatus();
  if (kind != start->kind() || e->lora_rank() != start->lora_rank() || e->lora_alpha() != start->lora_alpha()) {
    const auto text = [](api::AdapterKind kind_of, int64_t rank, double alpha) {
      if (kind_of == api::FULL) return std::string("FULL");
      return "LORA of rank " + std::to_string(rank) + ", alpha " + Number(alpha);
    };
    return FieldError("kind, lora_rank, lora_alpha", text(kind, e->lora_rank(), e->lora_alpha()),
                      text(start->kind(), start->lora_rank(), start->lora_alpha()) +
                          ", which adapter \"" + start->id() + "\" is");
  }
  return absl::OkStatus();
}

}  // namespace

std::string AdapterIdOf(const api::AdaptContextRequest& request) {
  return request.adapter_id().empty() ? "default" : request.adapter_id();
}

StatusOr<AdaptPlan> PlanAdapt(const api::AdaptContextRequest& r, const ModelConfig& model, const api::Adapter* start,
                              int64_t token_count, uint64_t seed, HeldOutRows* found) {
  AdaptPlan plan;
  REFOCUS_RETURN_IF_ERROR(CheckAdapterId(AdapterIdOf(r)));
  auto& e = plan.effective;
  if (!r.base_adapter().empty()) {
    REFOCUS_RETURN_IF_ERROR(CheckAdapterId(r.base_adapter()));
    if (r.continue_adapter() || r.base_adapter() == AdapterIdOf(r)) {
      return FieldError("base_adapter", Shown(r.base_adapter()),
                        "another adapter than adapter_id, without continue_adapter");
    }
    e.set_base_adapter(r.base_adapter());
  }
  REFOCUS_RETURN_IF_ERROR(PlanKind(r, model, start, &e));
  REFOCUS_RETURN_IF_ERROR(
      CheckEnum("optimizer", r.optimizer(), api::Optimizer_IsValid(r.optimizer()), "ADAMW or SGD"));
  REFOCUS_RETURN_IF_ERROR(
      CheckEnum("schedule", r.schedule(), api::Schedule_IsValid(r.schedule()), "CONSTANT, LINEAR or COSINE"));
  e.set_optimizer(r.optimizer() == api::OPTIMIZER_UNSPECIFIED ? api::ADAMW : r.optimizer());
  e.set_schedule(r.schedule() != api::SCHEDULE_UNSPECIFIED ? r.schedule() : api::CONSTANT);
  if (r.has_momentum() && e.optimizer() != api::SGD)
    return FieldError("momentum", Number(r.momentum()), "none with ADAMW");
  e.set_momentum(r.momentum());
  e.set_warmup_steps(r.warmup_steps());
  e.set_max_seconds(r.max_seconds());
  e.set_steps(r.has_steps() ? r.steps() : 32);
  e.set_span_tokens(r.has_span_tokens() ? r.span_tokens() : 128);
  e.set_spans_per_step(r.has_spans_per_step() ? r.spans_per_step() : 1);
  const bool automatic = r.has_automatic();
  e.set_learning_rate(r.has_learning_rate() ? r.learning_rate() : automatic ? RateBySize(model) : 1e-5);
  e.set_weight_decay(r.has_weight_decay() ? r.weight_decay() : 0.01);
  e.set_clip_norm(r.has_clip_norm() ? r.clip_norm() : 1.0);
  e.set_beta1(r.has_beta1() ? r.beta1() : 0.9);
  e.set_beta2(r.has_beta2() ? r.beta2() : 0.999);
  e.set_epsilon(r.has_epsilon() ? r.epsilon() : 1e-8);
  e.set_seed(r.has_seed() ? r.seed() : seed);
  e.set_probe_spans(r.has_probe_spans() ? r.probe_spans() : automatic ? 1 : 2);
  e.set_max_probe_rise(r.has_max_probe_rise() ? r.max_probe_rise() : 0.1);
  e.set_keep_best(r.keep_best() || automatic);
  e.set_probe_every(r.has_probe_every() ? r.probe_every() : e.keep_best() ? std::max<int64_t>(1, e.steps() / 8) : 0);
  e.set_patience(r.has_patience() || !automatic ? r.patience() : 3);
  plan.automatic = automatic;
  e.set_behind(r.behind());
  if (automatic) e.set_trial_steps(e.steps() / 4);
  if (e.patience() != 0 && !e.keep_best()) return FieldError("patience", Number(r.patience()), "0 without keep_best");
  REFOCUS_RETURN_IF_ERROR(CheckEffective(e));
  if (token_count < 2) {
    return Error(StatusCode::kFailedPrecondition, "CONTEXT_TOO_SHORT",
                 "context: got 1 token, allowed 2 or more: there is nothing to predict");
  }
  REFOCUS_RETURN_IF_ERROR(CheckBehind(e.behind(), token_count, model.max_positions));
  e.set_span_tokens(std::min(e.span_tokens(), token_count - 1));
  if (r.has_explicit_spans()) {
    REFOCUS_RETURN_IF_ERROR(PlanExplicitSpans(r.explicit_spans(), token_count, &plan));
  }
  int64_t rows = e.span_tokens();
  if (!plan.explicit_spans.empty()) rows = 0;
  for (const SpanRange& span : plan.explicit_spans) rows = std::max(rows, span.rows);
  REFOCUS_RETURN_IF_ERROR(CheckInt("spans_per_step x span_tokens", e.spans_per_step() * rows, 1, kMaxStepRows));
  if (r.has_recall_rows() || automatic) {
    double after = r.behind() != 0 || automatic ? 0 : kRecallAfter;
    if (r.recall_rows().has_after()) after = r.recall_rows().after();
    REFOCUS_RETURN_IF_ERROR(CheckReal("recall_rows.after", after, 0, 0.999999));
    const auto first_row = static_cast<int64_t>(after * static_cast<double>(token_count));
    if (found == nullptr) {
      plan.search = RowSearch{nullptr, e.probe_spans() * e.span_tokens(), first_row};
      return plan;
    }
    const auto rows = static_cast<int64_t>(found->training.size());
    if (r.has_recall_rows() || kWorthRecalling * rows >= token_count - first_row) {
      REFOCUS_RETURN_IF_ERROR(PlanRecallRows(found, &plan));
    } else {
      if (!r.has_probe_spans()) e.set_probe_spans(kUniformProbes);
      // Behind the text such spans could be copied from it, held-out ones too: no measure of anything.
      e.set_behind(0);
    }
  }
  if (plan.recall_rows.empty()) plan.probes = ProbeSpans(token_count, e.span_tokens(), e.probe_spans());
  std::erase_if(plan.probes, [&](const SpanRange& probe) {  // what the caller trains on holds nothing out
    return std::any_of(plan.explicit_spans.begin(), plan.explicit_spans.end(), [&](const SpanRange& span) {
      return span.start <= probe.start + probe.rows && probe.start <= span.start + span.rows;
    });
  });
  if (plan.recall_rows.empty()) e.set_probe_spans(static_cast<int64_t>(plan.probes.size()));
  if (plan.probes.empty()) {
    e.set_probe_spans(0);
    e.set_probe_every(0);
    if (e.keep_best()) {
      const std::string field = automatic ? "automatic" : "keep_best";
      return Error(StatusCode::kFailedPrecondition, "NO_PROBE_SPANS",
                   field + ": nothing is held out to compare by: the context is too short, explicit_spans cover it, or "
                   "probe_spans is 0; leave " + field + " out");
    }
  }
  if (r.has_surprisal_spans()) REFOCUS_RETURN_IF_ERROR(PlanCandidates(r.surprisal_spans(), token_count, &plan));
  if (e.behind() != 0) REFOCUS_RETURN_IF_ERROR(CheckFitsBehind(plan));
  return plan;
}

StatusOr<GeneratePlan> PlanGenerate(const api::GenerateRequest& r, const ModelConfig& model, const Tokenizer* tokenizer,
                                    uint64_t seed) {
  GeneratePlan plan;
  plan.max_tokens = r.has_max_tokens() ? r.max_tokens() : 256;
  REFOCUS_RETURN_IF_ERROR(CheckInt("max_tokens", plan.max_tokens, 1, kMaxGeneratedTokens));
  REFOCUS_ASSIGN_OR_RETURN(plan.sampling, PlanSampling(r, model.vocab, plan.max_tokens, seed));
  REFOCUS_RETURN_IF_ERROR(CheckInt("stop", r.stop_size(), 0, kMaxStops));
  for (const std::string& stop : r.stop()) {
    REFOCUS_RETURN_IF_ERROR(CheckInt("stop (bytes)", static_cast<int64_t>(stop.size()), 1, kMaxStopBytes));
    plan.stops.push_back(stop);
  }
  if (!plan.stops.empty() && tokenizer == nullptr) {
    return Error(StatusCode::kFailedPrecondition, "NO_TOKENIZER",
                 "stop: got strings, but this model has no tokenizer; use stop_token_ids");
  }
  REFOCUS_RETURN_IF_ERROR(CheckInt("stop_token_ids", r.stop_token_ids_size(), 0, kMaxStopTokenIds));
  REFOCUS_ASSIGN_OR_RETURN(const auto stop_ids, CheckIds(r.stop_token_ids(), model.vocab, 0));
  plan.stop_ids.insert(stop_ids.begin(), stop_ids.end());
  if (!r.ignore_eos()) {
    plan.eos_ids.insert(model.eos_tokens.begin(), model.eos_tokens.end());
    if (tokenizer != nullptr) {
      for (const int32_t id : tokenizer->eos_tokens()) plan.eos_ids.insert(id);
    }
  }
  std::set<int32_t> ends = plan.eos_ids;
  ends.insert(plan.stop_ids.begin(), plan.stop_ids.end());
  if (plan.sampling.min_tokens > 0 && static_cast<int64_t>(ends.size()) >= model.vocab) {
    return FieldError("min_tokens", std::to_string(plan.sampling.min_tokens), "0, because every token ends the answer");
  }
  if (r.has_logprobs()) {
    REFOCUS_RETURN_IF_ERROR(CheckInt("logprobs", r.logprobs(), 0, std::min<int64_t>(kMaxTopLogprobs, model.vocab)));
    plan.logprobs = r.logprobs();
  }
  return plan;
}

namespace {

// Rising; all of `count` when none is named.
template <typename Field>
StatusOr<std::vector<int32_t>> PlanNumbers(const char* field, const Field& asked, int64_t count) {
  std::vector<int32_t> numbers(asked.begin(), asked.end());
  for (int32_t i = 0; asked.empty() && i < count; ++i) numbers.push_back(i);
  std::sort(numbers.begin(), numbers.end());
  for (const int32_t number : numbers) REFOCUS_RETURN_IF_ERROR(CheckInt(field, number, 0, count - 1));
  const auto twice = std::adjacent_find(numbers.begin(), numbers.end());
  if (twice == numbers.end()) return numbers;
  return FieldError(field, std::to_string(*twice) + " twice", "each once");
}

StatusOr<std::vector<int64_t>> PlanPositions(const api::ProbeAttentionRequest& r, int64_t context, int64_t prompt) {
  REFOCUS_RETURN_IF_ERROR(CheckInt("positions (count)", r.positions_size(), 0, kMaxProbeRows));
  std::vector<int64_t> positions(r.positions().begin(), r.positions().end());
  if (positions.empty() && prompt == 0) positions.push_back(context - 1);
  for (int64_t i = 0; r.positions().empty() && i < prompt; ++i) positions.push_back(context + i);
  std::sort(positions.begin(), positions.end());
  for (const int64_t pos : positions) REFOCUS_RETURN_IF_ERROR(CheckInt("positions", pos, 0, context + prompt - 1));
  const auto twice = std::adjacent_find(positions.begin(), positions.end());
  if (twice == positions.end()) return positions;
  return FieldError("positions", std::to_string(*twice) + " twice", "each once");
}

}  // namespace

StatusOr<ProbePlan> PlanProbe(const api::ProbeAttentionRequest& r, const ModelConfig& model, int64_t token_count,
                              int64_t prompt_tokens) {
  ProbePlan plan;
  REFOCUS_RETURN_IF_ERROR(CheckInt("prompt (tokens)", prompt_tokens, 0, kMaxProbePromptTokens));
  REFOCUS_ASSIGN_OR_RETURN(plan.positions, PlanPositions(r, token_count, prompt_tokens));
  REFOCUS_RETURN_IF_ERROR(CheckInt("ranges (count)", r.ranges_size(), 1, kMaxKeyRanges));
  for (int i = 0; i < r.ranges_size(); ++i) {
    const std::string field = "ranges[" + std::to_string(i) + "]";
    REFOCUS_RETURN_IF_ERROR(CheckInt((field + ".begin").c_str(), r.ranges(i).begin(), 0, token_count));
    REFOCUS_RETURN_IF_ERROR(CheckInt((field + ".end").c_str(), r.ranges(i).end(), r.ranges(i).begin(), token_count));
    plan.ranges.emplace_back(r.ranges(i).begin(), r.ranges(i).end());
  }
  REFOCUS_ASSIGN_OR_RETURN(plan.layers, PlanNumbers("layers", r.layers(), model.layers));
  REFOCUS_ASSIGN_OR_RETURN(plan.heads, PlanNumbers("heads", r.heads(), model.heads));
  const auto values = static_cast<int64_t>(plan.positions.size() * plan.ranges.size() * plan.layers.size() *
                                           plan.heads.size());
  REFOCUS_RETURN_IF_ERROR(CheckInt("rows x ranges x layers x heads", values, 1, kMaxProbeValues));
  plan.mean_over_heads = r.mean_over_heads();
  plan.mean_over_rows = r.mean_over_rows();
  return plan;
}

}  // namespace refocus
