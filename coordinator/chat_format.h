// Conversations as a model's chat template writes them, in tokens.
//
// Templates are programs (Jinja), and model files are untrusted, so none is run: the templates of the supported
// families differ in a few texts. Which family it is shows in the model's own template, or an option says it. A
// template that is not one of these is refused, never guessed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "coordinator/tokenizer.h"

namespace refocus {

// The texts of one template. Markers in them ("<|im_start|>") become their tokens.
struct ChatTexts {
  enum class Thinking { kNever, kOptional, kAlways };

  std::string name;
  std::vector<std::string> markers;           // that stand in the texts, each a token of its own
  bool bos = false;                           // the conversation begins with the begin token
  std::string system_open, system_close;      // around the system prompt
  bool system_in_user = false;                // it stands at the beginning of the first user's turn
  std::optional<std::string> default_system;  // when the caller gives none; unset: no system turn then
  std::string date;                           // stands behind system_open; empty: no date
  bool asks_date = false;                     // the template asks for today's
  std::string user_open, user_close;
  std::string answer_open, answer_close;
  std::string answer_lead;  // in front of an answer given before, behind answer_open
  bool trims = false;       // white space around every text goes away
  bool trims_answers = false;
  Thinking thinking = Thinking::kNever;
};

// What a model's template (Jinja) is. FAILED_PRECONDITION NO_CHAT_FORMAT, saying what was found and what to do.
StatusOr<ChatTexts> RecogniseTemplate(std::string_view chat_template);
// "chatml", "qwen3", "llama3", ...; INVALID_ARGUMENT with all names for others.
StatusOr<ChatTexts> NamedTemplate(const std::string& name);

// Immutable, thread-safe. Bad texts are refused as Tokenizer::Encode refuses them.
class ChatFormat {
 public:
  // How the tokens of an answer are told from those of the reasoning before it.
  struct Thinking {
    bool begins_inside = false;  // the prompt opened the reasoning, else the model may with its first token
    int32_t open = -1;
    int32_t close = -1;
    std::vector<int32_t> forced_end;  // what ends it for a model that does not
  };
  struct Opening {
    std::optional<std::string> system;
    std::string user;
    std::string date;
    bool no_bos = false;
    bool allow_special = false;
  };
  struct Exchange {
    std::string question;
    std::string answer;
  };
  struct Question {
    std::vector<Exchange> earlier;
    std::string text;
    bool allow_special = false;
    std::optional<bool> thinking;
  };
  struct Asked {
    std::vector<int32_t> ids;
    std::shared_ptr<const Thinking> thinking;  // null: the answer comes at once
  };

  // Refuses everything: no tokenizer, or --chat-template none.
  ChatFormat() : refusal_("this model has no tokenizer") {}
  // `choice`: "auto" (by the model's template), "none", or a name. INVALID_ARGUMENT for an unknown name, or one whose
  // markers the tokenizer lacks; with "auto" such a model is served without conversations.
  static StatusOr<ChatFormat> Make(const std::string& choice, std::shared_ptr<const Tokenizer> tokenizer);

  bool usable() const { return refusal_.empty(); }
  const std::string& name() const { return texts_.name; }  // empty unless usable
  const std::string& refusal() const { return refusal_; }  // why not, and what to do
  bool thinks() const { return texts_.thinking != ChatTexts::Thinking::kNever; }
  Status CheckUsable() const;                         // FAILED_PRECONDITION NO_CHAT_FORMAT
  Status CheckOpening(const Opening& opening) const;  // without its texts: date

  // The beginning of a conversation and the opened user's turn, whose last words are `text`. At most `max_tokens`, else
  // CONTEXT_TOO_LONG.
  StatusOr<std::vector<int32_t>> Open(const Opening& opening, std::string_view text, int64_t max_tokens) const;
  // From the open user's turn to where the model answers. FAILED_PRECONDITION NO_THINKING.
  StatusOr<Asked> Ask(const Question& question, int64_t max_tokens) const;

 private:
  class Writer;
  Status Resolve();

  std::string refusal_;
  ChatTexts texts_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::vector<int32_t> marker_ids_;  // by texts_.markers
  Thinking thinking_;
};

}  // namespace refocus
