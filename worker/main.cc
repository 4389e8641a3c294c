// refocus-worker: reads the model, joins the group, executes commands until it is told to stop.
//
// Threads: main owns MPI and runs the engine; the link has three of its own; one waits for signals. Whatever ends the
// process first is latched and logged once. A failure ends it by std::_Exit, since unfinished messages forbid
// MPI_Finalize; mpirun then ends the other ranks.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include <ATen/Parallel.h>

#include "base/log.h"
#include "base/model_config.h"
#include "base/status.h"
#include "worker/backend.h"
#include "worker/collective.h"
#include "worker/engine.h"
#include "worker/host.h"
#include "worker/launch.h"
#include "worker/link.h"
#include "worker/options.h"
#include "worker/weights.h"

namespace refocus {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kElementBytes = 4;  // fp32
constexpr double kFlushSeconds = 2.0;
constexpr std::chrono::seconds kStopGrace{8};

std::string Size(int64_t bytes) {
  const bool large = bytes >= int64_t{1} << 30;
  char text[32];
  const double units = static_cast<double>(bytes) / (large ? 1 << 30 : 1 << 20);
  std::snprintf(text, sizeof(text), "%.2f %s", units, large ? "GiB" : "MiB");
  return text;
}

std::string Seconds(Clock::time_point since) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", std::chrono::duration<double>(Clock::now() - since).count());
  return text;
}

std::string Place(const Launch& launch) {
  return "rank " + std::to_string(launch.rank) + " of " + std::to_string(launch.size) + " on " + HostName();
}

// Why this process ends; the first cause wins.
class Ending {
 public:
  explicit Ending(std::string where) : where_(std::move(where)) {}

  // A planned end with this exit code. False when something else came first.
  bool Plan(int code) {
    int none = kOpen;
    return code_.compare_exchange_strong(none, code);
  }

  bool planned() const { return code_ != kOpen; }  // of the caller: a failure does not return

  // Logs the cause and ends the process; returns only where the end is planned already.
  void Fail(const Status& cause, int code) {
    int none = kOpen;
    if (!code_.compare_exchange_strong(none, code)) {
      while (none != kExitOk && none != kExitInterrupted) pause();  // another thread is ending the process
      return;
    }
    const std::string reason = DetailOf(cause).reason;
    LogError("FATAL " + where_ + ": " + std::string(cause.message()) + " (" + (reason.empty() ? "INTERNAL" : reason) +
             ", exit " + std::to_string(code) + ")");
    std::_Exit(code);
  }

  // Ends the process with the latched code if it has not ended in time.
  void Watch(std::chrono::seconds grace) {
    std::thread([this, grace] {
      std::this_thread::sleep_for(grace);
      std::_Exit(code_);
    }).detach();
  }

  int code() const { return code_; }

 private:
  static constexpr int kOpen = -1;
  const std::string where_;
  std::atomic<int> code_{kOpen};
};

struct Rank {
  Launch launch;
  WorkerOptions options;
  ModelConfig config;
  int threads = 1;
  int64_t kv_bytes = 0;
  int64_t weight_bytes = 0;  // expected
};

// Decides on threads and memory and says so before a weight is read.
Status Plan(Rank& rank) {
  const Launch& launch = rank.launch;
  rank.threads = rank.options.threads > 0 ? rank.options.threads : launch.threads;
  rank.weight_bytes = rank.config.parameters() * kElementBytes;
  const int64_t token_bytes = rank.config.kv_bytes_per_token(kElementBytes);
  const int64_t left = launch.free_bytes / launch.ranks_on_host - rank.weight_bytes;
  const bool known = launch.free_bytes >= 0;
  rank.kv_bytes = rank.options.kv_bytes;
  if (rank.kv_bytes == 0) {
    if (!known) {
      return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
                   "--kv-memory: the host's free memory is unknown; set it");
    }
    rank.kv_bytes = std::max<int64_t>(left / 2, 0);
  }
  const std::string plan = "weights " + Size(rank.weight_bytes) + ", K/V " + Size(rank.kv_bytes) + " on each of " +
                           std::to_string(launch.ranks_on_host) + " ranks of this host, free " +
                           (known ? Size(launch.free_bytes) : "unknown");
  if (known && (left < rank.kv_bytes || rank.kv_bytes < token_bytes)) {
    return Error(StatusCode::kResourceExhausted, "HARDWARE",
                 "memory: " + plan + "; use fewer ranks per host, a smaller --kv-memory or a smaller model");
  }
  if (launch.rank == 0) {
    LogInfo("memory: " + plan + "; K/V of 1000 tokens " + Size(1000 * token_bytes) + ", room for " +
            std::to_string(rank.kv_bytes / token_bytes * launch.size) + " tokens on " + std::to_string(launch.size) +
            " ranks; " + std::to_string(rank.threads) + " threads a rank");
  }
  return {};
}

StatusOr<std::shared_ptr<const Weights>> Load(const Rank& rank) {
  const Clock::time_point begin = Clock::now();
  Clock::time_point told = begin;
  LoadOptions options;
  options.threads = rank.threads;
  options.check_finite = rank.options.check_finite;
  if (rank.launch.rank == 0) {
    options.progress = [&](int64_t done, int64_t total) {
      if (Clock::now() - told < std::chrono::seconds(2) || done <= 0) return;
      told = Clock::now();
      const double rate = static_cast<double>(done) / std::chrono::duration<double>(told - begin).count();
      const auto left_seconds = static_cast<int64_t>(static_cast<double>(total - done) / rate) + 1;
      LogInfo("loading: " + Size(done) + " of " + Size(total) + ", about " + std::to_string(left_seconds) + " s left");
    };
  }
  try {
    REFOCUS_ASSIGN_OR_RETURN(Weights weights, LoadWeights(rank.options.model, rank.config, options));
    if (rank.launch.rank == 0) LogInfo("loaded " + Size(weights.bytes) + " in " + Seconds(begin));
    return std::make_shared<const Weights>(std::move(weights));
  } catch (const std::exception& error) {  // LibTorch reports a failed allocation as an exception
    return Error(StatusCode::kResourceExhausted, "HARDWARE", std::string("loading the weights: ") + error.what());
  }
}

RankIdentity Identity(const Rank& rank, const Weights& weights) {
  RankIdentity identity;
  identity.nonce = rank.launch.nonce;
  identity.rank = rank.launch.rank;
  identity.size = rank.launch.size;
  identity.model_fingerprint = rank.config.Fingerprint();
  char hash[17];
  std::snprintf(hash, sizeof(hash), "%016llx", static_cast<unsigned long long>(weights.content_hash));
  identity.weights_hash = hash;
  identity.device = rank.options.device;
  identity.vocab = rank.config.vocab;
  identity.kv_capacity_bytes = rank.kv_bytes;
  identity.kv_bytes_per_token = rank.config.kv_bytes_per_token(kElementBytes);
  identity.weight_bytes = weights.bytes;
  identity.parameters = rank.config.parameters();
  return identity;
}

// What the signal thread may stop; empty until the engine exists and after it is gone.
class StopTarget {
 public:
  void Set(std::function<void()> stop) {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = std::move(stop);
  }
  bool Stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) stop_();
    return stop_ != nullptr;
  }

 private:
  std::mutex mutex_;
  std::function<void()> stop_;
};

// First signal: a planned stop after the command in progress. Second signal, or too slow: now.
//
// Planned for this rank alone: the others of a launch are not told and miss it in their next collective, so the launch
// ends as a failure. A group of several ranks is drained through the coordinator, which stops all at the same command.
void WaitForSignals(const sigset_t& signals, Ending& ending, StopTarget& target) {
  int number = 0;
  sigwait(&signals, &number);
  const int code = number == SIGINT ? kExitInterrupted : kExitOk;
  if (ending.Plan(code)) LogInfo(std::string("stopping on ") + (number == SIGINT ? "SIGINT" : "SIGTERM"));
  if (!target.Stop()) std::_Exit(ending.code());  // still loading
  timespec grace{};
  grace.tv_sec = kStopGrace.count();
  sigtimedwait(&signals, nullptr, &grace);
  std::_Exit(ending.code());
}

int ExitCodeOfJoin(const Status& status) {
  const bool refused =
      status.code() == StatusCode::kFailedPrecondition || status.code() == StatusCode::kInvalidArgument;
  return refused ? kExitConfig : kExitGroup;
}

StatusOr<std::shared_ptr<Collective>> Connect(const Rank& rank) {
  try {
    return MakeMpiCollective(rank.options.deadline_seconds);
  } catch (const CollectiveError& error) {
    return Error(StatusCode::kUnavailable, "WORKER_LOST", error.what());
  }
}

// From the loaded model to the end of the group's work. Returns when the end is planned, with `collective` destroyed.
void Serve(const Rank& rank, std::shared_ptr<const Weights> weights, std::shared_ptr<Collective> collective,
           Ending& ending, StopTarget& target) {
  EngineOptions engine_options;
  engine_options.kv_capacity_bytes = rank.kv_bytes;
  std::unique_ptr<Link> link;
  Engine engine(engine_options, weights, MakeCpuBackend(), std::move(collective),
                [&link](Result result) { link->Send(std::move(result)); });

  LinkCallbacks callbacks;
  callbacks.submit = [&](Command command) { engine.Submit(std::move(command)); };
  callbacks.cancel = [&](uint64_t job) { engine.Cancel(job); };
  callbacks.shutdown = [&](const std::string& reason) {
    if (ending.Plan(kExitOk)) LogInfo("the coordinator ends this launch: " + reason);
    engine.Stop();
  };
  callbacks.lost = [&](const Status& cause) {
    ending.Fail(cause, kExitGroup);
    std::_Exit(ending.code());  // a signal had planned the end, but now nobody waits for what is in progress
  };
  callbacks.progress = [&] { return engine.progress(); };
  callbacks.running_seq = [&] { return engine.running_seq(); };
  LinkOptions link_options;
  link_options.coordinator = rank.options.coordinator;
  link_options.connect_seconds = rank.options.connect_seconds;
  link = std::make_unique<Link>(link_options, Identity(rank, *weights), std::move(callbacks));
  target.Set([&] {
    link->Interrupt();
    engine.Stop();
  });

  const Status joined = link->Join();
  if (!joined.ok()) {
    ending.Fail(joined, ExitCodeOfJoin(joined));
  } else {
    LogInfo("joined the group: " + Place(rank.launch) + ", model " + rank.config.name);
    const Status status = engine.Run();
    if (!status.ok()) {
      if (!ending.planned()) link->Close(0.5);  // what was found out before is worth sending
      ending.Fail(status, kExitGroup);
      std::_Exit(ending.code());  // planned before, but with unfinished messages MPI_Finalize would not return
    }
  }
  ending.Watch(kStopGrace);
  link->Close(kFlushSeconds);
  target.Set([] {});
}

int Main(int argc, char** argv) {
  Rank rank;
  rank.options = ParseWorkerOptions(argc, argv);
  SetLog("worker", rank.options.log_level);
  StatusOr<ModelConfig> config = LoadModelConfig(rank.options.model);
  if (!config.ok()) {
    LogError("FATAL " + HostName() + ": " + std::string(config.status().message()));
    return ExitCodeOf(config.status());
  }
  rank.config = std::move(config).value();

  // Before any other thread exists, so that all inherit it.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  rank.launch = StartLaunch();
  SetLog("worker[" + std::to_string(rank.launch.rank) + "]", rank.options.log_level);
  // Both outlive every thread that may end the process.
  auto& ending = *new Ending(Place(rank.launch));
  auto& target = *new StopTarget;
  std::thread([signals, &ending, &target] { WaitForSignals(signals, ending, target); }).detach();

  const Status planned = Plan(rank);
  if (!planned.ok()) ending.Fail(planned, ExitCodeOf(planned));
  at::set_num_threads(rank.threads);
  // Before the ranks' ways part: they may load for minutes more or less than each other.
  StatusOr<std::shared_ptr<Collective>> collective = Connect(rank);
  if (!collective.ok()) ending.Fail(collective.status(), kExitGroup);
  StatusOr<std::shared_ptr<const Weights>> weights = Load(rank);
  if (!weights.ok()) ending.Fail(weights.status(), ExitCodeOf(weights.status()));

  Serve(rank, std::move(weights).value(), std::move(collective).value(), ending, target);
  FinishLaunch();
  return ending.code();
}

}  // namespace
}  // namespace refocus

int main(int argc, char** argv) { return refocus::Main(argc, argv); }
