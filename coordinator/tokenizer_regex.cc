#include "coordinator/tokenizer_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <set>
#include <vector>

#include "base/check.h"
#include "coordinator/tokenizer_pattern.h"
#include "coordinator/tokenizer_spec.h"
#include "coordinator/tokenizer_unicode.h"

namespace refocus {
namespace {

// What one match may cost before its steps are counted against the subject's budget: enough for every ordinary piece.
constexpr uint32_t kFreeSteps = 1 << 16;
constexpr int64_t kStepsPerByte = 64;  // the known patterns need less than 8, for a run of one kind of character
constexpr int64_t kStepsPerSubject = 1 << 20;
constexpr size_t kProbeBytes = 400;

Status Refused(std::string_view what) { return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", what); }

// Texts on which a backtracking pattern shows itself: long runs of one or two characters that the pattern names or that
// are of a common class, then one that does not match, then all of them, or PCRE2 would see that a needed character is
// absent and not try.
std::vector<std::string> Probes(std::string_view pattern) {
  std::set<std::string> letters = {"a", "Z", "0", " ", "\n", "\r", "'", "!", "\xc3\xa9", "\xe4\xb8\xad", "\xcc\x81"};
  for (size_t at = 0; at < pattern.size() && letters.size() < 40;) {
    const size_t begin = at;
    DecodeUtf8(pattern, &at);
    letters.insert(std::string(pattern.substr(begin, at - begin)));
  }
  std::string end = "\x01";
  for (const std::string& letter : letters) end += letter;
  std::vector<std::string> probes;
  const auto repeat = [&](const std::string& unit) {
    std::string text;
    while (text.size() < kProbeBytes) text += unit;
    probes.push_back(text + end);
  };
  for (const std::string& a : letters) {
    repeat(a);
    for (const std::string& b : letters) {
      if (a < b) repeat(a + b);
    }
  }
  return probes;
}

Status Probe(const SplitRegex& regex, std::string_view pattern) {
  RegexMatcher matcher;
  for (const std::string& probe : Probes(pattern)) {
    matcher.Begin(probe);
    matcher.set_budget(kFreeSteps);
    for (size_t at = 0, begin = 0; at < probe.size();) {
      const StatusOr<bool> found = matcher.Next(regex, at, &begin, &at);
      if (!found.ok()) return Refused("backtracks without bound on a text of 400 bytes");
      if (!*found) break;
    }
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<SplitRegex>> SplitRegex::Make(std::string_view pattern, uint32_t options) {
  std::unique_ptr<SplitRegex> regex(new SplitRegex);
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
  REFOCUS_CHECK(context != nullptr);
  pcre2_set_newline(context, PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context, 32);
  regex->code_ = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options | PCRE2_UTF,
                               &error, &offset, context);
  pcre2_compile_context_free(context);
  if (regex->code_ == nullptr) {
    PCRE2_UCHAR message[160] = {};
    pcre2_get_error_message(error, message, sizeof message);
    return Refused(std::string("is not valid: ") + reinterpret_cast<const char*>(message));
  }
  uint32_t matches_empty = 0;
  pcre2_pattern_info(regex->code_, PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) return Refused("can match nothing");
  regex->jit_ = pcre2_jit_compile(regex->code_, PCRE2_JIT_COMPLETE) == 0;  // without it: slower, the same matches
  return regex;
}

StatusOr<std::unique_ptr<SplitRegex>> SplitRegex::Compile(std::string_view pattern) {
  if (pattern.empty() || static_cast<int64_t>(pattern.size()) > kMaxPatternBytes) {
    return Refused("has " + std::to_string(pattern.size()) + " bytes");
  }
  if (FindInvalidUtf8(pattern) >= 0) return Refused("is not UTF-8");
  REFOCUS_ASSIGN_OR_RETURN(const std::string translated, TranslatePattern(pattern));
  REFOCUS_ASSIGN_OR_RETURN(std::unique_ptr<SplitRegex> regex,
                           Make(translated, PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_CAPTURE));
  REFOCUS_RETURN_IF_ERROR(Probe(*regex, pattern));
  return regex;
}

StatusOr<std::unique_ptr<SplitRegex>> SplitRegex::CompileLiteral(std::string_view text) {
  if (text.empty() || static_cast<int64_t>(text.size()) > kMaxPatternBytes) {
    return Refused("has " + std::to_string(text.size()) + " bytes");
  }
  if (FindInvalidUtf8(text) >= 0) return Refused("is not UTF-8");
  return Make(text, PCRE2_LITERAL);
}

SplitRegex::~SplitRegex() { pcre2_code_free(code_); }

RegexMatcher::RegexMatcher()
    : context_(pcre2_match_context_create(nullptr)),
      data_(pcre2_match_data_create(1, nullptr)),
      stack_(pcre2_jit_stack_create(32 << 10, 1 << 20, nullptr)) {
  REFOCUS_CHECK(context_ != nullptr && data_ != nullptr);
  if (stack_ != nullptr) pcre2_jit_stack_assign(context_, nullptr, stack_);
}

RegexMatcher::~RegexMatcher() {
  pcre2_jit_stack_free(stack_);
  pcre2_match_data_free(data_);
  pcre2_match_context_free(context_);
}

void RegexMatcher::Begin(std::string_view subject) {
  subject_ = subject;
  budget_ = kStepsPerSubject + kStepsPerByte * static_cast<int64_t>(subject.size());
}

int RegexMatcher::Match(const SplitRegex& regex, size_t from, uint32_t limit) {
  pcre2_set_match_limit(context_, limit);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(subject_.data());
  if (regex.jit_) return pcre2_jit_match(regex.code_, subject, subject_.size(), from, 0, data_, context_);
  return pcre2_match(regex.code_, subject, subject_.size(), from, PCRE2_NO_UTF_CHECK, data_, context_);
}

StatusOr<bool> RegexMatcher::Next(const SplitRegex& regex, size_t from, size_t* begin, size_t* end) {
  int rc = Match(regex, from, kFreeSteps);
  for (int64_t limit = int64_t{kFreeSteps} * 16; rc == PCRE2_ERROR_MATCHLIMIT && budget_ > 0; limit *= 16) {
    const int64_t allowed = std::min<int64_t>({limit, budget_, UINT32_MAX});
    budget_ -= allowed;
    rc = Match(regex, from, static_cast<uint32_t>(allowed));
  }
  if (rc == PCRE2_ERROR_NOMATCH) return false;
  if (rc < 0) {
    return Error(StatusCode::kResourceExhausted, "REGEX_LIMIT",
                 "tokenizer: the model's pre-tokenizer pattern gave up after " + std::to_string(subject_.size()) +
                     " bytes were offered (PCRE2 error " + std::to_string(rc) +
                     "): shorten the text or mend the pattern");
  }
  const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data_);
  REFOCUS_CHECK_LT(span[0], span[1]);
  REFOCUS_CHECK_LE(from, span[0]);
  *begin = span[0];
  *end = span[1];
  return true;
}

}  // namespace refocus
