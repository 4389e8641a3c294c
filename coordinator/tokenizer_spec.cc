#include "coordinator/tokenizer_spec.h"

#include <algorithm>
#include <array>

#include "absl/container/flat_hash_map.h"
#include "base/input_file.h"
#include "coordinator/tokenizer_unicode.h"

namespace refocus {
namespace {

// GPT-2's alphabet: a byte that prints in Latin-1 stands for itself, the others are U+0100 and up, in order.
bool StandsForItself(int byte) { return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174; }

// By code point below 0x144: the byte, or -1.
const std::array<int16_t, 0x144>& ByteOfLetter() {
  static const std::array<int16_t, 0x144> table = [] {
    std::array<int16_t, 0x144> letters;
    letters.fill(-1);
    int next = 0x100;
    for (int byte = 0; byte < 256; ++byte) letters[StandsForItself(byte) ? byte : next++] = static_cast<int16_t>(byte);
    return letters;
  }();
  return table;
}

// False when a character is outside the alphabet; such a token can be decoded to its own text but never be reached by
// merges.
bool FromByteLevel(std::string_view text, std::string* bytes) {
  bytes->clear();
  for (size_t at = 0; at < text.size();) {
    const uint32_t letter = DecodeUtf8(text, &at);
    if (letter >= ByteOfLetter().size() || ByteOfLetter()[letter] < 0) return false;
    bytes->push_back(static_cast<char>(ByteOfLetter()[letter]));
  }
  return true;
}

using IdByText = absl::flat_hash_map<std::string_view, int32_t>;

}  // namespace

const char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Status TokenizerError(const std::string& source, std::string_view field, std::string_view found,
                      std::string_view allowed) {
  const std::string message =
      source + ": " + std::string(field) + ": got " + std::string(found) + ", allowed " + std::string(allowed);
  return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", message,
               {{"file", source},
                {"field", std::string(field)},
                {"found", std::string(found)},
                {"allowed", std::string(allowed)}});
}

Status SetVocabulary(const std::vector<std::string>& texts, const std::vector<bool>& literal, std::string_view field,
                     TokenizerSpec* spec) {
  const int64_t count = static_cast<int64_t>(texts.size());
  if (count < 1 || count > kMaxTokenizerTokens) {
    return TokenizerError(spec->source, field, std::to_string(count) + " tokens",
                          "1 to " + std::to_string(kMaxTokenizerTokens));
  }
  IdByText seen;
  seen.reserve(texts.size());
  spec->tokens.resize(texts.size());
  spec->plain.assign(texts.size(), false);
  for (int64_t id = 0; id < count; ++id) {
    const std::string& text = texts[id];
    if (text.empty() || static_cast<int64_t>(text.size()) > kMaxTokenBytes || FindInvalidUtf8(text) >= 0) {
      return TokenizerError(spec->source, field,
                            "token " + std::to_string(id) + " " + Quoted(text.substr(0, 40)) + " of " +
                                std::to_string(text.size()) + " bytes",
                            "UTF-8 of 1 to " + std::to_string(kMaxTokenBytes) + " bytes");
    }
    const auto [other, inserted] = seen.try_emplace(text, static_cast<int32_t>(id));
    if (!inserted) {
      return TokenizerError(spec->source, field,
                            Quoted(text) + " with ids " + std::to_string(other->second) + " and " + std::to_string(id),
                            "each token once");
    }
    const bool byte_level = !literal[id] && FromByteLevel(text, &spec->tokens[id]);
    if (!byte_level) spec->tokens[id] = text;
    spec->plain[id] = byte_level;
  }
  return absl::OkStatus();
}

Status SetMerges(const std::vector<std::string>& texts, const std::vector<std::pair<std::string, std::string>>& pairs,
                 std::string_view field, TokenizerSpec* spec) {
  if (static_cast<int64_t>(pairs.size()) > kMaxTokenizerMerges) {
    return TokenizerError(spec->source, field, std::to_string(pairs.size()) + " merges",
                          "at most " + std::to_string(kMaxTokenizerMerges));
  }
  IdByText ids;
  ids.reserve(texts.size());
  for (size_t id = 0; id < texts.size(); ++id) ids.emplace(texts[id], static_cast<int32_t>(id));
  spec->merges.reserve(pairs.size());
  for (size_t rank = 0; rank < pairs.size(); ++rank) {
    const auto& [left, right] = pairs[rank];
    const std::string both = left + right;
    int32_t found[3];
    const std::string* parts[3] = {&left, &right, &both};
    for (int i = 0; i < 3; ++i) {
      // An empty half would be the only way to a cycle: every other merge makes a longer token.
      const auto it = ids.find(*parts[i]);
      if (it == ids.end()) {
        return TokenizerError(spec->source, std::string(field) + "[" + std::to_string(rank) + "]",
                              "unknown token " + Quoted(*parts[i]),
                              "tokens of the vocabulary, their concatenation included");
      }
      found[i] = it->second;
    }
    spec->merges.push_back({found[0], found[1], found[2]});
  }
  return absl::OkStatus();
}

bool CutMerge(std::string_view text, std::pair<std::string, std::string>* pair) {
  const size_t space = text.find(' ');
  if (space == std::string_view::npos || space == 0 || space + 1 == text.size()) return false;
  if (text.find(' ', space + 1) != std::string_view::npos) return false;
  *pair = {std::string(text.substr(0, space)), std::string(text.substr(space + 1))};
  return true;
}

StatusOr<int32_t> CheckTokenId(const TokenizerSpec& spec, const std::string& source, std::string_view field,
                               int64_t id) {
  const int64_t count = static_cast<int64_t>(spec.tokens.size());
  if (id < 0 || id >= count) {
    return TokenizerError(source, field, std::to_string(id), "0 to " + std::to_string(count - 1));
  }
  return static_cast<int32_t>(id);
}

void AddUnique(int32_t id, std::vector<int32_t>* ids) {
  if (std::find(ids->begin(), ids->end(), id) == ids->end()) ids->push_back(id);
}

}  // namespace refocus
