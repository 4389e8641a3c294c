#include "coordinator/chat_format.h"

#include <algorithm>
#include <ctime>
#include <utility>

#include "coordinator/tokenizer_unicode.h"

namespace refocus {
namespace {

constexpr size_t kMaxDateBytes = 32;

// What str.strip of Python takes off, which the templates' `trim` calls.
bool IsSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

// Bytes that are no UTF-8 are no space; Encode refuses them later.
std::string_view TrimLeft(std::string_view text) {
  while (!text.empty()) {
    const Utf8Step step = StepUtf8(text, 0);
    size_t at = 0;
    if (!step.complete || !IsSpace(DecodeUtf8(text, &at))) break;
    text.remove_prefix(at);
  }
  return text;
}

std::string_view TrimRight(std::string_view text) {
  while (!text.empty()) {
    size_t begin = text.size() - 1;
    while (begin > 0 && text.size() - begin < 4 && (static_cast<unsigned char>(text[begin]) & 0xc0) == 0x80) --begin;
    const Utf8Step step = StepUtf8(text, begin);
    size_t at = begin;
    if (!step.complete || begin + static_cast<size_t>(step.size) != text.size() || !IsSpace(DecodeUtf8(text, &at)))
      break;
    text = text.substr(0, begin);
  }
  return text;
}

std::string_view Trim(std::string_view text) { return TrimRight(TrimLeft(text)); }

Status CheckUtf8(const std::string& field, std::string_view text) {
  const int64_t bad = FindInvalidUtf8(text);
  if (bad < 0) return absl::OkStatus();
  return Error(
      StatusCode::kInvalidArgument, "INVALID_UTF8",
      field + ": got a byte that is not UTF-8 at offset " + std::to_string(bad) + ", allowed well-formed UTF-8",
      {{"field", field}, {"offset", std::to_string(bad)}});
}

// The reasoning of an earlier answer goes away: a model sees its answers alone.
std::string_view AnswerAlone(std::string_view answer) {
  constexpr std::string_view kEnd = "</think>";
  const size_t end = answer.rfind(kEnd);
  if (end == std::string_view::npos) return answer;
  answer.remove_prefix(end + kEnd.size());
  while (!answer.empty() && answer.front() == '\n') answer.remove_prefix(1);
  return answer;
}

std::string Today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[kMaxDateBytes];
  return std::string(text, std::strftime(text, sizeof text, "%d %b %Y", &parts));
}

}  // namespace

// Collects a conversation as runs of text between special tokens: the tokenizer sees each run as a whole, as it does
// when the reference encodes the rendered conversation.
class ChatFormat::Writer {
 public:
  Writer(const ChatFormat& format, bool allow_special) : format_(format), allow_special_(allow_special) {}

  void Token(int32_t id) { runs_.push_back({"", id}); }
  void Text(std::string_view text) { Run().append(text); }

  // A text of the template.
  void Literal(std::string_view text) {
    while (!text.empty()) {
      size_t first = text.size(), which = 0;
      for (size_t i = 0; i < format_.texts_.markers.size(); ++i) {
        const size_t at = text.find(format_.texts_.markers[i]);
        if (at < first) {
          first = at;
          which = i;
        }
      }
      Text(text.substr(0, first));
      if (first == text.size()) return;
      Token(format_.marker_ids_[which]);
      text.remove_prefix(first + format_.texts_.markers[which].size());
    }
  }

  StatusOr<std::vector<int32_t>> Encode(int64_t max_tokens) const {
    std::vector<int32_t> ids;
    for (const auto& [text, id] : runs_) {
      if (id >= 0) ids.push_back(id);
      const int64_t left = std::max<int64_t>(max_tokens - static_cast<int64_t>(ids.size()), 0);
      if (text.empty()) continue;
      REFOCUS_ASSIGN_OR_RETURN(const auto more, format_.tokenizer_->Encode(text, allow_special_, left));
      ids.insert(ids.end(), more.begin(), more.end());
    }
    if (static_cast<int64_t>(ids.size()) <= max_tokens) return ids;
    const std::string got = std::to_string(ids.size()), allowed = std::to_string(max_tokens);
    return Error(StatusCode::kInvalidArgument, "CONTEXT_TOO_LONG",
                 "conversation: got " + got + " tokens or more, allowed " + allowed + ": shorten the texts",
                 {{"got", got}, {"allowed", allowed}});
  }

 private:
  struct Piece {
    std::string text;
    int32_t id = -1;  // instead of text
  };
  std::string& Run() {
    if (runs_.empty() || runs_.back().id >= 0) runs_.emplace_back();
    return runs_.back().text;
  }

  const ChatFormat& format_;
  const bool allow_special_;
  std::vector<Piece> runs_;
};

StatusOr<ChatFormat> ChatFormat::Make(const std::string& choice, std::shared_ptr<const Tokenizer> tokenizer) {
  ChatFormat out;
  if (choice == "none") {
    out.refusal_ = "the server was started with --chat-template none";
    return out;
  }
  if (choice != "auto") {
    REFOCUS_ASSIGN_OR_RETURN(out.texts_, NamedTemplate(choice));
    if (tokenizer == nullptr) {
      return FieldError("--chat-template", choice, "auto or none for a model without tokenizer");
    }
    out.tokenizer_ = std::move(tokenizer);
    REFOCUS_RETURN_IF_ERROR(out.Resolve());
    out.refusal_.clear();
    return out;
  }
  if (tokenizer == nullptr) return out;
  StatusOr<ChatTexts> texts = RecogniseTemplate(tokenizer->chat_template());
  Status status = texts.status();
  if (status.ok()) {
    out.texts_ = *std::move(texts);
    out.tokenizer_ = std::move(tokenizer);
    status = out.Resolve();
  }
  out.refusal_ = std::string(status.message());
  if (!status.ok()) out.texts_ = ChatTexts();
  return out;
}

Status ChatFormat::Resolve() {
  const auto find = [&](const std::string& text, int32_t* id) -> Status {
    const std::optional<int32_t> found = tokenizer_->FindToken(text);
    if (!found) {
      return FieldError("chat template " + texts_.name, "a tokenizer without the token " + text,
                        "one that has it; use raw text, or choose another --chat-template");
    }
    *id = *found;
    return absl::OkStatus();
  };
  for (const std::string& marker : texts_.markers) {
    REFOCUS_RETURN_IF_ERROR(find(marker, &marker_ids_.emplace_back()));
  }
  if (texts_.bos && !tokenizer_->bos_token()) {
    return FieldError("chat template " + texts_.name, "a tokenizer without begin token", "one that has it");
  }
  if (!thinks()) return absl::OkStatus();
  REFOCUS_RETURN_IF_ERROR(find("<think>", &thinking_.open));
  REFOCUS_RETURN_IF_ERROR(find("</think>", &thinking_.close));
  REFOCUS_ASSIGN_OR_RETURN(thinking_.forced_end, tokenizer_->Encode("\n", false, 8));
  REFOCUS_ASSIGN_OR_RETURN(const auto gap, tokenizer_->Encode("\n\n", false, 8));
  thinking_.forced_end.push_back(thinking_.close);
  thinking_.forced_end.insert(thinking_.forced_end.end(), gap.begin(), gap.end());
  return absl::OkStatus();
}

Status ChatFormat::CheckUsable() const {
  if (usable()) return absl::OkStatus();
  return Error(StatusCode::kFailedPrecondition, "NO_CHAT_FORMAT", "conversations: " + refusal_);
}

Status ChatFormat::CheckOpening(const Opening& opening) const {
  if (opening.date.size() > kMaxDateBytes) {
    return FieldError("prologue.date", std::to_string(opening.date.size()) + " bytes",
                      "at most " + std::to_string(kMaxDateBytes));
  }
  if (!opening.date.empty() && texts_.date.empty()) {
    return FieldError("prologue.date", "one for the chat format " + texts_.name, "none: its template tells no date");
  }
  return absl::OkStatus();
}

StatusOr<std::vector<int32_t>> ChatFormat::Open(const Opening& opening, std::string_view text,
                                                int64_t max_tokens) const {
  REFOCUS_RETURN_IF_ERROR(CheckUsable());
  REFOCUS_RETURN_IF_ERROR(CheckOpening(opening));
  REFOCUS_RETURN_IF_ERROR(CheckUtf8("text", text));
  REFOCUS_RETURN_IF_ERROR(CheckUtf8("prologue.system", opening.system.value_or("")));
  REFOCUS_RETURN_IF_ERROR(CheckUtf8("prologue.user", opening.user));
  REFOCUS_RETURN_IF_ERROR(CheckUtf8("prologue.date", opening.date));
  Writer writer(*this, opening.allow_special);
  if (texts_.bos && !opening.no_bos) writer.Token(*tokenizer_->bos_token());
  const std::optional<std::string>& system = opening.system ? opening.system : texts_.default_system;
  if (system && texts_.system_in_user) writer.Literal(texts_.user_open);
  if (system) {
    writer.Literal(texts_.system_open);
    if (!texts_.date.empty()) {
      const std::string& date = opening.date.empty() ? texts_.date : opening.date;
      writer.Text((texts_.asks_date && opening.date.empty() ? Today() : date) + "\n\n");
    }
    writer.Text(texts_.trims ? Trim(*system) : *system);
    writer.Literal(texts_.system_close);
  }
  if (!system || !texts_.system_in_user) writer.Literal(texts_.user_open);
  std::string_view user = texts_.trims ? TrimLeft(opening.user) : opening.user;
  writer.Text(user);
  writer.Text(texts_.trims && user.empty() ? TrimLeft(text) : text);
  return writer.Encode(max_tokens);
}

StatusOr<ChatFormat::Asked> ChatFormat::Ask(const Question& question, int64_t max_tokens) const {
  REFOCUS_RETURN_IF_ERROR(CheckUsable());
  using Mode = ChatTexts::Thinking;
  const bool thinks = question.thinking.value_or(texts_.thinking != Mode::kNever);
  if (thinks != (texts_.thinking != Mode::kNever) && texts_.thinking != Mode::kOptional) {
    return Error(StatusCode::kFailedPrecondition, "NO_THINKING",
                 std::string("chat.thinking: got ") + (thinks ? "true" : "false") + ", but the chat format " + name() +
                     (thinks ? " has no reasoning" : " always reasons") + "; leave it unset");
  }
  Writer writer(*this, question.allow_special);
  bool first = true;
  // The turn is open, and what stands in it keeps its end.
  const auto ask = [&](std::string_view text) {
    if (!first) writer.Literal(texts_.user_open);
    if (texts_.trims) text = first ? TrimRight(text) : Trim(text);
    writer.Text(text);
    writer.Literal(texts_.user_close);
    writer.Literal(texts_.answer_open);
    first = false;
  };
  for (size_t i = 0; i < question.earlier.size(); ++i) {
    const Exchange& exchange = question.earlier[i];
    const std::string field = "chat.earlier[" + std::to_string(i) + "]";
    REFOCUS_RETURN_IF_ERROR(CheckUtf8(field + ".question", exchange.question));
    REFOCUS_RETURN_IF_ERROR(CheckUtf8(field + ".answer", exchange.answer));
    ask(exchange.question);
    std::string_view answer = exchange.answer;
    if (texts_.thinking != Mode::kNever) answer = AnswerAlone(answer);
    if (texts_.trims || texts_.trims_answers) answer = Trim(answer);
    writer.Literal(texts_.answer_lead);
    writer.Text(answer);
    writer.Literal(texts_.answer_close);
  }
  REFOCUS_RETURN_IF_ERROR(CheckUtf8("chat.question", question.text));
  ask(question.text);
  Asked asked;
  if (thinks) {
    auto thinking = std::make_shared<Thinking>(thinking_);
    thinking->begins_inside = texts_.thinking == Mode::kAlways;
    asked.thinking = std::move(thinking);
  }
  if (texts_.thinking == Mode::kAlways) {
    writer.Token(thinking_.open);
    writer.Text("\n");
  } else if (texts_.thinking == Mode::kOptional && !thinks) {
    writer.Token(thinking_.open);
    writer.Text("\n\n");
    writer.Token(thinking_.close);
    writer.Text("\n\n");
  }
  REFOCUS_ASSIGN_OR_RETURN(asked.ids, writer.Encode(max_tokens));
  return asked;
}

}  // namespace refocus
