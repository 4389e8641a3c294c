#include "base/status.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace refocus {
namespace {

// Reason, then key and value alternating, each ended by a NUL: none of them can hold one.
constexpr char kPayloadUrl[] = "refocus/error_detail";

std::string Clean(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (c == '\0') c = '?';
  }
  return out;
}

}  // namespace

Status Error(StatusCode code, std::string_view reason, std::string_view message, const ErrorMetadata& metadata) {
  REFOCUS_CHECK(code != StatusCode::kOk);
  Status status(code, absl::string_view(message.data(), message.size()));
  std::string payload = Clean(reason);
  payload.push_back('\0');
  for (const auto& [key, value] : metadata) {
    payload += Clean(key);
    payload.push_back('\0');
    payload += Clean(value);
    payload.push_back('\0');
  }
  status.SetPayload(kPayloadUrl, absl::Cord(payload));
  return status;
}

Status FieldError(std::string_view field, std::string_view got, std::string_view allowed) {
  std::string message;
  message.append(field).append(": got ").append(got).append(", allowed ").append(allowed);
  return Error(StatusCode::kInvalidArgument, "FIELD_OUT_OF_RANGE", message,
               {{"field", std::string(field)}, {"got", std::string(got)}, {"allowed", std::string(allowed)}});
}

ErrorDetail DetailOf(const Status& status) {
  ErrorDetail detail;
  const auto payload = status.GetPayload(kPayloadUrl);
  if (!payload) return detail;
  const std::string bytes(*payload);
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t end = bytes.find('\0', begin);
    parts.push_back(bytes.substr(begin, end - begin));
    begin = end + 1;
  }
  if (!parts.empty()) detail.reason = parts[0];
  for (size_t i = 1; i + 1 < parts.size(); i += 2) detail.metadata.emplace_back(parts[i], parts[i + 1]);
  return detail;
}

ExitCode ExitCodeOf(const Status& status) {
  if (status.ok()) return kExitOk;
  const std::string reason = DetailOf(status).reason;
  if (reason == "CONFIG_INVALID") return kExitConfig;
  if (reason == "WEIGHTS_INVALID") return kExitWeights;
  if (reason == "HARDWARE") return kExitHardware;
  return kExitError;
}

}  // namespace refocus
