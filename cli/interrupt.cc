#include "cli/interrupt.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "base/status.h"

namespace refocus::cli {
namespace {

std::atomic<bool> interrupted{false};
std::mutex mutex;
grpc::ClientContext* current = nullptr;  // guarded by mutex; one call at a time

void Watch(sigset_t signals) {
  for (int count = 1;; ++count) {
    int signal = 0;
    if (sigwait(&signals, &signal) != 0) return;
    if (count > 1) _exit(kExitInterrupted);
    const std::lock_guard lock(mutex);
    interrupted = true;
    if (current != nullptr) current->TryCancel();
  }
}

}  // namespace

void InstallInterrupt() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::thread(Watch, signals).detach();
}

bool Interrupted() { return interrupted; }

CancelOnInterrupt::CancelOnInterrupt(grpc::ClientContext* context) {
  const std::lock_guard lock(mutex);
  current = context;
  if (interrupted) context->TryCancel();
}

CancelOnInterrupt::~CancelOnInterrupt() {
  const std::lock_guard lock(mutex);
  current = nullptr;
}

}  // namespace refocus::cli
