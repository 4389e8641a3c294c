#include "coordinator/core/prefill.h"

#include <utility>

#include "base/check.h"
#include "base/shard_plan.h"

namespace refocus {

api::PhaseUsage UsageOf(const Job& job, int64_t tokens, double now, const JobTools& tools) {
  api::PhaseUsage usage;
  usage.set_tokens(tokens);
  usage.set_queue_seconds(job.queue_seconds(now));
  usage.set_seconds(job.run_seconds());
  usage.set_tokens_per_second(job.run_seconds() > 0 ? static_cast<double>(tokens) / job.run_seconds() : 0);
  for (const int64_t bytes : tools.rank_memory()) usage.add_rank_memory_bytes(bytes);
  return usage;
}

PrefillJob::PrefillJob(uint64_t id, double now, std::shared_ptr<Session> session, JobTools* tools)
    : Job(id, now), session_(std::move(session)), tools_(tools) {
  event_.set_total_tokens(session_->token_count());
}

bool PrefillJob::NextCommand(wire::Command* command, double) {
  if (!open_sent_) {
    open_sent_ = true;
    command->mutable_open_context()->set_context(session_->cache_uid());
    command->mutable_open_context()->set_capacity(session_->token_count());
    return true;
  }
  const int64_t left = session_->token_count() - sent_;
  if (left == 0) return false;
  const int64_t rows = tools_->chunks.NextRows(sent_, left, kBlockTokens * tools_->ranks);
  command->set_job(id());
  wire::PrefillChunk* chunk = command->mutable_prefill_chunk();
  chunk->set_context(session_->cache_uid());
  chunk->set_first_pos(sent_);
  const auto first = session_->tokens().begin() + sent_;
  chunk->mutable_ids()->Assign(first, first + rows);
  sent_ += rows;
  return true;
}

void PrefillJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  const bool ok = result.code() == 0 && !result.cancelled();
  if (command.has_open_context()) opened_ = ok;
  if (command.has_close_context()) opened_ = false;
  if (command.has_prefill_chunk() && ok) OnChunk(command.prefill_chunk(), result, now);
}

void PrefillJob::OnChunk(const wire::PrefillChunk& chunk, const wire::Result& result, double now) {
  REFOCUS_CHECK_EQ(chunk.first_pos(), done_);
  const int64_t total = session_->token_count();
  done_ += chunk.ids_size();
  session_->Prefilled(done_);
  tools_->chunks.Measured(chunk.first_pos(), chunk.ids_size(), result.seconds());
  event_.set_prefilled_tokens(done_);
  event_.set_elapsed_seconds(run_seconds());
  event_.set_eta_seconds(tools_->chunks.Seconds(done_, total));
  if (result.seconds() > 0) event_.set_tokens_per_second(chunk.ids_size() / result.seconds());
  Changed();
  if (done_ == total) Stop(absl::OkStatus(), now);
}

void PrefillJob::NextCleanup(wire::Command* command) {
  command->mutable_close_context()->set_context(session_->cache_uid());
  opened_ = false;
}

void PrefillJob::OnEnd(double now) {
  if (!status().ok()) {
    session_->DropCache(std::string(status().message()));
    return;
  }
  *event_.mutable_usage() = UsageOf(*this, done_, now, *tools_);
  session_->FinishPrefill(event_);
  session_->Touch(now);
}

}  // namespace refocus
