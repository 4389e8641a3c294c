// What a tokenizer file says, checked and reduced to what encoding needs. Made by one of the two readers, consumed by
// Tokenizer::Load.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace refocus {

// Far above every known tokenizer (the largest have about 260,000 tokens, 600,000 merges and files of 35 MB).
inline constexpr int64_t kMaxTokenizerFileBytes = int64_t{128} << 20;
inline constexpr int64_t kMaxTokenizerTokens = 1 << 20;
inline constexpr int64_t kMaxTokenizerMerges = 1 << 22;
inline constexpr int64_t kMaxTokenBytes = 2048;
inline constexpr int64_t kMaxAddedTokens = 16'384;
inline constexpr int64_t kMaxAddedTokenBytes = 512;
inline constexpr int64_t kMaxSplitRules = 16;
inline constexpr int64_t kMaxPatternBytes = 4096;

// Two neighbouring tokens that become one; the index in the list is the rank, the lowest goes first.
struct MergeRule {
  int32_t left = 0;
  int32_t right = 0;
  int32_t result = 0;
};

struct AddedToken {
  int32_t id = 0;
  std::string text;
  bool special = false;
  bool normalized = false;  // sought in the normalized text, else before
  bool lstrip = false;      // takes the white space on its left with it
  bool rstrip = false;
  bool single_word = false;  // only where no word character stands beside it
};

// One step of cutting text into pieces; each step sees the pieces of the step before, one at a time.
struct SplitRule {
  enum class Kind {
    kSingleDigits,  // each number character (general category N) alone
    kDigitRuns,
    kRegex,        // each match and each gap between matches
    kLiteral,      // the same for a fixed text
    kPrefixSpace,  // a space in front of a piece that has none
  };
  Kind kind = Kind::kRegex;
  std::string pattern;     // regex or literal
  bool drop_gaps = false;  // only matches survive
};

struct TokenizerSpec {
  std::string source;               // the file, for messages
  std::vector<std::string> tokens;  // by id: the raw bytes
  std::vector<bool> plain;          // by id: a byte-level token of the model, not only an added one
  std::vector<MergeRule> merges;    // by rank
  std::vector<AddedToken> added;
  std::vector<SplitRule> splits;
  bool nfc = false;
  bool ignore_merges = false;  // a piece that is a token is that token, whatever the merges say
  bool adds_bos = false;
  std::optional<int32_t> bos;
  std::vector<int32_t> eos;
  std::string chat_template;  // as it is; says nothing about tokens
};

// `path` is a folder, or a file that ends in .gguf. The folder reader gives no value when nothing there describes a
// tokenizer.
StatusOr<std::optional<TokenizerSpec>> ReadTokenizerFolder(const std::string& path);
StatusOr<std::optional<TokenizerSpec>> ReadTokenizerGguf(const std::string& path);

// CONFIG_INVALID with file, field, found, allowed.
Status TokenizerError(const std::string& source, std::string_view field, std::string_view found,
                      std::string_view allowed);

// Shared by both readers. `texts` are the model's tokens by id in the byte-level alphabet; ids in `literal` are texts
// of their own (GGUF keeps special tokens in the same list). Fills tokens and plain.
Status SetVocabulary(const std::vector<std::string>& texts, const std::vector<bool>& literal, std::string_view field,
                     TokenizerSpec* spec);
// `pairs` are texts in the byte-level alphabet, by rank.
Status SetMerges(const std::vector<std::string>& texts, const std::vector<std::pair<std::string, std::string>>& pairs,
                 std::string_view field, TokenizerSpec* spec);
// Cuts "left right"; false unless there is exactly one space with something on both sides.
bool CutMerge(std::string_view text, std::pair<std::string, std::string>* pair);
// An id as a file gives it: OK and within the vocabulary, else an error.
StatusOr<int32_t> CheckTokenId(const TokenizerSpec& spec, const std::string& source, std::string_view field,
                               int64_t id);

void AddUnique(int32_t id, std::vector<int32_t>* ids);

// The regular expression of GPT-2's pre-tokenizer, which ByteLevel implies.
extern const char kGpt2Pattern[];

}  // namespace refocus
