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
#include "base/memory_plan.h"
#include "base/model_config.h"
#include "base/status.h"
#include "worker/backend.h"
#include "worker/collective.h"
#include "worker/device.h"
#include "worker/engine.h"
#include "worker/host.h"
#include "worker/launch.h"
#include "worker/link.h"
#include "worker/options.h"
#include "worker/weights.h"

namespace refocus {
namespace {

using Clock = std::chrono::steady_clock;

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
  return (launch.rank < 0 ? "a rank" : "rank " + std::to_string(launch.rank)) + " of " + std::to_string(launch.size) +
         " on " + HostName();
}

void SetLogOf(const Launch& launch, LogLevel level) {
  SetLog(launch.rank < 0 ? "worker" : "worker[" + std::to_string(launch.rank) + "]", level);
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
  int64_t gpu_free_bytes = -1;  // of this rank's own GPU; set before Plan where the device is cuda
  Gpu gpu;
  int threads = 1;
  int64_t kv_bytes = 0;
  int64_t weight_bytes = 0;  // expected

  bool on_gpu() const { return options.device == DeviceKind::kCuda; }
  // Of mpirun's ranks one speaks for all; processes that start by themselves may be far from each other.
  bool talks() const { return launch.rank <= 0; }
};

// Takes this rank's GPU, where it is to have one.
Status TakeDevice(Rank& rank) {
  if (!rank.on_gpu()) return {};
  REFOCUS_ASSIGN_OR_RETURN(rank.gpu, UseGpu(rank.launch.local_rank, rank.launch.ranks_on_host));
  rank.gpu_free_bytes = rank.gpu.free_bytes;
  LogInfo("GPU " + std::to_string(rank.gpu.index) + ": " + rank.gpu.name + ", free " + Size(rank.gpu.free_bytes) +
          " of " + Size(rank.gpu.total_bytes));
  return {};
}

// Decides on threads and memory and says so before a weight is read.
Status Plan(Rank& rank) {
  const Launch& launch = rank.launch;
  rank.threads = rank.options.threads > 0 ? rank.options.threads : launch.threads;
  const bool gpu = rank.on_gpu();
  const int64_t free_bytes = gpu ? rank.gpu_free_bytes : launch.free_bytes;
  const bool known = free_bytes >= 0;
  if (gpu && rank.options.kv == KvType::kInt8 && rank.config.head_dim % 16 != 0) {
    return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
                 "--kv-dtype: got int8, allowed bf16 with --device cuda and heads of " +
                     std::to_string(rank.config.head_dim) + " numbers: eight bits need a multiple of 16");
  }
  MemoryQuestion question;
  question.device = rank.options.device;
  question.kv = rank.options.kv;
  question.ranks = launch.size;
  question.memory_bytes = known ? free_bytes / (gpu ? 1 : launch.ranks_on_host) : 0;
  REFOCUS_ASSIGN_OR_RETURN(const MemoryPlan memory, PlanMemory(rank.config, question));
  rank.weight_bytes = memory.weights;
  rank.kv_bytes = rank.options.kv_bytes;
  if (rank.kv_bytes == 0) {
    if (!known) {
      return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
                   "--kv-memory: the host's free memory is unknown; set it");
    }
    rank.kv_bytes = memory.pool;
  }
  const std::string plan =
      "weights " + Size(rank.weight_bytes) +
      (gpu ? ", workspace " + Size(memory.workspace) + ", CUDA and NCCL " + Size(memory.runtime) : "") + ", K/V " +
      Size(rank.kv_bytes) + " (" + KvTypeName(rank.options.kv, rank.options.device) + ") on each of " + std::to_string(launch.ranks_on_host) + " ranks of this host, free " +
      (known ? Size(free_bytes) + (gpu ? " on this rank's GPU" : "") : "unknown");
  if (known && (memory.limit < rank.kv_bytes || rank.kv_bytes < memory.kv_per_token)) {
    return Error(StatusCode::kResourceExhausted, "HARDWARE",
                 "memory: " + plan + "; use " + (gpu ? "a GPU with more memory" : "fewer ranks per host") +
                     ", a smaller --kv-memory or a smaller model");
  }
  if (rank.talks()) {
    LogInfo("memory: " + plan + "; K/V of 1000 tokens " + Size(1000 * memory.kv_per_token) + ", room for " +
            std::to_string(rank.kv_bytes / memory.kv_per_token * launch.size) + " tokens on " +
            std::to_string(launch.size) + " ranks; " + std::to_string(rank.threads) + " threads a rank");
  }
  return {};
}

StatusOr<std::shared_ptr<const Weights>> Load(const Rank& rank) {
  const Clock::time_point begin = Clock::now();
  Clock::time_point told = begin;
  LoadOptions options;
  options.threads = rank.threads;
  options.check_finite = rank.options.check_finite;
  options.random_seed = rank.options.random_seed;
  if (rank.on_gpu()) options.device = at::Device(at::kCUDA, static_cast<at::DeviceIndex>(rank.gpu.index));
  if (rank.talks()) {
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
    if (rank.talks()) LogInfo("loaded " + Size(weights.bytes) + " in " + Seconds(begin));
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
  identity.device = rank.on_gpu() ? "cuda (" + rank.gpu.name + ")" : "cpu";
  identity.vocab = rank.config.vocab;
  identity.kv_capacity_bytes = rank.kv_bytes;
  identity.kv_bytes_per_token = KvBytesPerToken(rank.config, rank.options.device, rank.options.kv);
  identity.kv_dtype = KvTypeName(rank.options.kv, rank.options.device);
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

// For ranks that know each other through mpirun, and for a group of one.
std::shared_ptr<Collective> MakeCollective(const Rank& rank) {
  const Launch& launch = rank.launch;
  const double deadline = rank.options.deadline_seconds;
  if (!rank.on_gpu()) return launch.mpi ? MakeMpiCollective(deadline) : MakeLocalCollectives(1, deadline)[0];
  std::string id;
  if (launch.size > 1) {
    if (launch.rank == 0) id = MakeGpuGroupId();
    ShareFromRankZero(&id);
  }
  return MakeGpuCollective(id, launch.rank, launch.size, deadline, rank.options.peer_memory);
}

// The others are ranks that the coordinator has brought together.
StatusOr<std::shared_ptr<Collective>> MakeCollective(const Rank& rank, const ShareBytes& share) {
  const std::string own = rank.launch.rank == 0 ? MakeGpuGroupId() : "";
  REFOCUS_ASSIGN_OR_RETURN(const std::string id, share(own));
  return MakeGpuCollective(id, rank.launch.rank, rank.launch.size, rank.options.deadline_seconds,
                           rank.options.peer_memory);
}

// `make` returns a collective or a StatusOr of one.
template <typename Make>
StatusOr<std::shared_ptr<Collective>> Connect(const Make& make) {
  try {
    return make();
  } catch (const CollectiveError& error) {
    return Error(StatusCode::kUnavailable, "WORKER_LOST", error.what());
  }
}

// The engine for threads that may ask before it is there: a rank without a place gets it late.
class EngineSlot {
 public:
  void Set(Engine* engine) {
    const std::lock_guard<std::mutex> lock(mutex_);
    engine_ = engine;
    if (stopped_) engine_->Stop();
  }
  void Stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    if (engine_ != nullptr) engine_->Stop();
  }
  // No command comes, and no cancel counts, before the group serves.
  template <typename F>
  auto Ask(const F& ask) -> decltype(ask(std::declval<Engine&>())) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (engine_ != nullptr) return ask(*engine_);
    return decltype(ask(*engine_))();
  }

 private:
  std::mutex mutex_;
  Engine* engine_ = nullptr;
  bool stopped_ = false;
};

// What the link calls; `make_engine` is called once there is a collective.
template <typename MakeEngine>
LinkCallbacks Callbacks(Rank& rank, EngineSlot& slot, Ending& ending, std::shared_ptr<Collective>& collective,
                        const MakeEngine& make_engine) {
  LinkCallbacks callbacks;
  callbacks.form = [&rank, &collective, make_engine](int32_t number, const ShareBytes& share) -> Status {
    rank.launch.rank = number;
    SetLogOf(rank.launch, rank.options.log_level);
    REFOCUS_ASSIGN_OR_RETURN(collective, Connect([&] { return MakeCollective(rank, share); }));
    make_engine();
    return {};
  };
  callbacks.submit = [&slot](Command command) { slot.Ask([&](Engine& e) { e.Submit(std::move(command)); }); };
  callbacks.cancel = [&slot](uint64_t job) { slot.Ask([&](Engine& e) { e.Cancel(job); }); };
  callbacks.shutdown = [&slot, &ending](const std::string& reason) {
    if (ending.Plan(kExitOk)) LogInfo("the coordinator ends this launch: " + reason);
    slot.Stop();
  };
  callbacks.lost = [&ending](const Status& cause) {
    ending.Fail(cause, kExitGroup);
    std::_Exit(ending.code());  // a signal had planned the end, but now nobody waits for what is in progress
  };
  callbacks.progress = [&slot] { return slot.Ask([](Engine& e) { return e.progress(); }); };
  callbacks.running_seq = [&slot] { return slot.Ask([](Engine& e) { return e.running_seq(); }); };
  return callbacks;
}

// From the loaded model to the end of the group's work. Returns when the end is planned, with the collective destroyed.
// `collective` is null for a rank that gets its place from the coordinator. It outlives the engine, whose graphs hold
// work of it.
void Serve(Rank& rank, std::shared_ptr<const Weights> weights, std::shared_ptr<Collective> collective, Ending& ending,
           StopTarget& target) {
  std::unique_ptr<Link> link;
  EngineSlot slot;
  std::unique_ptr<Engine> engine;
  const auto make_engine = [&] {
    EngineOptions options;
    options.kv_capacity_bytes = rank.kv_bytes;
    const KvType kv = rank.options.kv;
    auto backend = rank.on_gpu() ? MakeGpuBackend(rank.config, rank.gpu, kv) : MakeCpuBackend(rank.config, kv);
    engine = std::make_unique<Engine>(options, weights, std::move(backend), collective,
                                      [&link](Result result) { link->Send(std::move(result)); });
    slot.Set(engine.get());
  };
  if (collective != nullptr) make_engine();
  LinkOptions link_options;
  link_options.coordinator = rank.options.coordinator;
  link_options.connect_seconds = rank.options.connect_seconds;
  link = std::make_unique<Link>(link_options, Identity(rank, *weights),
                                Callbacks(rank, slot, ending, collective, make_engine));
  target.Set([&] {
    link->Interrupt();
    slot.Stop();
  });

  const Status joined = link->Join();
  if (!joined.ok()) {
    ending.Fail(joined, ExitCodeOfJoin(joined));
  } else if (engine != nullptr) {  // else told to stop instead of to form a group
    LogInfo("joined the group: " + Place(rank.launch) + ", model " + rank.config.name);
    const Status status = engine->Run();
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
  StatusOr<ModelConfig> config = LoadModelConfig(rank.options.model, rank.options.rope_scaling);
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

  const int group_size = rank.options.group_size;
  rank.launch = group_size > 0 ? StartByItself(group_size, rank.options.group_name) : StartLaunch();
  SetLogOf(rank.launch, rank.options.log_level);
  // Both outlive every thread that may end the process.
  auto& ending = *new Ending(Place(rank.launch));
  auto& target = *new StopTarget;
  std::thread([signals, &ending, &target] { WaitForSignals(signals, ending, target); }).detach();

  const Status taken = TakeDevice(rank);
  if (!taken.ok()) ending.Fail(taken, ExitCodeOf(taken));
  const Status planned = Plan(rank);
  if (!planned.ok()) ending.Fail(planned, ExitCodeOf(planned));
  at::set_num_threads(rank.threads);
  // Before the ranks' ways part, where they know each other: they may load for minutes more or less than each other.
  StatusOr<std::shared_ptr<Collective>> collective(nullptr);
  if (rank.launch.rank >= 0) collective = Connect([&] { return MakeCollective(rank); });
  if (!collective.ok()) ending.Fail(collective.status(), kExitGroup);
  StatusOr<std::shared_ptr<const Weights>> weights = Load(rank);
  if (!weights.ok()) ending.Fail(weights.status(), ExitCodeOf(weights.status()));

  Serve(rank, std::move(weights).value(), std::move(collective).value(), ending, target);
  FinishLaunch(rank.launch);
  if (rank.on_gpu()) {
    std::fflush(nullptr);
    std::_Exit(ending.code());  // NCCL frees in threads of its own, which must not meet the end of CUDA's globals
  }
  return ending.code();
}

}  // namespace
}  // namespace refocus

int main(int argc, char** argv) { return refocus::Main(argc, argv); }
