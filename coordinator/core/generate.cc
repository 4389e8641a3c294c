#include "coordinator/core/generate.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "base/log.h"
#include "base/shard_plan.h"

namespace refocus {
namespace {

void FillLogprob(const wire::Token& token, api::TokenLogprob* out) {
  out->set_id(token.id());
  out->set_logprob(token.logprob());
  for (int i = 0; i < std::min(token.top_ids_size(), token.top_logprobs_size()); ++i) {
    api::TokenLogprob* top = out->add_top();
    top->set_id(token.top_ids(i));
    top->set_logprob(token.top_logprobs(i));
  }
}

}  // namespace

bool ResolveAdapter(Session& session, SequencePlan* plan) {
  if (plan->adapter_id.empty()) return true;
  if (session.committing(plan->adapter_id)) return false;
  const Session::Adapter* adapter = session.FindAdapter(plan->adapter_id);
  REFOCUS_CHECK(adapter != nullptr);  // one that is used cannot be deleted
  plan->adapter_uid = adapter->uid;
  plan->revision = adapter->info.revision();
  return true;
}

GenerateJob::GenerateJob(uint64_t id, double now, std::shared_ptr<Session> session, GeneratePlan plan,
                         const Tokenizer* tokenizer, JobTools* tools)
    : Job(id, now),
      session_(std::move(session)),
      plan_(std::move(plan)),
      tokenizer_(tokenizer),
      tools_(tools),
      text_(plan_.stops),
      reasoning_(plan_.thinking.get()) {
  LogInfo("generate " + plan_.request_id + ": begin, " + session_->name() + ", adapter \"" + plan_.sequence.adapter_id +
          "\", " + std::to_string(plan_.sequence.prompt.size()) + " prompt tokens, at most " +
          std::to_string(plan_.max_tokens));
}

bool GenerateJob::NextCommand(wire::Command* command, double now) {
  if (!open_sent_) return NextOpen(command, now);
  if (rows_sent_ == prompt_rows()) {
    if (!MustForce()) return false;  // the rest is decoding
    FillForced(command->mutable_extend_sequence());
  } else {
    FillExtend(command->mutable_extend_sequence());
  }
  command->set_job(id());
  return true;
}

bool GenerateJob::NextOpen(wire::Command* command, double now) {
  if (parent_ != nullptr) {
    if (parent_->tokens_ == 0) {
      if (parent_->stopping()) Stop(parent_->status(), now);
      return false;
    }
    plan_.sequence.adapter_uid = parent_->plan_.sequence.adapter_uid;
    plan_.sequence.revision = parent_->plan_.sequence.revision;
  } else if (!ResolveAdapter(*session_, &plan_.sequence)) {
    return false;
  }
  open_sent_ = true;
  started_ = now;
  FillOpen(command->mutable_open_sequence());
  LeaveParent();
  return true;
}

// The command that forks is on its way, or never will be.
void GenerateJob::LeaveParent() {
  if (parent_ == nullptr) return;
  --parent_->forks_waiting_;
  parent_.reset();
}

void GenerateJob::Fork(const std::shared_ptr<GenerateJob>& first, std::vector<std::shared_ptr<GenerateJob>> forks) {
  first->forks_waiting_ = static_cast<int>(forks.size());
  for (const std::shared_ptr<GenerateJob>& fork : forks) {
    fork->parent_ = first;
    fork->of_parent_ = first->plan_.sequence.memory;
    fork->rows_sent_ = first->prompt_rows() - 1;  // the last one alone
  }
  first->forks_ = std::move(forks);
}

GeneratePlan GenerateJob::ForkPlan(int32_t sample, std::shared_ptr<KvReservation> memory) const {
  GeneratePlan plan = plan_;
  plan.sample = sample;
  plan.sequence.memory = std::move(memory);
  return plan;
}

// A prompt that takes as long as other work takes its turns with that.
Lane GenerateJob::lane() const { return SecondsLeft() > kShortPromptSeconds ? Lane::kWork : Lane::kPrompts; }

double GenerateJob::SecondsLeft() const {
  const int64_t context = session_->token_count() - 1;
  return tools_->chunks.Seconds(context + rows_sent_, context + prompt_rows());
}

double GenerateJob::DecodeSecondsLeft() const {
  return step_seconds_ * static_cast<double>(plan_.max_tokens - tokens_);
}

double GenerateJob::Predict(const wire::Command& command) const {
  if (!command.has_extend_sequence()) return Job::Predict(command);
  const int64_t first = command.extend_sequence().first_pos();
  return tools_->chunks.Seconds(first, first + command.extend_sequence().ids_size());
}

// Only what surely has a token on the ranks joins a batch: a sequence without one would fail it for all.
void GenerateJob::AddDecodeRows(std::vector<DecodeRow>* rows) const {
  const bool waits = extending_ > 0 || forks_waiting_ > 0 || queue_.size() >= kMaxQueuedEvents;
  if (stopping() || tokens_ == 0 || left_ || waits) return;
  const int64_t left = TokenLimit() - tokens_asked_;
  if (left > 0) rows->push_back({id(), left, step_seconds_});
}

void GenerateJob::FillOpen(wire::OpenSequence* open) const {
  open->set_sequence(id());
  open->set_job(id());
  open->set_context(session_->cache_uid());
  open->set_adapter(plan_.sequence.adapter_uid);
  open->set_revision(plan_.sequence.revision);
  const int64_t own_prompt = parent_ != nullptr ? 0 : static_cast<int64_t>(plan_.sequence.prompt.size());
  open->set_parent(parent_ != nullptr ? parent_->id() : 0);
  open->set_capacity(own_prompt + plan_.max_tokens + plan_.forced_tokens());
  FillSampling(plan_.sampling, plan_.sample, open);
  std::set<int32_t> stops = plan_.eos_ids;
  stops.insert(plan_.stop_ids.begin(), plan_.stop_ids.end());
  for (const int32_t id : stops) open->add_stop_ids(static_cast<uint32_t>(id));
  open->set_top_logprobs(plan_.logprobs.value_or(0));
}

void GenerateJob::FillExtend(wire::ExtendSequence* extend) {
  const std::vector<int32_t>& prompt = plan_.sequence.prompt;
  const int64_t rows = static_cast<int64_t>(prompt.size()) + 1;
  const int64_t first_pos = session_->token_count() - 1 + rows_sent_;
  const int64_t count = tools_->chunks.NextRows(first_pos, rows - rows_sent_, kBlockTokens * tools_->ranks);
  ++extending_;
  extend->set_sequence(id());
  extend->set_first_pos(first_pos);
  for (int64_t row = rows_sent_; row < rows_sent_ + count; ++row) {
    extend->add_ids(static_cast<uint32_t>(row == 0 ? session_->tokens().back() : prompt[row - 1]));
  }
  if (plan_.sampling.prompt_logprobs) {  // row 0 predicts the prompt's first token, the last row none of it
    const int64_t end = std::min(rows_sent_ + count, rows - 1);
    for (int64_t row = rows_sent_; row < end; ++row) extend->add_score_ids(static_cast<uint32_t>(prompt[row]));
  }
  rows_sent_ += count;
  if (rows_sent_ < rows) return;
  extend->set_sample(true);
  tokens_asked_ = 1;
}

// The last sampled token has no row yet; it and the forced end get theirs, and decoding goes on behind them.
void GenerateJob::FillForced(wire::ExtendSequence* extend) {
  extend->set_sequence(id());
  extend->set_first_pos(session_->token_count() + static_cast<int64_t>(plan_.sequence.prompt.size()) + tokens_ - 1);
  extend->add_ids(static_cast<uint32_t>(last_id_));
  for (const int32_t forced : plan_.thinking->forced_end) extend->add_ids(static_cast<uint32_t>(forced));
  extend->set_sample(true);
  ++extending_;
  force_sent_ = true;
  ++tokens_asked_;
}

bool GenerateJob::MustForce() const {
  return plan_.limits_thinking() && reasoning_.inside() && !force_sent_ && forks_waiting_ == 0 &&
         tokens_ == tokens_asked_ && reasoning_.words() >= plan_.thinking_budget;
}

int64_t GenerateJob::TokenLimit() const {
  if (!plan_.limits_thinking() || reasoning_.over()) return plan_.max_tokens;
  return std::min(plan_.max_tokens, plan_.thinking_budget + (plan_.thinking->begins_inside ? 0 : 1));
}

void GenerateJob::OnPartial(const wire::Command&, const wire::Result& result, double now) {
  OnTokens(result, now);
  OnEnded(result, now);
}

void GenerateJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  const bool ok = result.code() == 0;
  if (command.has_open_sequence()) opened_ = ok;
  if (command.has_close_sequence()) opened_ = false;
  if (command.has_extend_sequence()) --extending_;
  if (!ok || stopping()) return;
  if (command.has_extend_sequence()) {
    prompt_logprobs_.insert(prompt_logprobs_.end(), result.score_logprobs().begin(), result.score_logprobs().end());
    for (int i = 0; i < result.score_best_ids_size() && i < result.score_best_logprobs_size(); ++i) {
      api::TokenLogprob& best = prompt_best_.emplace_back();
      best.set_id(result.score_best_ids(i));
      best.set_logprob(result.score_best_logprobs(i));
    }
  }
  if (command.has_decode_steps()) step_seconds_ = result.seconds() / command.decode_steps().steps();
  OnTokens(result, now);
  OnEnded(result, now);
}

// After the tokens that came with it: what had to end has ended.
void GenerateJob::OnEnded(const wire::Result& result, double now) {
  if (stopping() || result.ended().empty()) return;
  left_ = true;
  const wire::SequenceEnd& end = result.ended(0);
  if (end.why() == wire::SequenceEnd::FAILED) {
    const auto code = end.code() == 0 ? StatusCode::kInternal : static_cast<StatusCode>(end.code());
    Stop(Error(code, end.reason(), end.message()), now);
  } else {
    Stop(Error(StatusCode::kInternal, "RANK_DIVERGENCE",
               "the ranks ended a sequence that goes on: " + wire::SequenceEnd::Why_Name(end.why())),
         now);
  }
}

void GenerateJob::OnTokens(const wire::Result& result, double now) {
  if (stopping() || result.code() != 0 || result.tokens().empty()) return;
  api::GenerateEvent event;
  event.set_sample(plan_.sample);
  event.mutable_prompt_logprobs()->Assign(prompt_logprobs_.begin(), prompt_logprobs_.end());
  prompt_logprobs_.clear();
  event.mutable_prompt_best()->Assign(prompt_best_.begin(), prompt_best_.end());
  prompt_best_.clear();
  if (force_sent_ && !force_done_) {
    force_done_ = true;
    for (const int32_t forced : plan_.thinking->forced_end) AddToken(forced, &event);
  }
  for (const wire::Token& token : result.tokens()) {
    OnToken(token, &event);
    if (first_token_ < 0) first_token_ = now;
    last_token_ = now;
    if (reason_ == api::FINISH_REASON_UNSPECIFIED && tokens_ == plan_.max_tokens) reason_ = api::FINISH_LENGTH;
    if (reason_ != api::FINISH_REASON_UNSPECIFIED) break;  // later tokens are no part of the answer
  }
  if (reason_ != api::FINISH_REASON_UNSPECIFIED) {
    Finish(reason_, &event, now);
    return;
  }
  queue_.push_back(std::move(event));
  if (queue_.size() < kMaxQueuedEvents) {
    full_since_ = -1;
  } else if (full_since_ < 0) {
    full_since_ = now;
  }
  Changed();
}

void GenerateJob::OnToken(const wire::Token& token, api::GenerateEvent* event) {
  ++tokens_;
  const auto id = static_cast<int32_t>(token.id());
  last_id_ = id;
  const bool eos = plan_.eos_ids.count(id) != 0;
  if (eos || plan_.stop_ids.count(id) != 0) {  // it ends the answer and is no part of it
    reason_ = eos ? api::FINISH_EOS : api::FINISH_STOP;
    return;
  }
  if (plan_.logprobs) FillLogprob(token, event->add_logprobs());
  AddToken(id, event);
}

void GenerateJob::AddToken(int32_t id, api::GenerateEvent* event) {
  ++answer_tokens_;
  event->add_token_ids(static_cast<uint32_t>(id));
  if (tokenizer_ == nullptr) return;
  const std::string bytes = tokenizer_->TokenBytes(id, /*keep_special=*/false);
  const Reasoning::Parts parts = reasoning_.Push(id, bytes);
  event->mutable_reasoning()->append(parts.reasoning);
  event->mutable_text()->append(text_.Push(parts.answer));
  if (text_.stopped()) reason_ = api::FINISH_STOP;
}

void GenerateJob::Finish(api::FinishReason reason, api::GenerateEvent* event, double now) {
  if (tokenizer_ != nullptr) {
    event->mutable_reasoning()->append(reasoning_.Finish());
    event->mutable_text()->append(text_.Finish());
    if (text_.stopped()) reason = api::FINISH_STOP;  // the held-back end completed a stop string
  }
  api::GenerateSummary* summary = event->mutable_summary();
  summary->set_finish_reason(reason);
  summary->set_context_tokens(session_->token_count());
  summary->set_prompt_tokens(static_cast<int64_t>(plan_.sequence.prompt.size()));
  summary->set_generated_tokens(answer_tokens_);
  FillSampling(plan_.sampling, plan_.sample, summary);
  for (const std::set<int32_t>* ends : {&plan_.eos_ids, &plan_.stop_ids}) {
    for (const int32_t id : *ends) summary->add_end_token_ids(static_cast<uint32_t>(id));
  }
  summary->set_max_tokens(plan_.max_tokens);
  summary->set_adapter_revision(plan_.sequence.revision);
  summary->set_queue_seconds(queue_seconds(now));
  summary->set_prompt_seconds(first_token_ - started_);
  summary->set_decode_seconds(last_token_ - first_token_);
  const double decode = last_token_ - first_token_;
  summary->set_tokens_per_second(decode > 0 ? static_cast<double>(tokens_ - 1) / decode : 0);
  summary->set_stop(text_.stop());
  summary->set_request_id(plan_.request_id);
  summary->set_reasoning_tokens(reasoning_.tokens());
  summary->set_thinking_cut(force_done_);
  queue_.push_back(std::move(*event));
  Stop(absl::OkStatus(), now);
}

std::vector<api::GenerateEvent> GenerateJob::TakeEvents() {
  std::vector<api::GenerateEvent> events(std::make_move_iterator(queue_.begin()),
                                         std::make_move_iterator(queue_.end()));
  queue_.clear();
  full_since_ = -1;
  return events;
}

void GenerateJob::NextCleanup(wire::Command* command) {
  command->mutable_close_sequence()->set_sequence(id());
  opened_ = false;
}

void GenerateJob::OnEnd(double now) {
  LogInfo("generate " + plan_.request_id + ": end, " + (status().ok() ? "OK" : std::string(status().message())) + ", " +
          std::to_string(answer_tokens_) + " tokens, " + std::to_string(run_seconds()) + " s");
  LeaveParent();
  plan_.sequence.memory.reset();
  of_parent_.reset();
  session_->EndAnswer();
  session_->Touch(now);
}

}  // namespace refocus
