#include "coordinator/tokenizer.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <mutex>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "base/input_file.h"
#include "coordinator/tokenizer_added.h"
#include "coordinator/tokenizer_bpe.h"
#include "coordinator/tokenizer_regex.h"
#include "coordinator/tokenizer_spec.h"
#include "coordinator/tokenizer_unicode.h"

namespace refocus {
namespace {

constexpr size_t kKeptScratches = 16;

struct Scratch {
  BpeScratch bpe;
  std::vector<std::unique_ptr<RegexMatcher>> matchers;  // one per split rule: they are in use at the same time
};

std::string HashSpec(const TokenizerSpec& spec) {
  XXH3_state_t* state = XXH3_createState();
  XXH3_64bits_reset(state);
  const auto number = [&](int64_t value) { XXH3_64bits_update(state, &value, sizeof value); };
  const auto text = [&](const std::string& value) {
    number(static_cast<int64_t>(value.size()));
    XXH3_64bits_update(state, value.data(), value.size());
  };
  number(static_cast<int64_t>(spec.tokens.size()));
  for (size_t id = 0; id < spec.tokens.size(); ++id) {
    text(spec.tokens[id]);
    number(spec.plain[id]);
  }
  number(static_cast<int64_t>(spec.merges.size()));
  for (const MergeRule& rule : spec.merges) number(int64_t{rule.left} << 32 | rule.right);
  number(static_cast<int64_t>(spec.added.size()));
  for (const AddedToken& token : spec.added) {
    text(token.text);
    number(token.id * 4 + token.special * 2 + token.normalized);
    if (token.lstrip || token.rstrip || token.single_word) {
      number(-1 - token.lstrip * 4 - token.rstrip * 2 - token.single_word);
    }
  }
  for (const SplitRule& rule : spec.splits) {
    text(rule.pattern);
    number(static_cast<int>(rule.kind) * 2 + rule.drop_gaps);
  }
  number(spec.nfc * 4 + spec.ignore_merges * 2 + spec.adds_bos);
  number(spec.bos.value_or(-1));
  for (const int32_t id : spec.eos) number(id);
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(XXH3_64bits_digest(state)));
  XXH3_freeState(state);
  return digits;
}

// The character that ends before `at`, which is not 0; *at moves to its first byte.
uint32_t CharacterBefore(std::string_view text, size_t* at) {
  do {
    --*at;
  } while (*at > 0 && (static_cast<unsigned char>(text[*at]) & 0xc0) == 0x80);
  size_t here = *at;
  return DecodeUtf8(text, &here);
}

size_t SpacesBefore(std::string_view text, size_t at) {
  for (size_t next = at; at > 0; at = next) {
    if (!IsWhiteSpace(CharacterBefore(text, &next))) break;
  }
  return at;
}

size_t SpacesBehind(std::string_view text, size_t at) {
  for (size_t next = at; at < text.size(); at = next) {
    if (!IsWhiteSpace(DecodeUtf8(text, &next))) break;
  }
  return at;
}

bool StandsAlone(std::string_view text, const AddedTokenMatcher::Match& match) {
  size_t before = match.begin, behind = match.end;
  if (before > 0 && IsWordCharacter(CharacterBefore(text, &before))) return false;
  return behind == text.size() || !IsWordCharacter(DecodeUtf8(text, &behind));
}

class ByteLevelBpe final : public Tokenizer {
 public:
  static StatusOr<std::unique_ptr<Tokenizer>> Make(TokenizerSpec spec) {
    std::unique_ptr<ByteLevelBpe> tokenizer(new ByteLevelBpe(std::move(spec)));
    REFOCUS_RETURN_IF_ERROR(tokenizer->Prepare());
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
  }

  StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool allow_special, int64_t max_tokens) const override;

  std::string TokenBytes(int32_t id, bool keep_special) const override {
    if (id < 0 || id >= vocab_size()) return "";
    return special_[id] && !keep_special ? "" : spec_.tokens[id];
  }
  int64_t vocab_size() const override { return static_cast<int64_t>(spec_.tokens.size()); }
  std::optional<int32_t> bos_token() const override { return spec_.bos; }
  bool adds_bos() const override { return spec_.adds_bos; }
  std::vector<int32_t> eos_tokens() const override { return spec_.eos; }
  std::optional<int32_t> FindToken(std::string_view text) const override {
    const auto it = added_.find(absl::string_view(text.data(), text.size()));
    return it == added_.end() ? std::nullopt : std::optional<int32_t>(it->second);
  }
  std::string chat_template() const override { return spec_.chat_template; }
  std::string Fingerprint() const override { return fingerprint_; }

 private:
  explicit ByteLevelBpe(TokenizerSpec spec) : spec_(std::move(spec)), bpe_(spec_), fingerprint_(HashSpec(spec_)) {}

  // One call of Encode.
  struct Run {
    Scratch* scratch;
    bool allow_special;
    int64_t max_tokens;
    std::vector<int32_t> out;
  };

  Status Prepare();
  std::unique_ptr<Scratch> TakeScratch() const;
  void ReturnScratch(std::unique_ptr<Scratch> scratch) const;

  Status TooLong(const Run& run, int64_t at_least) const;
  // Added tokens become ids, the text between them goes to `rest`.
  template <typename Rest>
  Status CutAdded(const AddedTokenMatcher& matcher, std::string_view text, Run* run, const Rest& rest) const;
  Status Normalize(std::string_view text, Run* run) const;
  Status Split(size_t rule, std::string_view piece, Run* run) const;
  Status SplitDigits(size_t rule, std::string_view piece, Run* run) const;
  Status SplitMatches(size_t rule, std::string_view piece, Run* run) const;
  Status EncodePiece(std::string_view piece, Run* run) const;

  const TokenizerSpec spec_;
  const Bpe bpe_;
  const std::string fingerprint_;
  std::vector<bool> special_;  // by id
  absl::flat_hash_map<int32_t, AddedToken> particular_;  // added tokens that look at what stands beside them
  absl::flat_hash_map<std::string, int32_t> added_;
  AddedTokenMatcher before_normalizer_;
  AddedTokenMatcher after_normalizer_;
  std::vector<std::unique_ptr<SplitRegex>> regexes_;  // by split rule; null for rules without one

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Scratch>> scratches_;  // idle ones
};

Status ByteLevelBpe::Prepare() {
  special_.assign(spec_.tokens.size(), false);
  // Special tokens come first, as in the reference: of two equal patterns the first counts.
  for (const bool special : {true, false}) {
    for (const AddedToken& token : spec_.added) {
      if (token.special != special) continue;
      special_[token.id] = special;
      if (token.lstrip || token.rstrip || token.single_word) particular_.emplace(token.id, token);
      added_.emplace(token.text, token.id);
      if (token.normalized) {
        after_normalizer_.Add(spec_.nfc ? ToNfc(token.text) : token.text, token.id);
      } else {
        before_normalizer_.Add(token.text, token.id);
      }
    }
  }
  for (const SplitRule& rule : spec_.splits) {
    regexes_.emplace_back();
    if (rule.kind != SplitRule::Kind::kRegex && rule.kind != SplitRule::Kind::kLiteral) continue;
    StatusOr<std::unique_ptr<SplitRegex>> regex = rule.kind == SplitRule::Kind::kRegex
                                                      ? SplitRegex::Compile(rule.pattern)
                                                      : SplitRegex::CompileLiteral(rule.pattern);
    if (!regex.ok()) {
      return TokenizerError(spec_.source, "pre_tokenizer.pattern", Quoted(rule.pattern),
                            "a pattern without this: it " + std::string(regex.status().message()));
    }
    regexes_.back() = std::move(*regex);
  }
  return absl::OkStatus();
}

std::unique_ptr<Scratch> ByteLevelBpe::TakeScratch() const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!scratches_.empty()) {
      std::unique_ptr<Scratch> scratch = std::move(scratches_.back());
      scratches_.pop_back();
      return scratch;
    }
  }
  auto scratch = std::make_unique<Scratch>();
  for (const auto& regex : regexes_) scratch->matchers.push_back(regex ? std::make_unique<RegexMatcher>() : nullptr);
  return scratch;
}

void ByteLevelBpe::ReturnScratch(std::unique_ptr<Scratch> scratch) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (scratches_.size() < kKeptScratches) scratches_.push_back(std::move(scratch));
}

StatusOr<std::vector<int32_t>> ByteLevelBpe::Encode(std::string_view text, bool allow_special,
                                                    int64_t max_tokens) const {
  if (const int64_t bad = FindInvalidUtf8(text); bad >= 0) {
    return Error(StatusCode::kInvalidArgument, "INVALID_UTF8",
                 "text: got a byte that is not UTF-8 at offset " + std::to_string(bad) + ", allowed well-formed UTF-8",
                 {{"field", "text"}, {"offset", std::to_string(bad)}});
  }
  std::unique_ptr<Scratch> scratch = TakeScratch();
  Run run{scratch.get(), allow_special, std::max<int64_t>(max_tokens, 0), {}};
  run.out.reserve(
      static_cast<size_t>(std::min<int64_t>(static_cast<int64_t>(text.size()) / 3 + 8, run.max_tokens + 64)));
  const Status status =
      CutAdded(before_normalizer_, text, &run, [&](std::string_view rest) { return Normalize(rest, &run); });
  ReturnScratch(std::move(scratch));
  if (!status.ok()) return status;
  return std::move(run.out);
}

Status ByteLevelBpe::TooLong(const Run& run, int64_t at_least) const {
  const std::string got = std::to_string(at_least);
  const std::string allowed = std::to_string(run.max_tokens);
  return Error(StatusCode::kInvalidArgument, "CONTEXT_TOO_LONG",
               "text: got " + got + " tokens or more, allowed " + allowed + ": shorten the text",
               {{"field", "text"}, {"got", got}, {"allowed", allowed}});
}

template <typename Rest>
Status ByteLevelBpe::CutAdded(const AddedTokenMatcher& matcher, std::string_view text, Run* run,
                              const Rest& rest) const {
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const AddedTokenMatcher::Match match = matcher.Find(text, at);
    if (match.id < 0) break;
    at = match.end;
    if (special_[match.id] && !run->allow_special) continue;  // stays plain text, and so does what it covers
    size_t first = match.begin, end = match.end;
    if (const auto it = particular_.find(match.id); it != particular_.end()) {
      if (it->second.single_word && !StandsAlone(text, match)) continue;
      if (it->second.lstrip) first = std::max(SpacesBefore(text, first), begin);
      if (it->second.rstrip) end = SpacesBehind(text, end);
    }
    if (begin < first) REFOCUS_RETURN_IF_ERROR(rest(text.substr(begin, first - begin)));
    run->out.push_back(match.id);
    const auto count = static_cast<int64_t>(run->out.size());
    if (count > run->max_tokens) return TooLong(*run, count);
    begin = end;
  }
  return begin < text.size() ? rest(text.substr(begin)) : absl::OkStatus();
}

Status ByteLevelBpe::Normalize(std::string_view text, Run* run) const {
  std::string normalized;
  if (spec_.nfc && !IsPlainlyNfc(text)) {
    normalized = ToNfc(text);
    text = normalized;
  }
  return CutAdded(after_normalizer_, text, run, [&](std::string_view rest) { return Split(0, rest, run); });
}

Status ByteLevelBpe::Split(size_t rule, std::string_view piece, Run* run) const {
  if (piece.empty()) return absl::OkStatus();
  if (rule == spec_.splits.size()) return EncodePiece(piece, run);
  switch (spec_.splits[rule].kind) {
    case SplitRule::Kind::kSingleDigits:
    case SplitRule::Kind::kDigitRuns: return SplitDigits(rule, piece, run);
    case SplitRule::Kind::kRegex:
    case SplitRule::Kind::kLiteral: return SplitMatches(rule, piece, run);
    case SplitRule::Kind::kPrefixSpace:
      if (piece[0] == ' ') return Split(rule + 1, piece, run);
      return Split(rule + 1, std::string(1, ' ').append(piece), run);
  }
  return absl::OkStatus();
}

Status ByteLevelBpe::SplitDigits(size_t rule, std::string_view piece, Run* run) const {
  const bool single = spec_.splits[rule].kind == SplitRule::Kind::kSingleDigits;
  size_t begin = 0;
  bool in_digits = false;
  for (size_t at = 0; at < piece.size();) {
    const size_t here = at;
    const bool digit = IsNumber(DecodeUtf8(piece, &at));
    if (here > begin && (digit != in_digits || (digit && single))) {
      REFOCUS_RETURN_IF_ERROR(Split(rule + 1, piece.substr(begin, here - begin), run));
      begin = here;
    }
    in_digits = digit;
  }
  return Split(rule + 1, piece.substr(begin), run);
}

Status ByteLevelBpe::SplitMatches(size_t rule, std::string_view piece, Run* run) const {
  RegexMatcher& matcher = *run->scratch->matchers[rule];
  const bool drop_gaps = spec_.splits[rule].drop_gaps;
  matcher.Begin(piece);
  size_t at = 0;
  while (at < piece.size()) {
    size_t begin = 0;
    size_t end = 0;
    REFOCUS_ASSIGN_OR_RETURN(const bool found, matcher.Next(*regexes_[rule], at, &begin, &end));
    if (!found) break;
    if (begin > at && !drop_gaps) REFOCUS_RETURN_IF_ERROR(Split(rule + 1, piece.substr(at, begin - at), run));
    REFOCUS_RETURN_IF_ERROR(Split(rule + 1, piece.substr(begin, end - begin), run));
    at = end;
  }
  return at < piece.size() && !drop_gaps ? Split(rule + 1, piece.substr(at), run) : absl::OkStatus();
}

Status ByteLevelBpe::EncodePiece(std::string_view piece, Run* run) const {
  // A piece of 200 MB is refused before its merges are looked at, when no way of merging could make it fit.
  const auto before = static_cast<int64_t>(run->out.size());
  const int64_t at_least = before + bpe_.Fewest(piece);
  if (at_least > run->max_tokens) return TooLong(*run, at_least);
  bpe_.Encode(piece, &run->scratch->bpe, &run->out);
  const auto count = static_cast<int64_t>(run->out.size());
  return count > run->max_tokens ? TooLong(*run, count) : absl::OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& path) {
  const bool gguf = path.size() > 5 && path.ends_with(".gguf");
  REFOCUS_ASSIGN_OR_RETURN(std::optional<TokenizerSpec> spec,
                           gguf ? ReadTokenizerGguf(path) : ReadTokenizerFolder(path));
  if (!spec) return std::unique_ptr<Tokenizer>();
  return ByteLevelBpe::Make(std::move(*spec));
}

std::string Utf8Stream::Push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  out.reserve(pending_.size());
  size_t at = 0;
  while (at < pending_.size()) {
    const Utf8Step step = StepUtf8(pending_, at);
    if (step.open) break;
    out += step.complete ? std::string_view(pending_).substr(at, static_cast<size_t>(step.size)) : "\xef\xbf\xbd";
    at += static_cast<size_t>(step.size);
  }
  pending_.erase(0, at);
  return out;
}

std::string Utf8Stream::Finish() {
  if (pending_.empty()) return "";
  pending_.clear();
  return "\xef\xbf\xbd";
}

}  // namespace refocus
