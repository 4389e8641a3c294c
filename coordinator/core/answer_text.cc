#include "coordinator/core/answer_text.h"

#include <algorithm>

namespace refocus {

std::string AnswerText::Push(std::string_view token_bytes) {
  if (stopped()) return "";
  held_ += characters_.Push(token_bytes);
  return Release(/*all=*/false);
}

std::string AnswerText::Finish() {
  if (stopped()) return "";
  held_ += characters_.Finish();
  return Release(/*all=*/true);
}

std::string AnswerText::Release(bool all) {
  // The stop string that is complete first counts, of two that end together the longer one: the answer then does not
  // depend on how the text came in tokens.
  size_t first = std::string::npos, first_end = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at == std::string::npos) continue;
    const size_t end = at + stop.size();
    if (end > first_end || (end == first_end && at > first)) continue;
    first = at;
    first_end = end;
    stop_ = stop;
  }
  if (first != std::string::npos) {
    std::string out = held_.substr(0, first);
    held_.clear();
    return out;
  }
  size_t keep = 0;  // longest end of the text that begins a stop string
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep && !all; --n) {
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) keep = n;
    }
  }
  // A stop string is whole characters, so cutting before its first byte cuts at a character.
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return out;
}

}  // namespace refocus
