#include "coordinator/core/adapter_file.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "base/memory_plan.h"

namespace refocus {
namespace {

constexpr size_t kMagicBytes = sizeof(kAdapterMagic) - 1;
constexpr size_t kVersionByte = kMagicBytes - 1;
constexpr size_t kFixedBytes = kMagicBytes + 4;  // and the header's length

Status Invalid(const std::string& what) {
  return Error(StatusCode::kInvalidArgument, "ADAPTER_FILE_INVALID", "adapter file: " + what);
}

Status Mismatch(const std::string& field, const std::string& got, const std::string& allowed, const std::string& hint) {
  return Error(
      StatusCode::kInvalidArgument, "MODEL_MISMATCH",
      "adapter file, " + field + ": got " + got + ", allowed " + allowed + ": it belongs to another model" + hint,
      {{"field", field}, {"got", got}, {"allowed", allowed}});
}

std::string Printable(const std::string& text) {
  std::string out;
  for (const char c : text.substr(0, 80)) out.push_back(c >= 0x20 && c < 0x7f ? c : '?');
  return out;
}

}  // namespace

std::string AdapterFilePrefix(const api::AdapterFileHeader& header) {
  const std::string body = header.SerializeAsString();
  REFOCUS_CHECK_LE(static_cast<int64_t>(body.size()), kMaxAdapterHeaderBytes);
  std::string prefix(kAdapterMagic, kMagicBytes);
  for (int shift = 0; shift < 32; shift += 8) prefix.push_back(static_cast<char>(body.size() >> shift & 0xff));
  return prefix + body;
}

Status CheckAdapterFile(const api::AdapterFileHeader& header, const ModelConfig& model, const ModelIdentity& identity) {
  const api::Adapter& adapter = header.adapter();
  if (header.dtype() != "F32") return Invalid("dtype: got '" + Printable(header.dtype()) + "', allowed F32");
  const bool lora = adapter.kind() == api::LORA;
  if (!lora && adapter.kind() != api::FULL)
    return Invalid("kind: got " + std::to_string(adapter.kind()) + ", allowed FULL or LORA");
  const int64_t most = std::min(kMaxLoraRank, model.hidden);
  if (lora && (adapter.lora_rank() < 1 || adapter.lora_rank() > most)) {
    return Invalid("lora_rank: got " + std::to_string(adapter.lora_rank()) + ", allowed 1 to " + std::to_string(most));
  }
  if (!lora && adapter.lora_rank() != 0) return Invalid("lora_rank: got a value, allowed none with kind FULL");
  if (lora && !(adapter.lora_alpha() >= 1e-3 && adapter.lora_alpha() <= 1e6)) {
    return Invalid("lora_alpha: got " + std::to_string(adapter.lora_alpha()) + ", allowed 0.001 to 1e6");
  }
  if (adapter.steps() < 0) return Invalid("steps: got " + std::to_string(adapter.steps()) + ", allowed 0 or more");
  struct Size {
    const char* field;
    int64_t got, allowed;
  };
  for (const Size& size : {Size{"layers", header.layers(), model.layers},
                           Size{"hidden_size", header.hidden_size(), model.hidden},
                           Size{"query_size", header.query_size(), model.q_dim()}}) {
    if (size.got != size.allowed) {
      return Mismatch(size.field, std::to_string(size.got), std::to_string(size.allowed), "");
    }
  }
  const int64_t bytes = 4 * DeltaNumbers(model, adapter.lora_rank());
  if (header.data_bytes() != bytes) {
    return Invalid("data_bytes: got " + std::to_string(header.data_bytes()) + ", allowed " + std::to_string(bytes));
  }
  const auto differs = [](const std::string& a, const std::string& b) { return !a.empty() && !b.empty() && a != b; };
  const char* const hint = " (of this shape; allow_other_model lets it in)";
  if (differs(header.model_fingerprint(), identity.fingerprint)) {
    return Mismatch("model_fingerprint", Printable(header.model_fingerprint()), identity.fingerprint, hint);
  }
  if (differs(header.weights_hash(), identity.weights_hash)) {
    return Mismatch("weights_hash", Printable(header.weights_hash()), identity.weights_hash, hint);
  }
  return absl::OkStatus();
}

// Eats what belongs to magic, length and header.
Status AdapterFileReader::AddPrefix(std::string_view* bytes) {
  const auto fill = [&](size_t size) {
    const size_t count = std::min(size - std::min(size, prefix_.size()), bytes->size());
    prefix_.append(bytes->substr(0, count));
    bytes->remove_prefix(count);
    return prefix_.size() >= size;
  };
  const bool fixed = fill(kFixedBytes);
  const size_t known = std::min(prefix_.size(), kVersionByte);
  if (prefix_.compare(0, known, kAdapterMagic, known) != 0) {
    return Invalid("it does not begin as one; export with 'refocus adapter export', or name a PEFT folder");
  }
  if (prefix_.size() > kVersionByte && prefix_[kVersionByte] != kAdapterMagic[kVersionByte]) {
    return Invalid("version: got '" + Printable(prefix_.substr(kVersionByte, 1)) +
                   "', allowed '1'; run equal versions");
  }
  if (!fixed) return absl::OkStatus();
  int64_t size = 0;
  for (size_t i = 0; i < 4; ++i) size |= int64_t{static_cast<uint8_t>(prefix_[kMagicBytes + i])} << (8 * i);
  if (size > kMaxAdapterHeaderBytes) {
    return Invalid("header: got " + std::to_string(size) + " bytes, allowed " + std::to_string(kMaxAdapterHeaderBytes));
  }
  if (!fill(kFixedBytes + static_cast<size_t>(size))) return absl::OkStatus();
  if (!header_.ParseFromArray(prefix_.data() + kFixedBytes, static_cast<int>(size))) {
    return Invalid("its header cannot be read");
  }
  if (header_.data_bytes() < 0 || header_.data_bytes() % 4 != 0) {
    return Invalid("data_bytes: got " + std::to_string(header_.data_bytes()) + ", allowed a multiple of 4");
  }
  hash_.Update(prefix_.data(), prefix_.size());
  numbers_left_ = header_.data_bytes();
  has_header_ = true;
  return absl::OkStatus();
}

Status AdapterFileReader::Add(std::string_view bytes) {
  if (!has_header_) REFOCUS_RETURN_IF_ERROR(AddPrefix(&bytes));
  if (!has_header_) return absl::OkStatus();
  const auto count = static_cast<size_t>(std::min<int64_t>(numbers_left_, static_cast<int64_t>(bytes.size())));
  hash_.Update(bytes.data(), count);
  numbers_.append(bytes.substr(0, count));
  numbers_left_ -= static_cast<int64_t>(count);
  checksum_.append(bytes.substr(count));
  if (static_cast<int64_t>(checksum_.size()) <= kChecksumBytes) return absl::OkStatus();
  return Invalid("got bytes behind its end");
}

std::string AdapterFileReader::TakeNumbers(int64_t most) {
  const auto wanted = static_cast<size_t>(4 * most);
  if (numbers_.size() < wanted && numbers_left_ > 0) return {};
  std::string piece = numbers_.substr(0, wanted);
  numbers_.erase(0, wanted);
  return piece;
}

Status AdapterFileReader::Finish() {
  if (!has_header_ || numbers_left_ > 0 || static_cast<int64_t>(checksum_.size()) < kChecksumBytes) {
    return Error(StatusCode::kDataLoss, "ADAPTER_FILE_INVALID",
                 "adapter file: it is cut short; export it again, or copy it again");
  }
  if (hash_.Finish() == checksum_) return absl::OkStatus();
  return Error(StatusCode::kDataLoss, "CHECKSUM_MISMATCH",
               "adapter file: its checksum is wrong, so it was damaged; copy or export it again");
}

}  // namespace refocus
