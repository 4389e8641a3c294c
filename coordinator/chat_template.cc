// The families' templates, and how to tell them apart.
#include <algorithm>

#include "base/input_file.h"
#include "coordinator/chat_format.h"

namespace refocus {
namespace {

using Thinking = ChatTexts::Thinking;

constexpr char kNames[] = "chatml, qwen3, llama3, llama3.1, llama3.2, mistral, mistral-v3, mistral-tekken";
constexpr char kWhatToDo[] =
    "; use raw text, or start the server with --chat-template and one of chatml, qwen3, llama3, llama3.1, llama3.2, "
    "mistral, mistral-v3, mistral-tekken if the model knows it";

ChatTexts ChatMl() {
  ChatTexts t;
  t.name = "chatml";
  t.markers = {"<|im_start|>", "<|im_end|>"};
  t.system_open = "<|im_start|>system\n";
  t.user_open = "<|im_start|>user\n";
  t.answer_open = "<|im_start|>assistant\n";
  t.system_close = t.user_close = t.answer_close = "<|im_end|>\n";
  return t;
}

ChatTexts Llama3() {
  ChatTexts t;
  t.name = "llama3";
  t.markers = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"};
  t.bos = true;
  t.system_open = "<|start_header_id|>system<|end_header_id|>\n\n";
  t.user_open = "<|start_header_id|>user<|end_header_id|>\n\n";
  t.answer_open = "<|start_header_id|>assistant<|end_header_id|>\n\n";
  t.system_close = t.user_close = t.answer_close = "<|eot_id|>";
  t.trims = true;
  return t;
}

// Since 3.1 a system turn is always there and tells the dates.
ChatTexts Llama31(bool asks_date) {
  ChatTexts t = Llama3();
  t.name = asks_date ? "llama3.2" : "llama3.1";
  t.system_open += "Cutting Knowledge Date: December 2023\nToday Date: ";
  t.default_system = "";
  t.date = "26 Jul 2024";
  t.asks_date = asks_date;
  return t;
}

// Before there were tokens for them, [INST] and [/INST] were text. `before` and `behind` stand inside of the markers of
// a user's turn.
ChatTexts Mistral(const std::string& name, const std::string& before, const std::string& behind, bool spaced_answers) {
  ChatTexts t;
  t.name = name;
  t.bos = true;
  t.markers = {"</s>"};
  if (name != "mistral") t.markers.insert(t.markers.end(), {"[INST]", "[/INST]"});
  t.user_open = "[INST]" + before;
  t.user_close = behind + "[/INST]";
  t.answer_close = "</s>";
  t.system_in_user = true;
  t.system_close = "\n\n";
  if (spaced_answers) {
    t.answer_lead = " ";
    t.trims_answers = true;
  }
  return t;
}

bool Has(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

Status Unknown(const std::string& what) {
  return Error(StatusCode::kFailedPrecondition, "NO_CHAT_FORMAT", what + kWhatToDo);
}

// "<|im_start|>system\n...<|im_end|>" written out in one piece: what the model is told when the caller says nothing.
std::optional<std::string> DefaultSystem(std::string_view source) {
  constexpr std::string_view kOpen = "<|im_start|>system";
  for (size_t at = source.find(kOpen); at != std::string_view::npos; at = source.find(kOpen, at + 1)) {
    std::string_view rest = source.substr(at + kOpen.size());
    if (rest.starts_with("\\n")) {
      rest.remove_prefix(2);
    } else if (rest.starts_with("\n")) {
      rest.remove_prefix(1);
    } else {
      continue;
    }
    const size_t end = rest.find("<|im_end|>");
    if (end == std::string_view::npos) return std::nullopt;
    const std::string_view text = rest.substr(0, end);
    if (text.find_first_of("'\"{}\\") == std::string_view::npos) return std::string(text);
  }
  return std::nullopt;
}

StatusOr<ChatTexts> RecogniseChatMl(std::string_view source) {
  // Relatives that put more into a turn than its text.
  for (const char* other : {"<|im_sep|>", "reasoning_mode", "<|im_middle|>", "<|im_user|>", "<|im_system|>"}) {
    if (Has(source, other)) return Unknown("the chat template looks like chatml, but with " + Quoted(other));
  }
  if (!Has(source, "<|im_end|>") || !Has(source, "assistant")) {
    return Unknown("the chat template has <|im_start|> but no <|im_end|> or no assistant");
  }
  ChatTexts t = ChatMl();
  t.bos = Has(source, "bos_token");
  t.default_system = DefaultSystem(source);
  const bool opens =
      Has(source, "<|im_start|>assistant\\n<think>\\n'") || Has(source, "<|im_start|>assistant\n<think>\n'");
  if (Has(source, "enable_thinking")) {
    // Others than Qwen3 write the empty block differently.
    if (!Has(source, "<think>\\n\\n</think>\\n\\n") && !Has(source, "<think>\n\n</think>\n\n")) {
      return Unknown("the chat template has enable_thinking without Qwen3's empty block of reasoning");
    }
    t.thinking = Thinking::kOptional;
    t.name = "qwen3";
  } else if (opens) {
    t.thinking = Thinking::kAlways;
    t.name = "qwen3";
  }
  return t;
}

StatusOr<ChatTexts> RecogniseMistral(std::string_view source) {
  for (const char* other : {"[SYSTEM_PROMPT]", "<<SYS>>", " [INST]"}) {
    if (Has(source, other)) return Unknown("the chat template looks like mistral, but with " + Quoted(other));
  }
  if (!Has(source, "[/INST]")) return Unknown("the chat template has [INST] but no [/INST]");
  if (!Has(source, "[INST] ")) return Mistral("mistral-tekken", "", "", false);
  if (Has(source, " [/INST]")) return Mistral("mistral", " ", " ", false);
  return Mistral("mistral-v3", " ", "", true);
}

}  // namespace

StatusOr<ChatTexts> NamedTemplate(const std::string& name) {
  if (name == "chatml") return ChatMl();
  if (name == "qwen3") {
    ChatTexts t = ChatMl();
    t.name = name;
    t.thinking = Thinking::kOptional;
    return t;
  }
  if (name == "llama3") return Llama3();
  if (name == "llama3.1" || name == "llama3.2") return Llama31(name == "llama3.2");
  if (name == "mistral") return Mistral(name, " ", " ", false);
  if (name == "mistral-v3") return Mistral(name, " ", "", true);
  if (name == "mistral-tekken") return Mistral(name, "", "", false);
  return FieldError("--chat-template", Quoted(name), std::string("auto, none, ") + kNames);
}

StatusOr<ChatTexts> RecogniseTemplate(std::string_view source) {
  if (source.empty()) return Unknown("the model has no chat template");
  if (Has(source, "<|start_header_id|>") && Has(source, "<|eot_id|>")) {
    if (!Has(source, "trim")) return Unknown("the chat template looks like llama3, but does not trim texts");
    if (!Has(source, "Cutting Knowledge Date")) return Llama3();
    if (!Has(source, "Cutting Knowledge Date: December 2023\\n") &&
        !Has(source, "Cutting Knowledge Date: December 2023\n")) {
      return Unknown("the chat template looks like llama3.1, but with another \"Cutting Knowledge Date\"");
    }
    return Llama31(Has(source, "strftime_now"));
  }
  if (Has(source, "<|im_start|>")) return RecogniseChatMl(source);
  if (Has(source, "[INST]")) return RecogniseMistral(source);
  return Unknown("the chat template is none of " + std::string(kNames));
}

}  // namespace refocus
