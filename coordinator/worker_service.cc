#include "coordinator/worker_service.h"

#include <deque>
#include <string>

#include "base/log.h"

namespace refocus {
namespace {

using JoinCall = BidiCall<wire::WorkerMessage, wire::CoordinatorMessage>;

constexpr double kHelloSeconds = 10;

// The first message, which must be a hello.
Status TakeHello(JoinCall& call, wire::Hello* hello) {
  wire::WorkerMessage message;
  while (!call.Take(&message)) {
    if (call.cancelled() || call.read_closed()) return absl::CancelledError("the worker left before its hello");
    if (call.age_seconds() > kHelloSeconds) return absl::DeadlineExceededError("no hello within 10 s");
    call.Wait(0.5);
  }
  if (!message.has_hello()) return FieldError("message", "another one", "hello first");
  *hello = message.hello();
  return absl::OkStatus();
}

// Until the rank leaves or is told to.
Status Serve(JoinCall& call, Hub& hub, uint64_t link) {
  std::deque<std::shared_ptr<const wire::CoordinatorMessage>> outbox;
  wire::WorkerMessage message;
  std::string farewell;
  while (true) {
    while (call.Take(&message)) {
      hub.With([&](Coordinator& core) { core.OnMessage(link, message); });
    }
    if (call.cancelled()) return absl::CancelledError("stream lost");
    if (call.read_closed()) return absl::CancelledError("stream ended");
    for (auto& next : hub.TakeMessages(link)) outbox.push_back(std::move(next));
    while (!outbox.empty() && call.CanWrite() && farewell.empty()) {
      if (outbox.front()->has_shutdown()) farewell = "told to leave: " + outbox.front()->shutdown().reason();
      call.Write(std::move(outbox.front()));
      outbox.pop_front();
    }
    if (!farewell.empty() && call.CanWrite()) return absl::UnavailableError(farewell);
    call.Wait(1.0);
  }
}

Status Join(JoinCall& call, Hub& hub) {
  wire::Hello hello;
  REFOCUS_RETURN_IF_ERROR(TakeHello(call, &hello));
  const std::string who = (hello.wants_rank() ? "a rank" : "rank " + std::to_string(hello.rank())) + " of " + std::to_string(hello.size()) + " (" +
                          hello.host() + ", pid " + std::to_string(hello.pid()) + ")";
  const uint64_t link = hub.OpenLink(call.wakeup());
  Status status = hub.With([&](Coordinator& core) { return core.OnHello(link, hello); });
  if (status.ok()) {
    LogInfo(who + " joined");
    status = Guarded([&] { return Serve(call, hub, link); });
    hub.With([&](Coordinator& core) { core.OnClosed(link, "closed its stream"); });
    LogInfo(who + " left: " + std::string(status.message()));
  } else {
    LogWarning(who + " was refused: " + std::string(status.message()));
  }
  hub.CloseLink(link);
  return status;
}

}  // namespace

grpc::ServerBidiReactor<wire::WorkerMessage, wire::CoordinatorMessage>* WorkerService::Join(
    grpc::CallbackServerContext*) {
  return JoinCall::Start(hub_.links(), [this](JoinCall& call) { return refocus::Join(call, hub_); });
}

}  // namespace refocus
