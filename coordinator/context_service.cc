#include "coordinator/context_service.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "base/limits.h"
#include "coordinator/core/upload.h"

namespace refocus {
namespace {

constexpr int64_t kMaxUploadBytes = int64_t{1} << 30;  // of all uploads under way

using CreateCall = ReadCall<api::CreateContextRequest>;

// One upload's share of the memory for uploads, and its claim on a name.
class UploadHold {
 public:
  UploadHold(Hub& hub, std::atomic<int64_t>& total) : hub_(hub), total_(total) {}
  ~UploadHold() {
    total_ -= held_;
    hub_.With([&](Coordinator& core) { core.GiveUpUpload(ticket); });
  }
  Status Grow(int64_t bytes) {
    total_ += bytes - held_;
    held_ = bytes;
    if (total_ <= kMaxUploadBytes) return absl::OkStatus();
    return Error(StatusCode::kResourceExhausted, "UPLOAD_MEMORY",
                 "uploads under way: got more than " + std::to_string(kMaxUploadBytes) + " bytes; retry later",
                 {{"limit", std::to_string(kMaxUploadBytes)}});
  }
  Coordinator::UploadTicket ticket;

 private:
  Hub& hub_;
  std::atomic<int64_t>& total_;
  int64_t held_ = 0;
};

// A caller's part in work that others may share. Left on every path; as one who went away unless Finished() was called.
template <typename SharedJob>
class Attached {
 public:
  Attached(Hub& hub, std::shared_ptr<SharedJob> job, std::shared_ptr<Wakeup> wakeup, api::OnDisconnect on_disconnect)
      : hub_(hub), job_(std::move(job)), on_disconnect_(on_disconnect), watching_(hub, job_->id(), std::move(wakeup)) {}
  ~Attached() {
    hub_.With([&](Coordinator& core) { core.Detach(*job_, gone_, on_disconnect_); });
  }
  Attached(const Attached&) = delete;
  Attached& operator=(const Attached&) = delete;
  void Finished() { gone_ = false; }

 private:
  Hub& hub_;
  const std::shared_ptr<SharedJob> job_;
  const api::OnDisconnect on_disconnect_;
  const Watching watching_;
  bool gone_ = true;
};

}  // namespace

grpc::ServerReadReactor<api::CreateContextRequest>* ContextService::CreateContext(grpc::CallbackServerContext*,
                                                                                  api::Context* response) {
  return CreateCall::Start(hub_.calls(), [this, response](CreateCall& call) { return Create(call, response); });
}

Status ContextService::Create(CreateCall& call, api::Context* response) {
  UploadHold hold(hub_, upload_bytes_);
  api::CreateContextRequest message;
  Status next = NextMessage(call, upload_stall_seconds_, &message);
  if (HalfClosed(next) || (next.ok() && !message.has_header()))
    return FieldError("message", "no header", "header first");
  REFOCUS_RETURN_IF_ERROR(next);
  const api::CreateContextRequest::Header header = message.header();
  REFOCUS_ASSIGN_OR_RETURN(hold.ticket, hub_.With([&](Coordinator& core) { return core.BeginUpload(header); }));

  const int64_t limit = std::min(hub_.model().max_positions, kMaxContextTokens);
  Upload upload(hub_.model(), hub_.tokenizer(), limit, MaxTextBytes(limit, hub_.longest_token()));
  while (true) {
    next = NextMessage(call, upload_stall_seconds_, &message);
    if (HalfClosed(next)) {  // also how a broken message looks: never taken for the end of the text
      return FieldError("message", "the end of the stream", "finish last");
    }
    REFOCUS_RETURN_IF_ERROR(next);
    if (message.has_finish()) break;
    if (!message.has_chunk())
      return FieldError("message", message.has_header() ? "a second header" : "nothing", "chunk or finish");
    REFOCUS_RETURN_IF_ERROR(upload.Add(message.chunk()));
    REFOCUS_RETURN_IF_ERROR(hold.Grow(upload.held_bytes()));
  }
  REFOCUS_ASSIGN_OR_RETURN(TokenIds tokens, upload.Finish(header, message.finish(), hub_.chat()));
  next = NextMessage(call, upload_stall_seconds_, &message);
  if (next.ok())
    return Error(StatusCode::kFailedPrecondition, "UPLOAD_FINISHED", "message: got one after finish, allowed none");
  if (!HalfClosed(next)) return next;
  REFOCUS_ASSIGN_OR_RETURN(*response, hub_.With([&](Coordinator& core) {
    const Coordinator::UploadTicket ticket = std::exchange(hold.ticket, {});
    return core.FinishUpload(ticket, header, std::move(tokens), upload.content_hash());
  }));
  return absl::OkStatus();
}

grpc::ServerWriteReactor<api::PrefillEvent>* ContextService::PrefillContext(grpc::CallbackServerContext*,
                                                                            const api::PrefillContextRequest* request) {
  return WriteCall<api::PrefillEvent>::Start(
      hub_.calls(), [this, request = *request](WriteCall<api::PrefillEvent>& call) { return Prefill(call, request); });
}

Status ContextService::Prefill(WriteCall<api::PrefillEvent>& call, const api::PrefillContextRequest& request) {
  api::PrefillEvent ready;
  REFOCUS_ASSIGN_OR_RETURN(const Coordinator::PrefillStart start, hub_.With([&](Coordinator& core) {
    const Status admitted = core.Admit();
    auto started = admitted.ok() ? core.Prefill(request) : StatusOr<Coordinator::PrefillStart>(admitted);
    if (started.ok() && started->job == nullptr) ready = core.PrefillResult(*started->session);
    return started;
  }));
  if (start.job == nullptr) {
    call.Write(std::move(ready));
    return Flush(call);
  }
  PrefillJob& job = *start.job;
  Attached<PrefillJob> attached(hub_, start.job, call.wakeup(), request.on_disconnect());
  uint64_t seen = 0;
  bool over = false;
  while (!(over && call.CanWrite())) {
    REFOCUS_RETURN_IF_ERROR(call.Gone());
    api::PrefillEvent event;
    Status status;
    const bool fresh = hub_.With([&](Coordinator& core) {
      if (job.answered() && !job.status().ok()) status = job.status();
      if (!call.CanWrite() || over || job.version() == seen || !status.ok()) return false;
      seen = job.version();
      over = job.answered();
      event = over ? core.PrefillResult(*start.session) : job.event();
      return true;
    });
    if (!status.ok() || over) attached.Finished();
    REFOCUS_RETURN_IF_ERROR(status);
    if (fresh) {
      call.Write(std::move(event));
    } else {
      call.Wait(kCallPollSeconds);
    }
  }
  return absl::OkStatus();
}

grpc::ServerWriteReactor<api::AdaptEvent>* ContextService::AdaptContext(grpc::CallbackServerContext*,
                                                                        const api::AdaptContextRequest* request) {
  return WriteCall<api::AdaptEvent>::Start(
      hub_.calls(), [this, request = *request](WriteCall<api::AdaptEvent>& call) { return Adapt(call, request); });
}

// Admits the request; rows that it needs to know of are found here, on the call's own thread.
StatusOr<Coordinator::AdaptStart> ContextService::StartAdapt(WriteCall<api::AdaptEvent>& call,
                                                             const api::AdaptContextRequest& request) {
  const auto gone = [&] { return request.on_disconnect() == api::CANCEL && !call.Gone().ok(); };
  std::unique_lock<std::mutex> turn(search_turn_, std::defer_lock);
  FoundRows found;
  while (true) {
    REFOCUS_ASSIGN_OR_RETURN(Coordinator::AdaptStart start, hub_.With([&](Coordinator& core) {
      const Status admitted = core.Admit();
      return admitted.ok() ? core.Adapt(request, std::move(found)) : StatusOr<Coordinator::AdaptStart>(admitted);
    }));
    if (!start.search) return start;
    if (turn.owns_lock()) {
      found = find_rows_(*start.search, gone);
    } else if (!turn.try_lock()) {
      call.Wait(kCallPollSeconds);
    }  // and ask again: while others searched it may have been refused or done
    if (gone()) return call.Gone();
  }
}

Status ContextService::Adapt(WriteCall<api::AdaptEvent>& call, const api::AdaptContextRequest& request) {
  REFOCUS_ASSIGN_OR_RETURN(const Coordinator::AdaptStart start, StartAdapt(call, request));
  if (start.job == nullptr) {
    for (const api::AdaptEvent& event : start.events) {
      call.Write(event);
      REFOCUS_RETURN_IF_ERROR(Flush(call));
    }
    return absl::OkStatus();
  }
  AdaptJob& job = *start.job;
  Attached<AdaptJob> attached(hub_, start.job, call.wakeup(), request.on_disconnect());
  size_t sent = 0;
  while (true) {
    REFOCUS_RETURN_IF_ERROR(Flush(call));
    REFOCUS_RETURN_IF_ERROR(call.Gone());
    api::AdaptEvent event;
    bool over = false;
    Status status;
    const bool fresh = hub_.With([&](Coordinator&) {
      if (sent < job.events().size()) {
        event = job.events()[sent++];
        return true;
      }
      over = job.answered();
      if (over) status = job.status();
      return false;
    });
    if (over) {
      attached.Finished();
      return status;
    }
    if (fresh) {
      call.Write(std::move(event));
    } else {
      call.Wait(kCallPollSeconds);
    }
  }
}

namespace {

// Unary: admit, then ask.
template <typename F>
grpc::Status Ask(Hub& hub, F f) {
  return ToGrpc(Guarded([&] {
    return hub.With([&](Coordinator& core) -> Status {
      REFOCUS_RETURN_IF_ERROR(core.Admit());
      return f(core);
    });
  }));
}

}  // namespace

grpc::Status ContextService::GetContext(grpc::ServerContext*, const api::GetContextRequest* request,
                                        api::Context* response) {
  return Ask(hub_, [&](Coordinator& core) -> Status {
    REFOCUS_ASSIGN_OR_RETURN(*response, core.GetContext(request->name()));
    return absl::OkStatus();
  });
}

grpc::Status ContextService::ListContexts(grpc::ServerContext*, const api::ListContextsRequest* request,
                                          api::ListContextsResponse* response) {
  return Ask(hub_, [&](Coordinator& core) -> Status {
    REFOCUS_ASSIGN_OR_RETURN(*response, core.ListContexts(*request));
    return absl::OkStatus();
  });
}

grpc::Status ContextService::DeleteContext(grpc::ServerContext* context, const api::DeleteContextRequest* request,
                                           api::DeleteContextResponse*) {
  std::shared_ptr<Session> session;
  const grpc::Status status = Ask(hub_, [&](Coordinator& core) -> Status {
    REFOCUS_ASSIGN_OR_RETURN(session, core.DeleteContext(*request));
    return absl::OkStatus();
  });
  if (!status.ok() || session == nullptr) return status;
  Wakeup nobody;  // stopping work takes one command at most: polling is enough
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(delete_seconds_);
  while (hub_.With([&](Coordinator& core) { return core.Exists(session); })) {
    if (context->IsCancelled()) return ToGrpc(absl::CancelledError("the caller went away; the context goes, too"));
    if (std::chrono::steady_clock::now() > until) {
      const std::string seconds = std::to_string(static_cast<int>(delete_seconds_));
      return ToGrpc(Error(StatusCode::kDeadlineExceeded, "DEADLINE",
                          request->name() + ": its work did not stop within " + seconds +
                              " s; the context is hidden and goes as soon as it has",
                          {{"name", request->name()}, {"limit_seconds", seconds}}));
    }
    nobody.Wait(kCallPollSeconds / 5);
  }
  return status;
}

grpc::Status ContextService::ListAdapters(grpc::ServerContext*, const api::ListAdaptersRequest* request,
                                          api::ListAdaptersResponse* response) {
  return Ask(hub_, [&](Coordinator& core) -> Status {
    REFOCUS_ASSIGN_OR_RETURN(*response, core.ListAdapters(*request));
    return absl::OkStatus();
  });
}

grpc::Status ContextService::GetAdapter(grpc::ServerContext*, const api::GetAdapterRequest* request,
                                        api::Adapter* response) {
  return Ask(hub_, [&](Coordinator& core) -> Status {
    REFOCUS_ASSIGN_OR_RETURN(*response, core.GetAdapter(*request));
    return absl::OkStatus();
  });
}

grpc::Status ContextService::DeleteAdapter(grpc::ServerContext*, const api::DeleteAdapterRequest* request,
                                           api::DeleteAdapterResponse*) {
  return Ask(hub_, [&](Coordinator& core) { return core.DeleteAdapter(*request); });
}

}  // namespace refocus
