// Ctrl-C for client commands: the first SIGINT (or SIGTERM) cancels the call in progress, the second ends the process.
#pragma once

#include <grpcpp/client_context.h>

namespace refocus::cli {

// Once, before any other thread exists: blocks the signals everywhere and handles them on a thread of its own.
void InstallInterrupt();

// True after the first signal; the process then ends with kExitInterrupted.
bool Interrupted();

// While it lives, the first signal cancels `context`; at once when the signal came before.
class CancelOnInterrupt {
 public:
  explicit CancelOnInterrupt(grpc::ClientContext* context);
  ~CancelOnInterrupt();
  CancelOnInterrupt(const CancelOnInterrupt&) = delete;
  CancelOnInterrupt& operator=(const CancelOnInterrupt&) = delete;
};

}  // namespace refocus::cli
