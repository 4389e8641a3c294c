#include "tests/service/service_fixture.h"

namespace refocus {

Failure FailureOf(const grpc::Status& status) {
  Failure failure;
  failure.code = status.error_code();
  failure.message = status.error_message();
  google::rpc::Status details;
  if (status.error_details().empty() || !details.ParseFromString(status.error_details())) return failure;
  EXPECT_LT(status.error_details().size(), 4096u);
  EXPECT_EQ(details.code(), static_cast<int>(status.error_code()));
  for (const auto& any : details.details()) {
    google::rpc::ErrorInfo info;
    if (any.Is<google::rpc::RetryInfo>()) failure.retry = true;
    if (!any.Is<google::rpc::ErrorInfo>() || !any.UnpackTo(&info)) continue;
    EXPECT_EQ(info.domain(), "refocus");
    failure.reason = info.reason();
    failure.metadata = {info.metadata().begin(), info.metadata().end()};
  }
  return failure;
}

void ServiceTest::StartServer(ServerOptions options, bool with_tokenizer) {
  workers_.clear();
  server_.reset();
  options.listen = options.worker_listen = "127.0.0.1:0";
  if (options.core.model.vocab == 0) options.core.model = FakeModel(kWindow);
  options.core.group.fingerprint = "fake";
  options.core.version = "test";
  auto server = Server::Start(std::move(options), with_tokenizer ? FakeTokenizer() : nullptr, SystemEnvironment());
  ASSERT_TRUE(server.ok()) << server.status();
  server_ = *std::move(server);
  channel_ = Channel();
  contexts_ = api::ContextService::NewStub(channel_);
  inference_ = api::InferenceService::NewStub(channel_);
  cluster_ = api::ClusterService::NewStub(channel_);
}

void ServiceTest::TearDown() {
  workers_.clear();
  server_.reset();
}

std::shared_ptr<grpc::Channel> ServiceTest::Channel(const grpc::ChannelArguments& arguments) {
  grpc::ChannelArguments own = arguments;
  own.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(server_->public_address(), grpc::InsecureChannelCredentials(), own);
}

void ServiceTest::StartGroup(int32_t size, std::function<void(FakeRank&)> setup) {
  workers_.clear();
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.group().ranks().empty(); }); });
  auto launch = std::make_shared<FakeLaunch>();
  launch->nonce = "launch-" + std::to_string(++launches_);
  launch->size = size;
  for (int32_t rank = 0; rank < size; ++rank) {
    workers_.push_back(std::make_unique<FakeWorker>(server_->worker_address(), launch, rank, "fake", setup));
  }
  WaitFor([&] { return Serving(); });
  ASSERT_TRUE(Serving());
  CreateReady("witness", "the witness says: a");
  witness_ = Generate(GenerateRequest("witness", "?", 5)).ids;
  ASSERT_EQ(witness_.size(), 5u);
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.drained(); }); });
}

void ServiceTest::WaitFor(const std::function<bool()>& condition, double seconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!condition() && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_TRUE(condition());
}

bool ServiceTest::Serving() {
  return server_->hub().With([](Coordinator& core) { return core.serving(); });
}

api::CreateContextRequest HeaderMessage(const std::string& id) {
  api::CreateContextRequest message;
  message.mutable_header()->set_context_id(id);
  return message;
}

api::CreateContextRequest TextMessage(int64_t offset, const std::string& text) {
  api::CreateContextRequest message;
  message.mutable_chunk()->set_offset(offset);
  message.mutable_chunk()->set_text(text);
  return message;
}

api::CreateContextRequest IdsMessage(int64_t offset, const std::vector<uint32_t>& ids) {
  api::CreateContextRequest message;
  message.mutable_chunk()->set_offset(offset);
  message.mutable_chunk()->mutable_ids()->mutable_ids()->Assign(ids.begin(), ids.end());
  return message;
}

api::CreateContextRequest FinishMessage() {
  api::CreateContextRequest message;
  message.mutable_finish();
  return message;
}

grpc::Status ServiceTest::Upload(const std::vector<api::CreateContextRequest>& messages, api::Context* context) {
  grpc::ClientContext call;
  api::Context response;
  const auto writer = contexts_->CreateContext(&call, &response);
  for (const api::CreateContextRequest& message : messages) {
    if (!writer->Write(message)) break;  // refused already
  }
  writer->WritesDone();
  const grpc::Status status = writer->Finish();
  if (context != nullptr) *context = response;
  return status;
}

grpc::Status ServiceTest::Create(const std::string& id, const std::string& text, api::Context* context) {
  return Upload({HeaderMessage(id), TextMessage(0, text), FinishMessage()}, context);
}

grpc::Status ServiceTest::CreateIds(const std::string& id, const std::vector<uint32_t>& ids, api::Context* context) {
  return Upload({HeaderMessage(id), IdsMessage(0, ids), FinishMessage()}, context);
}

grpc::Status ServiceTest::Prefill(const std::string& id, std::vector<api::PrefillEvent>* events) {
  grpc::ClientContext call;
  api::PrefillContextRequest request;
  request.set_name("contexts/" + id);
  const auto reader = contexts_->PrefillContext(&call, request);
  api::PrefillEvent event;
  while (reader->Read(&event)) {
    if (events != nullptr) events->push_back(event);
  }
  return reader->Finish();
}

void ServiceTest::CreateReady(const std::string& id, const std::string& text) {
  const grpc::Status created = Create(id, text);
  ASSERT_TRUE(created.ok() || created.error_code() == grpc::ALREADY_EXISTS) << created.error_message();
  const grpc::Status prefilled = Prefill(id);
  ASSERT_TRUE(prefilled.ok()) << prefilled.error_message();
}

api::AdaptContextRequest ServiceTest::AdaptRequest(const std::string& id) {
  api::AdaptContextRequest request;
  request.set_name("contexts/" + id);
  request.set_steps(4);
  request.set_span_tokens(3);
  request.set_seed(7);
  return request;
}

grpc::Status ServiceTest::Adapt(const api::AdaptContextRequest& request, std::vector<api::AdaptEvent>* events) {
  grpc::ClientContext call;
  const auto reader = contexts_->AdaptContext(&call, request);
  api::AdaptEvent event;
  while (reader->Read(&event)) {
    if (events != nullptr) events->push_back(event);
  }
  return reader->Finish();
}

api::GenerateRequest ServiceTest::GenerateRequest(const std::string& id, const std::string& prompt,
                                                  int64_t max_tokens) {
  api::GenerateRequest request;
  request.set_name("contexts/" + id);
  request.mutable_prompt()->set_text(prompt);
  request.set_max_tokens(max_tokens);
  return request;
}

Answer ServiceTest::Generate(const api::GenerateRequest& request) {
  grpc::ClientContext call;
  Answer answer;
  const auto reader = inference_->Generate(&call, request);
  api::GenerateEvent event;
  while (reader->Read(&event)) {
    answer.text += event.text();
    answer.ids.insert(answer.ids.end(), event.token_ids().begin(), event.token_ids().end());
    answer.events.push_back(event);
    if (event.has_summary()) answer.summary = event.summary();
  }
  answer.status = reader->Finish();
  return answer;
}

grpc::Status ServiceTest::Score(const std::vector<api::ScoreRequest>& requests, std::vector<api::ScoreEvent>* events) {
  grpc::ClientContext call;
  const auto stream = inference_->Score(&call);
  std::thread writer([&] {
    for (const api::ScoreRequest& request : requests) {
      if (!stream->Write(request)) break;
    }
    stream->WritesDone();
  });
  api::ScoreEvent event;
  while (stream->Read(&event)) {
    if (events != nullptr) events->push_back(event);
  }
  writer.join();
  return stream->Finish();
}

api::Context ServiceTest::Get(const std::string& id) {
  grpc::ClientContext call;
  api::GetContextRequest request;
  request.set_name("contexts/" + id);
  api::Context context;
  EXPECT_TRUE(contexts_->GetContext(&call, request, &context).ok());
  return context;
}

void ServiceTest::ExpectUnharmed() {
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.drained(); }); });
  EXPECT_TRUE(Serving());
  const Answer again = Generate(GenerateRequest("witness", "?", 5));
  EXPECT_TRUE(again.status.ok()) << again.status.error_message();
  EXPECT_EQ(again.ids, witness_);
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.drained(); }); });
  size_t cached = 0;
  int64_t adapter_bytes = 0, used_bytes = 0;
  server_->hub().With([&](Coordinator& core) {
    EXPECT_EQ(core.scheduler().in_flight(), 0u);
    for (const auto& [name, session] : core.catalog().sessions()) {
      EXPECT_FALSE(session->busy()) << name;
      if (!session->has_cache()) continue;
      ++cached;
      const api::Context shown = session->ToProto(0, 0);
      for (const api::Adapter& a : shown.adapters()) adapter_bytes += core.group().size() * a.memory_bytes();
    }
    used_bytes = core.kv_used_bytes();
  });
  for (const auto& worker : workers_) {
    worker->Inspect([&](FakeRank& rank) {
      EXPECT_EQ(rank.contexts.size(), cached);
      EXPECT_EQ(used_bytes, rank.held_tokens() * kFakeKvBytesPerToken + adapter_bytes);
      EXPECT_TRUE(rank.sequences.empty());
      for (const auto& [uid, adapter] : rank.adapters) EXPECT_FALSE(adapter.work.has_value());
    });
  }
}

}  // namespace refocus
