#include "coordinator/core/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/limits.h"

namespace refocus {

void Scheduler::Start(int64_t epoch, int32_t ranks) {
  REFOCUS_CHECK(flight_.empty());
  epoch_ = epoch;
  ranks_ = ranks;
  next_seq_ = 1;
  lanes_ = Lanes();
  turn_ = {};
}

void Scheduler::Add(std::shared_ptr<Job> job) { jobs_.push_back({std::move(job)}); }
void Scheduler::AddFirst(std::shared_ptr<Job> job) { first_.push_back({std::move(job)}); }

void Scheduler::Stop(Job& job, const Status& why, double now) {
  job.Stop(why, now);
  Sweep();
}

bool Scheduler::NextFlight(double now, Flight* flight) {
  if (NextCleanup(now, flight)) return true;
  const bool long_out =
      std::any_of(flight_.begin(), flight_.end(), [](const Flight& f) { return f.predicted > kLongCommandSeconds; });
  std::vector<Lane> idle;
  for (const Lane lane : lanes_.Order()) {
    if (lane == Lane::kWork && long_out) continue;
    if (lane == Lane::kDecode ? NextDecode(flight) : NextOf(lane, now, flight)) {
      for (const Lane passed : idle) lanes_.PassOver(passed, lane);
      flight->lane = lane;
      lanes_.Charge(lane, flight->predicted);
      return true;
    }
    idle.push_back(lane);
  }
  return false;
}

bool Scheduler::NextCleanup(double now, Flight* flight) {
  for (std::list<Entry>* list : {&first_, &jobs_}) {
    for (Entry& entry : *list) {
      if (list == &jobs_ && !entry.job->HasCleanupNow()) continue;
      if (!entry.job->Next(&flight->command, now)) continue;
      flight->parts.push_back({entry.job, {}});
      return true;
    }
  }
  return false;
}

// The job of the lane that had least time and has something to send.
bool Scheduler::NextOf(Lane lane, double now, Flight* flight) {
  double& turn = turn_[static_cast<size_t>(lane)];
  std::vector<Entry*> order;
  for (Entry& entry : jobs_) {
    if (entry.job->stopping() || entry.job->lane() != lane) continue;
    if (entry.lane != lane) entry.used = turn;
    entry.lane = lane;
    order.push_back(&entry);
  }
  std::stable_sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) { return a->used < b->used; });
  for (auto it = order.begin(); it != order.end(); ++it) {
    Entry& chosen = **it;
    if (!chosen.job->Next(&flight->command, now)) continue;
    turn = chosen.used;
    for (auto passed = order.begin(); passed != it; ++passed) (*passed)->used = std::max((*passed)->used, turn);
    flight->parts.push_back({chosen.job, {}});
    flight->predicted = chosen.job->Predict(flight->command);
    chosen.used += flight->predicted;
    return true;
  }
  return false;
}

bool Scheduler::NextDecode(Flight* flight) {
  std::vector<DecodeRow> rows;
  std::vector<Entry*> owners;
  for (Entry& entry : jobs_) {
    const size_t before = rows.size();
    entry.job->AddDecodeRows(&rows);
    for (size_t i = before; i < rows.size(); ++i) rows[i].owner = owners.size();
    if (rows.size() > before) owners.push_back(&entry);
  }
  const DecodeBatch::Plan plan = batch_.Next(std::move(rows));
  if (plan.rows.empty()) return false;
  wire::DecodeSteps* decode = flight->command.mutable_decode_steps();
  decode->set_steps(plan.steps);
  std::vector<std::optional<size_t>> part_of_owner(owners.size());
  for (const DecodeRow& row : plan.rows) {
    decode->add_sequences(row.sequence);
    std::optional<size_t>& part = part_of_owner[row.owner];
    if (!part) {
      part = flight->parts.size();
      flight->parts.push_back({owners[row.owner]->job, {}});
    }
    flight->parts[*part].sequences.push_back(row.sequence);
    flight->part_of[row.sequence] = *part;
  }
  for (const Part& part : flight->parts) part.job->JoinDecode(part.sequences, plan.steps);
  flight->predicted = plan.seconds;
  return true;
}

// What was charged for the command becomes what it took.
void Scheduler::Correct(const Flight& flight, double seconds) {
  if (!flight.lane || !(seconds >= 0)) return;
  lanes_.Charge(*flight.lane, seconds - flight.predicted);
  if (*flight.lane == Lane::kDecode) return;
  for (Entry& entry : jobs_) {
    if (entry.job == flight.parts.front().job) entry.used += seconds - flight.predicted;
  }
}

void Scheduler::Pump(double now, std::vector<wire::CoordinatorMessage>* out) {
  for (Entry& entry : jobs_) entry.job->CheckDeadline(now);
  SendCancels(out);
  while (ranks_ > 0 && flight_.size() < kCommandsInFlight) {
    Flight flight;
    if (!NextFlight(now, &flight)) break;
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
    if (flight.command.job() == 0 && !flight.command.has_decode_steps()) continue;
    for (const Part& part : flight.parts) {
      if (!part.job->stopping()) continue;
      for (Entry& entry : jobs_) {
        if (entry.job != part.job || entry.cancel_sent) continue;
        entry.cancel_sent = true;
        wire::Cancel* cancel = out->emplace_back().mutable_cancel();
        cancel->set_epoch(epoch_);
        cancel->set_job(part.job->id());
      }
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
  for (const wire::Result& partial : std::exchange(front.early, {})) {
    const std::vector<wire::Result> results = Split(front, partial);
    for (size_t part = 0; part < results.size(); ++part) {
      const wire::Result& own = results[part];
      if (!front.command.has_decode_steps() || own.tokens_size() + own.ended_size() > 0) {
        front.parts[part].job->Partial(front.command, own, now);
      }
    }
  }
}

// The result as each part of the command is to see it.
std::vector<wire::Result> Scheduler::Split(const Flight& flight, const wire::Result& result) {
  if (!flight.command.has_decode_steps()) return {result};
  wire::Result common = result;
  common.clear_tokens();
  common.clear_ended();
  std::vector<wire::Result> parts(flight.parts.size(), common);
  for (const wire::Token& token : result.tokens()) {
    const auto part = flight.part_of.find(token.sequence());
    if (part != flight.part_of.end()) *parts[part->second].add_tokens() = token;
  }
  for (const wire::SequenceEnd& end : result.ended()) {
    const auto part = flight.part_of.find(end.sequence());
    if (part != flight.part_of.end()) *parts[part->second].add_ended() = end;
  }
  return parts;
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
    for (const Part& part : flight.parts) part.job->Lose(why, now);
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
  Correct(flight, first.seconds());
  const std::vector<wire::Result> results = Split(flight, first);
  for (size_t part = 0; part < results.size(); ++part) {
    flight.parts[part].job->Answer(flight.command, results[part], now);
  }
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

double Scheduler::SecondsLeft() const {
  double seconds = 0, decode = 0;
  int64_t decoding = 0;
  for (const Entry& entry : jobs_) {
    seconds += entry.job->SecondsLeft();
    const double left = entry.job->DecodeSecondsLeft();
    decode = std::max(decode, left);
    decoding += left > 0 ? 1 : 0;
  }
  return seconds + decode * static_cast<double>((decoding + kMaxDecodeRows - 1) / kMaxDecodeRows);
}

std::vector<Scheduler::Waiting> Scheduler::Queue() const {
  std::vector<Waiting> queue;
  for (const Entry& entry : jobs_) {
    if (!entry.job->started() && !entry.job->stopping()) queue.push_back({entry.job.get()});
  }
  std::stable_sort(queue.begin(), queue.end(),
                   [](const Waiting& a, const Waiting& b) { return a.job->lane() < b.job->lane(); });
  double ahead = 0;
  for (const Flight& flight : flight_) ahead += flight.predicted;
  for (Waiting& waiting : queue) {
    waiting.seconds = ahead;
    ahead += std::min(waiting.job->SecondsLeft(), kChunkSeconds);
  }
  return queue;
}

bool Scheduler::Working(int32_t rank) const {
  return std::any_of(flight_.begin(), flight_.end(), [&](const Flight& f) { return !f.answered[rank]; });
}

int64_t Scheduler::running() const {
  return std::count_if(jobs_.begin(), jobs_.end(), [](const Entry& entry) { return entry.job->in_flight() > 0; });
}

int64_t Scheduler::waiting() const { return static_cast<int64_t>(jobs_.size()) - running(); }

}  // namespace refocus
