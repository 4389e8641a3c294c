#include "cli/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

namespace refocus::cli {
namespace {

constexpr int kExecFailed = 127;

// What the child does between fork and exec; only async-signal-safe calls.
[[noreturn]] void BecomeCommand(char* const* argv, char* const* envp, pid_t parent, int stdout_fd) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(kExecFailed);  // it died before prctl
  const int null = open("/dev/null", O_RDONLY);
  if (null >= 0) dup2(null, STDIN_FILENO);
  if (stdout_fd >= 0) dup2(stdout_fd, STDOUT_FILENO);
  execvpe(argv[0], argv, envp);
  _exit(kExecFailed);
}

std::vector<std::string> Environment(const std::vector<std::pair<std::string, std::string>>& added) {
  std::map<std::string, std::string> values;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const size_t equals = text.find('=');
    if (equals != std::string::npos) values[text.substr(0, equals)] = text.substr(equals + 1);
  }
  for (const auto& [key, value] : added) values[key] = value;
  std::vector<std::string> result;
  for (const auto& [key, value] : values) result.push_back(key + "=" + value);
  return result;
}

std::vector<char*> Pointers(const std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (const auto& text : texts) pointers.push_back(const_cast<char*>(text.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

// The fourth field of /proc/PID/stat; the second one is in brackets and may hold anything. -1 when the process is gone.
pid_t ParentOf(const std::string& pid) {
  std::ifstream file("/proc/" + pid + "/stat");
  std::string line;
  if (!std::getline(file, line)) return -1;
  const size_t end = line.rfind(')');
  char state = 0;
  int parent = -1;
  if (end == std::string::npos || std::sscanf(line.c_str() + end + 1, " %c %d", &state, &parent) != 2) return -1;
  return parent;
}

}  // namespace

StatusOr<Child> Spawn(const std::vector<std::string>& command,
                      const std::vector<std::pair<std::string, std::string>>& environment, bool capture_stdout) {
  int ends[2] = {-1, -1};
  if (capture_stdout && pipe2(ends, O_CLOEXEC) != 0) {
    return Error(StatusCode::kInternal, "SPAWN", std::string("pipe: ") + std::strerror(errno));
  }
  const auto envs = Environment(environment);
  const auto argv = Pointers(command);
  const auto envp = Pointers(envs);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) BecomeCommand(argv.data(), envp.data(), parent, ends[1]);
  if (capture_stdout) close(ends[1]);
  if (pid < 0) {
    if (capture_stdout) close(ends[0]);
    return Error(StatusCode::kInternal, "SPAWN", command[0] + ": fork: " + std::strerror(errno));
  }
  return Child{pid, ends[0]};
}

void AdoptOrphans() { prctl(PR_SET_CHILD_SUBREAPER, 1); }

void KillChildrenExcept(pid_t spared) {
  DIR* proc = opendir("/proc");
  if (proc == nullptr) return;
  while (const dirent* entry = readdir(proc)) {
    const pid_t pid = std::atoi(entry->d_name);
    if (pid > 0 && pid != spared && ParentOf(entry->d_name) == getpid()) kill(pid, SIGKILL);
  }
  closedir(proc);
}

bool OnPath(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path != nullptr ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (access((folder + "/" + name).c_str(), X_OK) == 0) return true;
  }
  return false;
}

std::string OwnFolder() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path().string();
}

int ExitCodeOfWait(int wait_status) {
  return WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 128 + WTERMSIG(wait_status);
}

}  // namespace refocus::cli
