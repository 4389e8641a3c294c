// The ranks that serve the model together: who has dialled in, whether they are alive, which epoch they form.
//
//   WAITING --all hellos of one launch--> FORMING --all ready--> SERVING --any rank lost--> WAITING (epoch + 1)
//
// The processes of a launch know their ranks (mpirun) or get them here, in the order in which they come; then rank 0's
// key, with which they connect, is passed on to the others while the group is FORMING.
//
// Three faults, three detectors: a stream that ends (death), no heartbeat (host or link), heartbeats without progress
// while a command runs (hang). One lost rank loses the group: the others are told to leave, and a new launch must dial
// in.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/memory_plan.h"
#include "base/status.h"
#include "coordinator/core/messages.h"

namespace refocus {

struct GroupOptions {
  int32_t size = 0;            // ranks; 0: as the first hello says
  std::string fingerprint;     // of the model; ranks with another one are refused
  double dead_seconds = 15;    // without a heartbeat
  double form_seconds = 300;   // from the first hello to the last, and from there to the last GroupReady
  double stuck_seconds = 120;  // without progress of a rank that has a command
};

class Group {
 public:
  enum class State { kWaiting, kForming, kServing };
  struct Rank {
    uint64_t link = 0;  // the stream it came on
    wire::Hello hello;
    wire::Heartbeat heartbeat;  // the last one
    bool ready = false;
    double last_heartbeat = 0;
    double last_progress = 0;
  };
  // What happened in the last call; the caller takes it.
  struct Events {
    bool formed = false;
    std::optional<std::string> lost;  // the cause, one sentence
    bool planned = false;             // not a loss: the coordinator stops
    std::vector<uint64_t> leave;      // links to shut down, with `lost` as the reason
    std::vector<std::pair<uint64_t, int32_t>> form;  // links to send FormGroup to, with their ranks
    std::vector<uint64_t> connect;    // links to send `key` to
    std::string key;
  };

  explicit Group(GroupOptions options) : options_(std::move(options)) {}

  // Refuses (the stream is then ended with the status): FAILED_PRECONDITION VERSION_SKEW, MODEL_MISMATCH, GROUP_SIZE,
  // GROUP_DEVICE, GROUP_KV_DTYPE; ALREADY_EXISTS RANK_TAKEN (a process too many, where ranks are handed out); UNAVAILABLE GROUP_TAKEN
  // while another launch is there; INVALID_ARGUMENT FIELD_OUT_OF_RANGE.
  Status Hello(uint64_t link, const wire::Hello& hello, double now, Events* events);
  void Key(uint64_t link, const wire::GroupKey& key, double now, Events* events);
  void Ready(uint64_t link, const wire::GroupReady& ready, double now, Events* events);
  void Beat(uint64_t link, const wire::Heartbeat& heartbeat, double now);
  void Progressed(int32_t rank, double now) { ranks_.at(rank).last_progress = now; }
  void Closed(uint64_t link, const std::string& why, Events* events);
  // `working[rank]`: it has commands to answer. Call at least once a second.
  void Tick(double now, const std::vector<bool>& working, Events* events);
  // Ends the epoch for a reason found elsewhere.
  void Lose(const std::string& cause, Events* events);

  State state() const { return state_; }
  int64_t epoch() const { return epoch_; }
  int32_t size() const { return ranks_.empty() ? options_.size : ranks_.begin()->second.hello.size(); }
  const std::map<int32_t, Rank>& ranks() const { return ranks_; }
  DeviceKind device() const;  // of all its ranks; CPU while there are none
  std::optional<int32_t> RankOf(uint64_t link) const;
  const std::string& last_incident() const { return last_incident_; }

 private:
  Status CheckHello(const wire::Hello& hello) const;
  Status CheckLike(const wire::Hello& hello, const wire::Hello& first) const;
  std::string Describe(int32_t rank) const;
  std::string Missing() const;  // ranks of the launch that did not dial in

  const GroupOptions options_;
  State state_ = State::kWaiting;
  int64_t epoch_ = 1;
  std::map<int32_t, Rank> ranks_;
  double waiting_from_ = 0;  // first hello of the launch
  double formed_from_ = 0;
  bool key_sent_ = false;
  std::string last_incident_;
};

}  // namespace refocus
