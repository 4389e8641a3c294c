#include "coordinator/core/score.h"

#include <algorithm>
#include <utility>

#include "base/limits.h"
#include "base/shard_plan.h"

namespace refocus {

ScoreJob::ScoreJob(uint64_t id, double now, std::shared_ptr<Session> session, ScorePlan plan, JobTools* tools)
    : Job(id, now), session_(std::move(session)), plan_(std::move(plan)), tools_(tools) {
  event_.set_target_id(plan_.target_id);
}

bool ScoreJob::NextCommand(wire::Command* command, double now) {
  if (!open_sent_) {
    if (!ResolveAdapter(*session_, &plan_.sequence)) return false;
    open_sent_ = true;
    started_ = now;
    wire::OpenSequence* open = command->mutable_open_sequence();
    open->set_sequence(id());
    open->set_job(id());
    open->set_context(session_->cache_uid());
    open->set_adapter(plan_.sequence.adapter_uid);
    open->set_revision(plan_.sequence.revision);
    open->set_capacity(rows());
    return true;
  }
  if (rows_sent_ == rows()) return false;
  FillExtend(command->mutable_extend_sequence());
  command->set_job(id());
  return true;
}

double ScoreJob::SecondsLeft() const {
  const int64_t context = session_->token_count() - 1;
  return tools_->chunks.Seconds(context + rows_sent_, context + rows());
}

Lane ScoreJob::lane() const { return SecondsLeft() > kShortPromptSeconds ? Lane::kWork : Lane::kPrompts; }

double ScoreJob::Predict(const wire::Command& command) const {
  if (!command.has_extend_sequence()) return Job::Predict(command);
  const int64_t first = command.extend_sequence().first_pos();
  return tools_->chunks.Seconds(first, first + command.extend_sequence().ids_size());
}

// Row 0 is the context's last token; the row before target[i] predicts it.
int32_t ScoreJob::RowId(int64_t row) const {
  const auto prompt = static_cast<int64_t>(plan_.sequence.prompt.size());
  if (row == 0) return session_->tokens().back();
  return row <= prompt ? plan_.sequence.prompt[row - 1] : plan_.target[row - 1 - prompt];
}

void ScoreJob::FillExtend(wire::ExtendSequence* extend) {
  const auto prompt = static_cast<int64_t>(plan_.sequence.prompt.size());
  const int64_t first_pos = session_->token_count() - 1 + rows_sent_;
  const int64_t count = tools_->chunks.NextRows(first_pos, rows() - rows_sent_, kBlockTokens * tools_->ranks);
  extend->set_sequence(id());
  extend->set_first_pos(first_pos);
  for (int64_t row = rows_sent_; row < rows_sent_ + count; ++row) {
    extend->add_ids(static_cast<uint32_t>(RowId(row)));
    if (row >= prompt) extend->add_score_ids(static_cast<uint32_t>(plan_.target[row - prompt]));
  }
  rows_sent_ += count;
}

void ScoreJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  const bool ok = result.code() == 0 && !result.cancelled();
  if (command.has_open_sequence()) opened_ = ok;
  if (command.has_close_sequence()) opened_ = false;
  if (!ok || stopping() || !command.has_extend_sequence()) return;
  const int asked = command.extend_sequence().score_ids_size();
  if (result.score_logprobs_size() != asked || result.score_greedy_size() != asked) {
    Stop(Error(StatusCode::kInternal, "RANK_DIVERGENCE",
               "scores: got " + std::to_string(result.score_logprobs_size()) + ", asked for " + std::to_string(asked)),
         now);
    return;
  }
  for (int i = 0; i < asked; ++i) {
    sum_logprob_ += result.score_logprobs(i);
    greedy_ = greedy_ && result.score_greedy(i);
    if (plan_.token_logprobs) event_.add_token_logprobs(result.score_logprobs(i));
  }
  scored_ += asked;
  if (scored_ < static_cast<int64_t>(plan_.target.size())) return;
  event_.set_sum_logprob(sum_logprob_);
  event_.set_token_count(scored_);
  event_.set_is_greedy(greedy_);
  event_.set_adapter_revision(plan_.sequence.revision);
  event_.set_seconds(now - started_);
  Stop(absl::OkStatus(), now);
}

void ScoreJob::NextCleanup(wire::Command* command) {
  command->mutable_close_sequence()->set_sequence(id());
  opened_ = false;
}

void ScoreJob::OnEnd(double now) {
  plan_.sequence.memory.reset();
  session_->EndAnswer();
  session_->Touch(now);
}

}  // namespace refocus
