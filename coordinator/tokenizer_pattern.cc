#include "coordinator/tokenizer_pattern.h"

#include <cctype>
#include <cstdint>

#include "coordinator/tokenizer_unicode.h"

namespace refocus {
namespace {

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  StatusOr<std::string> Run() {
    while (at_ < in_.size()) {
      const Status status = in_class_ ? ClassItem() : Item();
      if (!status.ok()) return status;
    }
    if (in_class_) return Refuse("a class without end", class_begin_);
    return out_;
  }

 private:
  bool StartsWith(std::string_view text) const { return in_.substr(at_).starts_with(text); }

  Status Refuse(std::string_view what, size_t at) const {
    return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
                 "uses " + std::string(what) + " at byte " + std::to_string(at) + ", which is not supported");
  }

  Status Item() {
    const char c = in_[at_];
    switch (c) {
      case '\\': return Escape();
      case '[': return OpenClass();
      case '(': return Group();
      case '{': return Braces();
      case '^':
      case '$': return Refuse("an anchor", at_);  // the reference means lines, PCRE2 the text
      default:
        out_ += c;
        ++at_;
        return absl::OkStatus();
    }
  }

  Status Group() {
    constexpr std::string_view kKinds[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
    for (const std::string_view kind : kKinds) {
      if (!StartsWith(kind)) continue;
      out_ += kind;
      at_ += kind.size();
      return absl::OkStatus();
    }
    if (StartsWith("(?") || StartsWith("(*")) return Refuse("group " + std::string(in_.substr(at_, 4)), at_);
    out_ += "(?:";
    ++at_;
    return absl::OkStatus();
  }

  // {n}, {n,} and {n,m} are quantifiers in both; behind them the reference reads + and ? differently.
  Status Braces() {
    size_t i = at_ + 1;
    const auto digits = [&] {
      const size_t first = i;
      while (i < in_.size() && std::isdigit(static_cast<unsigned char>(in_[i]))) ++i;
      return i > first;
    };
    bool quantifier = digits();
    if (quantifier && i < in_.size() && in_[i] == ',') {
      ++i;
      digits();
    }
    quantifier = quantifier && i < in_.size() && in_[i] == '}';
    if (!quantifier) return Refuse("a brace that is no {n}, {n,} or {n,m}", at_);
    if (i + 1 < in_.size() && (in_[i + 1] == '+' || in_[i + 1] == '?'))
      return Refuse("a quantifier behind braces", i + 1);
    out_ += in_.substr(at_, i + 1 - at_);
    at_ = i + 1;
    return absl::OkStatus();
  }

  Status OpenClass() {
    class_begin_ = at_++;
    out_ += '[';
    in_class_ = true;
    if (StartsWith("^")) {
      out_ += '^';
      ++at_;
    }
    if (StartsWith("]")) return Refuse("an empty class", at_);
    return absl::OkStatus();
  }

  Status ClassItem() {
    const char c = in_[at_];
    if (c == '\\') return Escape();
    if (c == '[') return Refuse("a class within a class", at_);
    if (StartsWith("&&")) return Refuse("an intersection of classes", at_);
    if (c == ']') in_class_ = false;
    out_ += c;
    ++at_;
    return absl::OkStatus();
  }

  // A whole class of characters, in or outside of brackets. ASCII comes first because PCRE2 looks it up in a bitmap.
  Status Category(std::string_view name, bool negated) {
    const std::string* missing = MissingRanges(name);
    if (missing == nullptr) {
      return Refuse("\\p{" + std::string(name) + "} (supported: L, Lu, Ll, Lt, Lm, Lo, M, N, P, S)", at_);
    }
    // Without regard to case the engines disagree about what an upper-case letter is.
    if ((name == "Lu" || name == "Ll" || name == "Lt") && in_.find("(?i") != std::string_view::npos) {
      return Refuse("\\p{" + std::string(name) + "} in a pattern with (?i:", at_);
    }
    if (in_class_ && negated) return Refuse("a negated category in a class", at_);
    std::string members = name == "L"                   ? "a-zA-Z"
                          : name == "Lu"                  ? "A-Z"
                          : name == "Ll"                  ? "a-z"
                          : name == "N" || name == "Nd" ? "0-9"
                                                          : "";
    members += "\\p{" + std::string(name) + "}" + *missing;
    out_ += in_class_ ? members : (negated ? "[^" : "[") + members + "]";
    return absl::OkStatus();
  }

  Status Property(bool negated) {
    const size_t close = in_.find('}', at_);
    if (in_.substr(at_ + 2, 1) != "{" || close == std::string_view::npos) return Refuse("\\p without braces", at_);
    REFOCUS_RETURN_IF_ERROR(Category(in_.substr(at_ + 3, close - at_ - 3), negated));
    at_ = close + 1;
    return absl::OkStatus();
  }

  Status CodePoint() {
    std::string_view digits;
    size_t size = 0;
    if (StartsWith("\\x{")) {
      const size_t close = in_.find('}', at_);
      if (close == std::string_view::npos) return Refuse("\\x without end", at_);
      digits = in_.substr(at_ + 3, close - at_ - 3);
      size = close + 1 - at_;
    } else {
      digits = in_.substr(at_ + 2, StartsWith("\\u") ? 4 : 2);
      size = 2 + digits.size();
      if (size != (StartsWith("\\u") ? 6u : 4u)) return Refuse("a cut code point", at_);
    }
    uint32_t value = 0;
    for (const char c : digits) {
      if (!std::isxdigit(static_cast<unsigned char>(c))) return Refuse("a code point with other than hex digits", at_);
      value = value * 16 +
              static_cast<uint32_t>(std::isdigit(static_cast<unsigned char>(c)) ? c - '0' : (c | 0x20) - 'a' + 10);
      if (value > 0x10ffff) return Refuse("a code point above 10ffff", at_);
    }
    // Two hex digits name a byte to the reference, a character to PCRE2.
    if (digits.empty() || (size == 4 && value > 0x7f)) return Refuse("a byte above 7f", at_);
    out_ += "\\x{" + std::string(digits) + "}";
    at_ += size;
    return absl::OkStatus();
  }

  Status Escape() {
    if (at_ + 1 >= in_.size()) return Refuse("a lone backslash", at_);
    const char c = in_[at_ + 1];
    switch (c) {
      case 'p':
      case 'P': return Property(c == 'P');
      case 'x':
      case 'u': return CodePoint();
      case 'd':
      case 'D': REFOCUS_RETURN_IF_ERROR(Category("Nd", c == 'D')); break;
      case 's': out_ += "\\p{White_Space}"; break;  // PCRE2's \s has U+180E too
      case 'S': out_ += "\\P{White_Space}"; break;
      case 'v': out_ += "\\x{b}"; break;  // to PCRE2 every vertical space
      case 'r':
      case 'n':
      case 't':
      case 'f': out_ += {'\\', c}; break;
      default:
        if (!std::ispunct(static_cast<unsigned char>(c)) && c != ' ')
          return Refuse(std::string("\\").append(1, c), at_);
        out_ += {'\\', c};
    }
    at_ += 2;
    return absl::OkStatus();
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_;
  bool in_class_ = false;
  size_t class_begin_ = 0;
};

}  // namespace

StatusOr<std::string> TranslatePattern(std::string_view pattern) { return Translator(pattern).Run(); }

}  // namespace refocus
