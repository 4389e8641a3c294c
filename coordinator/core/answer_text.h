// From tokens to the text a caller sees: whole UTF-8 characters only, and nothing that may turn out to be part of a
// stop string.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/chat_format.h"
#include "coordinator/tokenizer.h"

namespace refocus {

class AnswerText {
 public:
  explicit AnswerText(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // Adds a token's bytes; returns the text that can be sent now. After a stop was found: nothing.
  std::string Push(std::string_view token_bytes);
  // The answer ended otherwise: what was held back.
  std::string Finish();

  bool stopped() const { return !stop_.empty(); }
  const std::string& stop() const { return stop_; }  // the one that was complete first

 private:
  std::string Release(bool all);

  const std::vector<std::string> stops_;
  Utf8Stream characters_;
  std::string held_;  // shorter than the longest stop string
  std::string stop_;
};

// Tells the tokens of the reasoning from those of the answer behind it. The markers, and the line breaks beside them,
// are no part of either text. Null: all is answer.
class Reasoning {
 public:
  explicit Reasoning(const ChatFormat::Thinking* thinking);

  struct Parts {
    std::string reasoning;  // whole UTF-8 characters
    std::string answer;     // bytes
  };
  Parts Push(int32_t id, std::string_view bytes);
  // The answer ended while the model reasoned: what was held back.
  std::string Finish();

  bool inside() const { return state_ == State::kInside; }
  bool over() const { return state_ == State::kOver; }  // or there was none
  int64_t tokens() const { return tokens_; }            // markers included
  int64_t words() const { return words_; }              // between the markers

 private:
  enum class State { kMayBegin, kInside, kOver };
  std::string Trimmed(std::string text);

  int32_t open_ = -1;
  int32_t close_ = -1;
  State state_ = State::kOver;
  int64_t tokens_ = 0;
  int64_t words_ = 0;
  bool at_start_ = true;        // of the reasoning's text
  bool skip_breaks_ = false;    // at the answer's start
  Utf8Stream characters_;
  std::string held_;            // line breaks that may be the reasoning's last
};

}  // namespace refocus
