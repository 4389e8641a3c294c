// ExportAdapter and ImportAdapter: an adapter's file as a stream. Its checksum is formed and checked here, outside the
// core's lock.
#include <optional>
#include <string>
#include <utility>

#include "base/limits.h"
#include "coordinator/context_service.h"
#include "coordinator/core/adapter_file.h"

namespace refocus {
namespace {

// Work whose caller is this call alone: stopped on every path on which it has not ended.
class OwnJob {
 public:
  OwnJob(Hub& hub, std::shared_ptr<Job> job, std::shared_ptr<Wakeup> wakeup)
      : hub_(hub), job_(std::move(job)), watching_(hub, job_->id(), std::move(wakeup)) {}
  ~OwnJob() { Stop(absl::CancelledError("the caller went away")); }
  OwnJob(const OwnJob&) = delete;
  OwnJob& operator=(const OwnJob&) = delete;
  void Stop(const Status& why) {
    hub_.With([&](Coordinator& core) { core.Stop(*job_, why); });
  }
  bool ended() {
    return hub_.With([&](Coordinator&) { return job_->ended(); });
  }

 private:
  Hub& hub_;
  const std::shared_ptr<Job> job_;
  const Watching watching_;
};

}  // namespace

grpc::ServerWriteReactor<api::ExportAdapterResponse>* ContextService::ExportAdapter(
    grpc::CallbackServerContext*, const api::ExportAdapterRequest* request) {
  return ExportCall::Start(hub_.calls(),
                           [this, request = *request](ExportCall& call) { return Export(call, request); });
}

Status ContextService::Export(ExportCall& call, const api::ExportAdapterRequest& request) {
  REFOCUS_ASSIGN_OR_RETURN(const std::shared_ptr<ExportJob> job, hub_.With([&](Coordinator& core) {
    const Status admitted = core.Admit();
    return admitted.ok() ? core.Export(request) : StatusOr<std::shared_ptr<ExportJob>>(admitted);
  }));
  const OwnJob own(hub_, job, call.wakeup());
  Sha256 hash;
  api::ExportAdapterResponse message;
  message.set_data(AdapterFilePrefix(job->header()));
  message.set_total_bytes(static_cast<int64_t>(message.data().size()) + job->header().data_bytes() + kChecksumBytes);
  int64_t left = job->header().data_bytes();
  while (true) {
    hash.Update(message.data().data(), message.data().size());
    call.Write(std::move(message));
    if (left == 0) break;
    REFOCUS_RETURN_IF_ERROR(Flush(call));
    message = api::ExportAdapterResponse();
    while (message.data().empty()) {
      REFOCUS_RETURN_IF_ERROR(call.Gone());
      Status status;
      message.set_data(hub_.With([&](Coordinator& core) {
        if (job->stopping() && !job->status().ok()) status = job->status();
        return status.ok() ? core.TakeExported(*job) : std::string();
      }));
      REFOCUS_RETURN_IF_ERROR(status);
      if (message.data().empty()) call.Wait(kCallPollSeconds);
    }
    left -= static_cast<int64_t>(message.data().size());
  }
  REFOCUS_RETURN_IF_ERROR(Flush(call));
  message = api::ExportAdapterResponse();
  message.set_data(hash.Finish());
  call.Write(std::move(message));
  return Flush(call);
}

grpc::ServerReadReactor<api::ImportAdapterRequest>* ContextService::ImportAdapter(grpc::CallbackServerContext*,
                                                                                  api::Adapter* response) {
  return ImportCall::Start(hub_.calls(), [this, response](ImportCall& call) { return Import(call, response); });
}

Status ContextService::Import(ImportCall& call, api::Adapter* response) {
  REFOCUS_RETURN_IF_ERROR(hub_.With([](Coordinator& core) { return core.Admit(); }));
  std::shared_ptr<ImportJob> job;
  const Status status = Guarded([&] { return TakeFile(call, &job); });
  if (job == nullptr) return status;
  OwnJob own(hub_, job, call.wakeup());
  if (status.ok()) {
    hub_.With([&](Coordinator& core) { core.FinishImport(*job); });
  } else {
    own.Stop(status);
  }
  // Also after a failure: the context is as it was, and free, when the caller hears of it.
  while (!own.ended()) {
    REFOCUS_RETURN_IF_ERROR(call.Gone());
    call.Wait(kCallPollSeconds);
  }
  return hub_.With([&](Coordinator&) {
    if (job->committed()) *response = *job->committed();
    return job->committed() ? absl::OkStatus() : job->status();
  });
}

// The whole file, checked; its numbers are on their way to the ranks in `job`, which is null until its header is known.
Status ContextService::TakeFile(ImportCall& call, std::shared_ptr<ImportJob>* job) {
  api::ImportAdapterRequest message;
  Status next = NextMessage(call, upload_stall_seconds_, &message);
  if (HalfClosed(next) || (next.ok() && !message.has_header()))
    return FieldError("message", "no header", "header first");
  REFOCUS_RETURN_IF_ERROR(next);
  const api::ImportAdapterRequest::Header header = message.header();
  AdapterFileReader file;
  std::optional<Watching> watching;
  while (true) {
    next = NextMessage(call, upload_stall_seconds_, &message);
    if (HalfClosed(next)) return FieldError("message", "the end of the stream", "finish last");
    REFOCUS_RETURN_IF_ERROR(next);
    if (message.has_finish()) break;
    if (message.message_case() != api::ImportAdapterRequest::kData)
      return FieldError("message", message.has_header() ? "a second header" : "nothing", "data or finish");
    REFOCUS_RETURN_IF_ERROR(file.Add(message.data()));
    if (!file.has_header()) continue;
    if (*job == nullptr) {
      REFOCUS_ASSIGN_OR_RETURN(
          *job, hub_.With([&](Coordinator& core) { return core.Import(header, file.header()); }));
      watching.emplace(hub_, (*job)->id(), call.wakeup());
    }
    REFOCUS_RETURN_IF_ERROR(PassNumbers(call, file, **job));
  }
  return file.Finish();
}

// What the file has given so far, to the ranks, as they take it.
Status ContextService::PassNumbers(ImportCall& call, AdapterFileReader& file, ImportJob& job) {
  while (true) {
    std::string piece = file.TakeNumbers(kDeltaPieceNumbers);
    if (piece.empty()) return absl::OkStatus();
    while (!piece.empty()) {
      REFOCUS_RETURN_IF_ERROR(call.Gone());
      Status status;
      hub_.With([&](Coordinator& core) {
        if (job.stopping()) {
          status = job.status();
        } else if (!job.full()) {
          core.PushImported(job, std::exchange(piece, {}));
        }
      });
      REFOCUS_RETURN_IF_ERROR(status);
      if (!piece.empty()) call.Wait(kCallPollSeconds);
    }
  }
}

}  // namespace refocus
