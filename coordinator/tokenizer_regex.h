// Regular expressions of tokenizer files on PCRE2, with the meaning the reference (Oniguruma) gives them.
//
// Only what means the same in both engines is accepted, everything else is refused by name. Every match has a bounded
// number of steps, so a pattern that backtracks exponentially is refused when it is loaded, or at the latest ends the
// call.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

struct pcre2_real_code_8;
struct pcre2_real_match_context_8;
struct pcre2_real_match_data_8;
struct pcre2_real_jit_stack_8;

namespace refocus {

// Immutable; used by any number of matchers at once.
class SplitRegex {
 public:
  // INVALID_ARGUMENT with what is not supported, or why the pattern was refused.
  static StatusOr<std::unique_ptr<SplitRegex>> Compile(std::string_view pattern);
  static StatusOr<std::unique_ptr<SplitRegex>> CompileLiteral(std::string_view text);
  ~SplitRegex();

 private:
  friend class RegexMatcher;
  SplitRegex() = default;
  static StatusOr<std::unique_ptr<SplitRegex>> Make(std::string_view pattern, uint32_t options);

  pcre2_real_code_8* code_ = nullptr;
  bool jit_ = false;
};

// One thread's buffers for matching; works with every SplitRegex.
class RegexMatcher {
 public:
  RegexMatcher();
  ~RegexMatcher();
  RegexMatcher(const RegexMatcher&) = delete;
  RegexMatcher& operator=(const RegexMatcher&) = delete;

  // A new subject: renews the budget of steps, which grows with the subject's size.
  void Begin(std::string_view subject);
  // The next match at or behind `from` in the subject of Begin (well-formed UTF-8), never empty. False when there is
  // none. RESOURCE_EXHAUSTED REGEX_LIMIT when the budget is spent.
  StatusOr<bool> Next(const SplitRegex& regex, size_t from, size_t* begin, size_t* end);

  int64_t budget() const { return budget_; }
  void set_budget(int64_t steps) { budget_ = steps; }

 private:
  int Match(const SplitRegex& regex, size_t from, uint32_t limit);

  std::string_view subject_;
  int64_t budget_ = 0;
  pcre2_real_match_context_8* context_;
  pcre2_real_match_data_8* data_;
  pcre2_real_jit_stack_8* stack_;
};

}  // namespace refocus
