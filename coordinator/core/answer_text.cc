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

Reasoning::Reasoning(const ChatFormat::Thinking* thinking) {
  if (thinking == nullptr) return;
  open_ = thinking->open;
  close_ = thinking->close;
  state_ = thinking->begins_inside ? State::kInside : State::kMayBegin;
}

Reasoning::Parts Reasoning::Push(int32_t id, std::string_view bytes) {
  if (state_ == State::kMayBegin) {
    state_ = id == open_ ? State::kInside : State::kOver;
    if (id == open_) {
      ++tokens_;
      return {};
    }
  }
  if (state_ == State::kInside) {
    ++tokens_;
    if (id == close_) {
      state_ = State::kOver;
      skip_breaks_ = true;
      Parts last{Trimmed(characters_.Finish()), ""};
      held_.clear();
      return last;
    }
    ++words_;
    return {Trimmed(characters_.Push(bytes)), ""};
  }
  if (skip_breaks_) {
    const size_t first = bytes.find_first_not_of('\n');
    bytes.remove_prefix(std::min(first, bytes.size()));
    skip_breaks_ = bytes.empty();
  }
  return {"", std::string(bytes)};
}

std::string Reasoning::Finish() { return inside() ? Trimmed(characters_.Finish()) : ""; }

std::string Reasoning::Trimmed(std::string text) {
  if (at_start_) {
    text.erase(0, std::min(text.find_first_not_of('\n'), text.size()));
    at_start_ = text.empty();
  }
  text.insert(0, held_);
  const size_t last = text.find_last_not_of('\n');
  const size_t end = last == std::string::npos ? 0 : last + 1;
  held_ = text.substr(end);
  text.resize(end);
  return text;
}

}  // namespace refocus
