// Child processes of the local launcher. Linux only. Call from one thread, the main one: children die with the thread
// that started them.
#pragma once

#include <sys/types.h>

#include <string>
#include <utility>
#include <vector>

#include "base/status.h"

namespace refocus::cli {

struct Child {
  pid_t pid = -1;        // leader of a process group of its own, so that a terminal's Ctrl-C does not reach it
  int stdout_fd = -1;    // read end when captured (the caller closes it), else -1
};

// stdin is /dev/null. The child gets SIGTERM when this process dies in any way.
StatusOr<Child> Spawn(const std::vector<std::string>& command,
                      const std::vector<std::pair<std::string, std::string>>& environment, bool capture_stdout);

// Orphaned descendants become children of this process instead of init's, so that KillChildrenExcept finds them.
void AdoptOrphans();

// SIGKILL to every direct child but `spared` (-1: to all).
void KillChildrenExcept(pid_t spared);

// Whether Spawn would find a command of this name.
bool OnPath(const std::string& name);

// Folder of this executable.
std::string OwnFolder();

// Shell convention: the exit code, or 128 + the signal that ended the process.
int ExitCodeOfWait(int wait_status);

}  // namespace refocus::cli
