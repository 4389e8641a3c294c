// What the supervisor finds out about the machine before it starts ranks.
#include "cli/supervisor.h"

#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <string>

namespace refocus::cli {
namespace {

// As a container that forbids the call.
bool ForbidReadingProcesses() {
  sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_process_vm_readv, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {4, rules};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// The answer of a process of its own: 0 no, 1 yes, 2 the rule could not be set.
int AnswerOfAChild(bool forbidden) {
  const pid_t child = fork();
  if (child == 0) {
    if (forbidden && !ForbidReadingProcesses()) _exit(2);
    _exit(ProcessMemoryReadable() ? 1 : 0);
  }
  int status = -1;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(ProcessMemory, ReadableUnlessForbidden) {
  const int forbidden = AnswerOfAChild(true);
  if (forbidden == 2) GTEST_SKIP() << "this machine allows no filter of system calls";
  EXPECT_EQ(forbidden, 0);
  const int free = AnswerOfAChild(false);
  EXPECT_TRUE(free == 0 || free == 1) << free;
  EXPECT_EQ(free == 1, ProcessMemoryReadable());
  errno = 0;
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "a child was left behind";
  EXPECT_EQ(errno, ECHILD);
}

TEST(VisibleGpus, AsTheEnvironmentSaysElseByDeviceNodes) {
  const std::string folder = ::testing::TempDir() + "/visible_gpus_" + std::to_string(getpid());
  std::filesystem::create_directory(folder);
  EXPECT_EQ(VisibleGpus(nullptr, folder), 1);
  for (const char* name : {"nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia", "xnvidia3", "7"}) {
    std::ofstream(folder + "/" + name) << "";
  }
  EXPECT_EQ(VisibleGpus(nullptr, folder), 3);
  EXPECT_EQ(VisibleGpus(nullptr, folder + "/none"), 1);
  EXPECT_EQ(VisibleGpus("0,2", folder), 2);
  EXPECT_EQ(VisibleGpus("GPU-8f2e,GPU-11aa,3,MIG-1", folder), 4);
  EXPECT_EQ(VisibleGpus("1,-1,2", folder), 1);
  EXPECT_EQ(VisibleGpus("", folder), 1);
  std::string many = "0";
  for (int i = 0; i < 300; ++i) many += ",1";
  EXPECT_EQ(VisibleGpus(many.c_str(), folder), kMaxServedRanks);
  std::filesystem::remove_all(folder);
}

TEST(OnPath, FindsWhatSpawnWouldFind) {
  EXPECT_TRUE(OnPath("sh"));
  EXPECT_FALSE(OnPath("no-such-command-of-refocus"));
}

}  // namespace
}  // namespace refocus::cli
