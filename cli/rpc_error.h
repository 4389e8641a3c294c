// gRPC statuses of the public API as Status, and as text for people.
#pragma once

#include <grpcpp/support/status.h>

#include <optional>
#include <string>

#include "base/status.h"

namespace refocus::cli {

// Keeps code, message, and the reason and metadata of google.rpc.ErrorInfo. A status without one has an empty reason.
Status FromGrpc(const grpc::Status& status);

// How long the server asks to wait (google.rpc.RetryInfo), seconds.
std::optional<double> RetryDelay(const grpc::Status& status);

// One line: "<message> [REASON, CODE]". The variable parts that the message does not show follow, indented, one a line.
std::string Describe(const Status& status);

}  // namespace refocus::cli
