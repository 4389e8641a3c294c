// A coordinator in this process on loopback ports, a group of fake ranks dialled in, and clients' stubs.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include "coordinator/hub.h"
#include "coordinator/server.h"
#include "google/rpc/error_details.pb.h"
#include "refocus/v1/cluster.grpc.pb.h"
#include "refocus/v1/context.grpc.pb.h"
#include "refocus/v1/inference.grpc.pb.h"
#include "tests/service/fake_worker.h"

namespace refocus {

// What a failed call says: code, ErrorInfo's reason, metadata, and whether RetryInfo is there.
struct Failure {
  grpc::StatusCode code = grpc::StatusCode::OK;
  std::string reason;
  std::map<std::string, std::string> metadata;
  bool retry = false;
  std::string message;
};
Failure FailureOf(const grpc::Status& status);

#define EXPECT_FAILS(call, want_code, want_reason)                             \
  do {                                                                         \
    const ::refocus::Failure failure_ = ::refocus::FailureOf(call);            \
    EXPECT_EQ(failure_.code, grpc::StatusCode::want_code) << failure_.message; \
    EXPECT_EQ(failure_.reason, want_reason) << failure_.message;               \
  } while (false)

struct Answer {
  grpc::Status status;
  std::string text;
  std::vector<uint32_t> ids;
  std::vector<api::GenerateEvent> events;
  api::GenerateSummary summary;
};

class ServiceTest : public ::testing::Test {
 protected:
  static constexpr int64_t kWindow = 4096;

  void SetUp() override { StartServer(); }
  void TearDown() override;

  // Starts server and group; call again for a fresh one.
  void StartServer() { StartServer(ServerOptions()); }
  void StartServer(ServerOptions options, bool with_tokenizer = true);
  void StartGroup(int32_t size, std::function<void(FakeRank&)> setup = nullptr);
  void WaitFor(const std::function<bool()>& condition, double seconds = 10);
  bool Serving();

  // A whole upload in one chunk.
  grpc::Status Create(const std::string& id, const std::string& text, api::Context* context = nullptr);
  grpc::Status CreateIds(const std::string& id, const std::vector<uint32_t>& ids, api::Context* context = nullptr);
  // Any sequence of messages.
  grpc::Status Upload(const std::vector<api::CreateContextRequest>& messages, api::Context* context = nullptr);
  grpc::Status Prefill(const std::string& id, std::vector<api::PrefillEvent>* events = nullptr);
  void CreateReady(const std::string& id, const std::string& text);
  grpc::Status Adapt(const api::AdaptContextRequest& request, std::vector<api::AdaptEvent>* events = nullptr);
  static api::AdaptContextRequest AdaptRequest(const std::string& id);
  Answer Generate(const api::GenerateRequest& request);
  static api::GenerateRequest GenerateRequest(const std::string& id, const std::string& prompt, int64_t max_tokens);
  grpc::Status Score(const std::vector<api::ScoreRequest>& requests, std::vector<api::ScoreEvent>* events = nullptr);
  api::Context Get(const std::string& id);

  // Nothing runs, nothing but these contexts is left, on the coordinator and on every rank; it still serves; and the
  // witness, a context that no test touches, answers as it did at the start.
  void ExpectUnharmed();

  std::shared_ptr<grpc::Channel> Channel(const grpc::ChannelArguments& arguments = {});

  std::unique_ptr<Server> server_;
  std::vector<std::unique_ptr<FakeWorker>> workers_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<api::ContextService::Stub> contexts_;
  std::unique_ptr<api::InferenceService::Stub> inference_;
  std::unique_ptr<api::ClusterService::Stub> cluster_;
  std::vector<uint32_t> witness_;
  int launches_ = 0;
};

api::CreateContextRequest HeaderMessage(const std::string& id);
api::CreateContextRequest TextMessage(int64_t offset, const std::string& text);
api::CreateContextRequest IdsMessage(int64_t offset, const std::vector<uint32_t>& ids);
api::CreateContextRequest FinishMessage();

}  // namespace refocus
