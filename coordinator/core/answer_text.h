// From tokens to the text a caller sees: whole UTF-8 characters only, and nothing that may turn out to be part of a
// stop string.
#pragma once

#include <string>
#include <string_view>
#include <vector>

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

}  // namespace refocus
