#include "cli/rpc_error.h"

#include "google/rpc/error_details.pb.h"

namespace refocus::cli {
namespace {

template <typename Detail>
std::optional<Detail> FindDetail(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return std::nullopt;
  for (const auto& any : details.details()) {
    Detail detail;
    if (any.Is<Detail>() && any.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

}  // namespace

Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<StatusCode>(status.error_code());
  const auto info = FindDetail<google::rpc::ErrorInfo>(status);
  ErrorMetadata metadata;
  if (info) {
    metadata.assign(info->metadata().begin(), info->metadata().end());
    std::sort(metadata.begin(), metadata.end());
  }
  return Error(code, info ? info->reason() : "", status.error_message(), metadata);
}

std::optional<double> RetryDelay(const grpc::Status& status) {
  const auto info = FindDetail<google::rpc::RetryInfo>(status);
  if (!info) return std::nullopt;
  return static_cast<double>(info->retry_delay().seconds()) + 1e-9 * info->retry_delay().nanos();
}

std::string Describe(const Status& status) {
  const ErrorDetail detail = DetailOf(status);
  const std::string message(status.message().data(), status.message().size());
  std::string text = message.empty() ? "no message" : message;
  text += " [";
  if (!detail.reason.empty()) text += detail.reason + ", ";
  text += absl::StatusCodeToString(status.code()) + "]";
  for (const auto& [key, value] : detail.metadata) {
    if (message.find(value) == std::string::npos) text += "\n  " + key + ": " + value;
  }
  return text;
}

}  // namespace refocus::cli
