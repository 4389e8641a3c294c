// Runs a coordinator and one worker group on this machine: starts them, starts the group anew with back-off when it
// dies, ends everything in order. One thread, one loop: start reading at Run().
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "cli/client.h"
#include "cli/process.h"

namespace refocus::cli {

struct ServeOptions {
  std::string model;
  int ranks = 1;
  std::string listen = kDefaultAddress;
  std::vector<std::string> coordinator_flags;  // passed on as they are
  std::vector<std::string> worker_flags;
  double drain_seconds = 30;
  int give_up_after = 10;                      // group failures in a row, each within kSettledSeconds of its start
};

// How long the next start of the group waits.
class Backoff {
 public:
  // `lived`: seconds from the start of the group to its death.
  double After(double lived);
  int failures() const { return failures_; }   // in a row

 private:
  double next_ = 0.5;
  int failures_ = 0;
};
inline constexpr double kSettledSeconds = 60;  // a group that lived so long starts the back-off anew
inline constexpr double kLongestBackoffSeconds = 10;

// "refocus-coordinator ready public=HOST:PORT worker=HOST:PORT"; false for any other line.
bool ParseReadyLine(const std::string& line, std::string* public_address, std::string* worker_address);

// Whether ranks that share a machine can copy straight from each other's memory; some containers forbid it.
bool ProcessMemoryReadable();

inline constexpr int kMaxServedRanks = 256;

// GPUs that ranks started here would see, at least 1 (a rank says what is wrong with none) and at most kMaxServedRanks:
// those that CUDA_VISIBLE_DEVICES names (null: unset), else the nodes nvidia0, nvidia1, ... in `devices`.
int VisibleGpus(const char* cuda_visible_devices, const std::string& devices = "/dev");

class Supervisor {
 public:
  explicit Supervisor(const ServeOptions& options);
  ~Supervisor();  // no child survives it

  // Returns the exit code of `refocus serve`: 0 after an orderly stop, the coordinator's when it failed while stopping.
  int Run();

 private:
  enum class State { kStarting, kRunning, kDraining, kStopped };

  bool StartCoordinator();
  void StartGroup();
  void ReadCoordinator();
  void OnSignals();
  void ReapChildren();
  void OnCoordinatorExit(int code);
  void OnGroupExit(int code);
  void OnTimer();
  void AskWhetherReady();
  void Drain();
  void Stop(int exit_code);
  int WaitMilliseconds() const;

  ServeOptions options_;
  State state_ = State::kStarting;
  int exit_code_ = 0;
  int drain_exit_code_ = 0;          // of a drain that ends by itself: the coordinator's when it failed meanwhile
  int signal_fd_ = -1;
  Child coordinator_;
  std::string coordinator_output_;
  std::string public_address_;
  std::string worker_address_;
  std::unique_ptr<Client> client_;   // from the ready line on

  Child group_;                      // mpirun
  double group_started_ = 0;         // monotonic seconds
  double next_start_ = -1;           // of the group; negative: none is due
  double next_question_ = 0;         // when to ask whether the group serves
  double deadline_ = 0;              // of the ready line, later of the drain
  bool ready_ = false;               // this group was seen serving
  bool ever_ready_ = false;
  int bad_starts_ = 0;               // exit codes 2 to 4 in a row
  Backoff backoff_;
};

}  // namespace refocus::cli
