#include "worker/host.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>

namespace refocus {
namespace {

// The first number of a one-line file; -1 when absent or not a number ("max").
int64_t ReadNumber(const char* path) {
  std::ifstream file(path);
  int64_t number = -1;
  return file >> number ? number : -1;
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

int64_t FreeMemoryBytes() {
  std::ifstream file("/proc/meminfo");
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
  const int64_t limit = ReadNumber("/sys/fs/cgroup/memory.max");
  const int64_t used = ReadNumber("/sys/fs/cgroup/memory.current");
  if (limit < 0 || used < 0) return free;
  const int64_t left = std::max<int64_t>(limit - used, 0);
  return free < 0 ? left : std::min(free, left);
}

}  // namespace refocus
