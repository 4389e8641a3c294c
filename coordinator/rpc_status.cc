#include "coordinator/rpc_status.h"

#include <cstdlib>
#include <string>

#include "google/rpc/error_details.pb.h"

namespace refocus {
namespace {

constexpr size_t kMaxMessageBytes = 1024;
constexpr size_t kMaxValueBytes = 256;
constexpr size_t kMaxMetadataBytes = 1500;
constexpr char kTypePrefix[] = "type.googleapis.com/";

// Cut at a character, so that the field stays valid UTF-8.
std::string Cut(std::string text, size_t bytes) {
  if (text.size() <= bytes) return text;
  while (bytes > 0 && (static_cast<unsigned char>(text[bytes]) & 0xc0) == 0x80) --bytes;
  return text.substr(0, bytes);
}

// Seconds after which another try may succeed; 0: retrying does not help. Who refused may know better.
int64_t RetrySeconds(const std::string& reason, const ErrorMetadata& metadata) {
  for (const auto& [key, value] : metadata) {
    if (key == "retry_seconds") return std::atoll(value.c_str());
  }
  if (reason == "WORKER_LOST" || reason == "GROUP_REBUILDING") return 2;
  if (reason == "QUEUE_FULL") return 1;
  if (reason == "DRAINING") return 5;
  return 0;
}

void Pack(const google::protobuf::Message& message, google::rpc::Status* out) {
  google::protobuf::Any* any = out->add_details();
  any->set_type_url(kTypePrefix + message.GetDescriptor()->full_name());
  any->set_value(message.SerializeAsString());
}

}  // namespace

grpc::Status ToGrpc(const Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());
  const std::string message = Cut(std::string(status.message()), kMaxMessageBytes);
  const ErrorDetail detail = DetailOf(status);
  if (detail.reason.empty()) return grpc::Status(code, message);

  google::rpc::Status out;
  out.set_code(static_cast<int32_t>(code));
  out.set_message(message);
  google::rpc::ErrorInfo info;
  info.set_reason(detail.reason);
  info.set_domain("refocus");
  size_t bytes = 0;
  for (const auto& [key, value] : detail.metadata) {
    const std::string cut = Cut(value, kMaxValueBytes);
    bytes += key.size() + cut.size();
    if (bytes > kMaxMetadataBytes) break;
    (*info.mutable_metadata())[key] = cut;
  }
  Pack(info, &out);
  if (const int64_t seconds = RetrySeconds(detail.reason, detail.metadata); seconds > 0) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(seconds);
    Pack(retry, &out);
  }
  return grpc::Status(code, message, out.SerializeAsString());
}

}  // namespace refocus
