// What both weight containers offer: named, typed, shaped byte ranges that were checked against the file before anything was
// allocated. Read with pread, never mapped: a file cut short under a mapping would raise SIGBUS.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/status.h"

namespace refocus {

enum class TensorType { kF32, kF16, kBf16, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ6_K };
std::string TensorTypeName(TensorType type);

struct TensorInfo {
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;  // row-major, slowest first (GGUF's order reversed); empty: a scalar
  std::string file;            // absolute or as given
  int64_t offset = 0;          // bytes from the file's start
  int64_t bytes = 0;
  int64_t elements() const;
};

using TensorTable = std::unordered_map<std::string, TensorInfo>;

// Bytes of `elements` values, or an error when they do not fill whole blocks or overflow.
StatusOr<int64_t> TensorBytes(TensorType type, int64_t elements);

// Reads info's bytes into `out` [info.bytes]. WEIGHTS_INVALID when the file is shorter than it was. Thread-safe.
Status ReadTensorBytes(const TensorInfo& info, void* out);

// Values in one block of the type: what rows are multiples of.
int64_t BlockElements(TensorType type);

// Decodes `elements` values (a multiple of the type's block) to fp32. Pure; exact for F32, F16, BF16.
void DecodeToFloat(TensorType type, const void* in, int64_t elements, float* out);

}  // namespace refocus
