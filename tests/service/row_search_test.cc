// Rows to train on are found on the call's thread: nobody else waits for that, and whatever becomes of caller, context,
// group or server meanwhile, the result is dropped or used rightly.
#include <atomic>
#include <chrono>
#include <thread>

#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

class RowSearchTest : public ServiceTest {
 protected:
  void SetUp() override {
    ServerOptions options;
    options.find_rows = [this](const RowSearch& search, const std::function<bool()>& stop) {
      searched_tokens_ = static_cast<int64_t>(search.tokens->size());
      ++begun_;
      while (begun_ > allowed_ && !(stop && stop())) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      if (begun_ > allowed_) ++stopped_;
      return FindRows(search, stop);
    };
    StartServer(std::move(options));
    StartGroup(2);
    CreateReady("a", Text(600));
  }
  void TearDown() override {
    allowed_ = 1000;
    if (caller_.joinable()) caller_.join();
    ServiceTest::TearDown();
  }

  // Numbers that come again: most rows can be looked up.
  static std::string Text(int64_t bytes) {
    std::string text;
    for (int64_t i = 0; i < bytes; ++i) text += static_cast<char>('a' + i % 23);
    return text;
  }
  static api::AdaptContextRequest Request(api::OnDisconnect mode = api::CANCEL, const std::string& id = "a") {
    api::AdaptContextRequest request = AdaptRequest(id);
    request.mutable_recall_rows();
    request.set_on_disconnect(mode);
    return request;
  }
  void Start(const api::AdaptContextRequest& request) {
    caller_ = std::thread([this, request] {
      const auto reader = contexts_->AdaptContext(&call_, request);
      api::AdaptEvent event;
      while (reader->Read(&event)) events_.push_back(event);
      status_ = reader->Finish();
    });
    WaitFor([&] { return begun_ == 1; });
  }
  void WaitUntilNobodyCalls() {
    WaitFor([&] { return server_->hub().calls().running() == 0; });
    WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.drained(); }); });
  }
  grpc::Status Delete(const std::string& id) {
    grpc::ClientContext call;
    api::DeleteContextRequest request;
    api::DeleteContextResponse response;
    request.set_name("contexts/" + id);
    return contexts_->DeleteContext(&call, request, &response);
  }

  // All rows of the later half, but for those of the tokens that are held out.
  static void ExpectRowsOf(int64_t bytes, const std::vector<api::AdaptEvent>& events) {
    ASSERT_FALSE(events.empty());
    EXPECT_LE(events.front().effective().recall_rows(), bytes / 2);
    EXPECT_GT(events.front().effective().recall_rows(), bytes / 2 - 30);
  }

  std::atomic<int> begun_{0}, allowed_{0}, stopped_{0};
  std::atomic<int64_t> searched_tokens_{0};
  grpc::ClientContext call_;
  std::vector<api::AdaptEvent> events_;
  grpc::Status status_;
  std::thread caller_;
};

TEST_F(RowSearchTest, OthersAreServedMeanwhile) {
  Start(Request());
  EXPECT_EQ(Get("a").state(), api::Context::READY);
  EXPECT_EQ(Generate(GenerateRequest("a", "a", 3)).text, "bcd");
  CreateReady("b", Text(700));
  EXPECT_TRUE(Adapt(AdaptRequest("b")).ok());
  // A second search waits for its turn, and leaves the queue when its caller does.
  grpc::ClientContext second;
  const auto reader = contexts_->AdaptContext(&second, Request(api::CANCEL, "b"));
  WaitFor([&] { return server_->hub().calls().running() == 2; });
  second.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::CANCELLED);
  WaitFor([&] { return server_->hub().calls().running() == 1; });
  EXPECT_EQ(begun_, 1);
  EXPECT_TRUE(events_.empty());
  allowed_ = 1;
  caller_.join();
  ASSERT_TRUE(status_.ok()) << status_.error_message();
  ExpectRowsOf(600, events_);
  EXPECT_EQ(Get("a").adapters_size(), 1);
  WaitUntilNobodyCalls();
  ExpectUnharmed();
}

TEST_F(RowSearchTest, TwoSearchesBothEnd) {
  Start(Request());
  CreateReady("b", Text(700));
  grpc::Status second;
  std::vector<api::AdaptEvent> events;
  std::thread other([&] { second = Adapt(Request(api::CANCEL, "b"), &events); });
  WaitFor([&] { return server_->hub().calls().running() == 2; });
  allowed_ = 2;
  other.join();
  caller_.join();
  EXPECT_TRUE(status_.ok()) << status_.error_message();
  ASSERT_TRUE(second.ok()) << second.error_message();
  ExpectRowsOf(700, events);
  WaitUntilNobodyCalls();
  ExpectUnharmed();
}

// The second caller joins the work of the first, whoever found the rows.
TEST_F(RowSearchTest, OneRequestIdOnePieceOfWork) {
  api::AdaptContextRequest request = Request();
  request.set_request_id("once");
  Start(request);
  grpc::Status second;
  std::vector<api::AdaptEvent> events;
  std::thread other([&] { second = Adapt(request, &events); });
  WaitFor([&] { return server_->hub().calls().running() == 2; });
  allowed_ = 1;
  other.join();
  caller_.join();
  EXPECT_TRUE(status_.ok()) << status_.error_message();
  ASSERT_TRUE(second.ok()) << second.error_message();
  EXPECT_EQ(events.back().adapter().revision(), 1);
  EXPECT_EQ(Get("a").adapters(0).revision(), 1);
  EXPECT_EQ(begun_, 1);
}

TEST_F(RowSearchTest, CancelEndsIt) {
  Start(Request());
  call_.TryCancel();
  caller_.join();
  EXPECT_EQ(status_.error_code(), grpc::CANCELLED);
  WaitUntilNobodyCalls();
  EXPECT_EQ(stopped_, 1);
  EXPECT_EQ(Get("a").adapters_size(), 0);
  ExpectUnharmed();
}

TEST_F(RowSearchTest, TheDeadlineEndsIt) {
  call_.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(300));
  Start(Request());
  caller_.join();
  EXPECT_EQ(status_.error_code(), grpc::DEADLINE_EXCEEDED);
  WaitUntilNobodyCalls();
  EXPECT_EQ(stopped_, 1);
  ExpectUnharmed();
}

TEST_F(RowSearchTest, GoesOnWithoutItsCallerWhereThatWasAsked) {
  Start(Request(api::CONTINUE));
  call_.TryCancel();
  caller_.join();
  allowed_ = 1;
  WaitUntilNobodyCalls();
  EXPECT_EQ(stopped_, 0);
  ASSERT_EQ(Get("a").adapters_size(), 1);
  EXPECT_EQ(Get("a").adapters(0).steps(), 4);
  ExpectUnharmed();
}

TEST_F(RowSearchTest, TheContextIsDeletedMeanwhile) {
  Start(Request());
  EXPECT_TRUE(Delete("a").ok());
  allowed_ = 1;
  caller_.join();
  EXPECT_FAILS(status_, NOT_FOUND, "CONTEXT_NOT_FOUND");
  WaitUntilNobodyCalls();
  ExpectUnharmed();
}

TEST_F(RowSearchTest, AnotherTextUnderTheNameIsSearchedAnew) {
  Start(Request());
  EXPECT_EQ(searched_tokens_, 600);
  EXPECT_TRUE(Delete("a").ok());
  CreateReady("a", Text(800));
  allowed_ = 2;
  caller_.join();
  ASSERT_TRUE(status_.ok()) << status_.error_message();
  EXPECT_EQ(begun_, 2);
  EXPECT_EQ(searched_tokens_, 800);
  ExpectRowsOf(800, events_);
  WaitUntilNobodyCalls();
  ExpectUnharmed();
}

TEST_F(RowSearchTest, AnotherAdaptationIsFaster) {
  Start(Request());
  EXPECT_TRUE(Adapt(AdaptRequest("a")).ok());
  allowed_ = 1;
  caller_.join();
  ASSERT_TRUE(status_.ok()) << status_.error_message();
  EXPECT_EQ(Get("a").adapters(0).revision(), 2);
}

TEST_F(RowSearchTest, TheGroupIsLostMeanwhile) {
  Start(Request());
  workers_[1]->Kill();
  WaitFor([&] { return !Serving(); });
  allowed_ = 1;
  caller_.join();
  EXPECT_FAILS(status_, UNAVAILABLE, "GROUP_REBUILDING");
}

TEST_F(RowSearchTest, TheServerDrainsMeanwhile) {
  Start(Request());
  server_->hub().With([](Coordinator& core) { core.BeginDrain(); });
  allowed_ = 1;
  caller_.join();
  EXPECT_FAILS(status_, UNAVAILABLE, "DRAINING");
}

// Refused at once, not after a search.
TEST_F(RowSearchTest, BadRequestsAreNotSearchedFor) {
  api::AdaptContextRequest request = Request();
  request.set_steps(-1);
  EXPECT_FAILS(Adapt(request), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  ASSERT_TRUE(Create("fresh", Text(300)).ok());
  EXPECT_FAILS(Adapt(Request(api::CANCEL, "fresh")), FAILED_PRECONDITION, "CONTEXT_NOT_READY");
  request = Request();
  request.set_base_adapter("nobody");
  request.set_adapter_id("x");
  EXPECT_FAILS(Adapt(request), NOT_FOUND, "ADAPTER_NOT_FOUND");
  EXPECT_EQ(begun_, 0);
}

}  // namespace
}  // namespace refocus
