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
  size_t first = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at < first) {
      first = at;
      stop_ = stop;
    }
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
