// The client library against a service in the same process that records what arrives and answers as told.
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <openssl/sha.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <random>

#include "base/limits.h"
#include "cli/client.h"
#include "google/rpc/error_details.pb.h"

namespace refocus::cli {
namespace {

std::string Sha256Of(const std::string& bytes) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

grpc::Status Unavailable(double retry_seconds) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(retry_seconds * 1e9));
  google::rpc::Status details;
  details.add_details()->PackFrom(retry);
  return {grpc::StatusCode::UNAVAILABLE, "group is being rebuilt", details.SerializeAsString()};
}

struct Contexts : v1::ContextService::Service {
  grpc::Status CreateContext(grpc::ServerContext*, grpc::ServerReader<v1::CreateContextRequest>* reader,
                             v1::Context* response) override {
    v1::CreateContextRequest message;
    while (reader->Read(&message)) {
      if (refuse) return {grpc::StatusCode::ALREADY_EXISTS, "context exists"};
      if (message.has_header()) header = message.header();
      if (message.has_finish()) finish = message.finish();
      if (!message.has_chunk()) continue;
      const auto& chunk = message.chunk();
      EXPECT_LE(message.ByteSizeLong(), static_cast<size_t>(kPublicMessageBytes));
      EXPECT_EQ(received, chunk.offset());
      if (chunk.has_ids()) {
        for (const uint32_t id : chunk.ids().ids()) bytes.append(reinterpret_cast<const char*>(&id), 4);
        received += chunk.ids().ids_size();
      } else {
        bytes += chunk.text();
        received += static_cast<int64_t>(chunk.text().size());
      }
    }
    response->set_name("contexts/x");
    return grpc::Status::OK;
  }
  grpc::Status GetContext(grpc::ServerContext*, const v1::GetContextRequest* request, v1::Context* response) override {
    ++calls;
    if (calls <= failures) return Unavailable(retry_seconds);
    response->set_name(request->name());
    return grpc::Status::OK;
  }
  grpc::Status DeleteContext(grpc::ServerContext*, const v1::DeleteContextRequest*,
                             v1::DeleteContextResponse*) override {
    ++calls;
    return Unavailable(0);
  }
  grpc::Status ListContexts(grpc::ServerContext*, const v1::ListContextsRequest* request,
                            v1::ListContextsResponse* response) override {
    response->add_contexts()->set_name("contexts/" + std::to_string(request->page_token().size()));
    if (request->page_token().size() < 2) response->set_next_page_token(request->page_token() + "t");
    return grpc::Status::OK;
  }

  std::atomic<int> calls{0};
  int failures = 0;
  double retry_seconds = 0;
  bool refuse = false;
  v1::CreateContextRequest::Header header;
  v1::CreateContextRequest::Finish finish;
  std::string bytes;
  int64_t received = 0;
};

struct Inference : v1::InferenceService::Service {
  // One id a byte: the worst case for the size of an answer.
  grpc::Status Tokenize(grpc::ServerContext*, const v1::TokenizeRequest* request,
                        v1::TokenizeResponse* response) override {
    EXPECT_LE(request->ByteSizeLong(), static_cast<size_t>(kPublicMessageBytes));
    pieces.push_back(request->text());
    for (const char c : request->text()) response->add_ids(static_cast<unsigned char>(c));
    return grpc::Status::OK;
  }
  grpc::Status Score(grpc::ServerContext*,
                     grpc::ServerReaderWriter<v1::ScoreEvent, v1::ScoreRequest>* stream) override {
    v1::ScoreRequest request;
    while (answers-- > 0 && stream->Read(&request)) {
      v1::ScoreEvent event;
      event.set_target_id(request.target_id());
      event.mutable_token_logprobs()->Resize(10'000, -1);
      stream->Write(event);
    }
    return grpc::Status::OK;
  }
  std::vector<std::string> pieces;
  int answers = 1'000'000;  // of Score, before it ends as if all were well
};

class ClientTest : public testing::Test {
 protected:
  ClientTest() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&contexts_);
    builder.RegisterService(&inference_);
    server_ = builder.BuildAndStart();
    options_.address = "127.0.0.1:" + std::to_string(port);
  }

  Contexts contexts_;
  Inference inference_;
  std::unique_ptr<grpc::Server> server_;
  ClientOptions options_;
};

TEST_F(ClientTest, ReadsAreRetriedNoSoonerThanTheServerAsks) {
  contexts_.failures = 2;
  contexts_.retry_seconds = 0.4;
  Client client(options_);
  const auto begin = std::chrono::steady_clock::now();
  const auto context = client.GetContext("contexts/a");
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  ASSERT_TRUE(context.ok()) << context.status();
  EXPECT_EQ("contexts/a", context->name());
  EXPECT_EQ(3, contexts_.calls);
  EXPECT_GE(seconds, 0.8);
}

TEST_F(ClientTest, RetriesEnd) {
  contexts_.failures = 1000;
  options_.max_attempts = 3;
  Client client(options_);
  const auto context = client.GetContext("contexts/a");
  EXPECT_EQ(StatusCode::kUnavailable, context.status().code());
  EXPECT_EQ(3, contexts_.calls);
}

TEST_F(ClientTest, TheDeadlineHoldsForAllAttemptsTogether) {
  contexts_.failures = 1000;
  contexts_.retry_seconds = 0.9;
  options_.max_attempts = 1000;
  options_.read_seconds = 1.5;
  Client client(options_);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(StatusCode::kUnavailable, client.GetContext("contexts/a").status().code());
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), 1.6);
  EXPECT_EQ(2, contexts_.calls);
}

TEST_F(ClientTest, ChangesAreNotRetried) {
  Client client(options_);
  EXPECT_EQ(StatusCode::kUnavailable, client.DeleteContext({}).code());
  EXPECT_EQ(1, contexts_.calls);
}

TEST_F(ClientTest, ListFollowsPages) {
  Client client(options_);
  const auto all = client.ListContexts();
  ASSERT_TRUE(all.ok());
  ASSERT_EQ(3u, all->size());
  EXPECT_EQ("contexts/2", all->back().name());
}

TEST_F(ClientTest, TextGoesUpInChunksWithOffsetsTotalAndChecksum) {
  std::string text(2 * kUploadChunkBytes + 7, 'a');
  for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>('a' + i % 23);
  Client client(options_);
  int64_t sent = 0;
  v1::CreateContextRequest::Header header;
  header.set_context_id("x");
  const auto context = client.CreateContext(header, {.text = text}, [&](int64_t done, int64_t total) {
    EXPECT_GT(done, sent);
    EXPECT_EQ(static_cast<int64_t>(text.size()), total);
    sent = done;
  });
  ASSERT_TRUE(context.ok()) << context.status();
  EXPECT_EQ(static_cast<int64_t>(text.size()), sent);
  EXPECT_EQ("x", contexts_.header.context_id());
  EXPECT_TRUE(contexts_.bytes == text);
  EXPECT_EQ(static_cast<int64_t>(text.size()), contexts_.finish.total());
  EXPECT_EQ(Sha256Of(text), contexts_.finish.sha256());
}

TEST_F(ClientTest, IdsGoUpAsLittleEndianWords) {
  std::vector<uint32_t> ids(kUploadChunkBytes / 4 + 3);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<uint32_t>(i * 7);
  Client client(options_);
  ASSERT_TRUE(client.CreateContext({}, {.ids = &ids}, nullptr).ok());
  EXPECT_EQ(static_cast<int64_t>(ids.size()), contexts_.finish.total());
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(ids.data()), ids.size() * 4), contexts_.bytes);
  EXPECT_EQ(Sha256Of(contexts_.bytes), contexts_.finish.sha256());
}

TEST_F(ClientTest, AnEmptyTextIsSentAsSuch) {
  Client client(options_);
  ASSERT_TRUE(client.CreateContext({}, {}, nullptr).ok());
  EXPECT_TRUE(contexts_.finish.has_total());
  EXPECT_EQ(0, contexts_.finish.total());
  EXPECT_EQ(Sha256Of(""), contexts_.finish.sha256());
}

TEST_F(ClientTest, ARefusedUploadGivesTheServersReason) {
  contexts_.refuse = true;
  const std::string text(50 * kUploadChunkBytes, 'a');
  Client client(options_);
  EXPECT_EQ(StatusCode::kAlreadyExists, client.CreateContext({}, {.text = text}, nullptr).status().code());
}

TEST_F(ClientTest, LongDocumentsAreCutBeforeLettersAtLineStartsOnly) {
  std::mt19937 random(7);
  std::string text;
  while (text.size() < 700'000)
    text += (random() % 3 ? "word " : "\n  indented ") + std::string(random() % 9 ? "" : "\nLine ");
  Client client(options_);
  const auto ids = client.TokenizeDocument(text);
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(text.size(), ids->size());
  std::string joined;
  for (size_t i = 0; i < inference_.pieces.size(); ++i) {
    if (i > 0) {
      EXPECT_EQ('\n', joined.back());
      EXPECT_TRUE(std::isalpha(inference_.pieces[i][0]));
    }
    joined += inference_.pieces[i];
  }
  EXPECT_TRUE(joined == text);
  EXPECT_GT(inference_.pieces.size(), 3u);

  EXPECT_EQ("TEXT_NOT_CUTTABLE", DetailOf(client.TokenizeDocument(std::string(300'000, 'a')).status()).reason);
  EXPECT_TRUE(client.TokenizeDocument("")->empty());
}

TEST_F(ClientTest, ManyLargeScoresDoNotBlockEachOther) {
  std::vector<v1::ScoreRequest> requests(300);
  for (auto& request : requests) request.mutable_target()->set_text(std::string(100'000, 'a'));
  Client client(options_);
  int events = 0;
  const Status status = client.Score(requests, [&](const v1::ScoreEvent&) { ++events; });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(300, events);
}

TEST_F(ClientTest, MissingScoresAreAnError) {
  std::vector<v1::ScoreRequest> requests(3);
  inference_.answers = 2;
  Client client(options_);
  int events = 0;
  const Status status = client.Score(requests, [&](const v1::ScoreEvent&) { ++events; });
  EXPECT_EQ(2, events);
  EXPECT_EQ("RESULTS_MISSING", DetailOf(status).reason);
  EXPECT_NE(std::string::npos, std::string(status.message()).find("got 2 results, expected 3")) << status;
}

TEST_F(ClientTest, TextThatIsNoUtf8ArrivesAsItIs) {
  const std::string text = "caf\xe9\xff";
  Client client(options_);
  ASSERT_TRUE(client.Tokenize(text, false, false).ok());
  ASSERT_EQ(1u, inference_.pieces.size());
  EXPECT_EQ(text, inference_.pieces[0]);
}

TEST_F(ClientTest, AProxyForWebPagesIsNotAsked) {
  setenv("http_proxy", "http://127.0.0.1:1", 1);
  setenv("grpc_proxy", "http://127.0.0.1:1", 1);
  options_.max_attempts = 1;
  Client client(options_);
  EXPECT_TRUE(client.GetContext("contexts/a").ok());
  unsetenv("http_proxy");
  unsetenv("grpc_proxy");
}

TEST_F(ClientTest, AServerThatIsGoneIsNamed) {
  server_->Shutdown();
  options_.max_attempts = 2;
  Client client(options_);
  const auto model = client.GetModel();
  EXPECT_EQ("NOT_REACHABLE", DetailOf(model.status()).reason);
  EXPECT_NE(std::string::npos, std::string(model.status().message()).find(options_.address));
}

}  // namespace
}  // namespace refocus::cli
