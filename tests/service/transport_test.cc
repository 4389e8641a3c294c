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
