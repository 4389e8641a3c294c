// What the state machine may ask of the world; tests give a virtual clock and a fixed seed.
#pragma once

#include <cstdint>
#include <functional>

namespace refocus {

struct Environment {
  std::function<double()> now;       // seconds of a monotonic clock: every timeout and duration
  std::function<double()> unix_now;  // seconds since 1970: only shown to people
  std::function<uint64_t()> random;
};

}  // namespace refocus
