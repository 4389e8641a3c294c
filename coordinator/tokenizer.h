// Byte-level BPE, token for token what the model's reference tokenizer gives.
//
// Reads tokenizer.json of a Hugging Face folder, or the tokenizer in GGUF metadata. Added and special tokens first (longest
// match), then normalizer (NFC), pre-tokenizer (Split by regex, Digits, ByteLevel, Sequence), then merges by rank with a cache
// of pieces. What it does not know is refused by name (CONFIG_INVALID).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace refocus {

class Tokenizer {
 public:
  // `path` as in LoadModelConfig. nullptr (OK) when the model brings no tokenizer: it then serves token ids only.
  // CONFIG_INVALID with file, field, found, allowed for a broken or unsupported one; every count is capped before allocation.
  static StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path);

  virtual ~Tokenizer() = default;

  // All methods are const, thread-safe, and linear in the input.

  // INVALID_ARGUMENT INVALID_UTF8 with the byte offset. Special-token strings are plain text unless `allow_special`; added
  // tokens that are not special always match, as in the reference. Adds no begin or end tokens. Stops with CONTEXT_TOO_LONG as
  // soon as more than `max_tokens` came out.
  virtual StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool allow_special, int64_t max_tokens) const = 0;

  // The raw bytes of one token (special tokens: their text when `keep_special`, else nothing). Empty for ids without a token.
  virtual std::string TokenBytes(int32_t id, bool keep_special) const = 0;

  virtual int64_t vocab_size() const = 0;               // largest id + 1
  virtual std::optional<int32_t> bos_token() const = 0;
  virtual bool adds_bos() const = 0;                    // the reference puts bos first when encoding a document
  virtual std::vector<int32_t> eos_tokens() const = 0;  // as far as the tokenizer's files say
  virtual std::optional<int32_t> FindToken(std::string_view text) const = 0;  // an added or special token's id
  virtual std::string chat_template() const = 0;        // as the model's files have it (Jinja), empty when they have none
  virtual std::string Fingerprint() const = 0;          // 16 hex digits over vocabulary, merges and rules
};

// Joins token bytes into whole UTF-8 characters: what is incomplete waits; what can never become valid is U+FFFD.
class Utf8Stream {
 public:
  std::string Push(std::string_view bytes);  // the characters that are complete now
  std::string Finish();                      // U+FFFD for a rest, else empty

 private:
  std::string pending_;  // at most 3 bytes
};

}  // namespace refocus
