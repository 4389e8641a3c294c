// The main paths over real streams: upload, prefill, adapt, generate, score.
#include "tests/service/service_fixture.h"

namespace refocus {
namespace {

class ServeTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2);
  }
};

TEST_F(ServeTest, ContextFromUploadToAnswer) {
  api::Context context;
  ASSERT_TRUE(Create("novel", std::string(1500, 'x') + "a", &context).ok());
  EXPECT_EQ(context.name(), "contexts/novel");
  EXPECT_EQ(context.state(), api::Context::CREATED);
  EXPECT_EQ(context.token_count(), 1501);

  std::vector<api::PrefillEvent> progress;
  ASSERT_TRUE(Prefill("novel", &progress).ok());
  ASSERT_FALSE(progress.empty());  // steps that follow each other faster than they are sent are told as one
  EXPECT_EQ(progress.back().prefilled_tokens(), 1501);
  EXPECT_EQ(progress.back().context().state(), api::Context::READY);
  EXPECT_EQ(progress.back().usage().tokens(), 1501);
  EXPECT_EQ(progress.back().usage().rank_memory_bytes_size(), 2);

  const Answer answer = Generate(GenerateRequest("novel", "", 4));
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.text, "bcde");
  EXPECT_EQ(answer.summary.finish_reason(), api::FINISH_LENGTH);
  EXPECT_EQ(answer.summary.context_tokens(), 1501);
  EXPECT_EQ(answer.summary.generated_tokens(), 4);
  EXPECT_EQ(answer.summary.prompt_tokens(), 0);

  std::vector<api::AdaptEvent> events;
  const grpc::Status adapted = Adapt(AdaptRequest("novel"), &events);
  ASSERT_TRUE(adapted.ok()) << adapted.error_message();
  ASSERT_EQ(events.size(), 8u);  // effective, probe, 4 steps, probe, adapter
  EXPECT_EQ(events[0].effective().seed(), 7u);
  EXPECT_EQ(events[5].step().step(), 4);
  EXPECT_DOUBLE_EQ(events[5].step().loss(), 0.25);
  EXPECT_EQ(events[7].adapter().revision(), 1);
  EXPECT_EQ(events[7].adapter().delta_hash(), "0000000000001004");
  EXPECT_DOUBLE_EQ(events[7].adapter().probe_loss_after(), 2.0 - 0.04);
  EXPECT_EQ(events[7].usage().tokens(), 12);

  api::GenerateRequest adapted_request = GenerateRequest("novel", "a", 3);
  adapted_request.set_adapter_id("default");
  const Answer adapted_answer = Generate(adapted_request);
  EXPECT_EQ(adapted_answer.text, "ceg");  // revision 1 steps by two
  EXPECT_EQ(adapted_answer.summary.adapter_revision(), 1);
  EXPECT_EQ(Generate(GenerateRequest("novel", "a", 3)).text, "bcd");
  ExpectUnharmed();
}

TEST_F(ServeTest, ScoresComeInOrder) {
  CreateReady("a", "text a");
  std::vector<api::ScoreRequest> requests;
  for (int i = 0; i < 40; ++i) {
    api::ScoreRequest& request = requests.emplace_back();
    request.set_name("contexts/a");
    request.mutable_prompt()->set_text(std::string(i % 3, 'p'));
    request.mutable_target()->set_text(i % 2 == 0 ? "qrs" : "zzz");
    request.set_target_id(std::to_string(i));
    request.set_token_logprobs(true);
  }
  std::vector<api::ScoreEvent> events;
  const grpc::Status status = Score(requests, &events);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(events.size(), 40u);
  for (int i = 0; i < 40; ++i) {
    EXPECT_EQ(events[i].target_id(), std::to_string(i));
    EXPECT_EQ(events[i].token_count(), 3);
    EXPECT_EQ(events[i].token_logprobs_size(), 3);
    EXPECT_EQ(events[i].is_greedy(), i % 2 == 0 && i % 3 != 0) << i;  // "p" is followed by "qrs"
  }
  EXPECT_NEAR(events[0].sum_logprob(), -('q' % 7) - ('r' % 7) - ('s' % 7) - 1.5, 1e-6);
  ExpectUnharmed();
}

// A context that opens a conversation, a question that closes it, and what both refuse; nothing is left behind.
TEST_F(ServeTest, Conversation) {
  ServerOptions options;
  options.core.chat = *ChatFormat::Make("qwen3", FakeTokenizer());
  StartServer(std::move(options));
  StartGroup(2);
  api::CreateContextRequest header = HeaderMessage("talk");
  api::Prologue* prologue = header.mutable_header()->mutable_prologue();
  prologue->set_system("S");
  api::Context context;
  ASSERT_TRUE(Upload({header, TextMessage(0, "a te"), TextMessage(4, "xt"), FinishMessage()}, &context).ok());
  EXPECT_EQ(context.chat_format(), "qwen3");
  // <|im_start|> "system\nS" <|im_end|> "\n" <|im_start|> "user\na text"
  EXPECT_EQ(context.token_count(), 1 + 8 + 1 + 1 + 1 + 11);
  ASSERT_TRUE(Prefill("talk").ok());

  api::GenerateRequest request = GenerateRequest("talk", "", 3);
  request.clear_prompt();
  request.mutable_chat()->set_question("?");
  const Answer answer = Generate(request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.text, "\x0b\x0c\r") << "the fake model counts on from the line break behind \"assistant\"";
  // "?" <|im_end|> "\n" <|im_start|> "assistant\n"
  EXPECT_EQ(answer.summary.prompt_tokens(), 1 + 1 + 1 + 1 + 10);
  auto* earlier = request.mutable_chat()->add_earlier();
  earlier->set_question("?");
  earlier->set_answer("!");
  request.mutable_chat()->set_thinking(false);
  const Answer second = Generate(request);
  // and "!" <|im_end|> "\n" <|im_start|> "user\n?" <|im_end|> "\n" <|im_start|> "assistant\n" <think> 2 </think> 2
  EXPECT_EQ(second.summary.prompt_tokens(), 14 + 4 + 6 + 3 + 10 + 6);

  // The fake model finds what counts on from the prompt's last token most likely.
  api::ScoreRequest score;
  score.set_name("contexts/talk");
  *score.mutable_chat() = request.chat();
  score.mutable_target()->set_text("\x0b\x0c");
  api::ScoreRequest raw = score;
  raw.clear_chat();
  raw.mutable_prompt()->set_text("?");
  std::vector<api::ScoreEvent> scores;
  ASSERT_TRUE(Score({score, raw}, &scores).ok());
  EXPECT_TRUE(scores[0].is_greedy()) << "behind the line break that opens the answer";
  EXPECT_FALSE(scores[1].is_greedy());
  EXPECT_EQ(scores[0].token_count(), 2);
  score.mutable_prompt()->set_text("?");
  EXPECT_FAILS(Score({score}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  score.clear_prompt();
  score.mutable_chat()->set_thinking_budget(5);
  EXPECT_FAILS(Score({score}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  score.mutable_chat()->clear_thinking_budget();

  prologue->set_system("\xff");
  header.mutable_header()->set_context_id("bad");
  EXPECT_FAILS(Upload({header, TextMessage(0, "x"), FinishMessage()}), INVALID_ARGUMENT, "INVALID_UTF8");
  prologue->set_system("S");
  prologue->set_date("today");
  EXPECT_FAILS(Upload({header, TextMessage(0, "x"), FinishMessage()}), INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  request.mutable_chat()->set_thinking_budget(0);
  EXPECT_FAILS(Generate(request).status, INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE");
  CreateReady("plain", "text");
  request.mutable_chat()->clear_thinking_budget();
  request.set_name("contexts/plain");
  EXPECT_FAILS(Generate(request).status, FAILED_PRECONDITION, "NO_CONVERSATION");
  score.set_name("contexts/plain");
  EXPECT_FAILS(Score({score}), FAILED_PRECONDITION, "NO_CONVERSATION");

  StartServer();  // a model whose template nobody knows
  StartGroup(1);
  prologue->clear_date();
  EXPECT_FAILS(Upload({header, TextMessage(0, "x"), FinishMessage()}), FAILED_PRECONDITION, "NO_CHAT_FORMAT");
  CreateReady("plain", "text");
  EXPECT_FAILS(Generate(request).status, FAILED_PRECONDITION, "NO_CHAT_FORMAT");
  EXPECT_FAILS(Score({score}), FAILED_PRECONDITION, "NO_CHAT_FORMAT");
}

// What a rank draws depends on all that it may depend on, and on nothing else.
class SharingTest : public ServiceTest {
 protected:
  void SetUp() override {
    StartServer();
    StartGroup(2, [](FakeRank& rank) { rank.keyed = true; });
    CreateReady("a", std::string(1200, 'x') + "a");
    CreateReady("b", std::string(1200, 'x') + "b");
  }
  static api::GenerateRequest Question(int i) {
    api::GenerateRequest request = GenerateRequest(i % 2 == 0 ? "a" : "b", std::string(i % 7, 'p'), 20 + i);
    request.set_ignore_eos(true);
    return request;
  }
};

TEST_F(SharingTest, ManyClientsGetWhatEachWouldAlone) {
  constexpr int kClients = 40;
  std::vector<std::vector<uint32_t>> alone(kClients);
  for (int i = 0; i < kClients; ++i) alone[i] = Generate(Question(i)).ids;
  std::vector<Answer> together(kClients);
  std::vector<std::thread> clients;
  for (int i = 0; i < kClients; ++i) clients.emplace_back([&, i] { together[i] = Generate(Question(i)); });
  for (std::thread& client : clients) client.join();
  for (int i = 0; i < kClients; ++i) {
    ASSERT_TRUE(together[i].status.ok()) << together[i].status.error_message();
    EXPECT_EQ(together[i].ids.size(), static_cast<size_t>(20 + i));
    EXPECT_EQ(together[i].ids, alone[i]) << i;
  }
  EXPECT_EQ(Get("b").shared_tokens(), 1024);
  ExpectUnharmed();
}

TEST_F(SharingTest, SamplesComeSideBySide) {
  api::GenerateRequest request = Question(6);
  request.set_temperature(1);
  request.set_seed(3);
  request.set_n(4);
  const Answer answer = Generate(request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  std::map<int32_t, std::vector<uint32_t>> samples;
  std::map<int32_t, uint64_t> seeds;
  for (const api::GenerateEvent& event : answer.events) {
    EXPECT_EQ(seeds.count(event.sample()), 0u);  // the summary is a sample's last event
    auto& ids = samples[event.sample()];
    ids.insert(ids.end(), event.token_ids().begin(), event.token_ids().end());
    if (event.has_summary()) seeds[event.sample()] = event.summary().seed();
  }
  ASSERT_EQ(samples.size(), 4u);
  ASSERT_EQ(seeds.size(), 4u);
  request.clear_n();
  for (const auto& [sample, ids] : samples) {
    request.set_seed(seeds[sample]);
    EXPECT_EQ(Generate(request).ids, ids) << sample;
  }
  ExpectUnharmed();
}

}  // namespace
}  // namespace refocus
