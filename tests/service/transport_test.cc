// Hostile use of the transport: unknown methods, broken or huge messages, other protocols.
#include <grpcpp/generic/generic_stub.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

class TransportTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2);
    CreateReady("a", std::string(600, 'x') + "a");
  }
};

grpc::Status RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method, const std::string& bytes,
                     const std::function<void(grpc::ClientContext&)>& setup = nullptr) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  if (setup) setup(context);
  const grpc::Slice slice(bytes);
  grpc::ByteBuffer request(&slice, 1), response;
  grpc::CompletionQueue queue;
  grpc::Status status;
  const auto call = stub.PrepareUnaryCall(&context, method, request, &queue);
  call->StartCall();
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  return status;
}

TEST_F(TransportTest, Row88UnknownMethod) {
  EXPECT_EQ(RawCall(channel_, "/refocus.v1.ContextService/Nothing", "").error_code(), grpc::UNIMPLEMENTED);
  EXPECT_EQ(RawCall(channel_, "/refocus.internal.v1.GroupService/Join", "").error_code(), grpc::UNIMPLEMENTED);
  EXPECT_EQ(RawCall(channel_, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "").error_code(),
            grpc::UNIMPLEMENTED);
  ExpectUnharmed();
}

TEST_F(TransportTest, Row89BrokenProtobuf) {
  for (const std::string& bytes :
       {std::string("\xff\xff\xff\xff"), std::string("\x0a\xff"), std::string(200, '\x0b')}) {
    for (const char* method : {"GetContext", "DeleteContext", "PrefillContext", "AdaptContext", "ListContexts"}) {
      const grpc::Status status = RawCall(channel_, std::string("/refocus.v1.ContextService/") + method, bytes);
      EXPECT_FALSE(status.ok()) << method;
    }
    EXPECT_FALSE(RawCall(channel_, "/refocus.v1.InferenceService/Generate", bytes).ok());
    const grpc::Status upload = RawCall(channel_, "/refocus.v1.ContextService/CreateContext", bytes);
    EXPECT_FAILS(upload, INVALID_ARGUMENT,
                 "FIELD_OUT_OF_RANGE");  // looks like the end of the stream: never a short document
  }
  ExpectUnharmed();
}

// A `string` field is checked by the parser: nothing of ours sees the request. UNIMPLEMENTED is how the library's
// callback API says it.
TEST_F(TransportTest, StringsThatAreNoUtf8) {
  const std::pair<const char*, grpc::StatusCode> methods[] = {{"ContextService/GetContext", grpc::INTERNAL},
                                                              {"ContextService/PrefillContext", grpc::UNIMPLEMENTED},
                                                              {"ContextService/AdaptContext", grpc::UNIMPLEMENTED},
                                                              {"InferenceService/Generate", grpc::UNIMPLEMENTED}};
  for (const auto& [method, code] : methods) {
    // The name, of two bytes that are no character.
    const grpc::Status status = RawCall(channel_, std::string("/refocus.v1.") + method, "\x0a\x02\xc3\x28");
    EXPECT_EQ(status.error_code(), code) << method << ": " << status.error_message();
  }
  api::GenerateRequest stop = GenerateRequest("a", "x", 2);
  stop.add_stop("\xff");
  EXPECT_EQ(Generate(stop).status.error_code(), grpc::UNIMPLEMENTED);
  api::CreateContextRequest header = HeaderMessage("b");
  (*header.mutable_header()->mutable_labels())["k"] = "\xff";
  EXPECT_FAILS(Upload({header, TextMessage(0, "text"), FinishMessage()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  api::ScoreRequest score;
  score.set_name("contexts/a");
  score.mutable_target()->set_text("q");
  api::ScoreRequest odd = score;
  odd.set_target_id("\xff");
  std::vector<api::ScoreEvent> events;
  EXPECT_TRUE(Score({score, odd, score}, &events).ok());  // as if the caller had half-closed
  EXPECT_EQ(events.size(), 1u);
  EXPECT_FAILS(Score({odd}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  ExpectUnharmed();
}

TEST_F(TransportTest, Row90UnknownFieldIsIgnoredMissingFieldIsRefused) {
  api::GetContextRequest request;
  request.set_name("contexts/a");
  EXPECT_TRUE(
      RawCall(channel_, "/refocus.v1.ContextService/GetContext", request.SerializeAsString() + "\xa2\x06\x02hi").ok());
  EXPECT_FAILS(RawCall(channel_, "/refocus.v1.ContextService/GetContext", ""), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  ExpectUnharmed();
}

TEST_F(TransportTest, Row91LargeOrCompressedMessages) {
  EXPECT_EQ(RawCall(channel_, "/refocus.v1.InferenceService/Tokenize", std::string(5 << 20, 'x')).error_code(),
            grpc::RESOURCE_EXHAUSTED);
  api::TokenizeRequest request;
  request.set_text(std::string(1 << 19, 'x'));
  grpc::ClientContext call;
  call.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  api::TokenizeResponse response;
  EXPECT_EQ(inference_->Tokenize(&call, request, &response).error_code(), grpc::UNIMPLEMENTED);
  ExpectUnharmed();
}

// The packaged gRPC answers RESOURCE_EXHAUSTED, and now and then closes that connection as well; never another
// client's.
TEST_F(TransportTest, Row92Metadata) {
  const grpc::Status status =
      RawCall(Channel(), "/refocus.v1.ClusterService/GetCluster", "",
              [](grpc::ClientContext& context) { context.AddMetadata("large", std::string(17 << 10, 'm')); });
  EXPECT_TRUE(status.error_code() == grpc::RESOURCE_EXHAUSTED || status.error_code() == grpc::UNAVAILABLE)
      << status.error_message();
  EXPECT_TRUE(RawCall(channel_, "/refocus.v1.ClusterService/GetCluster", "").ok());
  ExpectUnharmed();
}

TEST_F(TransportTest, Row96OtherProtocols) {
  const int port = std::stoi(server_->public_address().substr(server_->public_address().rfind(':') + 1));
  const std::string kinds[] = {"GET / HTTP/1.1\r\nHost: x\r\n\r\n", std::string("\x16\x03\x01\x02\x00\x01\x00", 7),
                               std::string(4096, '\xee')};
  for (const std::string& bytes : kinds) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    const timeval limit{12, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    ASSERT_EQ(write(fd, bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
    char buffer[4096];
    ssize_t got = 0;
    while ((got = read(fd, buffer, sizeof(buffer))) > 0) {
    }
    EXPECT_TRUE(got == 0 || errno == ECONNRESET) << errno;  // closed, not left open
    close(fd);
  }
  ExpectUnharmed();
}

}  // namespace
}  // namespace refocus
