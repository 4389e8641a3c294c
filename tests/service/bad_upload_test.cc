// Bad names and bad uploads: the status that is promised, and nobody else notices. Numbers in the test names are rows
// of the list of bad inputs that this service answers for.
#include <algorithm>

#include "base/limits.h"
#include "coordinator/core/digest.h"
#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

class BadUploadTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2, [](FakeRank& rank) { rank.kv_capacity_bytes = 1200 * kFakeKvBytesPerToken; });
  }
  void TearDown() override {
    ExpectUnharmed();
    ServiceTest::TearDown();
  }
  grpc::Status Delete(const std::string& name, bool force = false, bool allow_missing = false) {
    grpc::ClientContext call;
    api::DeleteContextRequest request;
    request.set_name(name);
    request.set_force(force);
    request.set_allow_missing(allow_missing);
    api::DeleteContextResponse response;
    return contexts_->DeleteContext(&call, request, &response);
  }
  bool Claimed(const std::string& id) {
    return server_->hub().With([&](Coordinator& core) { return core.catalog().Claimed("contexts/" + id); });
  }
  grpc::Status List(int32_t page_size, const std::string& token, api::ListContextsResponse* response) {
    grpc::ClientContext call;
    api::ListContextsRequest request;
    request.set_page_size(page_size);
    request.set_page_token(token);
    return contexts_->ListContexts(&call, request, response);
  }
};

TEST_F(BadUploadTest, Row39Names) {
  const std::string bad[] = {"contexts/../../etc",
                             "contexts/",
                             "contexts",
                             "",
                             std::string(300, 'a'),
                             "contexts/" + std::string(64, 'a'),
                             "contexts/UPPER",
                             "contexts/a/b",
                             "contexts/a\n",
                             std::string("contexts/a\0b", 12),
                             "contexts/\xe2\x80\xae"
                             "a",
                             "contexts/a\xe2\x80\x8b",
                             "contexts/-a",
                             "contexts/a-",
                             "other/a"};
  for (const std::string& name : bad) {
    grpc::ClientContext call;
    api::GetContextRequest request;
    request.set_name(name);
    api::Context context;
    const grpc::Status status = contexts_->GetContext(&call, request, &context);
    EXPECT_FAILS(status, INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
    EXPECT_EQ(FailureOf(status).metadata["field"], "name");
    EXPECT_FAILS(Delete(name), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
    EXPECT_FAILS(Generate([&] {
                   api::GenerateRequest generate;
                   generate.set_name(name);
                   return generate;
                 }())
                     .status,
                 INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  }
  for (const std::string id : {"../x", "A", "a b", "-", "\xe2\x80\xae"}) {
    EXPECT_FAILS(Create(id, "text"), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  }
}

TEST_F(BadUploadTest, Row40AbsentName) {
  EXPECT_FAILS(Delete("contexts/absent"), NOT_FOUND, "CONTEXT_NOT_FOUND");
  EXPECT_FAILS(Prefill("absent"), NOT_FOUND, "CONTEXT_NOT_FOUND");
  EXPECT_FAILS(Adapt(AdaptRequest("absent")), NOT_FOUND, "CONTEXT_NOT_FOUND");
  EXPECT_FAILS(Generate(GenerateRequest("absent", "x", 1)).status, NOT_FOUND, "CONTEXT_NOT_FOUND");
}

TEST_F(BadUploadTest, Row42IdInUse) { EXPECT_FAILS(Create("witness", "text"), ALREADY_EXISTS, "CONTEXT_EXISTS"); }

TEST_F(BadUploadTest, Row43Row44RequestIds) {
  api::CreateContextRequest header = HeaderMessage("twice");
  header.mutable_header()->set_request_id("request 1");
  api::Context first, second;
  ASSERT_TRUE(Upload({header, TextMessage(0, "text"), FinishMessage()}, &first).ok());
  ASSERT_TRUE(Upload({header, TextMessage(0, "te"), TextMessage(2, "xt"), FinishMessage()}, &second).ok());
  EXPECT_EQ(first.SerializeAsString(), second.SerializeAsString());
  EXPECT_FAILS(Upload({header, TextMessage(0, "Text"), FinishMessage()}), INVALID_ARGUMENT, "REQUEST_ID_REUSED");
  header.mutable_header()->set_request_id(std::string(129, 'r'));
  EXPECT_FAILS(Upload({header, TextMessage(0, "text"), FinishMessage()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
}

// Also with a name of the server's making, which the second creation cannot get again.
TEST_F(BadUploadTest, RequestIdOfADeletedContextCreatesAnew) {
  for (const std::string id : {"again", ""}) {
    api::CreateContextRequest header = HeaderMessage(id);
    header.mutable_header()->set_request_id("request of " + id);
    api::Context first, second, third;
    ASSERT_TRUE(Upload({header, TextMessage(0, "text"), FinishMessage()}, &first).ok());
    ASSERT_TRUE(Prefill(first.name().substr(9)).ok());
    ASSERT_TRUE(Delete(first.name()).ok());
    ASSERT_TRUE(Upload({header, TextMessage(0, "text"), FinishMessage()}, &second).ok());
    EXPECT_EQ(second.state(), api::Context::CREATED);
    EXPECT_EQ(first.name() == second.name(), !id.empty());
    EXPECT_EQ(Get(second.name().substr(9)).token_count(), 4);
    ASSERT_TRUE(Upload({header, TextMessage(0, "text"), FinishMessage()}, &third).ok());
    EXPECT_EQ(second.SerializeAsString(), third.SerializeAsString());
  }
}

TEST_F(BadUploadTest, Row45PageSize) {
  api::ListContextsResponse response;
  EXPECT_FAILS(List(-1, "", &response), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_TRUE(List(0, "", &response).ok());
  EXPECT_TRUE(List(1'000'000'000, "", &response).ok());
  EXPECT_EQ(response.contexts_size(), 1);
  server_->hub().With([](Coordinator& core) {
    for (int i = 0; i < 1000; ++i) {
      const auto tokens = std::make_shared<const std::vector<int32_t>>(1, 5);
      EXPECT_TRUE(core.FinishUpload(*core.BeginUpload({}), {}, tokens, "").ok());
    }
  });
  ASSERT_TRUE(List(1'000'000'000, "", &response).ok());
  EXPECT_EQ(response.contexts_size(), 1000);
  ASSERT_TRUE(List(1'000'000'000, response.next_page_token(), &response).ok());
  EXPECT_EQ(response.contexts_size(), 1);
  EXPECT_TRUE(response.next_page_token().empty());
  ASSERT_TRUE(List(0, "", &response).ok());
  EXPECT_EQ(response.contexts_size(), 50);
}

TEST_F(BadUploadTest, Row46PageToken) {
  ASSERT_TRUE(Create("zz", "text").ok());
  api::ListContextsResponse response;
  ASSERT_TRUE(List(1, "", &response).ok());
  std::string token = response.next_page_token();
  ASSERT_FALSE(token.empty());
  EXPECT_TRUE(List(1, token, &response).ok());
  token.back() ^= 1;
  EXPECT_FAILS(List(1, token, &response), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(List(1, "contexts/witness", &response), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(List(1, ".", &response), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
}

TEST_F(BadUploadTest, Row49DeleteTwice) {
  ASSERT_TRUE(Create("gone", "text").ok());
  EXPECT_TRUE(Delete("contexts/gone").ok());
  EXPECT_FAILS(Delete("contexts/gone"), NOT_FOUND, "CONTEXT_NOT_FOUND");
  EXPECT_TRUE(Delete("contexts/gone", false, true).ok());
}

TEST_F(BadUploadTest, Row51NoTokens) {
  EXPECT_FAILS(Upload({HeaderMessage("a"), FinishMessage()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Create("a", ""), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(CreateIds("a", {}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
}

TEST_F(BadUploadTest, Row52TokenIds) {
  const grpc::Status status =
      Upload({HeaderMessage("a"), IdsMessage(0, {1, 2}), IdsMessage(2, {3, 300}), FinishMessage()});
  EXPECT_FAILS(status, INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
  EXPECT_EQ(FailureOf(status).metadata["index"], "3");
  EXPECT_EQ(FailureOf(status).metadata["got"], "300");
  EXPECT_FAILS(CreateIds("a", {0xffffffffu}), INVALID_ARGUMENT, "TOKEN_ID_OUT_OF_RANGE");
}

TEST_F(BadUploadTest, Row53AboveTheWindow) {
  const grpc::Status status = CreateIds("a", std::vector<uint32_t>(kWindow + 1, 5));
  EXPECT_FAILS(status, INVALID_ARGUMENT, "CONTEXT_TOO_LONG");
  EXPECT_EQ(FailureOf(status).metadata["limit"], "4096 tokens");
  EXPECT_FAILS(Create("a", std::string(kWindow + 1, 'x')), INVALID_ARGUMENT, "CONTEXT_TOO_LONG");
}

TEST_F(BadUploadTest, Row54AboveTheMemory) {
  const grpc::Status status = CreateIds("a", std::vector<uint32_t>(2500, 5));
  EXPECT_FAILS(status, RESOURCE_EXHAUSTED, "KV_CAPACITY");
  EXPECT_EQ(FailureOf(status).metadata["need_bytes"], std::to_string(2500 * kFakeKvBytesPerToken));
  EXPECT_EQ(FailureOf(status).metadata["free_bytes"], std::to_string((2400 - 19) * kFakeKvBytesPerToken));
}

TEST_F(BadUploadTest, Row55Offsets) {
  for (const int64_t offset : {-1, 0, 3, 5, 1 << 30}) {
    const grpc::Status status =
        Upload({HeaderMessage("a"), TextMessage(0, "text"), TextMessage(offset, "more"), FinishMessage()});
    EXPECT_FAILS(status, OUT_OF_RANGE, "UPLOAD_OFFSET_MISMATCH");
    EXPECT_EQ(FailureOf(status).metadata["expected_offset"], "4");
  }
}

TEST_F(BadUploadTest, Row56DataAfterFinish) {
  EXPECT_FAILS(Upload({HeaderMessage("a"), TextMessage(0, "text"), FinishMessage(), TextMessage(4, "more")}),
               FAILED_PRECONDITION, "UPLOAD_FINISHED");
  EXPECT_FAILS(Upload({HeaderMessage("a"), TextMessage(0, "text"), FinishMessage(), FinishMessage()}),
               FAILED_PRECONDITION, "UPLOAD_FINISHED");
}

TEST_F(BadUploadTest, Row57TotalAndHash) {
  api::CreateContextRequest finish = FinishMessage();
  finish.mutable_finish()->set_total(5);
  EXPECT_FAILS(Upload({HeaderMessage("a"), TextMessage(0, "text"), finish}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  finish.mutable_finish()->set_total(4);
  finish.mutable_finish()->set_sha256(std::string(32, 'x'));
  EXPECT_FAILS(Upload({HeaderMessage("a"), TextMessage(0, "text"), finish}), DATA_LOSS, "CHECKSUM_MISMATCH");
  Sha256 hash;
  hash.Update("text", 4);
  finish.mutable_finish()->set_sha256(hash.Finish());
  EXPECT_TRUE(Upload({HeaderMessage("a"), TextMessage(0, "text"), finish}).ok());
  Sha256 ids;
  const uint32_t id = 7;
  ids.Update(&id, 4);
  finish.mutable_finish()->set_total(1);
  finish.mutable_finish()->set_sha256(ids.Finish());
  EXPECT_TRUE(Upload({HeaderMessage("b"), IdsMessage(0, {7}), finish}).ok());
}

TEST_F(BadUploadTest, Row58ManySmallChunks) {
  std::vector<api::CreateContextRequest> messages = {HeaderMessage("a")};
  for (int i = 0; i < 2000; ++i) messages.push_back(IdsMessage(i, {static_cast<uint32_t>(i % 250)}));
  messages.push_back(FinishMessage());
  api::Context context;
  EXPECT_TRUE(Upload(messages, &context).ok());
  EXPECT_EQ(context.token_count(), 2000);
}

TEST_F(BadUploadTest, Row58ManyEmptyChunks) {
  grpc::ClientContext call;
  api::Context response;
  const auto writer = contexts_->CreateContext(&call, &response);
  writer->Write(HeaderMessage("a"));
  for (int i = 0; i < 50'000; ++i) {
    if (!writer->Write(TextMessage(0, ""))) break;
  }
  writer->Write(TextMessage(0, "ok"));
  writer->Write(FinishMessage());
  writer->WritesDone();
  EXPECT_TRUE(writer->Finish().ok());
}

TEST_F(BadUploadTest, Row59MessageAboveTheLimit) {
  const grpc::Status status =
      Upload({HeaderMessage("a"), TextMessage(0, std::string(kPublicMessageBytes, 'x')), FinishMessage()});
  EXPECT_EQ(status.error_code(), grpc::RESOURCE_EXHAUSTED);  // from the gRPC layer: no details
}

TEST_F(BadUploadTest, Row61Utf8) {
  EXPECT_FAILS(Create("a", "ab\xff"), INVALID_ARGUMENT, "INVALID_UTF8");
  api::Context context;
  EXPECT_TRUE(
      Upload({HeaderMessage("a"), TextMessage(0, "caf\xc3"), TextMessage(4, "\xa9"), FinishMessage()}, &context).ok());
  EXPECT_EQ(context.token_count(), 5);
}

TEST_F(BadUploadTest, Row62SpecialStrings) {
  api::Context context;
  ASSERT_TRUE(Create("plain", "<|im_start|>", &context).ok());
  EXPECT_EQ(context.token_count(), 12);
  api::CreateContextRequest header = HeaderMessage("special");
  header.mutable_header()->set_allow_special(true);
  ASSERT_TRUE(Upload({header, TextMessage(0, "<|im_st"), TextMessage(7, "art|>"), FinishMessage()}, &context).ok());
  EXPECT_EQ(context.token_count(), 1);
}

TEST_F(BadUploadTest, Row63TwoUploadsToOneName) {
  grpc::ClientContext call;
  api::Context response;
  const auto writer = contexts_->CreateContext(&call, &response);
  ASSERT_TRUE(writer->Write(HeaderMessage("a")));
  WaitFor([&] { return Claimed("a"); });
  EXPECT_FAILS(Create("a", "text"), ABORTED, "CONTEXT_BUSY");
  writer->Write(TextMessage(0, "first"));
  writer->Write(FinishMessage());
  writer->WritesDone();
  EXPECT_TRUE(writer->Finish().ok());
  EXPECT_EQ(response.token_count(), 5);
}

TEST_F(BadUploadTest, Row64HugeTextEndsEarly) {
  grpc::ClientContext call;
  api::Context response;
  const auto writer = contexts_->CreateContext(&call, &response);
  writer->Write(HeaderMessage("a"));
  const std::string megabyte(kPublicMessageBytes - 1024, 'x');
  int64_t sent = 0;
  while (sent < (int64_t{1} << 30) && writer->Write(TextMessage(sent, megabyte)))
    sent += static_cast<int64_t>(megabyte.size());
  EXPECT_LT(sent, kMaxTextBytes + (16 << 20));
  writer->WritesDone();
  EXPECT_FAILS(writer->Finish(), INVALID_ARGUMENT, "CONTEXT_TOO_LONG");
}

TEST_F(BadUploadTest, Row98HalfCloseAtOnce) {
  EXPECT_FAILS(Upload({}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Upload({HeaderMessage("a")}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Upload({HeaderMessage("a"), TextMessage(0, "no finish")}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Score({}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
}

TEST_F(BadUploadTest, MessagesOutOfPlace) {
  EXPECT_FAILS(Upload({TextMessage(0, "text")}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Upload({HeaderMessage("a"), HeaderMessage("a")}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Upload({HeaderMessage("a"), api::CreateContextRequest()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  EXPECT_FAILS(Upload({HeaderMessage("a"), TextMessage(0, "t"), IdsMessage(1, {1})}), INVALID_ARGUMENT,
               "FIELD_OUT_OF_RANGE");
}

TEST_F(BadUploadTest, LabelsAndLife) {
  api::CreateContextRequest header = HeaderMessage("a");
  for (const int64_t seconds :
       {int64_t{-1}, int64_t{0}, int64_t{59}, int64_t{604801}, std::numeric_limits<int64_t>::max()}) {
    header.mutable_header()->mutable_ttl()->set_seconds(seconds);
    EXPECT_FAILS(Upload({header, TextMessage(0, "t"), FinishMessage()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  }
  header = HeaderMessage("a");
  for (int i = 0; i < 33; ++i) (*header.mutable_header()->mutable_labels())[std::to_string(i)] = "v";
  EXPECT_FAILS(Upload({header, TextMessage(0, "t"), FinishMessage()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  header.mutable_header()->clear_labels();
  (*header.mutable_header()->mutable_labels())["k"] = std::string(129, 'v');
  EXPECT_FAILS(Upload({header, TextMessage(0, "t"), FinishMessage()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
}

TEST_F(BadUploadTest, ValidateOnlyStoresNothing) {
  api::CreateContextRequest header = HeaderMessage("a");
  header.mutable_header()->set_validate_only(true);
  api::Context context;
  ASSERT_TRUE(Upload({header, TextMessage(0, "text"), FinishMessage()}, &context).ok());
  EXPECT_EQ(context.token_count(), 4);
  EXPECT_FAILS(Prefill("a"), NOT_FOUND, "CONTEXT_NOT_FOUND");
}

TEST_F(BadUploadTest, AnUploadThatIsAbandonedLeavesItsName) {
  {
    grpc::ClientContext call;
    api::Context response;
    const auto writer = contexts_->CreateContext(&call, &response);
    writer->Write(HeaderMessage("a"));
    writer->Write(TextMessage(0, "text"));
    WaitFor([&] { return Claimed("a"); });
    call.TryCancel();
    EXPECT_EQ(writer->Finish().error_code(), grpc::CANCELLED);
  }
  WaitFor([&] { return !Claimed("a"); });
  EXPECT_TRUE(Create("a", "text").ok());
}

class StalledUploadTest : public ServiceTest {};

TEST_F(StalledUploadTest, Row60Stall) {
  ServerOptions options;
  options.upload_stall_seconds = 0.3;
  StartServer(std::move(options));
  StartGroup(1);
  for (int messages = 0; messages < 4; ++messages) {
    grpc::ClientContext call;
    api::Context response;
    const auto writer = contexts_->CreateContext(&call, &response);
    if (messages > 0) writer->Write(HeaderMessage("a"));
    if (messages > 1) writer->Write(TextMessage(0, "text"));
    if (messages > 2) writer->Write(FinishMessage());
    EXPECT_FAILS(writer->Finish(), DEADLINE_EXCEEDED, "UPLOAD_STALLED");
  }
  EXPECT_TRUE(Create("a", "text").ok());  // the name is free again
  ExpectUnharmed();
}

TEST_F(StalledUploadTest, NoTokenizer) {
  StartServer(ServerOptions(), /*with_tokenizer=*/false);
  EXPECT_FAILS(Create("a", "text"), FAILED_PRECONDITION, "NO_TOKENIZER");
  EXPECT_TRUE(CreateIds("a", {1, 2, 3}).ok());
  EXPECT_FAILS(Generate(GenerateRequest("a", "text", 1)).status, FAILED_PRECONDITION, "NO_TOKENIZER");
  grpc::ClientContext call;
  api::TokenizeRequest request;
  api::TokenizeResponse response;
  EXPECT_FAILS(inference_->Tokenize(&call, request, &response), FAILED_PRECONDITION, "NO_TOKENIZER");
}

TEST_F(StalledUploadTest, AMillionTokens) {
  ServerOptions options;
  options.core.model = FakeModel(int64_t{1} << 21);
  StartServer(std::move(options));
  std::vector<api::CreateContextRequest> messages = {HeaderMessage("a")};
  for (int64_t offset = 0; offset < 1'000'000; offset += 50'000) {
    messages.push_back(IdsMessage(offset, std::vector<uint32_t>(50'000, 7)));
  }
  messages.push_back(FinishMessage());
  api::Context context;
  const auto begin = std::chrono::steady_clock::now();
  ASSERT_TRUE(Upload(messages, &context).ok());
  std::printf("1M tokens taken in %.3f s\n",
              std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  EXPECT_EQ(context.token_count(), 1'000'000);
}

}  // namespace
}  // namespace refocus
