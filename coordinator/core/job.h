// One piece of work on the group: a source of commands and a consumer of their results. The scheduler pulls; a job
// never pushes. Prefill, adapt, generate and score are jobs; each has a file of its own.
//
// Life: running -> stopping (finished, failed, or stopped; the first reason counts) -> its commands in flight come back
// -> clean-up commands, one after the other -> ended. When the group is lost a job ends at once: there is nothing to
// clean.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
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
  uint64_t version() const { return version_; }  // grows when a watcher has something new to read

  // No further regular commands. Ends at once when nothing is in flight and nothing is to be cleaned.
  void Stop(Status why, double now);

  // For the scheduler only.
  bool Next(wire::Command* command, double now);  // fills body and job; false: nothing to send now
  void Partial(const wire::Command& command, const wire::Result& result, double now);
  void Answer(const wire::Command& command, const wire::Result& result, double now);
  void Lose(const Status& why, double now);

  double queue_seconds(double now) const { return (first_command_ < 0 ? now : first_command_) - created_; }
  double run_seconds() const { return first_command_ < 0 ? 0 : last_result_ - first_command_; }

 protected:
  // While running. May be called with commands in flight: jobs pipeline. A command with job = id() can be cancelled;
  // set-up and clean-up commands carry 0, because exactly what they built must be taken down.
  virtual bool NextCommand(wire::Command* command, double now) = 0;
  // While stopping, with nothing in flight.
  virtual bool HasCleanup() const { return false; }
  virtual void NextCleanup(wire::Command*) {}
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
};

}  // namespace refocus
