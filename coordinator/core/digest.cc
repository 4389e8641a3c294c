#include "coordinator/core/digest.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <openssl/evp.h>

#include "base/check.h"

namespace refocus {

void Sha256::Free::operator()(void* context) const { EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(context)); }

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  REFOCUS_CHECK(context_ != nullptr);
  REFOCUS_CHECK_EQ(EVP_DigestInit_ex(static_cast<EVP_MD_CTX*>(context_.get()), EVP_sha256(), nullptr), 1);
}

Sha256::~Sha256() = default;

void Sha256::Update(const void* data, size_t bytes) {
  REFOCUS_CHECK_EQ(EVP_DigestUpdate(static_cast<EVP_MD_CTX*>(context_.get()), data, bytes), 1);
}

std::string Sha256::Finish() {
  std::string out(32, '\0');
  unsigned int size = 0;
  REFOCUS_CHECK_EQ(
      EVP_DigestFinal_ex(static_cast<EVP_MD_CTX*>(context_.get()), reinterpret_cast<unsigned char*>(out.data()), &size),
      1);
  REFOCUS_CHECK_EQ(size, 32u);
  return out;
}

std::string Digest(std::string_view data) {
  Sha256 hash;
  hash.Update(data.data(), data.size());
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const unsigned char byte : hash.Finish()) {
    hex.push_back(kDigits[byte >> 4]);
    hex.push_back(kDigits[byte & 15]);
  }
  return hex;
}

std::string MessageDigest(const google::protobuf::Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream sink(&bytes);
    google::protobuf::io::CodedOutputStream out(&sink);
    out.SetSerializationDeterministic(true);
    REFOCUS_CHECK(message.SerializeToCodedStream(&out));
  }
  return Digest(bytes);
}

}  // namespace refocus
