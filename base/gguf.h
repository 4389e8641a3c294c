// GGUF container, versions 2 and 3: metadata and tensor table. Little-endian.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "base/tensor_file.h"

namespace refocus {

// Numbers are widened: all integers to int64 (uint64 above 2^63 - 1 is refused), f32 and f64 to double.
using GgufValue = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<double>,
                               std::vector<std::string>>;

struct GgufFile {
  std::map<std::string, GgufValue> metadata;
  TensorTable tensors;

  // WEIGHTS_INVALID naming file and key when absent or of another type.
  StatusOr<int64_t> Int(const std::string& key) const;
  StatusOr<double> Float(const std::string& key) const;  // accepts integers too
  StatusOr<std::string> String(const std::string& key) const;
  const std::vector<std::string>* Strings(const std::string& key) const;  // nullptr when absent or of another type
  const std::vector<int64_t>* Ints(const std::string& key) const;
  bool Has(const std::string& key) const { return metadata.count(key) != 0; }

  std::string path;
};

// Every count, length, alignment, offset and product is checked against the file size before allocation; duplicate keys and
// tensor names, unknown value or tensor types are WEIGHTS_INVALID with name and file offset.
StatusOr<GgufFile> ReadGguf(const std::string& path);

}  // namespace refocus
