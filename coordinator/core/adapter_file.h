// An adapter's file, as AdapterFileHeader in proto/refocus/v1/context.proto describes it: magic, header, numbers,
// checksum. Numbers pass through in pieces; nothing of them is kept.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/model_config.h"
#include "base/status.h"
#include "coordinator/core/digest.h"
#include "coordinator/core/messages.h"

namespace refocus {

inline constexpr char kAdapterMagic[] = "RFKADPT1";  // 8 bytes
inline constexpr int64_t kChecksumBytes = 32;

// What comes before the numbers. The header is below kMaxAdapterHeaderBytes.
std::string AdapterFilePrefix(const api::AdapterFileHeader& header);

// What a model is known by; empty: unknown.
struct ModelIdentity {
  std::string fingerprint;
  std::string weights_hash;
};

// INVALID_ARGUMENT ADAPTER_FILE_INVALID for a header that contradicts itself, MODEL_MISMATCH for another model's shape,
// or identity where both sides know theirs.
Status CheckAdapterFile(const api::AdapterFileHeader& header, const ModelConfig& model, const ModelIdentity& identity);

// Takes a file apart as its bytes come. After an error it must not be used again.
class AdapterFileReader {
 public:
  // INVALID_ARGUMENT ADAPTER_FILE_INVALID: no such file, another version, a broken header, bytes behind the end.
  Status Add(std::string_view bytes);
  bool has_header() const { return has_header_; }
  const api::AdapterFileHeader& header() const { return header_; }
  // The next numbers, at most `most`; only whole ones, and as many as that except at the end. Empty: none yet.
  std::string TakeNumbers(int64_t most);
  // The file is at its end: DATA_LOSS ADAPTER_FILE_INVALID when it is cut short, CHECKSUM_MISMATCH.
  Status Finish();

 private:
  Status AddPrefix(std::string_view* bytes);

  Sha256 hash_;
  std::string prefix_;    // until the header is whole
  bool has_header_ = false;
  api::AdapterFileHeader header_;
  int64_t numbers_left_ = 0;  // bytes not yet added
  std::string numbers_;       // added, not yet taken
  std::string checksum_;
};

}  // namespace refocus
