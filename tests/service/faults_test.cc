// What goes wrong while work runs: callers that leave, callers that do not read, ranks that die or hang, a server that
// stops.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/health_check_service_interface.h>

#include "base/limits.h"
#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

// grpc.health.v1: the request is one string field, the answer one enum field.
int HealthOf(const std::shared_ptr<grpc::Channel>& channel, const std::string& service, grpc::StatusCode* code) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  std::string bytes = service.empty() ? "" : "\x0a" + std::string(1, static_cast<char>(service.size())) + service;
  const grpc::Slice slice(bytes);
  grpc::ByteBuffer request(&slice, 1), response;
  grpc::CompletionQueue queue;
  grpc::Status status;
  const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  *code = status.error_code();
  std::vector<grpc::Slice> slices;
  if (!status.ok() || !response.Dump(&slices).ok() || slices.empty() || slices[0].size() < 2) return -1;
  return slices[0].begin()[1];
}

void Pause(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

class FaultsTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    // A command takes 3 ms, a decoded token 2 ms.
    StartGroup(2, [](FakeRank& rank) {
      rank.command_seconds = 0.2;
      rank.pause = [](const wire::Command&, int64_t token) { Pause(token < 0 ? 3 : 2); };
    });
    CreateReady("a", std::string(600, 'x') + "a");
  }
  bool Idle() {
    return server_->hub().With([](Coordinator& core) { return core.drained(); });
  }
  api::GenerateRequest LongAnswer(const std::string& id = "a") {
    api::GenerateRequest request = GenerateRequest(id, "a", 3000);
    request.set_ignore_eos(true);
    return request;
  }
};

TEST_F(FaultsTest, CallerGoneInGenerateStopsTheWork) {
  grpc::ClientContext call;
  const auto reader = inference_->Generate(&call, LongAnswer());
  api::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  call.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::CANCELLED);
  WaitFor([&] { return Idle(); }, 3);  // unharmed, it would take 6 s
  ExpectUnharmed();
}

TEST_F(FaultsTest, CallerGoneInPrefillCancelsOnlyWhenAsked) {
  for (const api::OnDisconnect mode : {api::CANCEL, api::CONTINUE}) {
    const std::string id = mode == api::CANCEL ? "cancelled" : "continued";
    ASSERT_TRUE(Create(id, std::string(3500, 'y')).ok());
    grpc::ClientContext call;
    api::PrefillContextRequest request;
    request.set_name("contexts/" + id);
    request.set_on_disconnect(mode);
    const auto reader = contexts_->PrefillContext(&call, request);
    api::PrefillEvent event;
    ASSERT_TRUE(reader->Read(&event));
    call.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::CANCELLED);
    WaitFor([&] { return Get(id).state() == (mode == api::CANCEL ? api::Context::CREATED : api::Context::READY); });
    EXPECT_EQ(Get(id).kv_bytes() > 0, mode == api::CONTINUE);
  }
  ExpectUnharmed();
}

TEST_F(FaultsTest, CallerGoneInAdaptMayComeBack) {
  api::AdaptContextRequest request = AdaptRequest("a");
  request.set_steps(60);
  request.set_request_id("attach");
  {
    grpc::ClientContext call;
    const auto reader = contexts_->AdaptContext(&call, request);
    api::AdaptEvent event;
    ASSERT_TRUE(reader->Read(&event));
    call.TryCancel();
    reader->Finish();
  }
  std::vector<api::AdaptEvent> events;
  const grpc::Status status = Adapt(request, &events);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(events.back().adapter().revision(), 1);
  EXPECT_EQ(events.size(), 64u);  // all of it, from the start
  EXPECT_EQ(Get("a").adapters(0).revision(), 1);
  request.set_request_id("cancel");
  request.set_steps(3000);  // far from its end when it is left
  request.set_on_disconnect(api::CANCEL);
  {
    grpc::ClientContext call;
    const auto reader = contexts_->AdaptContext(&call, request);
    api::AdaptEvent event;
    ASSERT_TRUE(reader->Read(&event));
    call.TryCancel();
    reader->Finish();
  }
  WaitFor([&] { return Get("a").state() == api::Context::READY; });
  EXPECT_EQ(Get("a").adapters(0).revision(), 1);
  ExpectUnharmed();
}

TEST_F(FaultsTest, Row50DeleteWhileGenerating) {
  grpc::ClientContext call;
  const auto reader = inference_->Generate(&call, LongAnswer());
  api::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  api::DeleteContextRequest request;
  api::DeleteContextResponse response;
  request.set_name("contexts/a");
  grpc::ClientContext first, second;
  EXPECT_FAILS(contexts_->DeleteContext(&first, request, &response), FAILED_PRECONDITION, "CONTEXT_BUSY");
  request.set_force(true);
  EXPECT_TRUE(contexts_->DeleteContext(&second, request, &response).ok());
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::CANCELLED);
  ExpectUnharmed();
}

TEST_F(FaultsTest, Row71TwoAdaptationsOfOneContext) {
  api::AdaptContextRequest request = AdaptRequest("a");
  request.set_steps(3000);
  request.set_on_disconnect(api::CANCEL);
  grpc::ClientContext call;
  const auto reader = contexts_->AdaptContext(&call, request);
  api::AdaptEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_FAILS(Adapt(AdaptRequest("a")), ABORTED, "CONTEXT_BUSY");
  EXPECT_TRUE(Generate(GenerateRequest("a", "a", 2)).status.ok());  // answers use what is committed
  call.TryCancel();
  reader->Finish();
  WaitFor([&] { return Idle(); });
  EXPECT_EQ(Get("a").adapters_size(), 0);
  ExpectUnharmed();
}

TEST_F(FaultsTest, Row74NonFiniteLoss) {
  StartGroup(2, [](FakeRank& rank) {
    rank.tamper = [](const wire::Command& command, wire::Result& result) {
      if (command.has_adapt_step() && command.adapt_step().step() == 2) result.set_loss(0.0 / 0.0);
    };
  });
  CreateReady("a", "");
  const grpc::Status status = Adapt(AdaptRequest("a"));
  EXPECT_FAILS(status, ABORTED, "NON_FINITE_LOSS");
  EXPECT_EQ(FailureOf(status).metadata["step"], "2");
  EXPECT_EQ(FailureOf(status).metadata["kept_revision"], "0");
  ExpectUnharmed();
}

TEST_F(FaultsTest, NonFiniteLogitsEndTheirCallOnly) {
  std::atomic<int> poisoned{0};  // 1: prompts and targets, 2: the end of decode commands
  std::atomic<size_t> steps{0};  // of the first such command
  StartGroup(2, [&](FakeRank& rank) {
    rank.tamper = [&](const wire::Command& command, wire::Result& result) {
      if (!(poisoned == 1 && command.has_extend_sequence()) && !(poisoned == 2 && command.has_decode_steps())) return;
      size_t none = 0;
      steps.compare_exchange_strong(none, static_cast<size_t>(command.decode_steps().steps()));
      result.clear_tokens();
      result.clear_score_logprobs();
      result.clear_score_greedy();
      const auto fail = [](auto* to) {
        to->set_code(grpc::INTERNAL);
        to->set_reason("NON_FINITE_LOGITS");
        to->set_message("position 612: the logits are not finite");
      };
      if (!command.has_decode_steps()) return fail(&result);
      wire::SequenceEnd* end = result.add_ended();  // in a batch the command itself goes on
      end->set_sequence(command.decode_steps().sequences(0));
      end->set_why(wire::SequenceEnd::FAILED);
      fail(end);
    };
  });
  CreateReady("a", "");
  for (const int where : {1, 2}) {
    poisoned = where;
    const Answer answer = Generate(LongAnswer());
    EXPECT_FAILS(answer.status, INTERNAL, "NON_FINITE_LOGITS");
    EXPECT_FALSE(FailureOf(answer.status).retry);
    EXPECT_LE(answer.ids.size(), where == 1 ? 0u : 1u + steps);  // what came before and was sent before the end
    EXPECT_FALSE(answer.events.empty() ? false : answer.events.back().has_summary());
    WaitFor([&] { return Idle(); });  // the caller is told before the second rank has ended its command
  }
  poisoned = 1;
  api::ScoreRequest request;
  request.set_name("contexts/a");
  request.mutable_target()->set_text("q");
  std::vector<api::ScoreEvent> events;
  EXPECT_FAILS(Score({request}, &events), INTERNAL, "NON_FINITE_LOGITS");
  EXPECT_TRUE(events.empty());
  WaitFor([&] { return Idle(); });
  poisoned = 0;
  EXPECT_EQ(Generate(GenerateRequest("a", "a", 3)).text, "bcd");
  ExpectUnharmed();
}

TEST_F(FaultsTest, ALostRankFailsEveryCallSoonAndANewLaunchServes) {
  ASSERT_TRUE(Create("b", std::string(3500, 'y')).ok());
  Answer answer;
  grpc::Status adapted, prefilled;
  std::thread generating([&] { answer = Generate(LongAnswer()); });
  std::thread adapting([&] {
    api::AdaptContextRequest request = AdaptRequest("a");
    request.set_steps(2000);
    adapted = Adapt(request);
  });
  std::thread prefilling([&] { prefilled = Prefill("b"); });
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.jobs() == 3; }); });
  const auto begin = std::chrono::steady_clock::now();
  workers_[1]->Kill();
  generating.join();
  adapting.join();
  prefilling.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(2));
  for (const grpc::Status& status : {answer.status, adapted, prefilled}) {
    EXPECT_FAILS(status, UNAVAILABLE, "WORKER_LOST");
    EXPECT_TRUE(FailureOf(status).retry);
    EXPECT_NE(FailureOf(status).metadata["cause"].find("rank 1"), std::string::npos);
  }
  EXPECT_FALSE(Serving());
  EXPECT_EQ(workers_[0]->WaitUntilEnded().error_code(), grpc::UNAVAILABLE);
  EXPECT_NE(workers_[0]->shutdown_reason().find("rank 1"), std::string::npos);
  EXPECT_FAILS(Prefill("a"), UNAVAILABLE, "GROUP_REBUILDING");
  EXPECT_EQ(Get("a").state(), api::Context::CREATED);
  StartGroup(3);
  CreateReady("a", "");
  EXPECT_EQ(Generate(GenerateRequest("a", "a", 3)).text, "bcd");
  ExpectUnharmed();
}

TEST_F(FaultsTest, AHungRankIsFoundByItsMissingProgress) {
  ServerOptions options;
  options.core.group.stuck_seconds = 0.5;
  StartServer(std::move(options));
  StartGroup(2);
  workers_[1]->Freeze();
  const Answer answer = Generate(GenerateRequest("witness", "a", 10));
  EXPECT_FAILS(answer.status, UNAVAILABLE, "WORKER_LOST");
  EXPECT_NE(answer.status.error_message().find("rank 1 is alive but made no progress"), std::string::npos);
}

TEST_F(FaultsTest, SlowReaderDoesNotDelayOthers) {
  grpc::ChannelArguments small;
  small.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1024);
  small.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  const auto stub = api::InferenceService::NewStub(Channel(small));
  grpc::ClientContext call;
  api::GenerateRequest request = LongAnswer();
  request.set_logprobs(20);
  const auto reader = stub->Generate(&call, request);
  Pause(300);  // it reads nothing
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_TRUE(Generate(GenerateRequest("witness", "?", 5)).status.ok());
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
  call.TryCancel();
  reader->Finish();
  ExpectUnharmed();
}

TEST_F(FaultsTest, CallersThatStopReadingLoseTheirCalls) {
  ServerOptions options;
  options.read_within_seconds = 0.4;
  StartServer(std::move(options));
  StartGroup(1);
  CreateReady("a", std::string(600, 'x'));
  grpc::ChannelArguments small;
  small.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1024);
  small.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  const auto channel = Channel(small);
  const auto nobody_runs = [&] { return server_->hub().calls().running() == 0; };
  const auto last_status = [](auto& reader, auto event) {
    while (reader->Read(&event)) {
    }
    return reader->Finish();
  };
  {
    grpc::ClientContext call;
    api::GenerateRequest request = LongAnswer();
    request.set_logprobs(20);
    const auto reader = api::InferenceService::NewStub(channel)->Generate(&call, request);
    Pause(100);
    WaitFor(nobody_runs);
    EXPECT_FAILS(last_status(reader, api::GenerateEvent()), RESOURCE_EXHAUSTED, "SLOW_READER");
  }
  {
    grpc::ClientContext call;
    api::AdaptContextRequest request = AdaptRequest("a");
    request.set_steps(5000);
    request.set_spans_per_step(64);
    request.set_on_disconnect(api::CANCEL);
    const auto reader = api::ContextService::NewStub(channel)->AdaptContext(&call, request);
    Pause(100);
    WaitFor(nobody_runs);
    WaitFor([&] { return Get("a").state() == api::Context::READY; });
    EXPECT_FAILS(last_status(reader, api::AdaptEvent()), RESOURCE_EXHAUSTED, "SLOW_READER");
  }
  ExpectUnharmed();
}

TEST_F(FaultsTest, AnExceptionEndsItsCallOnly) {
  EXPECT_FAILS(Create("z", "some \xfe"), RESOURCE_EXHAUSTED, "SERVER_MEMORY");
  EXPECT_FAILS(Create("z", "some \xfd"), INTERNAL, "EXCEPTION");
  EXPECT_FAILS(Generate(GenerateRequest("a", "\xfd", 1)).status, INTERNAL, "EXCEPTION");
  grpc::ClientContext call;
  api::TokenizeRequest request;
  request.set_text("\xfe");
  api::TokenizeResponse response;
  EXPECT_FAILS(inference_->Tokenize(&call, request, &response), RESOURCE_EXHAUSTED, "SERVER_MEMORY");
  EXPECT_TRUE(Create("z", "text").ok());
  ExpectUnharmed();
}

TEST_F(FaultsTest, ADeletionWaitsOnlySoLong) {
  ServerOptions options;
  options.delete_seconds = 0.3;
  StartServer(std::move(options));
  StartGroup(1);
  CreateReady("a", std::string(600, 'x'));
  workers_[0]->Freeze();
  Answer answer;
  std::thread generating([&] { answer = Generate(LongAnswer()); });
  WaitFor([&] { return !Idle(); });
  grpc::ClientContext call;
  api::DeleteContextRequest request;
  api::DeleteContextResponse response;
  request.set_name("contexts/a");
  request.set_force(true);
  EXPECT_FAILS(contexts_->DeleteContext(&call, request, &response), DEADLINE_EXCEEDED, "DEADLINE");
  EXPECT_FAILS(Create("a", "text"), ABORTED, "CONTEXT_BUSY");
  workers_[0]->Kill();
  generating.join();
  EXPECT_EQ(answer.status.error_code(), grpc::CANCELLED);
}

TEST_F(FaultsTest, AScoreCallThatMovesIsNotIdle) {
  ServerOptions options;
  options.score_idle_seconds = 0.5;
  StartServer(std::move(options));
  StartGroup(1, [](FakeRank& rank) {
    rank.pause = [](const wire::Command& command, int64_t) {
      if (command.has_extend_sequence() && command.extend_sequence().score_ids_size() > 0) Pause(700);
    };
  });
  grpc::ClientContext call;
  const auto stream = inference_->Score(&call);
  api::ScoreRequest request;
  request.set_name("contexts/witness");
  request.mutable_target()->set_text("q");
  api::ScoreEvent event;
  for (int i = 0; i < 2; ++i) {  // each takes longer than the limit, and so does the pause after it, nearly
    ASSERT_TRUE(stream->Write(request));
    ASSERT_TRUE(stream->Read(&event)) << i;
    Pause(250);
  }
  EXPECT_FALSE(stream->Read(&event));  // nothing more is asked for
  EXPECT_FAILS(stream->Finish(), DEADLINE_EXCEEDED, "DEADLINE");
}

TEST_F(FaultsTest, HealthStartsAsNotServing) {
  StartServer();
  grpc::StatusCode code;
  EXPECT_EQ(HealthOf(channel_, "", &code), 2);
  EXPECT_EQ(HealthOf(channel_, "refocus.v1.ContextService", &code), 2);
  EXPECT_EQ(HealthOf(channel_, "liveness", &code), 1);
}

TEST_F(FaultsTest, DrainLetsRunningWorkFinish) {
  Answer answer;
  std::thread generating([&] {
    api::GenerateRequest request = GenerateRequest("a", "a", 100);
    request.set_ignore_eos(true);
    answer = Generate(request);
  });
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.jobs() == 1; }); });
  std::thread draining([&] { server_->Drain(20, [] { return false; }); });
  WaitFor([&] { return !Serving(); });
  EXPECT_FAILS(Generate(GenerateRequest("a", "a", 1)).status, UNAVAILABLE, "DRAINING");
  EXPECT_FAILS(Create("z", "text"), UNAVAILABLE, "DRAINING");
  generating.join();
  draining.join();
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.ids.size(), 100u);
  EXPECT_NE(workers_[0]->shutdown_reason(), "");
}

TEST_F(FaultsTest, ASecondSignalEndsTheDrainAtOnce) {
  Answer answer;
  std::thread generating([&] { answer = Generate(LongAnswer()); });
  WaitFor([&] { return server_->hub().With([](Coordinator& core) { return core.jobs() == 1; }); });
  const auto begin = std::chrono::steady_clock::now();
  int asked = 0;
  server_->Drain(60, [&] { return ++asked > 5; });
  generating.join();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  EXPECT_FAILS(answer.status, UNAVAILABLE, "DRAINING");
}

TEST_F(FaultsTest, Row97Deadlines) {
  grpc::ClientContext call;
  call.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(30));
  const auto reader = inference_->Generate(&call, LongAnswer());
  api::GenerateEvent event;
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::DEADLINE_EXCEEDED);
  WaitFor([&] { return Idle(); }, 3);  // unharmed, it would take 6 s
  grpc::ClientContext far;
  far.set_deadline(std::chrono::system_clock::now() + std::chrono::hours(24 * 3650));
  api::GetClusterResponse response;
  EXPECT_TRUE(cluster_->GetCluster(&far, {}, &response).ok());
  ExpectUnharmed();
}

TEST_F(FaultsTest, HealthFollowsTheGroup) {
  const std::string names[] = {"", "readiness", "refocus.v1.ContextService", "refocus.v1.InferenceService",
                               "refocus.v1.ClusterService"};
  grpc::StatusCode code;
  for (const std::string& name : names) EXPECT_EQ(HealthOf(channel_, name, &code), 1) << name;
  EXPECT_EQ(HealthOf(channel_, "liveness", &code), 1);
  EXPECT_EQ(HealthOf(channel_, "unknown", &code), -1);
  EXPECT_EQ(code, grpc::NOT_FOUND);
  workers_[0]->Kill();
  WaitFor([&] { return !Serving(); });
  for (const std::string& name : names) EXPECT_EQ(HealthOf(channel_, name, &code), 2) << name;
  EXPECT_EQ(HealthOf(channel_, "liveness", &code), 1);
}

TEST_F(FaultsTest, TheSecondServerCannotTakeThePort) {
  ServerOptions options;
  options.core.model = FakeModel(100);
  options.listen = server_->public_address();
  options.worker_listen = "127.0.0.1:0";
  const auto second = Server::Start(std::move(options), nullptr, SystemEnvironment());
  EXPECT_FALSE(second.ok());
  EXPECT_EQ(DetailOf(second.status()).reason, "CONFIG_INVALID");
}

TEST_F(FaultsTest, RejectionsLeaveNothing) {
  for (int i = 0; i < 2000; ++i) {
    EXPECT_FALSE(Generate(GenerateRequest(i % 2 == 0 ? "absent" : "a", "a", i % 2 == 0 ? 1 : 100'000)).status.ok());
  }
  ExpectUnharmed();
}

TEST_F(FaultsTest, CoordinatorOverheadPerToken) {
  StartGroup(2);  // ranks that need no time
  CreateReady("a", "");
  const auto begin = std::chrono::steady_clock::now();
  const Answer answer = Generate(LongAnswer());
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%zu tokens, %.3f ms each\n", answer.ids.size(), 1e3 * seconds / static_cast<double>(answer.ids.size()));
}

}  // namespace
}  // namespace refocus
