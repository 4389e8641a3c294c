// Seeded random interleavings of everything: requests, cancels, deletes, answers in any order across ranks, lost ranks,
// new launches, time; and adaptations of an adapter that is being asked.
// Whatever happens: every job ends with one status, nothing is left behind anywhere, and every answer is the one that
// would have been given alone.
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

constexpr uint64_t kSeeds = 300;
constexpr int kEvents = 400;

CoordinatorOptions ChatOptions() {
  CoordinatorOptions options = Simulation::DefaultOptions();
  options.chat = *ChatFormat::Make("qwen3", FakeTokenizer());
  return options;
}

// Reasons from the beginning, until 9 is drawn.
std::shared_ptr<const ChatFormat::Thinking> Reasons() {
  ChatFormat::Thinking thinking;
  thinking.begins_inside = true;
  thinking.close = 9;
  thinking.forced_end = {5, 9, 6};
  return std::make_shared<const ChatFormat::Thinking>(thinking);
}

class Chaos {
 public:
  explicit Chaos(uint64_t seed) : random_(seed), simulation_(seed * 31 + 7, ChatOptions()) { Launch(); }

  void Run() {
    for (int i = 0; i < kEvents; ++i) Event();
    Settle();
  }
  int64_t answers = 0;  // given
  int64_t forced = 0;   // of them, ends of their reasoning

  // One context and one adapter: commits and answers meet all the time. The number of commits.
  int64_t RunReadaptations() {
    simulation_.Run();
    simulation_.CreateReady("c0", 600);
    Keep(simulation_.Adapt(Simulation::AdaptRequest("c0", 1)));
    simulation_.Run();
    for (int i = 0; i < kEvents; ++i) {
      const uint64_t draw = Below(100);
      if (draw < 45) {
        AnyRank();
      } else if (draw < 88) {
        AnyAnswer();
      } else if (draw < 92) {
        Keep(simulation_.Adapt(Simulation::AdaptRequest("c0", 1)));
      } else if (draw < 96) {
        AskSome("c0", Below(3), 1 + Below(4), "default");
      } else if (draw < 98) {
        ScoreSome("c0", "default");
      } else if (draw < 99) {
        ProbeSome("c0", "default");
      } else if (!jobs_.empty()) {
        simulation_.Stop(*jobs_[Below(jobs_.size())]);
      }
    }
    Settle();
    return simulation_.Get("c0").adapters(0).revision();
  }

 private:
  uint64_t Below(uint64_t n) { return random_.Below(n); }
  int32_t Ranks() { return 1 + static_cast<int32_t>(Below(4)); }
  std::string AnyId() { return std::string(1, 'c').append(std::to_string(Below(4))); }
  template <typename JobPointer>
  void Keep(const StatusOr<JobPointer>& job) {
    if (job.ok() && *job != nullptr) jobs_.push_back(*job);
  }

  void Event() {
    const uint64_t draw = Below(100);
    if (draw < 40) return AnyRank();
    if (draw < 75) return AnyAnswer();
    if (draw < 80) return CreateSome();
    if (draw < 84) return Keep(simulation_.Prefill(AnyId()));
    if (draw < 87) return AdaptSome();
    if (draw < 92) return AskSome(AnyId(), Below(600), 1 + Below(40), Below(3) == 0 ? "default" : "");
    if (draw < 93) return ScoreSome(AnyId(), Below(3) == 0 ? "default" : "");
    if (draw < 94) return ProbeSome(AnyId(), Below(3) == 0 ? "default" : "");
    if (draw < 96 && !jobs_.empty()) return simulation_.Stop(*jobs_[Below(jobs_.size())]);
    if (draw < 97) return DeleteSome();
    if (draw < 98) return simulation_.Advance(0.5);
    if (draw < 99 && Below(4) == 0 && !simulation_.links().empty()) return Lose();
    simulation_.DeliverCancels();
  }

  void AnyRank() {
    if (simulation_.links().empty()) return;
    auto& link = simulation_.links()[Below(simulation_.links().size())];
    if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
  }
  void AnyAnswer() {
    if (simulation_.links().empty()) return;
    auto& link = simulation_.links()[Below(simulation_.links().size())];
    if (!link.outbox.empty()) simulation_.StepAnswer(link);
  }
  void Launch() {
    simulation_.Launch(Ranks(), [](FakeRank& rank, int32_t) { rank.keyed = true; });
  }
  // Most texts begin alike.
  void CreateSome() {
    api::CreateContextRequest::Header header;
    header.set_context_id(AnyId());
    if (Below(2) == 0) header.mutable_prologue();
    (void)simulation_.CreateIds(header, Simulation::Ids(1 + static_cast<int64_t>(Below(5000)), Below(3)));
  }
  void AskSome(const std::string& id, uint64_t prompt, uint64_t max_tokens, const std::string& adapter) {
    api::GenerateRequest request;
    request.set_name("contexts/" + id);
    request.set_max_tokens(static_cast<int64_t>(max_tokens));
    request.set_adapter_id(adapter);
    request.set_ignore_eos(true);
    request.set_temperature(Below(2) == 0 ? 0 : 1);
    if (request.temperature() > 0 && Below(3) == 0) request.set_n(2 + static_cast<int32_t>(Below(3)));
    Asked asked;
    for (uint64_t i = 0; i < prompt; ++i) asked.prompt.push_back(Below(250));
    const std::vector<int32_t> ids(asked.prompt.begin(), asked.prompt.end());
    const double seconds = Below(8) == 0 ? 0.1 : 1e9;
    const auto session = simulation_.core().catalog().Find(request.name());
    if (session != nullptr && !session->chat_format().empty() && Below(2) == 0) {
      asked.budget = 1 + static_cast<int64_t>(Below(12));
      request.mutable_chat()->set_thinking_budget(asked.budget);
    }
    const auto first = simulation_.core().Generate(request, ids, seconds, asked.budget > 0 ? Reasons() : nullptr);
    simulation_.Collect();
    if (!first.ok()) return;
    const auto& tokens = simulation_.core().catalog().Find(request.name())->tokens();
    asked.context.assign(tokens.begin(), tokens.end());
    asked.job = *first;
    asked_.push_back(asked);
    for (const auto& fork : (*first)->forks()) {
      asked.job = fork;
      asked_.push_back(asked);
    }
    jobs_.push_back(*first);
    jobs_.insert(jobs_.end(), (*first)->forks().begin(), (*first)->forks().end());
  }
  struct Asked {
    std::shared_ptr<GenerateJob> job;
    std::vector<uint32_t> context, prompt;
    int64_t budget = 0;  // of reasoning; 0: there is none
  };
  void ExpectAsAlone(const Asked& asked) {
    std::vector<uint32_t> said;
    api::GenerateSummary summary;
    for (const api::GenerateEvent& event : asked.job->TakeEvents()) {
      said.insert(said.end(), event.token_ids().begin(), event.token_ids().end());
      if (event.has_summary()) summary = event.summary();
    }
    if (!asked.job->status().ok()) return;
    const uint64_t seed = summary.temperature() > 0 ? summary.seed() : 0;
    std::vector<uint32_t> rows = asked.prompt;
    bool thinks = asked.budget > 0, cut = false;
    for (int64_t sampled = 0; sampled < summary.max_tokens(); ++sampled) {
      if (thinks && sampled == asked.budget) {
        cut = true;
        thinks = false;
        rows.insert(rows.end(), {5, 9, 6});
      }
      rows.push_back(FakeRank::KeyedToken(asked.context, summary.adapter_revision(), seed, rows));
      thinks = thinks && rows.back() != 9;
    }
    rows.erase(rows.begin(), rows.begin() + static_cast<int64_t>(asked.prompt.size()));
    EXPECT_EQ(said, rows);
    EXPECT_EQ(summary.thinking_cut(), cut);
    forced += cut ? 1 : 0;
  }

  void AdaptSome() {
    api::AdaptContextRequest request = Simulation::AdaptRequest(AnyId(), 1 + static_cast<int64_t>(Below(5)));
    request.set_spans_per_step(1 + static_cast<int64_t>(Below(3)));
    request.set_continue_adapter(Below(2) == 0);
    Keep(simulation_.Adapt(request));
  }
  void ScoreSome(const std::string& id, const std::string& adapter) {
    api::ScoreRequest request;
    request.set_name("contexts/" + id);
    request.set_adapter_id(adapter);
    auto job = simulation_.core().Score(request, std::vector<int32_t>(Below(5), 1), {7, 8, 9});
    simulation_.Collect();
    Keep(job);
  }
  void ProbeSome(const std::string& id, const std::string& adapter) {
    api::ProbeAttentionRequest request;
    request.set_name("contexts/" + id);
    request.set_adapter_id(adapter);
    request.add_ranges();
    request.set_mean_over_rows(Below(2) == 0);
    auto job = simulation_.core().Probe(request, std::vector<int32_t>(Below(5), 1));
    simulation_.Collect();
    Keep(job);
  }
  void DeleteSome() {
    api::DeleteContextRequest request;
    request.set_name("contexts/" + AnyId());
    request.set_force(Below(2) == 0);
    (void)simulation_.core().DeleteContext(request);
    simulation_.Collect();
  }
  void Lose() {
    simulation_.Kill(static_cast<int32_t>(Below(simulation_.links().size())));
    Launch();
  }
  void Settle() {
    simulation_.DeliverCancels();
    simulation_.Run();
    for (const auto& job : jobs_) {
      EXPECT_TRUE(job->ended());
      const auto code = job->status().code();
      EXPECT_TRUE(code == StatusCode::kOk || code == StatusCode::kCancelled || code == StatusCode::kUnavailable ||
                  code == StatusCode::kDeadlineExceeded)
          << job->status();
      EXPECT_TRUE(code != StatusCode::kDeadlineExceeded || !job->started());
    }
    for (const Asked& asked : asked_) {
      ExpectAsAlone(asked);
      answers += asked.job->status().ok() ? 1 : 0;
    }
    simulation_.ExpectConsistent();
    EXPECT_TRUE(simulation_.core().serving());
  }

  SplitMix64 random_;
  Simulation simulation_;
  std::vector<std::shared_ptr<Job>> jobs_;
  std::vector<Asked> asked_;
};

TEST(RandomTest, EveryInterleavingEndsClean) {
  int64_t answers = 0, forced = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Chaos chaos(seed);
    chaos.Run();
    answers += chaos.answers;
    forced += chaos.forced;
    if (HasFailure()) return;
  }
  EXPECT_GT(answers, static_cast<int64_t>(kSeeds));
  EXPECT_GT(forced, static_cast<int64_t>(kSeeds / 10));
}

TEST(RandomTest, AnswersAndCommitsOfOneAdapter) {
  int64_t commits = 0;
  for (uint64_t seed = 1; seed <= kSeeds / 3; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    commits += Chaos(seed).RunReadaptations();
    if (HasFailure()) return;
  }
  EXPECT_GT(commits, static_cast<int64_t>(kSeeds / 3 * 2));
}

}  // namespace
}  // namespace refocus
