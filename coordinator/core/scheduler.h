// Puts the commands of many jobs into the one order that every rank executes.
//
// Clean-up goes first: what has ended makes room at once. Then the lanes share the time (lanes.h), and in a lane the
// job that had least of it goes first. All answers decode together (decode_batch.h). At most kCommandsInFlight are out,
// and of long ones one: no decode step waits for a round trip, a new question for one chunk and one short command.
//
// A command counts as answered when every rank has sent its final Result; then the codes must be equal, and so must the
// hashes of what has to be equal (`agree`).
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "coordinator/core/job.h"

namespace refocus {

inline constexpr size_t kCommandsInFlight = 2;
// Behind a command that should take longer than this no other of kWork waits on the ranks. The round trip between two
// of them, a millisecond, is lost; a question that comes meanwhile saves a chunk.
inline constexpr double kLongCommandSeconds = 0.1;

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

  // Predicted seconds of all the work that is there, as far as anybody knows.
  double SecondsLeft() const;
  // Jobs that have not started, in the order in which they probably will: short questions first.
  struct Waiting {
    const Job* job = nullptr;
    double seconds = 0;  // predicted, until its first command
  };
  std::vector<Waiting> Queue() const;

  bool Working(int32_t rank) const;  // has commands to answer
  int64_t running() const;           // jobs with a command out
  int64_t waiting() const;           // jobs without
  int64_t jobs() const { return static_cast<int64_t>(jobs_.size() + first_.size()); }
  size_t in_flight() const { return flight_.size(); }
  // Jobs whose version changed since the last call.
  std::vector<uint64_t> TakeChanged();

 private:
  struct Part {
    std::shared_ptr<Job> job;
    std::vector<uint64_t> sequences;  // of decode steps
  };
  struct Flight {
    std::vector<Part> parts;                       // one, or all jobs of a decode batch
    std::unordered_map<uint64_t, size_t> part_of;  // sequence -> part, of decode steps
    std::optional<Lane> lane;                      // none: clean-up
    double predicted = 0;                          // seconds
    wire::Command command;
    std::vector<wire::Result> results;  // by rank
    std::vector<bool> answered;
    std::vector<wire::Result> early;  // rank 0's partial ones, while an earlier command still lacks answers
  };
  struct Entry {
    std::shared_ptr<Job> job;
    uint64_t seen_version = 0;
    bool cancel_sent = false;
    std::optional<Lane> lane;
    double used = 0;  // seconds of the lane's time, from where the lane was when the job came
  };
  bool NextFlight(double now, Flight* flight);
  bool NextCleanup(double now, Flight* flight);
  bool NextOf(Lane lane, double now, Flight* flight);
  bool NextDecode(Flight* flight);
  void Correct(const Flight& flight, double seconds);
  static std::vector<wire::Result> Split(const Flight& flight, const wire::Result& result);
  Status Complete(Flight& flight, double now);
  void ReleaseEarly(double now);
  void SendCancels(std::vector<wire::CoordinatorMessage>* out);
  void Sweep();

  int64_t epoch_ = 0;
  int32_t ranks_ = 0;
  int64_t next_seq_ = 1;
  std::list<Entry> first_;  // see AddFirst
  std::list<Entry> jobs_;   // in order of arrival
  std::deque<Flight> flight_;
  Lanes lanes_;
  std::array<double, kLanes> turn_ = {};  // `used` of the job that was last chosen
  DecodeBatch batch_;
  std::vector<uint64_t> changed_;
};

}  // namespace refocus
