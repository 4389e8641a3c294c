// absl::Status with what a caller can act on: a stable reason and every variable part of the message.
//
// Three kinds of failure, not mixed: a bad request or a failed operation is a Status; a broken invariant is REFOCUS_CHECK.
// The reason and metadata become google.rpc.ErrorInfo on the public API (coordinator/rpc_status.h) and fields of Result on
// the worker link. Message style, one line: what, got, allowed, what to do.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace refocus {

using absl::Status;
using absl::StatusCode;
using absl::StatusOr;

using ErrorMetadata = std::vector<std::pair<std::string, std::string>>;

struct ErrorDetail {
  std::string reason;  // UPPER_SNAKE_CASE, empty when the status carries none
  ErrorMetadata metadata;
};

// `code` must not be kOk.
Status Error(StatusCode code, std::string_view reason, std::string_view message, const ErrorMetadata& metadata = {});

// Shorthand for the most frequent one: INVALID_ARGUMENT FIELD_OUT_OF_RANGE with metadata field, got, allowed, and the message
// "<field>: got <got>, allowed <allowed>".
Status FieldError(std::string_view field, std::string_view got, std::string_view allowed);

ErrorDetail DetailOf(const Status& status);

// Documented exit codes of every binary (reliability promise): planned stop, configuration, weights, hardware, group failure.
enum ExitCode : int {
  kExitOk = 0,
  kExitError = 1,        // the command line client: the call failed
  kExitConfig = 2,
  kExitWeights = 3,
  kExitHardware = 4,
  kExitGroup = 5,
  kExitInterrupted = 130,
};

// A start-up failure and how the process must end; used by loaders. An OK status means success.
// Reasons CONFIG_INVALID and WEIGHTS_INVALID map to kExitConfig and kExitWeights, HARDWARE to kExitHardware, else kExitError.
ExitCode ExitCodeOf(const Status& status);

}  // namespace refocus

#define REFOCUS_RETURN_IF_ERROR(expression)                       \
  do {                                                            \
    if (::refocus::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

#define REFOCUS_CONCAT_(a, b) a##b
#define REFOCUS_CONCAT(a, b) REFOCUS_CONCAT_(a, b)
// REFOCUS_ASSIGN_OR_RETURN(auto x, F()): x from a StatusOr, or return its status.
#define REFOCUS_ASSIGN_OR_RETURN(declaration, expression) \
  REFOCUS_ASSIGN_OR_RETURN_(REFOCUS_CONCAT(status_or_, __LINE__), declaration, expression)
#define REFOCUS_ASSIGN_OR_RETURN_(temporary, declaration, expression) \
  auto temporary = (expression);                                      \
  if (!temporary.ok()) return temporary.status();                     \
  declaration = std::move(temporary).value()
