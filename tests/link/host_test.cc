// Free memory as a machine with and without a control group shows it.
#include "worker/host.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "tests/base/model_files.h"

namespace refocus {
namespace {

constexpr int64_t kMib = 1 << 20;

class FreeMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directories(root_.path() + "/proc");
    std::filesystem::create_directories(root_.path() + "/sys/fs/cgroup");
  }
  void Host(int64_t available_mib) {
    root_.Write("proc/meminfo", "MemTotal:   16384000 kB\nMemFree:  1 kB\nMemAvailable:   " +
                                    std::to_string(available_mib * 1024) + " kB\nBuffers:  1 kB\n");
  }
  void Group(const std::string& limit, int64_t used_mib) {
    root_.Write("sys/fs/cgroup/memory.max", limit + "\n");
    root_.Write("sys/fs/cgroup/memory.current", std::to_string(used_mib * kMib) + "\n");
  }
  void Cached(int64_t inactive_mib, int64_t active_mib, int64_t shared_mib) {
    const auto line = [](const std::string& key, int64_t mib) { return key + " " + std::to_string(mib * kMib) + "\n"; };
    root_.Write("sys/fs/cgroup/memory.stat",
                line("anon", 7) + line("file", inactive_mib + active_mib + shared_mib) + line("shmem", shared_mib) +
                    line("file_mapped", 5) + line("inactive_anon", 3) + line("inactive_file", inactive_mib) +
                    line("active_file", active_mib) + line("workingset_refault_file", 900));
  }
  int64_t FreeMib() {
    const int64_t bytes = FreeMemoryBytes(root_.path());
    return bytes < 0 ? bytes : bytes / kMib;
  }

  TempDir root_;
};

TEST_F(FreeMemoryTest, UnknownWithoutFiles) { EXPECT_EQ(FreeMib(), -1); }

TEST_F(FreeMemoryTest, HostWithoutALimit) {
  Host(4000);
  EXPECT_EQ(FreeMib(), 4000);
  Group("max", 1000);
  EXPECT_EQ(FreeMib(), 4000);
}

TEST_F(FreeMemoryTest, CachedFilesOfAContainerAreFree) {
  Host(4000);
  Group(std::to_string(2000 * kMib), 1900);
  EXPECT_EQ(FreeMib(), 100);
  Cached(700, 300, 50);
  EXPECT_EQ(FreeMib(), 1100);
}

TEST_F(FreeMemoryTest, LeastOfHostAndGroup) {
  Host(400);
  Group(std::to_string(2000 * kMib), 900);
  Cached(700, 100, 0);
  EXPECT_EQ(FreeMib(), 400);
}

TEST_F(FreeMemoryTest, NumbersThatDoNotFitTogether) {
  Group(std::to_string(2000 * kMib), 2100);  // above its limit for a moment
  EXPECT_EQ(FreeMib(), 0);
  Cached(3000, 0, 0);  // read a moment later than the use
  EXPECT_EQ(FreeMib(), 2000);
}

TEST(HostTest, ThisMachineIsKnown) { EXPECT_GT(FreeMemoryBytes(), 0); }

}  // namespace
}  // namespace refocus
