#include "coordinator/core/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace refocus {

void Scheduler::Start(int64_t epoch, int32_t ranks) {
  REFOCUS_CHECK(flight_.empty());
  epoch_ = epoch;
  ranks_ = ranks;
  next_seq_ = 1;
}

void Scheduler::Add(std::shared_ptr<Job> job) { jobs_.push_back({std::move(job)}); }
void Scheduler::AddFirst(std::shared_ptr<Job> job) { first_.push_back({std::move(job)}); }

void Scheduler::Stop(Job& job, const Status& why, double now) {
  job.Stop(why, now);
  Sweep();
}

bool Scheduler::NextCommand(double now, std::shared_ptr<Job>* job, wire::Command* command) {
  for (Entry& entry : first_) {
    if (!entry.job->Next(command, now)) continue;
    *job = entry.job;
    return true;
  }
  for (auto it = jobs_.begin(); it != jobs_.end(); ++it) {
    if (!it->job->Next(command, now)) continue;
    *job = it->job;
    jobs_.splice(jobs_.end(), jobs_, it);  // to the back of the queue
    return true;
  }
  return false;
}

void Scheduler::Pump(double now, std::vector<wire::CoordinatorMessage>* out) {
  SendCancels(out);
  while (ranks_ > 0 && flight_.size() < kCommandsInFlight) {
    Flight flight;
    if (!NextCommand(now, &flight.job, &flight.command)) break;
    flight.command.set_epoch(epoch_);
    flight.command.set_seq(next_seq_++);
    flight.results.resize(ranks_);
    flight.answered.assign(ranks_, false);
    *out->emplace_back().mutable_command() = flight.command;
    flight_.push_back(std::move(flight));
  }
  Sweep();
}

// Before further commands of a stopping job would be: those on the way are left early.
void Scheduler::SendCancels(std::vector<wire::CoordinatorMessage>* out) {
  for (const Flight& flight : flight_) {
    if (!flight.job->stopping() || flight.command.job() == 0) continue;
    for (Entry& entry : jobs_) {
      if (entry.job != flight.job || entry.cancel_sent) continue;
      entry.cancel_sent = true;
      wire::Cancel* cancel = out->emplace_back().mutable_cancel();
      cancel->set_epoch(epoch_);
      cancel->set_job(flight.command.job());
    }
  }
}

Status Scheduler::OnResult(int32_t rank, const wire::Result& result, double now) {
  const auto broken = [&](const std::string& what) {
    return Error(StatusCode::kInternal, "RANK_DIVERGENCE", "rank " + std::to_string(rank) + " " + what);
  };
  if (result.epoch() != epoch_) return absl::OkStatus();  // of a group that is gone
  const auto next = std::find_if(flight_.begin(), flight_.end(), [&](const Flight& f) { return !f.answered[rank]; });
  if (next == flight_.end() || next->command.seq() != result.seq()) {
    return broken("answered command " + std::to_string(result.seq()) + " out of order");
  }
  if (!result.final()) {
    if (rank == 0) next->early.push_back(result);
    ReleaseEarly(now);
    Sweep();
    return absl::OkStatus();
  }
  next->answered[rank] = true;
  next->results[rank] = result;
  while (!flight_.empty()) {
    Flight& front = flight_.front();
    if (std::find(front.answered.begin(), front.answered.end(), false) != front.answered.end()) break;
    Flight done = std::move(front);
    flight_.pop_front();
    REFOCUS_RETURN_IF_ERROR(Complete(done, now));
    ReleaseEarly(now);
  }
  Sweep();
  return absl::OkStatus();
}

// Rank 0 may be a command ahead of the others: what it sends then must not overtake the results before it.
void Scheduler::ReleaseEarly(double now) {
  if (flight_.empty()) return;
  Flight& front = flight_.front();
  for (const wire::Result& partial : std::exchange(front.early, {})) front.job->Partial(front.command, partial, now);
}

Status Scheduler::Complete(Flight& flight, double now) {
  wire::Result& first = flight.results.front();
  const std::string seq = std::to_string(flight.command.seq());
  for (size_t rank = 1; rank < flight.results.size(); ++rank) {
    const wire::Result& other = flight.results[rank];
    if (other.code() == first.code() && other.cancelled() == first.cancelled()) continue;
    const Status why = Error(StatusCode::kInternal, "RANK_DIVERGENCE",
                             "ranks 0 and " + std::to_string(rank) + " ended command " + seq + " differently",
                             {{"rank", std::to_string(rank)}, {"command", seq}});
    flight.job->Lose(why, now);
    return why;
  }
  for (size_t rank = 1; rank < flight.results.size() && first.code() == 0; ++rank) {
    if (flight.results[rank].agree() == first.agree()) continue;
    // The same verb, another outcome: only what this job made differs, and its clean-up drops that.
    first.set_code(static_cast<int32_t>(StatusCode::kInternal));
    first.set_reason("RANK_DIVERGENCE");
    first.set_message("ranks 0 and " + std::to_string(rank) + " computed different results in command " + seq);
    (*first.mutable_metadata())["rank"] = std::to_string(rank);
    (*first.mutable_metadata())["command"] = seq;
  }
  flight.job->Answer(flight.command, first, now);
  return absl::OkStatus();
}

void Scheduler::Lose(const Status& why, double now) {
  flight_.clear();
  ranks_ = 0;
  for (std::list<Entry>* list : {&first_, &jobs_}) {
    for (Entry& entry : *list) entry.job->Lose(why, now);
  }
  Sweep();
}

// Notes what watchers should look at and forgets ended jobs.
void Scheduler::Sweep() {
  for (std::list<Entry>* list : {&first_, &jobs_}) {
    for (auto it = list->begin(); it != list->end();) {
      if (it->job->version() != it->seen_version) {
        it->seen_version = it->job->version();
        changed_.push_back(it->job->id());
      }
      it = it->job->ended() ? list->erase(it) : std::next(it);
    }
  }
}

std::vector<uint64_t> Scheduler::TakeChanged() { return std::exchange(changed_, {}); }

bool Scheduler::Working(int32_t rank) const {
  return std::any_of(flight_.begin(), flight_.end(), [&](const Flight& f) { return !f.answered[rank]; });
}

int64_t Scheduler::running() const {
  return std::count_if(jobs_.begin(), jobs_.end(), [](const Entry& entry) { return entry.job->in_flight() > 0; });
}

int64_t Scheduler::waiting() const { return static_cast<int64_t>(jobs_.size()) - running(); }

}  // namespace refocus
