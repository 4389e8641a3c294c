#include "coordinator/core/job.h"

#include <utility>

#include "base/check.h"

namespace refocus {

Status StatusOf(const wire::Result& result) {
  if (result.code() == 0) return absl::OkStatus();
  const bool known = result.code() > 0 && result.code() <= 16;
  ErrorMetadata metadata(result.metadata().begin(), result.metadata().end());
  return Error(known ? static_cast<StatusCode>(result.code()) : StatusCode::kUnknown, result.reason(), result.message(),
               metadata);
}

void Job::Stop(Status why, double now) {
  if (stopping_) return;
  stopping_ = true;
  status_ = std::move(why);
  Changed();
  EndIfIdle(now);
}

bool Job::Next(wire::Command* command, double now) {
  if (ended_) return false;
  if (!stopping_) {
    if (!NextCommand(command, now)) return false;
  } else {
    if (!HasCleanupNow()) return false;
    NextCleanup(command);
  }
  if (first_command_ < 0) first_command_ = now;
  ++in_flight_;
  return true;
}

double Job::Predict(const wire::Command& command) const {
  const auto found = seconds_.find(static_cast<int>(command.command_case()));
  return found == seconds_.end() ? 0 : found->second;
}

void Job::JoinDecode(const std::vector<uint64_t>& sequences, int64_t steps) {
  ++in_flight_;
  for (const uint64_t sequence : sequences) OnDecode(sequence, steps);
}

void Job::CheckDeadline(double now) {
  if (started() || stopping_ || now < deadline) return;
  Stop(Error(StatusCode::kDeadlineExceeded, "DEADLINE", "the deadline passed while the request waited for its turn"),
       now);
}

void Job::Partial(const wire::Command& command, const wire::Result& result, double now) {
  OnPartial(command, result, now);
}

void Job::Answer(const wire::Command& command, const wire::Result& result, double now) {
  REFOCUS_CHECK_GE(in_flight_, 1);
  --in_flight_;
  last_result_ = now;
  if (result.code() == 0 && !result.cancelled()) {
    seconds_[static_cast<int>(command.command_case())] = result.seconds();
  }
  OnResult(command, result, now);
  if (result.code() != 0) {
    Stop(StatusOf(result), now);
  } else if (result.cancelled() && !stopping_) {
    Stop(Error(StatusCode::kInternal, "RANK_DIVERGENCE", "the ranks left a command that nobody had cancelled"), now);
  }
  EndIfIdle(now);
}

void Job::Lose(const Status& why, double now) {
  if (ended_) return;
  in_flight_ = 0;
  if (!stopping_) {
    stopping_ = true;
    status_ = why;
  }
  ended_ = true;
  Changed();
  OnEnd(now);
}

void Job::EndIfIdle(double now) {
  if (!stopping_ || ended_ || in_flight_ > 0 || HasCleanup()) return;
  ended_ = true;
  Changed();
  OnEnd(now);
}

}  // namespace refocus
