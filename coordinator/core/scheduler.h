// Puts the commands of many jobs into the one order that every rank executes.
//
// Jobs take turns, one command each. At most kCommandsInFlight are out, so that no step waits for a round trip and a
// new job waits for no more than two. A command counts as answered when every rank has sent its final Result; then the
// codes must be equal, and so must the hashes of what has to be equal (`agree`).
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <vector>

#include "coordinator/core/job.h"

namespace refocus {

inline constexpr size_t kCommandsInFlight = 2;

class Scheduler {
 public:
  // A new group: numbering starts at 1. No job may be there.
  void Start(int64_t epoch, int32_t ranks);

  // Runs until it ended. The scheduler keeps it alive.
  void Add(std::shared_ptr<Job> job);
  // One that takes its turn before all others, in order of their arrival: commands nobody waits for (CloseContext).
  void AddFirst(std::shared_ptr<Job> job);

  // Stops a job for `why`; ranks are told to leave its commands.
  void Stop(Job& job, const Status& why, double now);

  // Commands to send to every rank, in order, and cancels; call after every event.
  void Pump(double now, std::vector<wire::CoordinatorMessage>* out);

  // An answer. Not OK: the ranks disagree about what happened or break the order, nothing they hold can be trusted, and
  // the group must be ended with this status.
  Status OnResult(int32_t rank, const wire::Result& result, double now);

  // The group is gone: every job ends with `why`.
  void Lose(const Status& why, double now);

  bool Working(int32_t rank) const;  // has commands to answer
  int64_t running() const;           // jobs with a command out
  int64_t waiting() const;           // jobs without
  int64_t jobs() const { return static_cast<int64_t>(jobs_.size() + first_.size()); }
  size_t in_flight() const { return flight_.size(); }
  // Jobs whose version changed since the last call.
  std::vector<uint64_t> TakeChanged();

 private:
  struct Flight {
    std::shared_ptr<Job> job;
    wire::Command command;
    std::vector<wire::Result> results;  // by rank
    std::vector<bool> answered;
    std::vector<wire::Result> early;  // rank 0's partial ones, while an earlier command still lacks answers
  };
  struct Entry {
    std::shared_ptr<Job> job;
    uint64_t seen_version = 0;
    bool cancel_sent = false;
  };
  bool NextCommand(double now, std::shared_ptr<Job>* job, wire::Command* command);
  Status Complete(Flight& flight, double now);
  void ReleaseEarly(double now);
  void SendCancels(std::vector<wire::CoordinatorMessage>* out);
  void Sweep();

  int64_t epoch_ = 0;
  int32_t ranks_ = 0;
  int64_t next_seq_ = 1;
  std::list<Entry> first_;  // see AddFirst
  std::list<Entry> jobs_;   // the front is next in turn
  std::deque<Flight> flight_;
  std::vector<uint64_t> changed_;
};

}  // namespace refocus
