#include "coordinator/core/upload.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "base/limits.h"
#include "coordinator/core/validate.h"

namespace refocus {

static_assert(std::endian::native == std::endian::little, "ids are hashed as little-endian 32-bit");

int64_t MaxTextBytes(int64_t max_tokens, int64_t longest_token) {
  constexpr int64_t kNfc = 4;  // normalization to NFC shrinks UTF-8 by less than this before it is tokenized
  const int64_t token_bytes = std::max<int64_t>(longest_token, 1) * kNfc;
  return max_tokens > kMaxTextBytes / token_bytes ? kMaxTextBytes : max_tokens * token_bytes;
}

Status Upload::Add(const api::CreateContextRequest::Chunk& chunk) {
  if (++chunks_ > kMaxUploadChunks) {
    return Error(StatusCode::kResourceExhausted, "TOO_MANY_CHUNKS",
                 "chunks: got more than " + std::to_string(kMaxUploadChunks) + "; send larger ones",
                 {{"limit", std::to_string(kMaxUploadChunks)}});
  }
  if (chunk.offset() != received_) {
    return Error(StatusCode::kOutOfRange, "UPLOAD_OFFSET_MISMATCH",
                 "offset: got " + std::to_string(chunk.offset()) + ", expected " + std::to_string(received_),
                 {{"got", std::to_string(chunk.offset())}, {"expected_offset", std::to_string(received_)}});
  }
  const Kind kind = chunk.has_text() ? Kind::kText : chunk.has_ids() ? Kind::kIds : Kind::kUnknown;
  if (kind == Kind::kUnknown) return FieldError("chunk.content", "nothing", "text or ids");
  if (kind_ != Kind::kUnknown && kind != kind_) return FieldError("chunk.content", "both text and ids", "one kind");
  kind_ = kind;
  return kind == Kind::kText ? AddText(chunk.text()) : AddIds(chunk.ids());
}

Status Upload::TooLong(const std::string& got, const std::string& allowed) const {
  return Error(StatusCode::kInvalidArgument, "CONTEXT_TOO_LONG", "context: got " + got + ", allowed " + allowed,
               {{"got", got}, {"limit", allowed}});
}

Status Upload::AddText(const std::string& text) {
  if (tokenizer_ == nullptr) {
    return Error(StatusCode::kFailedPrecondition, "NO_TOKENIZER",
                 "chunk.text: got text, but this model has no tokenizer; send ids");
  }
  const auto size = static_cast<int64_t>(text.size());
  if (received_ + size > max_text_bytes_) {
    return TooLong(std::to_string(received_ + size) + " bytes or more", std::to_string(max_text_bytes_) + " bytes");
  }
  hash_.Update(text.data(), text.size());
  text_ += text;
  received_ += size;
  return absl::OkStatus();
}

Status Upload::AddIds(const api::TokenIds& message) {
  const int64_t size = message.ids_size();
  if (received_ + size > max_tokens_) {
    return TooLong(std::to_string(received_ + size) + " tokens or more", std::to_string(max_tokens_) + " tokens");
  }
  REFOCUS_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, CheckIds(message.ids(), model_.vocab, received_));
  hash_.Update(ids.data(), ids.size() * sizeof(int32_t));
  ids_.insert(ids_.end(), ids.begin(), ids.end());
  received_ += size;
  return absl::OkStatus();
}

StatusOr<TokenIds> Upload::Finish(const api::CreateContextRequest::Header& header,
                                  const api::CreateContextRequest::Finish& finish, const ChatFormat& chat) {
  if (finish.has_total() && finish.total() != received_) {
    return FieldError("finish.total", std::to_string(finish.total()),
                      std::to_string(received_) + ", which was received");
  }
  const std::string hash = hash_.Finish();
  if (!finish.sha256().empty() && finish.sha256() != hash) {
    return Error(StatusCode::kDataLoss, "CHECKSUM_MISMATCH",
                 "sha256: the content received is not the content that was sent; upload again");
  }
  content_hash_ = (kind_ == Kind::kText ? "text:" : "ids:") + hash;
  if (header.has_prologue()) return OpenConversation(header, chat);
  if (kind_ == Kind::kText) return Tokenize(header);
  return std::make_shared<const std::vector<int32_t>>(std::move(ids_));
}

StatusOr<TokenIds> Upload::OpenConversation(const api::CreateContextRequest::Header& header, const ChatFormat& chat) {
  REFOCUS_ASSIGN_OR_RETURN(auto ids, chat.Open(OpeningOf(header), text_, max_tokens_));
  std::string().swap(text_);
  const auto count = static_cast<int64_t>(ids.size() + ids_.size());
  if (count > max_tokens_) return TooLong(std::to_string(count) + " tokens", std::to_string(max_tokens_) + " tokens");
  ids.insert(ids.end(), ids_.begin(), ids_.end());
  return std::make_shared<const std::vector<int32_t>>(std::move(ids));
}

StatusOr<TokenIds> Upload::Tokenize(const api::CreateContextRequest::Header& header) {
  const bool bos = tokenizer_->adds_bos() && tokenizer_->bos_token() && !header.no_bos();
  REFOCUS_ASSIGN_OR_RETURN(auto ids, tokenizer_->Encode(text_, header.allow_special(), max_tokens_ - (bos ? 1 : 0)));
  // A begin token alone is no context.
  if (bos && !ids.empty()) ids.insert(ids.begin(), *tokenizer_->bos_token());
  std::string().swap(text_);
  return std::make_shared<const std::vector<int32_t>>(std::move(ids));
}

}  // namespace refocus
