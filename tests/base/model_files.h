// Writes weight and configuration files for tests, correct or deliberately broken, into a folder that goes away.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "base/status.h"

namespace refocus {

class TempDir {
 public:
  TempDir() {
    // Rewriting a file on some disks takes milliseconds; some tests do it thousands of times.
    const bool memory = std::filesystem::is_directory("/dev/shm");
    const std::filesystem::path parent = memory ? "/dev/shm" : std::filesystem::temp_directory_path();
    std::string name = (parent / "refocus-test-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "mkdtemp " << name;
    path_ = name;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;

  const std::string& path() const { return path_; }

  // Returns the file's path.
  std::string Write(const std::string& name, std::string_view bytes) const {
    const std::string file = path_ + "/" + name;
    std::ofstream out(file, std::ios::binary);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    EXPECT_TRUE(out.good()) << file;
    return file;
  }

 private:
  std::string path_;
};

// A number's bytes in the file formats' order; tests run on little-endian hosts only.
template <typename T>
std::string Bytes(T value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

inline std::string FloatBytes(const std::vector<float>& values) {
  std::string bytes;
  for (const float value : values) bytes += Bytes(value);
  return bytes;
}

inline std::string Safetensors(std::string_view header, std::string_view data) {
  return Bytes<uint64_t>(header.size()) + std::string(header) + std::string(data);
}

// A GGUF file piece by piece. Counts, offsets and padding are right unless a test sets them.
class GgufBuilder {
 public:
  static std::string String(std::string_view text) { return Bytes<uint64_t>(text.size()) + std::string(text); }

  // `value` with its type in front, already encoded.
  GgufBuilder& Raw(std::string_view key, uint32_t type, std::string_view value) {
    metadata_ += String(key) + Bytes(type) + std::string(value);
    ++keys_;
    return *this;
  }
  GgufBuilder& U32(std::string_view key, uint32_t value) { return Raw(key, 4, Bytes(value)); }
  GgufBuilder& F32(std::string_view key, float value) { return Raw(key, 6, Bytes(value)); }
  GgufBuilder& Text(std::string_view key, std::string_view value) { return Raw(key, 8, String(value)); }
  GgufBuilder& Texts(std::string_view key, const std::vector<std::string>& values) {
    std::string bytes = Bytes<uint32_t>(8) + Bytes<uint64_t>(values.size());
    for (const std::string& value : values) bytes += String(value);
    return Raw(key, 9, bytes);
  }
  // dimensions: fastest first, as the format has them. Data are placed one after the other.
  GgufBuilder& Tensor(std::string_view name, const std::vector<uint64_t>& dimensions, uint32_t type,
                      std::string_view data) {
    return TensorAt(name, dimensions, type, data_.size(), data);
  }
  GgufBuilder& TensorAt(std::string_view name, const std::vector<uint64_t>& dimensions, uint32_t type, uint64_t offset,
                        std::string_view data) {
    tensors_ += String(name) + Bytes(static_cast<uint32_t>(dimensions.size()));
    for (const uint64_t size : dimensions) tensors_ += Bytes(size);
    tensors_ += Bytes(type) + Bytes(offset);
    ++tensor_count_;
    data_ += data;
    data_.resize((data_.size() + alignment_ - 1) / alignment_ * alignment_);
    return *this;
  }
  GgufBuilder& Alignment(uint32_t alignment) {
    alignment_ = alignment;
    return U32("general.alignment", alignment);
  }

  // Everything before the data section, without padding.
  std::string Head() const { return Head(tensor_count_, keys_); }
  std::string Head(uint64_t tensors, uint64_t keys, uint32_t version = 3) const {
    return "GGUF" + Bytes(version) + Bytes(tensors) + Bytes(keys) + metadata_ + tensors_;
  }
  std::string File() const {
    std::string bytes = Head();
    bytes.resize((bytes.size() + alignment_ - 1) / alignment_ * alignment_);
    return bytes + data_;
  }

 private:
  std::string metadata_, tensors_, data_;
  uint64_t keys_ = 0, tensor_count_ = 0;
  size_t alignment_ = 32;
};

// The failure's reason, exit code and a part of its message.
inline ::testing::AssertionResult FailsWith(const Status& status, const std::string& reason, const std::string& part) {
  const std::string message(status.message());
  if (status.ok()) return ::testing::AssertionFailure() << "OK, expected " << reason;
  if (DetailOf(status).reason != reason) {
    return ::testing::AssertionFailure() << "reason '" << DetailOf(status).reason << "': " << message;
  }
  if (message.find(part) == std::string::npos)
    return ::testing::AssertionFailure() << "no '" << part << "' in: " << message;
  if (message.find('\n') != std::string::npos) return ::testing::AssertionFailure() << "more than a line: " << message;
  return ::testing::AssertionSuccess();
}

}  // namespace refocus
