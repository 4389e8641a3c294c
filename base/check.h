// Broken invariants end the process with expression, values and place; active in release builds too.
// Never for input from outside: that returns a Status (base/status.h). The names carry a prefix because LibTorch and glog
// define CHECK and friends.
#pragma once

#include <sstream>
#include <string>

namespace refocus {

[[noreturn]] void CheckFailed(const char* expression, const char* file, int line, const std::string& values);

template <typename A, typename B>
std::string CheckValues(const A& a, const B& b) {
  std::ostringstream out;
  out << a << " vs " << b;
  return out.str();
}

}  // namespace refocus

#define REFOCUS_CHECK(condition)                                                          \
  do {                                                                                    \
    if (!(condition)) ::refocus::CheckFailed(#condition, __FILE__, __LINE__, "");         \
  } while (false)

#define REFOCUS_CHECK_OP(a, op, b)                                                        \
  do {                                                                                    \
    const auto& check_a = (a);                                                            \
    const auto& check_b = (b);                                                            \
    if (!(check_a op check_b))                                                            \
      ::refocus::CheckFailed(#a " " #op " " #b, __FILE__, __LINE__,                       \
                             ::refocus::CheckValues(check_a, check_b));                   \
  } while (false)

#define REFOCUS_CHECK_EQ(a, b) REFOCUS_CHECK_OP(a, ==, b)
#define REFOCUS_CHECK_LE(a, b) REFOCUS_CHECK_OP(a, <=, b)
#define REFOCUS_CHECK_LT(a, b) REFOCUS_CHECK_OP(a, <, b)
#define REFOCUS_CHECK_GE(a, b) REFOCUS_CHECK_OP(a, >=, b)
#define REFOCUS_CHECK_GT(a, b) REFOCUS_CHECK_OP(a, >, b)
