#include "worker/host.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>

namespace refocus {
namespace {

// The first number of a one-line file; -1 when absent or not a number ("max").
int64_t ReadNumber(const std::string& path) {
  std::ifstream file(path);
  int64_t number = -1;
  return file >> number ? number : -1;
}

// Cached files in memory.stat; 0 when unknown. The two lists and not `file`, which includes shared memory: that can
// only be swapped out.
int64_t CachedBytes(const std::string& path) {
  std::ifstream file(path);
  std::string key;
  int64_t bytes = 0;
  int64_t sum = 0;
  while (file >> key >> bytes) sum += key == "inactive_file" || key == "active_file" ? bytes : 0;
  return sum;
}

}  // namespace

std::string HostName() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) return "unknown";
  return name.data();
}

int64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  int64_t total = 0;
  int64_t resident = 0;
  if (!(file >> total >> resident)) return 0;
  return resident * sysconf(_SC_PAGESIZE);
}

int64_t FreeMemoryBytes(const std::string& root) {
  std::ifstream file(root + "/proc/meminfo");
  std::string key;
  int64_t free = -1;
  while (file >> key) {
    int64_t kib = 0;
    if (key == "MemAvailable:" && file >> kib) {
      free = kib * 1024;
      break;
    }
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  const std::string group = root + "/sys/fs/cgroup/memory.";
  const int64_t limit = ReadNumber(group + "max");
  const int64_t used = ReadNumber(group + "current");
  if (limit < 0 || used < 0) return free;
  const int64_t held = std::max<int64_t>(used - CachedBytes(group + "stat"), 0);
  const int64_t left = std::max<int64_t>(limit - held, 0);
  return free < 0 ? left : std::min(free, left);
}

}  // namespace refocus
