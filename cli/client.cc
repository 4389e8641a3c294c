#include "cli/client.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <openssl/evp.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <random>
#include <thread>

#include "base/limits.h"
#include "cli/interrupt.h"
#include "cli/rpc_error.h"

namespace refocus::cli {
namespace {

using Clock = std::chrono::system_clock;

// A tokenize answer has up to one id a byte: the pieces leave room for that.
constexpr size_t kTokenizePieceBytes = 192 << 10;
constexpr double kFirstBackoffSeconds = 0.2;

static_assert(std::endian::native == std::endian::little, "checksums of ids are defined on little-endian bytes");

Clock::time_point After(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2'000);
  arguments.SetMaxReceiveMessageSize(4 << 20);
  // The server is named by its own address; a proxy for web pages cannot reach 127.0.0.1 of this machine.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) { EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr); }
  void Update(const void* data, size_t size) { EVP_DigestUpdate(context_.get(), data, size); }
  std::string Finish() {
    std::string digest(EVP_MAX_MD_SIZE, '\0');
    unsigned int size = 0;
    EVP_DigestFinal_ex(context_.get(), reinterpret_cast<unsigned char*>(digest.data()), &size);
    digest.resize(size);
    return digest;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

template <typename Event>
grpc::Status Drain(grpc::ClientReader<Event>* reader, const std::function<void(const Event&)>& on_event) {
  Event event;
  while (reader->Read(&event)) on_event(event);
  return reader->Finish();
}

}  // namespace

std::string ContextName(const std::string& name) {
  return name.starts_with("contexts/") ? name : "contexts/" + name;
}

std::string NewRequestId() {
  std::random_device random;
  std::string id = "cli-";
  for (int i = 0; i < 16; ++i) id += "0123456789abcdef"[random() & 15];
  return id;
}

Client::Client(const ClientOptions& options)
    : options_(options),
      channel_(Connect(options.address)),
      contexts_(v1::ContextService::NewStub(channel_)),
      inference_(v1::InferenceService::NewStub(channel_)),
      cluster_(v1::ClusterService::NewStub(channel_)) {}

Status Client::Explain(const grpc::Status& status) const {
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE && status.error_details().empty() &&
      channel_->GetState(false) != GRPC_CHANNEL_READY) {
    return Error(StatusCode::kUnavailable, "NOT_REACHABLE",
                 "cannot reach a server at " + options_.address +
                     ": start one with 'refocus serve', or set --address or REFOCUS_ADDRESS",
                 {{"address", options_.address}, {"cause", status.error_message()}});
  }
  return FromGrpc(status);
}

template <typename Call>
Status Client::Read(const Call& call) {
  const auto deadline = After(options_.read_seconds);
  double backoff = kFirstBackoffSeconds;
  for (int attempt = 1;; ++attempt) {
    grpc::Status status;
    {
      grpc::ClientContext context;
      context.set_deadline(deadline);
      const CancelOnInterrupt cancel(&context);
      status = call(&context);
    }
    const bool again = status.error_code() == grpc::StatusCode::UNAVAILABLE && attempt < options_.max_attempts;
    // Jitter: clients that lost the same server do not come back together.
    const double wait = std::max(RetryDelay(status).value_or(0), backoff * (0.5 + std::rand() / (2.0 * RAND_MAX)));
    if (!again || Interrupted() || After(wait) >= deadline) return Explain(status);
    std::this_thread::sleep_for(std::chrono::duration<double>(wait));
    backoff *= 2;
  }
}

StatusOr<v1::Model> Client::GetModel() {
  v1::Model model;
  REFOCUS_RETURN_IF_ERROR(
      Read([&](grpc::ClientContext* context) { return cluster_->GetModel(context, v1::GetModelRequest(), &model); }));
  return model;
}

StatusOr<v1::GetClusterResponse> Client::GetCluster() {
  v1::GetClusterResponse response;
  REFOCUS_RETURN_IF_ERROR(Read(
      [&](grpc::ClientContext* context) { return cluster_->GetCluster(context, v1::GetClusterRequest(), &response); }));
  return response;
}

StatusOr<v1::Context> Client::GetContext(const std::string& name) {
  v1::GetContextRequest request;
  request.set_name(name);
  v1::Context response;
  REFOCUS_RETURN_IF_ERROR(
      Read([&](grpc::ClientContext* context) { return contexts_->GetContext(context, request, &response); }));
  return response;
}

StatusOr<std::vector<v1::Context>> Client::ListContexts() {
  std::vector<v1::Context> all;
  v1::ListContextsRequest request;
  request.set_page_size(1000);
  do {
    v1::ListContextsResponse page;
    REFOCUS_RETURN_IF_ERROR(
        Read([&](grpc::ClientContext* context) { return contexts_->ListContexts(context, request, &page); }));
    all.insert(all.end(), page.contexts().begin(), page.contexts().end());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return all;
}

StatusOr<std::vector<uint32_t>> Client::Tokenize(const std::string& text, bool allow_special, bool add_bos) {
  v1::TokenizeRequest request;
  request.set_text(text);
  request.set_allow_special(allow_special);
  request.set_add_bos(add_bos);
  v1::TokenizeResponse response;
  REFOCUS_RETURN_IF_ERROR(
      Read([&](grpc::ClientContext* context) { return inference_->Tokenize(context, request, &response); }));
  return std::vector<uint32_t>(response.ids().begin(), response.ids().end());
}

StatusOr<std::string> Client::Detokenize(const std::vector<uint32_t>& ids) {
  v1::DetokenizeRequest request;
  request.mutable_ids()->Add(ids.begin(), ids.end());
  v1::DetokenizeResponse response;
  REFOCUS_RETURN_IF_ERROR(
      Read([&](grpc::ClientContext* context) { return inference_->Detokenize(context, request, &response); }));
  return response.text();
}

StatusOr<bool> Client::Healthy() {
  // HealthCheckRequest for "" is empty; HealthCheckResponse has one field, status = 1 (varint), and SERVING is 1. That
  // much by hand keeps the health proto out of the build.
  grpc::ByteBuffer response;
  REFOCUS_RETURN_IF_ERROR(Read([&](grpc::ClientContext* context) {
    const grpc::Slice empty("");
    grpc::ByteBuffer request(&empty, 1);
    grpc::CompletionQueue queue;
    grpc::GenericStub stub(channel_);
    auto call = stub.PrepareUnaryCall(context, "/grpc.health.v1.Health/Check", request, &queue);
    grpc::Status status;
    call->StartCall();
    call->Finish(&response, &status, call.get());
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    return status;
  }));
  grpc::Slice slice;
  if (!response.DumpToSingleSlice(&slice).ok()) return false;
  return slice.size() == 2 && slice.begin()[0] == 8 && slice.begin()[1] == 1;
}

StatusOr<std::vector<uint32_t>> Client::TokenizeDocument(std::string_view text) {
  // Every supported pre-tokenizer ends a piece at a line break that an ASCII letter follows, and no
  // normalization joins the two.
  std::vector<uint32_t> ids;
  while (!text.empty()) {
    size_t end = text.size();
    if (end > kTokenizePieceBytes) {
      end = kTokenizePieceBytes;
      while (end > 0 && !(text[end - 1] == '\n' && (text[end] | 32) >= 'a' && (text[end] | 32) <= 'z')) --end;
      if (end == 0) {
        return Error(
            StatusCode::kInvalidArgument, "TEXT_NOT_CUTTABLE",
            "text: got " + std::to_string(kTokenizePieceBytes) +
                " bytes without a line that begins with a letter, which --max-tokens needs; break the lines");
      }
    }
    REFOCUS_ASSIGN_OR_RETURN(const auto piece, Tokenize(std::string(text.substr(0, end)), false, false));
    ids.insert(ids.end(), piece.begin(), piece.end());
    text.remove_prefix(end);
  }
  return ids;
}

StatusOr<v1::Context> Client::CreateContext(const v1::CreateContextRequest::Header& header, const Content& content,
                                            const std::function<void(int64_t, int64_t)>& on_sent) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  v1::Context response;
  const auto writer = contexts_->CreateContext(&context, &response);

  v1::CreateContextRequest message;
  *message.mutable_header() = header;
  bool alive = writer->Write(message);

  const bool as_ids = content.ids != nullptr;
  const int64_t unit = as_ids ? 4 : 1;
  const int64_t total = as_ids ? static_cast<int64_t>(content.ids->size()) : static_cast<int64_t>(content.text.size());
  const int64_t step = kUploadChunkBytes / unit;
  Sha256 sha;
  for (int64_t offset = 0; alive && offset < total; offset += step) {
    const int64_t count = std::min(step, total - offset);
    auto* chunk = message.mutable_chunk();
    chunk->Clear();
    chunk->set_offset(offset);
    if (as_ids) {
      const uint32_t* first = content.ids->data() + offset;
      chunk->mutable_ids()->mutable_ids()->Add(first, first + count);
      sha.Update(first, static_cast<size_t>(count * unit));
    } else {
      chunk->set_text(content.text.data() + offset, static_cast<size_t>(count));
      sha.Update(content.text.data() + offset, static_cast<size_t>(count));
    }
    alive = writer->Write(message);
    if (alive && on_sent) on_sent(offset + count, total);
  }
  if (alive) {
    message.mutable_finish()->set_total(total);
    message.mutable_finish()->set_sha256(sha.Finish());
    writer->Write(message);
  }
  writer->WritesDone();
  REFOCUS_RETURN_IF_ERROR(Explain(writer->Finish()));
  return response;
}

Status Client::DeleteContext(const v1::DeleteContextRequest& request) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.read_seconds));
  const CancelOnInterrupt cancel(&context);
  v1::DeleteContextResponse response;
  return Explain(contexts_->DeleteContext(&context, request, &response));
}

Status Client::DeleteAdapter(const v1::DeleteAdapterRequest& request) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.read_seconds));
  const CancelOnInterrupt cancel(&context);
  v1::DeleteAdapterResponse response;
  return Explain(contexts_->DeleteAdapter(&context, request, &response));
}

StatusOr<std::vector<v1::Adapter>> Client::ListAdapters(const std::string& name) {
  v1::ListAdaptersRequest request;
  request.set_name(name);
  v1::ListAdaptersResponse response;
  REFOCUS_RETURN_IF_ERROR(
      Read([&](grpc::ClientContext* context) { return contexts_->ListAdapters(context, request, &response); }));
  return std::vector<v1::Adapter>(response.adapters().begin(), response.adapters().end());
}

Status Client::ExportAdapter(const v1::ExportAdapterRequest& request,
                             const std::function<bool(const std::string&)>& on_data) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  const auto on_message = [&](const v1::ExportAdapterResponse& message) {
    if (!on_data(message.data())) context.TryCancel();
  };
  return Explain(Drain(contexts_->ExportAdapter(&context, request).get(),
                       std::function<void(const v1::ExportAdapterResponse&)>(on_message)));
}

StatusOr<v1::Adapter> Client::ImportAdapter(const v1::ImportAdapterRequest::Header& header,
                                            const std::function<Status(std::string*)>& next) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  v1::Adapter response;
  const auto writer = contexts_->ImportAdapter(&context, &response);
  v1::ImportAdapterRequest message;
  *message.mutable_header() = header;
  bool alive = writer->Write(message);
  while (alive) {
    const Status status = next(message.mutable_data());
    if (!status.ok()) {
      context.TryCancel();
      writer->Finish();
      return status;
    }
    const bool end = message.data().empty();
    if (end) message.mutable_finish();
    alive = writer->Write(message) && !end;
  }
  writer->WritesDone();
  REFOCUS_RETURN_IF_ERROR(Explain(writer->Finish()));
  return response;
}

Status Client::Prefill(const v1::PrefillContextRequest& request,
                       const std::function<void(const v1::PrefillEvent&)>& on_event) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  return Explain(Drain(contexts_->PrefillContext(&context, request).get(), on_event));
}

Status Client::Adapt(const v1::AdaptContextRequest& request,
                     const std::function<void(const v1::AdaptEvent&)>& on_event) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  return Explain(Drain(contexts_->AdaptContext(&context, request).get(), on_event));
}

Status Client::Generate(const v1::GenerateRequest& request,
                        const std::function<void(const v1::GenerateEvent&)>& on_event) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  return Explain(Drain(inference_->Generate(&context, request).get(), on_event));
}

Status Client::ProbeAttention(const v1::ProbeAttentionRequest& request,
                              const std::function<void(const v1::ProbeAttentionEvent&)>& on_event) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  return Explain(Drain(inference_->ProbeAttention(&context, request).get(), on_event));
}

Status Client::Score(const std::vector<v1::ScoreRequest>& requests,
                     const std::function<void(const v1::ScoreEvent&)>& on_event) {
  grpc::ClientContext context;
  context.set_deadline(After(options_.stream_seconds));
  const CancelOnInterrupt cancel(&context);
  const auto stream = inference_->Score(&context);
  // Reads on another thread: with both directions on one, a long list of targets could fill both windows and stop.
  std::thread writer([&] {
    for (const auto& request : requests) {
      if (!stream->Write(request)) break;
    }
    stream->WritesDone();
  });
  v1::ScoreEvent event;
  size_t received = 0;
  for (; stream->Read(&event); ++received) on_event(event);
  writer.join();
  REFOCUS_RETURN_IF_ERROR(Explain(stream->Finish()));
  if (received != requests.size()) {
    return Error(StatusCode::kDataLoss, "RESULTS_MISSING",
                 "score: got " + std::to_string(received) + " results, expected " + std::to_string(requests.size()) +
                     ": the server ended the stream early; ask again");
  }
  return absl::OkStatus();
}

}  // namespace refocus::cli
