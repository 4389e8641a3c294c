// SHA-256, in one piece or bit by bit.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include <google/protobuf/message.h>

namespace refocus {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  void Update(const void* data, size_t bytes);
  std::string Finish();  // 32 bytes; once

 private:
  struct Free {
    void operator()(void* context) const;
  };
  std::unique_ptr<void, Free> context_;
};

std::string Digest(std::string_view data);                            // 64 hex digits
std::string MessageDigest(const google::protobuf::Message& message);  // of its bytes, maps in the order of their keys

}  // namespace refocus
