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

PrefillJob::PrefillJob(uint64_t id, double now, std::shared_ptr<Session> session, SharedPrefix prefix, JobTools* tools)
    : Job(id, now), session_(std::move(session)), prefix_(std::move(prefix)), tools_(tools) {
  event_.set_total_tokens(session_->token_count());
  event_.set_prefilled_tokens(prefix_.tokens);
  event_.set_shared_tokens(prefix_.tokens);
  sent_ = done_ = prefix_.tokens;
}

// While it waited for its turn the other context may have gone: then there is nothing to share any more.
bool PrefillJob::FillOpen(wire::OpenContext* open, double now) {
  if (!prefix_.none() && !prefix_.there()) {
    prefix_ = SharedPrefix();
    session_->DropPrefix(nullptr);
    auto memory = tools_->ledger->Reserve(0, session_->token_count());
    if (!memory.ok()) {
      Stop(memory.status(), now);
      return false;
    }
    session_->DropPrefix(*std::move(memory));
    sent_ = done_ = 0;
    event_.set_prefilled_tokens(0);
    event_.set_shared_tokens(0);
  }
  open->set_context(session_->cache_uid());
  open->set_capacity(session_->token_count());
  open->set_prefix_context(prefix_.parent_uid);
  open->set_prefix_tokens(prefix_.tokens);
  return true;
}

bool PrefillJob::NextCommand(wire::Command* command, double now) {
  if (!open_sent_) {
    open_sent_ = true;
    return FillOpen(command->mutable_open_context(), now);
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

double PrefillJob::Predict(const wire::Command& command) const {
  if (!command.has_prefill_chunk()) return Job::Predict(command);
  const int64_t first = command.prefill_chunk().first_pos();
  return tools_->chunks.Seconds(first, first + command.prefill_chunk().ids_size());
}

void PrefillJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  const bool ok = result.code() == 0 && !result.cancelled();
  if (command.has_open_context()) {
    opened_ = ok;
    session_->SetShareable(ok && !stopping());
  }
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
  session_->SetShareable(false);
  opened_ = false;
}

void PrefillJob::OnEnd(double now) {
  if (!status().ok()) {
    session_->DropCache(std::string(status().message()));
    return;
  }
  *event_.mutable_usage() = UsageOf(*this, done_ - session_->shared_tokens(), now, *tools_);
  session_->FinishPrefill(event_);
  session_->Touch(now);
}

}  // namespace refocus
