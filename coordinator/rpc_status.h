// Status -> grpc::Status with google.rpc.ErrorInfo (domain "refocus") and, when a retry makes sense, RetryInfo in
// grpc-status-details-bin. Always under 4 KB: trailers share gRPC's 8 KB limit.
#pragma once

#include <grpcpp/support/status.h>

#include "base/status.h"

namespace refocus {

grpc::Status ToGrpc(const Status& status);

}  // namespace refocus
