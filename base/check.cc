#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace refocus {

void CheckFailed(const char* expression, const char* file, int line, const std::string& values) {
  std::fprintf(stderr, "FATAL %s:%d: check failed: %s%s%s\n", file, line, expression,
               values.empty() ? "" : ": ", values.c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace refocus
