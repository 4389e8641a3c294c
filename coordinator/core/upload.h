// One upload while it streams in: offsets, sizes and ids are checked chunk by chunk, so that a bad upload ends early
// and a good one is tokenized once, as a whole. Pure; holds the text or the ids, nothing else.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/limits.h"
#include "base/model_config.h"
#include "base/status.h"
#include "coordinator/chat_format.h"
#include "coordinator/core/digest.h"
#include "coordinator/core/messages.h"
#include "coordinator/core/session.h"
#include "coordinator/tokenizer.h"

namespace refocus {

// Bytes of text that can be `max_tokens` tokens, the longest of which has `longest_token` bytes; at most kMaxTextBytes.
int64_t MaxTextBytes(int64_t max_tokens, int64_t longest_token);

class Upload {
 public:
  // At most `max_tokens` tokens, and `max_text_bytes` before they are counted. `tokenizer` may be null (ids
  // only); both outlive the upload.
  Upload(const ModelConfig& model, const Tokenizer* tokenizer, int64_t max_tokens,
         int64_t max_text_bytes = kMaxTextBytes)
      : model_(model), tokenizer_(tokenizer), max_tokens_(max_tokens), max_text_bytes_(max_text_bytes) {}

  // OUT_OF_RANGE UPLOAD_OFFSET_MISMATCH, INVALID_ARGUMENT, FAILED_PRECONDITION NO_TOKENIZER, RESOURCE_EXHAUSTED
  // TOO_MANY_CHUNKS.
  Status Add(const api::CreateContextRequest::Chunk& chunk);

  // Checks total and hash, tokenizes; with a prologue, `chat` writes it in front. DATA_LOSS CHECKSUM_MISMATCH,
  // INVALID_ARGUMENT, as Encode. May take seconds.
  StatusOr<TokenIds> Finish(const api::CreateContextRequest::Header& header,
                            const api::CreateContextRequest::Finish& finish, const ChatFormat& chat = {});

  int64_t held_bytes() const { return static_cast<int64_t>(text_.capacity() + ids_.capacity() * sizeof(int32_t)); }
  const std::string& content_hash() const {
    return content_hash_;
  }  // after Finish: equal iff kind and content are equal

 private:
  enum class Kind { kUnknown, kText, kIds };
  Status AddText(const std::string& text);
  Status AddIds(const api::TokenIds& ids);
  Status TooLong(const std::string& got, const std::string& allowed) const;
  StatusOr<TokenIds> Tokenize(const api::CreateContextRequest::Header& header);
  StatusOr<TokenIds> OpenConversation(const api::CreateContextRequest::Header& header, const ChatFormat& chat);

  const ModelConfig& model_;
  const Tokenizer* const tokenizer_;
  const int64_t max_tokens_;
  const int64_t max_text_bytes_;
  Kind kind_ = Kind::kUnknown;
  int64_t chunks_ = 0;
  int64_t received_ = 0;  // bytes of text, or ids
  std::string text_;
  std::vector<int32_t> ids_;
  Sha256 hash_;
  std::string content_hash_;
};

}  // namespace refocus
