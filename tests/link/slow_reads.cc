// Preloaded into a rank: every read from a file of weights takes a tenth of a second.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

namespace {

using Pread = ssize_t (*)(int, void*, size_t, off64_t);

ssize_t SlowPread(int fd, void* out, size_t bytes, off64_t offset) {
  static const auto next = reinterpret_cast<Pread>(dlsym(RTLD_NEXT, "pread64"));
  char link[32];
  char path[4096];
  std::snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  path[length > 0 ? length : 0] = '\0';
  if (std::strstr(path, ".safetensors") != nullptr) usleep(100'000);
  return next(fd, out, bytes, offset);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" ssize_t pread(int fd, void* out, size_t bytes, off_t offset) { return SlowPread(fd, out, bytes, offset); }
extern "C" ssize_t pread64(int fd, void* out, size_t bytes, off64_t offset) {
  return SlowPread(fd, out, bytes, offset);
}
#pragma GCC visibility pop
