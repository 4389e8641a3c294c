// Contexts: upload.h takes an upload apart, core/requests.cc decides, core/prefill.h and core/adapt.h work; here their
// progress becomes streams.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <utility>

#include "coordinator/core/adapter_file.h"
#include "coordinator/hub.h"
#include "refocus/v1/context.grpc.pb.h"

namespace refocus {

using ContextServiceBase =
    api::ContextService::WithCallbackMethod_CreateContext<api::ContextService::WithCallbackMethod_PrefillContext<
        api::ContextService::WithCallbackMethod_AdaptContext<api::ContextService::WithCallbackMethod_ExportAdapter<
            api::ContextService::WithCallbackMethod_ImportAdapter<api::ContextService::Service>>>>>;

class ContextService : public ContextServiceBase {
 public:
  // An upload without a message for `upload_stall_seconds` ends; a deletion waits for at most `delete_seconds`.
  using RowFinder = std::function<FoundRows(const RowSearch&, const std::function<bool()>& stop)>;
  ContextService(Hub& hub, double upload_stall_seconds, double delete_seconds, RowFinder find_rows)
      : hub_(hub),
        upload_stall_seconds_(upload_stall_seconds),
        delete_seconds_(delete_seconds),
        find_rows_(std::move(find_rows)) {}

  grpc::ServerReadReactor<api::CreateContextRequest>* CreateContext(grpc::CallbackServerContext*,
                                                                    api::Context* response) override;
  grpc::ServerWriteReactor<api::PrefillEvent>* PrefillContext(grpc::CallbackServerContext*,
                                                              const api::PrefillContextRequest* request) override;
  grpc::ServerWriteReactor<api::AdaptEvent>* AdaptContext(grpc::CallbackServerContext*,
                                                          const api::AdaptContextRequest* request) override;
  grpc::Status GetContext(grpc::ServerContext*, const api::GetContextRequest* request, api::Context* response) override;
  grpc::Status ListContexts(grpc::ServerContext*, const api::ListContextsRequest* request,
                            api::ListContextsResponse* response) override;
  grpc::Status DeleteContext(grpc::ServerContext* context, const api::DeleteContextRequest* request,
                             api::DeleteContextResponse*) override;
  grpc::ServerWriteReactor<api::ExportAdapterResponse>* ExportAdapter(
      grpc::CallbackServerContext*, const api::ExportAdapterRequest* request) override;
  grpc::ServerReadReactor<api::ImportAdapterRequest>* ImportAdapter(grpc::CallbackServerContext*,
                                                                    api::Adapter* response) override;
  grpc::Status ListAdapters(grpc::ServerContext*, const api::ListAdaptersRequest* request,
                            api::ListAdaptersResponse* response) override;
  grpc::Status GetAdapter(grpc::ServerContext*, const api::GetAdapterRequest* request, api::Adapter* response) override;
  grpc::Status DeleteAdapter(grpc::ServerContext*, const api::DeleteAdapterRequest* request,
                             api::DeleteAdapterResponse*) override;

 private:
  Status Create(ReadCall<api::CreateContextRequest>& call, api::Context* response);
  Status Prefill(WriteCall<api::PrefillEvent>& call, const api::PrefillContextRequest& request);
  Status Adapt(WriteCall<api::AdaptEvent>& call, const api::AdaptContextRequest& request);
  StatusOr<Coordinator::AdaptStart> StartAdapt(WriteCall<api::AdaptEvent>& call,
                                               const api::AdaptContextRequest& request);

  using ExportCall = WriteCall<api::ExportAdapterResponse>;
  using ImportCall = ReadCall<api::ImportAdapterRequest>;
  Status Export(ExportCall& call, const api::ExportAdapterRequest& request);
  Status Import(ImportCall& call, api::Adapter* response);
  Status TakeFile(ImportCall& call, std::shared_ptr<ImportJob>* job);
  Status PassNumbers(ImportCall& call, AdapterFileReader& file, ImportJob& job);

  Hub& hub_;
  const double upload_stall_seconds_;
  const double delete_seconds_;
  const RowFinder find_rows_;
  std::mutex search_turn_;  // one call at a time searches, which takes up to 64 bytes a token
  std::atomic<int64_t> upload_bytes_{0};  // held by all uploads under way
};

}  // namespace refocus
