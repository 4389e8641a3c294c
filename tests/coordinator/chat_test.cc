// Conversations in the state machine: what a prologue and a chat need, and reasoning with its budget as the ranks see
// it.
#include "coordinator/core/upload.h"
#include "coordinator/core/validate.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

CoordinatorOptions ChatOptions() {
  CoordinatorOptions options = Simulation::DefaultOptions();
  options.model = FakeModel(1000);
  options.chat = *ChatFormat::Make("qwen3", FakeTokenizer());
  return options;
}

class ChatTest : public ::testing::Test {
 protected:
  // '@' opens the reasoning and 'J' closes it; the forced end is 'J' and two line breaks.
  static constexpr int32_t kOpen = '@', kClose = 'J';

  void SetUp() override {
    simulation_.Launch(2);
    simulation_.Run();
    api::CreateContextRequest::Header header;
    header.set_context_id("talk");
    header.mutable_prologue();
    const auto ticket = simulation_.core().BeginUpload(header);
    ASSERT_TRUE(ticket.ok()) << ticket.status();
    const auto tokens = std::make_shared<const std::vector<int32_t>>(600, 50);
    ASSERT_TRUE(simulation_.core().FinishUpload(*ticket, header, tokens, "hash").ok());
    ASSERT_TRUE(simulation_.Prefill("talk").ok());
    simulation_.Run();
    request_.set_name("contexts/talk");
    request_.mutable_chat();
    thinking_.open = kOpen;
    thinking_.close = kClose;
    thinking_.forced_end = {kClose, 10, 10};
  }
  void TearDown() override {
    simulation_.Run();
    simulation_.ExpectConsistent();
  }

  StatusOr<std::shared_ptr<GenerateJob>> Generate(std::vector<int32_t> prompt) {
    return simulation_.core().Generate(request_, std::move(prompt), 1e9,
                                       std::make_shared<const ChatFormat::Thinking>(thinking_));
  }

  struct Said {
    std::string reasoning, text;
    std::vector<uint32_t> ids;
    api::GenerateSummary summary;
  };
  // The fake model counts on from `last`.
  Said Ask(int32_t last, int64_t max_tokens, int64_t budget) {
    request_.set_max_tokens(max_tokens);
    if (budget > 0) request_.mutable_chat()->set_thinking_budget(budget);
    const auto job = Generate({last});
    EXPECT_TRUE(job.ok()) << job.status();
    simulation_.Collect();
    simulation_.Run();
    EXPECT_TRUE((*job)->status().ok()) << (*job)->status();
    Said said;
    for (const auto& event : (*job)->TakeEvents()) {
      said.reasoning += event.reasoning();
      said.text += event.text();
      said.ids.insert(said.ids.end(), event.token_ids().begin(), event.token_ids().end());
      if (event.has_summary()) said.summary = event.summary();
    }
    return said;
  }

  Simulation simulation_{1, ChatOptions()};
  api::GenerateRequest request_;
  ChatFormat::Thinking thinking_;
};

TEST_F(ChatTest, ReasoningComesApart) {
  request_.add_stop("C");  // of the answer: what the model thinks does not stop it
  request_.add_stop("N");
  const Said said = Ask(kOpen - 1, 100, 0);
  EXPECT_EQ(said.reasoning, "ABCDEFGHI");
  EXPECT_EQ(said.text, "KLM");
  EXPECT_EQ(said.ids.front(), static_cast<uint32_t>(kOpen));
  EXPECT_EQ(said.summary.reasoning_tokens(), 11);
  EXPECT_EQ(said.summary.finish_reason(), api::FINISH_STOP);
  EXPECT_FALSE(said.summary.thinking_cut());
}

TEST_F(ChatTest, AModelMayAnswerAtOnce) {
  const Said said = Ask('O', 3, 1);
  EXPECT_EQ(said.text, "PQR");
  EXPECT_EQ(said.reasoning, "");
  EXPECT_EQ(said.summary.reasoning_tokens(), 0);
}

TEST_F(ChatTest, BudgetForcesTheEndAndDecodingGoesOn) {
  const Said said = Ask(kOpen - 1, 8, 4);
  EXPECT_EQ(said.reasoning, "ABCD");
  EXPECT_EQ(said.text, "\x0b\x0c\r") << "the model counts on from the last forced token";
  EXPECT_EQ(said.ids, (std::vector<uint32_t>{64, 65, 66, 67, 68, 74, 10, 10, 11, 12, 13}));
  EXPECT_EQ(said.summary.generated_tokens(), 11);
  EXPECT_EQ(said.summary.reasoning_tokens(), 6);
  EXPECT_EQ(said.summary.finish_reason(), api::FINISH_LENGTH);
  EXPECT_TRUE(said.summary.thinking_cut());
}

TEST_F(ChatTest, BudgetWhereThePromptOpened) {
  thinking_.begins_inside = true;
  const Said cut = Ask('0', 5, 2);
  EXPECT_EQ(cut.reasoning, "12");
  EXPECT_EQ(cut.text, "\x0b\x0c\r");
  EXPECT_TRUE(cut.summary.thinking_cut());
  const Said in_time = Ask('H', 5, 2);  // closed by the model with the token after its budget's first
  EXPECT_EQ(in_time.reasoning, "I");
  EXPECT_EQ(in_time.text, "KLM");
  EXPECT_FALSE(in_time.summary.thinking_cut());
}

TEST_F(ChatTest, LengthCountsBeforeTheBudget) {
  const Said said = Ask(kOpen - 1, 5, 4);
  EXPECT_EQ(said.reasoning, "ABCD");
  EXPECT_EQ(said.text, "");
  EXPECT_EQ(said.summary.finish_reason(), api::FINISH_LENGTH);
  EXPECT_FALSE(said.summary.thinking_cut());
}

TEST_F(ChatTest, OneStepAtATimeGivesTheSame) {
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.06;
  EXPECT_EQ(Ask(kOpen - 1, 8, 4).ids, (std::vector<uint32_t>{64, 65, 66, 67, 68, 74, 10, 10, 11, 12, 13}));
}

// Meanwhile the others decode on. Nobody's tokens change.
TEST_F(ChatTest, TheForcedEndLeavesTheBatchAndJoinsItAgain) {
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0.06;
  const auto begin = [&](int32_t last, int64_t max_tokens) {
    request_.set_max_tokens(max_tokens);
    return *Generate({last});
  };
  const std::shared_ptr<GenerateJob> others[] = {begin('O', 30), begin('o', 30)};
  request_.mutable_chat()->set_thinking_budget(4);
  const std::shared_ptr<GenerateJob> talk = begin(kOpen - 1, 8);
  simulation_.Collect();
  std::map<int64_t, char> commands;  // 'F': the forced end; else how many decode
  for (int i = 0; i < 1000; ++i) {
    for (const auto& message : simulation_.links()[0].inbox) {
      const wire::Command& command = message.command();
      if (command.has_decode_steps()) {
        commands[command.seq()] = static_cast<char>('0' + command.decode_steps().sequences_size());
      } else if (command.extend_sequence().ids_size() == 4) {
        commands[command.seq()] = 'F';
      }
    }
    for (auto& link : simulation_.links()) {
      if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
      while (!link.outbox.empty()) simulation_.StepAnswer(link);
    }
  }
  std::string order;
  for (const auto& [seq, what] : commands) order += what;
  const size_t forced = order.find('F');
  ASSERT_NE(forced, std::string::npos) << order;
  EXPECT_EQ(order.find('F', forced + 1), std::string::npos) << order;
  EXPECT_LT(order.find('3'), forced) << order;
  EXPECT_NE(order.find('3', forced), std::string::npos) << order;
  EXPECT_EQ(order[forced + 1], '2') << order;
  const auto ids = [](GenerateJob& job) {
    EXPECT_TRUE(job.status().ok()) << job.status();
    std::vector<uint32_t> out;
    for (const auto& event : job.TakeEvents()) out.insert(out.end(), event.token_ids().begin(), event.token_ids().end());
    return out;
  };
  EXPECT_EQ(ids(*talk), (std::vector<uint32_t>{64, 65, 66, 67, 68, 74, 10, 10, 11, 12, 13}));
  for (const uint32_t first : {80u, 112u}) {
    std::vector<uint32_t> expected;
    for (uint32_t id = first; id < first + 30; ++id) expected.push_back(id);
    EXPECT_EQ(ids(*others[first == 112u]), expected);
  }
}

// Each ends its own reasoning, also where that is due before all others have forked.
TEST_F(ChatTest, SamplesHaveABudgetEach) {
  request_.set_n(3);
  request_.set_temperature(1);
  request_.set_max_tokens(6);
  request_.mutable_chat()->set_thinking_budget(1);
  for (int32_t rank = 0; rank < 2; ++rank) simulation_.rank(rank).command_seconds = 0;  // all are owed the next turn
  for (const bool inside : {false, true}) {
    thinking_.begins_inside = inside;
    const auto first = Generate({kOpen - 1});
    ASSERT_TRUE(first.ok()) << first.status();
    simulation_.Collect();
    simulation_.Run();
    std::vector<std::shared_ptr<GenerateJob>> samples = (*first)->forks();
    ASSERT_EQ(samples.size(), 2u);
    samples.push_back(*first);
    for (const auto& sample : samples) {
      EXPECT_TRUE(sample->status().ok()) << sample->status();
      std::vector<uint32_t> ids;
      for (const auto& event : sample->TakeEvents()) {
        ids.insert(ids.end(), event.token_ids().begin(), event.token_ids().end());
        EXPECT_EQ(event.summary().thinking_cut(), event.has_summary());
      }
      // '@' opens, or is what was thought already; 'J' and two line breaks are forced.
      EXPECT_EQ(ids, inside ? (std::vector<uint32_t>{64, 74, 10, 10, 11, 12, 13, 14, 15})
                            : (std::vector<uint32_t>{64, 65, 74, 10, 10, 11, 12, 13, 14}));
    }
  }
}

TEST_F(ChatTest, OnlyAConversationCanBeAsked) {
  EXPECT_EQ(simulation_.Get("talk").chat_format(), "qwen3");
  simulation_.CreateReady("plain", 600);
  EXPECT_EQ(simulation_.Get("plain").chat_format(), "");
  request_.set_name("contexts/plain");
  EXPECT_EQ(ReasonOf(simulation_.core().Generate(request_, {1}).status()), "NO_CONVERSATION");
  api::ScoreRequest score;
  score.mutable_chat();
  score.set_name("contexts/plain");
  EXPECT_EQ(ReasonOf(simulation_.core().Score(score, {1}, {2}).status()), "NO_CONVERSATION");
  score.set_name("contexts/talk");
  EXPECT_TRUE(simulation_.core().Score(score, {1}, {2}).ok());
  simulation_.Collect();
  EXPECT_EQ(simulation_.core().GetModel().chat_format(), "qwen3");
  EXPECT_TRUE(simulation_.core().GetModel().thinks());
}

TEST_F(ChatTest, ForcedTokensNeedRoom) {
  request_.set_max_tokens(392);  // 600 + 8 + 392 = the window
  EXPECT_TRUE(Generate(std::vector<int32_t>(8, 1)).ok());
  request_.mutable_chat()->set_thinking_budget(5);
  EXPECT_EQ(ReasonOf(Generate(std::vector<int32_t>(8, 1)).status()), "CONTEXT_TOO_LONG");
}

TEST(ChatRequests, AreRefusedByField) {
  const ModelConfig model = FakeModel(1000);
  const auto tokenizer = FakeTokenizer();
  const ChatFormat format = *ChatFormat::Make("qwen3", FakeTokenizer());
  const auto reason = [&](const std::function<void(api::GenerateRequest&)>& change, const ChatFormat& with) {
    api::GenerateRequest request;
    request.mutable_chat()->set_question("x");
    change(request);
    return ReasonOf(QuestionIds(request, model, tokenizer.get(), with).status());
  };
  const auto nothing = [](api::GenerateRequest&) {};
  EXPECT_EQ(reason(nothing, format), "");
  EXPECT_EQ(reason(nothing, ChatFormat()), "NO_CHAT_FORMAT");
  EXPECT_EQ(reason(nothing, *ChatFormat::Make("none", FakeTokenizer())), "NO_CHAT_FORMAT");
  EXPECT_EQ(reason([](auto& r) { r.mutable_prompt()->set_text("y"); }, format), "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(reason([](auto& r) { r.mutable_chat()->set_question("\xff"); }, format), "INVALID_UTF8");
  EXPECT_EQ(reason([](auto& r) { r.mutable_chat()->add_earlier()->set_answer("a\x80"); }, format), "INVALID_UTF8");
  EXPECT_EQ(reason([](auto& r) { r.mutable_chat()->set_question(std::string(2000, 'a')); }, format),
            "CONTEXT_TOO_LONG");
  for (const int64_t budget : {int64_t{-1}, int64_t{0}, int64_t{65'537}}) {
    EXPECT_EQ(reason([&](auto& r) { r.mutable_chat()->set_thinking_budget(budget); }, format), "FIELD_OUT_OF_RANGE");
  }
  EXPECT_EQ(reason(
                [](auto& r) {
                  while (r.chat().earlier_size() < 1025) r.mutable_chat()->add_earlier();
                },
                format),
            "FIELD_OUT_OF_RANGE");
  const ChatFormat chatml = *ChatFormat::Make("chatml", FakeTokenizer());
  EXPECT_EQ(reason([](auto& r) { r.mutable_chat()->set_thinking(true); }, chatml), "NO_THINKING");
  EXPECT_EQ(reason([](auto& r) { r.mutable_chat()->set_thinking(false); }, chatml), "");
  EXPECT_EQ(reason([](auto& r) { r.mutable_chat()->set_thinking(false); }, format), "");
}

// The upload begins with the prologue's tokens, whether text or ids follow, and however it was cut.
TEST(ChatUploads, BeginWithTheProlog) {
  const ModelConfig model = FakeModel(1000);
  const auto tokenizer = FakeTokenizer();
  const ChatFormat format = *ChatFormat::Make("chatml", FakeTokenizer());
  api::CreateContextRequest::Header header;
  header.mutable_prologue()->set_system("S");
  header.mutable_prologue()->set_user("U: ");
  const std::string begin = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU: ";
  const auto upload = [&](const std::vector<std::string>& texts, const std::vector<uint32_t>& ids, int64_t limit) {
    Upload out(model, tokenizer.get(), limit);
    int64_t offset = 0;
    for (const std::string& text : texts) {
      api::CreateContextRequest::Chunk chunk;
      chunk.set_offset(offset);
      chunk.set_text(text);
      EXPECT_TRUE(out.Add(chunk).ok());
      offset += static_cast<int64_t>(text.size());
    }
    if (!ids.empty()) {
      api::CreateContextRequest::Chunk chunk;
      chunk.mutable_ids()->mutable_ids()->Add(ids.begin(), ids.end());
      EXPECT_TRUE(out.Add(chunk).ok());
    }
    return out.Finish(header, {}, format);
  };
  const auto ids_of = [&](const std::string& text) { return *tokenizer->Encode(text, true, 1000); };
  EXPECT_EQ(**upload({"a text", " <think>"}, {}, 1000), [&] {
    std::vector<int32_t> ids = ids_of(begin);
    for (const char c : std::string("a text <think>")) ids.push_back(c);  // plain text
    return ids;
  }());
  EXPECT_EQ(**upload({}, {7, 8}, 1000), [&] {
    std::vector<int32_t> ids = ids_of(begin);
    ids.insert(ids.end(), {7, 8});
    return ids;
  }());
  EXPECT_EQ(**upload({}, {}, 1000), ids_of(begin)) << "a conversation about nothing";
  header.set_allow_special(true);
  EXPECT_EQ(**upload({"a <think>"}, {}, 1000), ids_of(begin + "a <think>"));
  EXPECT_EQ(ReasonOf(upload({"a text"}, {}, 20).status()), "CONTEXT_TOO_LONG");
  EXPECT_EQ(ReasonOf(upload({}, {7, 8}, 21).status()), "CONTEXT_TOO_LONG");
  header.mutable_prologue()->set_system("\xff");
  EXPECT_EQ(ReasonOf(upload({"a"}, {}, 1000).status()), "INVALID_UTF8");
  header.mutable_prologue()->set_system("S");
  header.mutable_prologue()->set_date("1 May 2026");
  EXPECT_EQ(ReasonOf(upload({"a"}, {}, 1000).status()), "FIELD_OUT_OF_RANGE");
}

TEST(ReasoningText, DropsTheBreaksBesideItsMarkers) {
  ChatFormat::Thinking thinking;
  thinking.open = 1;
  thinking.close = 2;
  Reasoning split{&thinking};
  std::string reasoning, answer;
  const auto push = [&](int32_t id, std::string_view bytes) {
    const Reasoning::Parts parts = split.Push(id, bytes);
    reasoning += parts.reasoning;
    answer += parts.answer;
  };
  push(1, "<think>");
  for (const char* bytes : {"\n", "\na\n", "\n", "b\xc3", "\xa9\n", "\n"}) push(9, bytes);
  EXPECT_TRUE(split.inside());
  push(2, "</think>");
  for (const char* bytes : {"\n", "\n\nc\n", "\n"}) push(9, bytes);
  EXPECT_EQ(reasoning, "a\n\nb\u00e9");
  EXPECT_EQ(answer, "c\n\n");
  EXPECT_EQ(split.tokens(), 8);
  EXPECT_EQ(split.words(), 6);

  Reasoning cut{&thinking};
  cut.Push(1, "");
  EXPECT_EQ(cut.Push(9, "x\n\xe2\x82").reasoning, "x");
  EXPECT_EQ(cut.Finish(), "\n\ufffd");
}

}  // namespace
}  // namespace refocus
