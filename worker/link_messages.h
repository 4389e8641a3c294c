// Protobuf to and from worker/command.h. Everything received is checked here, before the engine sees it.
#pragma once

#include "base/status.h"
#include "refocus/internal/v1/group.pb.h"
#include "worker/command.h"

namespace refocus {

// INVALID_ARGUMENT naming field, got and allowed; TOKEN_ID_OUT_OF_RANGE for an id outside [0, vocab).
StatusOr<Command> ReadCommand(const internal::v1::Command& message, int64_t vocab);

internal::v1::Result WriteResult(const Result& result);

}  // namespace refocus
