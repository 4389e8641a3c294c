#include "cli/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <sstream>
#include <string_view>

#include "base/log.h"
#include "cli/rpc_error.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

constexpr double kCoordinatorStartSeconds = 60;  // it reads the tokenizer before it is ready
constexpr double kQuestionSeconds = 0.2;
constexpr double kGroupStopSeconds = 5;
constexpr int kBadStartsAllowed = 3;

double Now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// mpirun as root, on one machine, more ranks than cores, in a container.
std::vector<std::pair<std::string, std::string>> GroupEnvironment() {
  std::vector<std::pair<std::string, std::string>> environment = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                                                  {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                                                                  {"OMPI_MCA_pml", "ob1"},
                                                                  {"OMPI_MCA_btl", "self,vader,tcp"}};
  // Large messages otherwise go through a shared buffer, which takes about three times as long.
  if (!ProcessMemoryReadable()) environment.emplace_back("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
  return environment;
}

bool IsStartUpFailure(int code) { return code == kExitConfig || code == kExitWeights || code == kExitHardware; }

std::string CodeText(int code) {
  if (code > 128) return std::string("signal ") + std::to_string(code - 128) + " (" + strsignal(code - 128) + ")";
  return "exit code " + std::to_string(code);
}

}  // namespace

// Tried between two children, since more is allowed to a parent. Open MPI's ranks declare that anyone may read them.
bool ProcessMemoryReadable() {
  static volatile int word = 0;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return false;
  const pid_t target = fork();
  if (target == 0) {
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    alarm(10);  // should nobody be left to end it
    word = 1;
    if (write(ends[1], "", 1) == 1) pause();
    _exit(0);
  }
  close(ends[1]);
  char ready = 0;
  const pid_t reader = target > 0 && read(ends[0], &ready, 1) == 1 ? fork() : -1;
  if (reader == 0) {
    int copy = 0;
    const iovec local{&copy, sizeof(copy)};
    const iovec remote{const_cast<int*>(&word), sizeof(word)};
    _exit(process_vm_readv(target, &local, 1, &remote, 1, 0) == sizeof(copy) && copy == 1 ? 0 : 1);
  }
  close(ends[0]);
  int status = -1;
  const bool ran = reader > 0 && waitpid(reader, &status, 0) == reader;
  if (target > 0) {
    kill(target, SIGKILL);
    waitpid(target, nullptr, 0);
  }
  return ran && status == 0;
}

double Backoff::After(double lived) {
  if (lived >= kSettledSeconds) *this = Backoff();
  ++failures_;
  const double wait = next_;
  next_ = std::min(next_ * 2, kLongestBackoffSeconds);
  return wait;
}

int VisibleGpus(const char* cuda_visible_devices, const std::string& devices) {
  int count = 0;
  if (cuda_visible_devices != nullptr) {
    std::istringstream names(cuda_visible_devices);
    // CUDA looks no further than the first name that it does not know, such as -1.
    for (std::string name; std::getline(names, name, ',') && !name.empty() && name[0] != '-';) ++count;
  } else {
    constexpr std::string_view kPrefix = "nvidia";
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(devices, error)) {
      const std::string name = entry.path().filename().string();
      const size_t digits = name.find_last_not_of("0123456789") + 1;
      if (digits == kPrefix.size() && digits < name.size() && name.starts_with(kPrefix)) ++count;
    }
  }
  return std::clamp(count, 1, kMaxServedRanks);
}

bool ParseReadyLine(const std::string& line, std::string* public_address, std::string* worker_address) {
  constexpr char kStart[] = "refocus-coordinator ready ";
  if (!line.starts_with(kStart)) return false;
  const auto value = [&](const std::string& key) {
    const size_t at = line.find(" " + key + "=");
    if (at == std::string::npos) return std::string();
    const size_t begin = at + key.size() + 2;
    return line.substr(begin, line.find_first_of(" \r\n", begin) - begin);
  };
  *public_address = value("public");
  *worker_address = value("worker");
  return !public_address->empty() && !worker_address->empty();
}

Supervisor::Supervisor(const ServeOptions& options) : options_(options) {}

Supervisor::~Supervisor() {
  KillChildrenExcept(-1);
  while (waitpid(-1, nullptr, 0) > 0) {
  }
  if (signal_fd_ >= 0) close(signal_fd_);
  if (coordinator_.stdout_fd >= 0) close(coordinator_.stdout_fd);
}

int Supervisor::Run() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGCHLD, SIGINT, SIGTERM}) sigaddset(&signals, signal);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // before gRPC makes threads
  signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
  AdoptOrphans();
  if (!StartCoordinator()) return kExitError;
  while (state_ != State::kStopped) {
    pollfd fds[] = {{signal_fd_, POLLIN, 0}, {coordinator_.stdout_fd, POLLIN, 0}};
    if (poll(fds, 2, WaitMilliseconds()) > 0) {
      if (fds[1].revents != 0) ReadCoordinator();
      if (fds[0].revents != 0) OnSignals();
    }
    if (state_ != State::kStopped) OnTimer();
  }
  return exit_code_;
}

bool Supervisor::StartCoordinator() {
  std::vector<std::string> command = {OwnFolder() + "/refocus-coordinator",
                                      "--model",
                                      options_.model,
                                      "--listen",
                                      options_.listen,
                                      "--worker-listen",
                                      "127.0.0.1:0",
                                      "--ranks",
                                      std::to_string(options_.ranks)};
  command.insert(command.end(), options_.coordinator_flags.begin(), options_.coordinator_flags.end());
  auto child = Spawn(command, {}, true);
  if (!child.ok()) {
    LogError(Describe(child.status()));
    return false;
  }
  coordinator_ = *child;
  deadline_ = Now() + kCoordinatorStartSeconds;
  return true;
}

void Supervisor::StartGroup() {
  std::vector<std::string> command = {"mpirun",
                                      "--oversubscribe",
                                      "--bind-to",
                                      "none",
                                      "-np",
                                      std::to_string(options_.ranks),
                                      OwnFolder() + "/refocus-worker",
                                      "--model",
                                      options_.model,
                                      "--coordinator",
                                      worker_address_};
  command.insert(command.end(), options_.worker_flags.begin(), options_.worker_flags.end());
  next_start_ = -1;
  ready_ = false;
  group_started_ = Now();
  next_question_ = group_started_;
  auto child = Spawn(command, GroupEnvironment(), false);
  if (!child.ok()) {
    LogError(Describe(child.status()));
    return Stop(kExitError);
  }
  group_ = *child;
}

void Supervisor::ReadCoordinator() {
  char buffer[4096];
  const ssize_t count = read(coordinator_.stdout_fd, buffer, sizeof(buffer));
  if (count <= 0) {
    close(coordinator_.stdout_fd);
    coordinator_.stdout_fd = -1;  // poll ignores it; its exit arrives as SIGCHLD
    return;
  }
  coordinator_output_.append(buffer, static_cast<size_t>(count));
  for (size_t end; (end = coordinator_output_.find('\n')) != std::string::npos; coordinator_output_.erase(0, end + 1)) {
    const std::string line = coordinator_output_.substr(0, end);
    if (state_ == State::kStarting && ParseReadyLine(line, &public_address_, &worker_address_)) {
      ClientOptions client;
      client.address = public_address_;
      client.read_seconds = 1;
      client.max_attempts = 1;
      client_ = std::make_unique<Client>(client);
      state_ = State::kRunning;
      StartGroup();
    } else {
      std::cout << line << std::endl;
    }
  }
}

void Supervisor::OnSignals() {
  signalfd_siginfo info{};
  while (read(signal_fd_, &info, sizeof(info)) == sizeof(info)) {
    if (info.ssi_signo == SIGCHLD) continue;
    if (state_ == State::kDraining) {
      LogWarning("second signal: ending at once");
      return Stop(kExitInterrupted);
    }
    Drain();
  }
  ReapChildren();
}

void Supervisor::ReapChildren() {
  int wait_status = 0;
  for (pid_t pid; state_ != State::kStopped && (pid = waitpid(-1, &wait_status, WNOHANG)) > 0;) {
    if (pid == coordinator_.pid) {
      OnCoordinatorExit(ExitCodeOfWait(wait_status));
    } else if (pid == group_.pid) {
      OnGroupExit(ExitCodeOfWait(wait_status));
    }
  }
}

void Supervisor::OnCoordinatorExit(int code) {
  coordinator_.pid = -1;
  if (state_ == State::kDraining) {
    if (code != 0) {
      LogError("the coordinator ended with " + CodeText(code) + " while stopping");
      drain_exit_code_ = code < 128 ? code : kExitError;
    }
    if (group_.pid < 0) return Stop(drain_exit_code_);
    deadline_ = Now() + kGroupStopSeconds;  // the ranks end by themselves when their stream ends
    return;
  }
  LogError("the coordinator ended with " + CodeText(code) + "; stopping");
  Stop(code > 0 && code < 128 ? code : kExitError);
}

void Supervisor::OnGroupExit(int code) {
  group_.pid = -1;
  KillChildrenExcept(coordinator_.pid);  // ranks that outlived mpirun
  if (state_ == State::kDraining) {
    if (coordinator_.pid < 0) Stop(drain_exit_code_);
    return;
  }
  bad_starts_ = IsStartUpFailure(code) ? bad_starts_ + 1 : 0;
  if (bad_starts_ > 0 && (!ever_ready_ || bad_starts_ >= kBadStartsAllowed)) {
    LogError("the worker group cannot start: " + CodeText(code) + "; stopping");
    return Stop(code);
  }
  const double wait = backoff_.After(Now() - group_started_);
  if (backoff_.failures() >= options_.give_up_after) {
    LogError("the worker group failed " + std::to_string(backoff_.failures()) + " times in a row, last with " +
             CodeText(code) + "; stopping");
    return Stop(kExitGroup);
  }
  LogWarning("the worker group ended with " + CodeText(code) + "; starting it anew in " + FormatSeconds(wait));
  next_start_ = Now() + wait;
}

void Supervisor::OnTimer() {
  const double now = Now();
  switch (state_) {
    case State::kStarting:
      if (now < deadline_) return;
      LogError("the coordinator was not ready within " + FormatSeconds(kCoordinatorStartSeconds) + "; stopping");
      return Stop(kExitError);
    case State::kRunning:
      if (next_start_ >= 0 && now >= next_start_) StartGroup();
      if (group_.pid >= 0 && !ready_ && now >= next_question_) AskWhetherReady();
      return;
    case State::kDraining:
      if (now < deadline_) return;
      LogWarning("not everything stopped in time; ending what is left");
      return Stop(drain_exit_code_);
    case State::kStopped: return;
  }
}

void Supervisor::AskWhetherReady() {
  next_question_ = Now() + kQuestionSeconds;
  const auto cluster = client_->GetCluster();
  if (!cluster.ok() || cluster->state() != v1::GetClusterResponse::SERVING) return;
  const auto model = client_->GetModel();
  if (!model.ok()) return;
  ready_ = true;
  ever_ready_ = true;
  bad_starts_ = 0;
  std::cout << "Ready: " << public_address_ << ", model " << model->name() << ", up to "
            << FormatCount(model->max_positions()) << " tokens a context, " << options_.ranks
            << (options_.ranks == 1 ? " rank" : " ranks") << ", K/V " << FormatBytes(cluster->kv_capacity_bytes())
            << ", epoch " << cluster->epoch() << ", no authentication" << std::endl;
}

void Supervisor::Drain() {
  state_ = State::kDraining;
  next_start_ = -1;
  LogInfo("stopping: requests in progress have " + FormatSeconds(options_.drain_seconds) + " to end");
  deadline_ = Now() + options_.drain_seconds + kGroupStopSeconds;
  if (coordinator_.pid >= 0) kill(coordinator_.pid, SIGTERM);
}

void Supervisor::Stop(int exit_code) {
  state_ = State::kStopped;
  exit_code_ = exit_code;
  // mpirun takes its ranks with it when it is asked to end; what stays gets SIGKILL from the destructor.
  if (group_.pid < 0) return;
  kill(group_.pid, SIGTERM);
  const double deadline = Now() + kGroupStopSeconds;
  while (Now() < deadline && waitpid(group_.pid, nullptr, WNOHANG) == 0) usleep(20'000);
}

int Supervisor::WaitMilliseconds() const {
  const double now = Now();
  double next = now + 60;
  if (state_ == State::kStarting || state_ == State::kDraining) next = std::min(next, deadline_);
  if (state_ == State::kRunning && next_start_ >= 0) next = std::min(next, next_start_);
  if (state_ == State::kRunning && group_.pid >= 0 && !ready_) next = std::min(next, next_question_);
  return static_cast<int>(std::clamp((next - now) * 1000 + 1, 0.0, 60'000.0));
}

}  // namespace refocus::cli
