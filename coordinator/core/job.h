// One piece of work on the group: a source of commands and a consumer of their results. The scheduler pulls; a job
// never pushes. Prefill, adapt, generate and score are jobs; each has a file of its own. Decode steps alone are taken
// together: the scheduler asks the jobs which sequences want to go on and sends one command for all of them.
//
// Life: running -> stopping (finished, failed, or stopped; the first reason counts) -> its commands in flight come back
// -> clean-up commands, one after the other -> ended. When the group is lost a job ends at once: there is nothing to
// clean.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "base/status.h"
#include "coordinator/core/decode_batch.h"
#include "coordinator/core/lanes.h"
#include "coordinator/core/messages.h"

namespace refocus {

// Why commands of a failed Result stopped, as a Status with its reason and metadata.
Status StatusOf(const wire::Result& result);

class Job {
 public:
  Job(uint64_t id, double now) : id_(id), created_(now) {}
  virtual ~Job() = default;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  uint64_t id() const { return id_; }
  bool stopping() const { return stopping_; }
  bool ended() const { return ended_; }
  // Why it stopped; meaningful once stopping.
  const Status& status() const { return status_; }
  int in_flight() const { return in_flight_; }
  // Everything the caller will ever see is there, although clean-up may still run.
  virtual bool answered() const { return stopping_; }
  // The adapter that it reads, which must not be deleted until it has answered; empty: none.
  virtual std::string adapter_id() const { return {}; }
  uint64_t version() const { return version_; }  // grows when a watcher has something new to read

  // No further regular commands. Ends at once when nothing is in flight and nothing is to be cleaned.
  void Stop(Status why, double now);

  // For the scheduler only.
  bool Next(wire::Command* command, double now);  // fills body and job; false: nothing to send now
  bool HasCleanupNow() const { return stopping_ && !ended_ && in_flight_ == 0 && HasCleanup() && MayCleanUp(); }
  // Where the next command takes its turn.
  virtual Lane lane() const { return Lane::kWork; }
  // Seconds that this command of the job should take; 0: nobody knows.
  virtual double Predict(const wire::Command& command) const;
  virtual const char* kind() const { return "clean-up"; }  // for people
  // Predicted, as things stand, decode steps aside; and of those, if nothing else ran. 0: nobody knows.
  virtual double SecondsLeft() const { return 0; }
  virtual double DecodeSecondsLeft() const { return 0; }
  // Sequences that can decode now: open, with a sampled token. None while stopping.
  virtual void AddDecodeRows(std::vector<DecodeRow>*) const {}
  // A decode command with these sequences of the job is on its way. Its results come as those of other commands do,
  // with the tokens and ends of these sequences alone.
  void JoinDecode(const std::vector<uint64_t>& sequences, int64_t steps);
  void Partial(const wire::Command& command, const wire::Result& result, double now);
  void Answer(const wire::Command& command, const wire::Result& result, double now);
  void Lose(const Status& why, double now);
  // A job that has sent nothing by `deadline` never starts: it ends with DEADLINE_EXCEEDED.
  void CheckDeadline(double now);
  double deadline = std::numeric_limits<double>::infinity();  // by the coordinator's clock

  bool started() const { return first_command_ >= 0; }
  double queue_seconds(double now) const { return (first_command_ < 0 ? now : first_command_) - created_; }
  double run_seconds() const { return first_command_ < 0 ? 0 : last_result_ - first_command_; }

 protected:
  // While running. May be called with commands in flight: jobs pipeline. A command with job = id() can be cancelled;
  // set-up and clean-up commands carry 0, because exactly what they built must be taken down.
  virtual bool NextCommand(wire::Command* command, double now) = 0;
  // While stopping, with nothing in flight.
  virtual bool HasCleanup() const { return false; }
  virtual bool MayCleanUp() const { return true; }  // false: others still need what is to be taken down
  virtual void NextCleanup(wire::Command*) {}
  virtual void OnDecode(uint64_t, int64_t) {}  // a sequence takes part in so many steps
  // Results in the order of the commands; also those of a stopping job. Not OK: Stop() with it follows.
  virtual void OnPartial(const wire::Command&, const wire::Result&, double) {}
  virtual void OnResult(const wire::Command& command, const wire::Result& result, double now) = 0;
  virtual void OnEnd(double) {}  // once; last of all

  void Changed() { ++version_; }

 private:
  void EndIfIdle(double now);

  const uint64_t id_;
  const double created_;
  double first_command_ = -1;
  double last_result_ = 0;
  bool stopping_ = false;
  bool ended_ = false;
  int in_flight_ = 0;
  uint64_t version_ = 1;
  Status status_;
  std::map<int, double> seconds_;  // of the last command of each kind
};

}  // namespace refocus
