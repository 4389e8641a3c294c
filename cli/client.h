// Client of the public API: connection, deadlines, retries. One call at a time; the first Ctrl-C cancels it.
//
// UNAVAILABLE is retried on reads alone (Get, List, Tokenize, health), with back-off and jitter and never before the
// delay that the server asks for. Nothing else is retried: what a lost connection left behind is for the
// caller to look at.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "refocus/v1/cluster.grpc.pb.h"
#include "refocus/v1/context.grpc.pb.h"
#include "refocus/v1/inference.grpc.pb.h"

namespace refocus::cli {

inline constexpr char kDefaultAddress[] = "127.0.0.1:7070";

struct ClientOptions {
  std::string address = kDefaultAddress;  // host:port
  double read_seconds = 20;               // deadline of a read, retries included
  double stream_seconds = 3600;           // deadline of everything else
  int max_attempts = 4;                   // of a read
};

class Client {
 public:
  explicit Client(const ClientOptions& options);

  StatusOr<v1::Model> GetModel();
  StatusOr<v1::GetClusterResponse> GetCluster();
  StatusOr<v1::Context> GetContext(const std::string& name);
  StatusOr<std::vector<v1::Context>> ListContexts();  // all pages
  StatusOr<std::vector<uint32_t>> Tokenize(const std::string& text, bool allow_special, bool add_bos);
  StatusOr<std::string> Detokenize(const std::vector<uint32_t>& ids);
  // grpc.health.v1 of the whole server: true when SERVING.
  StatusOr<bool> Healthy();

  // Ids of a text of any length as if it were tokenized in one call: cut where no piece
  // of a tokenizer can span the cut.
  StatusOr<std::vector<uint32_t>> TokenizeDocument(std::string_view text);

  // Exactly one of text and ids is sent, in chunks with offsets, total and SHA-256;
  // `on_sent(bytes or ids so far, total)`.
  struct Content {
    std::string_view text;
    const std::vector<uint32_t>* ids = nullptr;
  };
  StatusOr<v1::Context> CreateContext(const v1::CreateContextRequest::Header& header, const Content& content,
                                      const std::function<void(int64_t, int64_t)>& on_sent);
  Status DeleteContext(const v1::DeleteContextRequest& request);
  Status DeleteAdapter(const v1::DeleteAdapterRequest& request);
  StatusOr<std::vector<v1::Adapter>> ListAdapters(const std::string& name);
  // The file in order; `on_data` false: give up (CANCELLED).
  Status ExportAdapter(const v1::ExportAdapterRequest& request, const std::function<bool(const std::string&)>& on_data);
  // `next` gives the file's next bytes, empty at its end.
  StatusOr<v1::Adapter> ImportAdapter(const v1::ImportAdapterRequest::Header& header,
                                      const std::function<Status(std::string*)>& next);

  Status Prefill(const v1::PrefillContextRequest& request,
                 const std::function<void(const v1::PrefillEvent&)>& on_event);
  Status Adapt(const v1::AdaptContextRequest& request, const std::function<void(const v1::AdaptEvent&)>& on_event);
  Status Generate(const v1::GenerateRequest& request, const std::function<void(const v1::GenerateEvent&)>& on_event);
  Status ProbeAttention(const v1::ProbeAttentionRequest& request,
                        const std::function<void(const v1::ProbeAttentionEvent&)>& on_event);
  // RESULTS_MISSING when the stream ends well but with fewer results than requests.
  Status Score(const std::vector<v1::ScoreRequest>& requests,
               const std::function<void(const v1::ScoreEvent&)>& on_event);

 private:
  template <typename Call>
  Status Read(const Call& call);
  Status Explain(const grpc::Status& status) const;

  ClientOptions options_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::ContextService::Stub> contexts_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
  std::unique_ptr<v1::ClusterService::Stub> cluster_;
};

// "pride" and "contexts/pride" name the same context.
std::string ContextName(const std::string& name);

// Unique, printable; for request_id fields.
std::string NewRequestId();

}  // namespace refocus::cli
