// The settings of an adaptation: kinds, defaults, schedules, and what is refused.
#include <cmath>
#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "coordinator/core/validate.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

api::AdaptEvent::Effective Schedule(api::Schedule schedule, int64_t steps, int64_t warmup) {
  api::AdaptEvent::Effective effective;
  effective.set_learning_rate(2e-3);
  effective.set_steps(steps);
  effective.set_schedule(schedule);
  effective.set_warmup_steps(warmup);
  return effective;
}

std::vector<double> Rates(const api::AdaptEvent::Effective& effective) {
  std::vector<double> rates;
  for (int64_t step = 1; step <= effective.steps(); ++step) rates.push_back(ScheduledRate(effective, step));
  return rates;
}

void ExpectNear(const std::vector<double>& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) EXPECT_NEAR(actual[i], expected[i], 1e-9) << i;
}

// torch 2.11: SequentialLR of LinearLR(1 / 4, 1, total_iters=3) and, from step 3 on, LinearLR(1, 0, 5) or
// CosineAnnealingLR(T_max=5), at lr 2e-3.
TEST(ScheduleTest, AsTorchComputesThem) {
  ExpectNear(Rates(Schedule(api::CONSTANT, 3, 0)), {2e-3, 2e-3, 2e-3});
  ExpectNear(Rates(Schedule(api::CONSTANT, 5, 3)), {5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3});
  ExpectNear(Rates(Schedule(api::LINEAR, 8, 3)), {5e-4, 1e-3, 1.5e-3, 2e-3, 1.6e-3, 1.2e-3, 8e-4, 4e-4});
  ExpectNear(Rates(Schedule(api::COSINE, 8, 3)),
             {5e-4, 1e-3, 1.5e-3, 2e-3, 1.8090169943749475e-3, 1.3090169943749475e-3, 6.909830056250527e-4,
              1.9098300562505266e-4});
  ExpectNear(Rates(Schedule(api::COSINE, 1, 0)), {2e-3});
}

// 500 tokens that never recur.
std::vector<int32_t> NewTokens() {
  std::vector<int32_t> tokens(500);
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

StatusOr<AdaptPlan> Plan(const std::function<void(api::AdaptContextRequest&)>& set, const api::Adapter* start = nullptr,
                         const ModelConfig& model = FakeModel(1000), const std::vector<int32_t>& tokens = NewTokens()) {
  api::AdaptContextRequest request;
  set(request);
  const auto token_count = static_cast<int64_t>(tokens.size());
  REFOCUS_ASSIGN_OR_RETURN(AdaptPlan plan, PlanAdapt(request, model, start, token_count, 1));
  if (!plan.search) return plan;
  plan.search->tokens = std::make_shared<const std::vector<int32_t>>(tokens);
  HeldOutRows found = FindRows(*plan.search).rows;
  return PlanAdapt(request, model, start, token_count, 1, &found);
}

TEST(AdaptPlanTest, KindsAndDefaults) {
  EXPECT_EQ(Plan([](auto&) {})->effective.kind(), api::FULL);
  EXPECT_EQ(Plan([](auto&) {})->effective.lora_rank(), 0);
  const auto lora = Plan([](auto& r) { r.set_kind(api::LORA); })->effective;
  EXPECT_EQ(lora.lora_rank(), 8) << "16, but the hidden size is 8";
  EXPECT_EQ(lora.lora_alpha(), 16);
  EXPECT_EQ(Plan([](auto& r) { r.set_lora_rank(3); })->effective.kind(), api::LORA);
  ModelConfig large = FakeModel(1000);
  large.hidden = 8192;
  large.mlp = 30'000;
  large.layers = 80;
  EXPECT_EQ(Plan([](auto&) {}, nullptr, large)->effective.lora_rank(), 16);
  EXPECT_EQ(Plan([](auto& r) { r.set_kind(api::FULL); }, nullptr, large)->effective.kind(), api::FULL);
  api::Adapter start;
  start.set_kind(api::LORA);
  start.set_lora_rank(5);
  start.set_lora_alpha(7);
  EXPECT_EQ(Plan([](auto&) {}, &start)->effective.lora_rank(), 5);
  EXPECT_EQ(Plan([](auto&) {}, &start)->effective.lora_alpha(), 7);
  EXPECT_TRUE(Plan([](auto& r) { r.set_lora_rank(5); }, &start).ok());
}

TEST(AdaptPlanTest, BadSettingsAreNamed) {
  api::Adapter lora, full;
  lora.set_kind(api::LORA);
  lora.set_lora_rank(5);
  lora.set_lora_alpha(7);
  full.set_kind(api::FULL);
  struct Case {
    std::string field;
    std::function<void(api::AdaptContextRequest&)> set;
    const api::Adapter* start = nullptr;
  };
  const std::vector<Case> cases = {
      {"kind", [](auto& r) { r.set_kind(static_cast<api::AdapterKind>(9)); }},
      {"lora_rank", [](auto& r) { r.set_kind(api::FULL), r.set_lora_rank(4); }},
      {"lora_alpha", [](auto& r) { r.set_kind(api::FULL), r.set_lora_alpha(4); }},
      {"lora_rank", [](auto& r) { r.set_lora_rank(0); }},
      {"lora_rank", [](auto& r) { r.set_lora_rank(-1); }},
      {"lora_rank", [](auto& r) { r.set_lora_rank(9); }},  // hidden is 8
      {"lora_alpha", [](auto& r) { r.set_lora_alpha(std::nan("")); }},
      {"lora_alpha", [](auto& r) { r.set_lora_alpha(0); }},
      {"kind, lora_rank, lora_alpha", [](auto& r) { r.set_kind(api::FULL); }, &lora},
      {"kind, lora_rank, lora_alpha", [](auto& r) { r.set_lora_rank(4); }, &lora},
      {"kind, lora_rank, lora_alpha", [](auto& r) { r.set_kind(api::LORA); }, &full},
      {"optimizer", [](auto& r) { r.set_optimizer(static_cast<api::Optimizer>(-3)); }},
      {"schedule", [](auto& r) { r.set_schedule(static_cast<api::Schedule>(7)); }},
      {"momentum", [](auto& r) { r.set_momentum(0.5); }},
      {"momentum", [](auto& r) { r.set_optimizer(api::SGD), r.set_momentum(1.0); }},
      {"momentum", [](auto& r) { r.set_optimizer(api::SGD), r.set_momentum(std::nan("")); }},
      {"warmup_steps", [](auto& r) { r.set_warmup_steps(-1); }},
      {"warmup_steps", [](auto& r) { r.set_steps(4), r.set_warmup_steps(4); }},
      {"max_seconds", [](auto& r) { r.set_max_seconds(-1); }},
      {"max_seconds", [](auto& r) { r.set_max_seconds(std::nan("")); }},
      {"max_seconds", [](auto& r) { r.set_max_seconds(1e9); }},
      {"base_adapter", [](auto& r) { r.set_base_adapter("default"); }},
      {"base_adapter", [](auto& r) { r.set_base_adapter("b"), r.set_continue_adapter(true); }},
      {"adapter_id", [](auto& r) { r.set_base_adapter("../b"); }}};
  for (const Case& c : cases) {
    const Status status = Plan(c.set, c.start).status();
    EXPECT_EQ(ReasonOf(status), "FIELD_OUT_OF_RANGE") << c.field << ": " << status;
    EXPECT_NE(std::string(status.message()).find(c.field), std::string::npos) << c.field << ": " << status;
  }
}

// 100 pairs "i, 400 - i" twice over: every even row of the second half can be looked up.
TEST(AdaptPlanTest, RecallRows) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < 400; ++i) tokens.push_back(i / 2 % 2 == 0 ? i % 200 : 400 - i % 200);
  const auto recall = [](auto& r) { r.mutable_recall_rows(); };
  const StatusOr<AdaptPlan> plan = Plan(recall, nullptr, FakeModel(1000), tokens);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->effective.recall_rows(), static_cast<int64_t>(plan->recall_rows.size()));
  EXPECT_GT(plan->recall_rows.size(), 150u);
  EXPECT_FALSE(plan->probes.empty());
  EXPECT_EQ(plan->effective.probe_spans(), 2);
  for (const SpanRange& probe : plan->probes) {
    for (const int64_t row : plan->recall_rows) EXPECT_FALSE(probe.start <= row && row < probe.start + probe.rows);
  }
  // From the later half, the last quarter, and from where nothing recurs: then from the whole text.
  const auto half = static_cast<int64_t>(tokens.size()) / 2;
  EXPECT_GE(plan->recall_rows.front(), half);
  const auto after = [&](double share) {
    return *Plan([=](auto& r) { r.mutable_recall_rows()->set_after(share); }, nullptr, FakeModel(1000), tokens);
  };
  EXPECT_EQ(after(0).recall_rows.size(), plan->recall_rows.size()) << "nothing recurs in the first half";
  EXPECT_GE(after(0.75).recall_rows.front(), 300);
  EXPECT_LT(after(0.75).recall_rows.size(), plan->recall_rows.size());
  EXPECT_EQ(after(0.9999).recall_rows.size(), plan->recall_rows.size());
  const auto refused = Plan([](auto& r) { r.mutable_recall_rows()->set_after(1.0); }, nullptr, FakeModel(1000), tokens);
  EXPECT_EQ(ReasonOf(refused.status()), "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(ReasonOf(Plan(recall).status()), "NOTHING_RECURS");
}

// Rows to recall where a sixth of the text can be looked up; else uniform spans where they stand, more of them held out.
TEST(AdaptPlanTest, AutomaticRows) {
  const auto plan = [](int64_t pairs) {  // of 1,200 tokens, twice over
    std::vector<int32_t> tokens;
    for (int32_t i = 0; i < 1200 - 4 * pairs; ++i) tokens.push_back(1000 + i);
    for (int32_t i = 0; i < 4 * pairs; ++i) tokens.push_back(i / 2 % 2 == 0 ? i % (2 * pairs) : 999 - i % (2 * pairs));
    return Plan(
        [](auto& r) {
          r.mutable_automatic();
          r.set_behind(64);
          r.set_span_tokens(64);
        },
        nullptr, FakeModel(3000), tokens);
  };
  const auto many = plan(200), few = plan(0);
  ASSERT_TRUE(many.ok() && few.ok()) << many.status() << few.status();
  EXPECT_GT(many->effective.recall_rows(), 200);
  EXPECT_EQ(many->effective.behind(), 64);
  EXPECT_EQ(many->effective.probe_spans(), 1);
  EXPECT_EQ(few->effective.recall_rows(), 0);
  EXPECT_EQ(few->effective.behind(), 0);
  EXPECT_EQ(few->effective.probe_spans(), 4);
  ASSERT_EQ(few->probes.size(), 4u);
}

TEST(AdaptPlanTest, Behind) {
  ModelConfig model = FakeModel(1000);
  model.max_positions = 700;
  const auto plan = [&](int64_t behind, int64_t span, const std::function<void(api::AdaptContextRequest&)>& set) {
    return Plan([&](auto& r) { r.set_behind(behind), r.set_span_tokens(span), set(r); }, nullptr, model);
  };
  const auto uniform = [](auto&) {};
  EXPECT_EQ(plan(0, 64, uniform)->effective.behind(), 0);
  EXPECT_EQ(plan(64, 64, uniform)->effective.behind(), 64);
  EXPECT_EQ(plan(200, 64, uniform)->effective.behind(), 200);
  const auto explicit_span = [](auto& r) {
    api::AdaptContextRequest::ExplicitSpans::Span* span = r.mutable_explicit_spans()->add_spans();
    span->set_start(3);
    span->set_length(100);
  };
  EXPECT_TRUE(plan(100, 1, explicit_span).ok());
  const auto without_probes = [&](auto& r) { explicit_span(r), r.set_probe_spans(0); };
  EXPECT_TRUE(plan(100, 128, without_probes).ok());
  // Shorter than a span, longer than what is left of the window; negative; spans of too many tokens.
  for (const auto& refused : {plan(63, 64, uniform), plan(201, 64, uniform), plan(-1, 64, uniform),
                              plan(99, 1, explicit_span), plan(127, 128, explicit_span), plan(110, 128, explicit_span),
                              plan(99, 128, without_probes), Plan([](auto& r) { r.set_behind(513), r.set_span_tokens(513); },
                                                               nullptr, FakeModel(1000), std::vector<int32_t>(600))}) {
    EXPECT_EQ(ReasonOf(refused.status()), "FIELD_OUT_OF_RANGE") << refused.status();
    EXPECT_NE(std::string(refused.status().message()).find("behind"), std::string::npos) << refused.status();
  }
}

// The first quarter of the steps where they stand, then rows to recall alone, at another place in every step; all seeded.
TEST(AdaptPlanTest, WhereSpansBehindTheTextStand) {
  const auto trained = [](int64_t behind, bool recall, uint64_t seed) {
    Simulation simulation;
    simulation.Launch(1);
    simulation.Run();
    simulation.CreateReady("a", 600);
    api::AdaptContextRequest request = Simulation::AdaptRequest("a", recall ? 200 : 30);
    request.set_behind(behind);
    request.set_span_tokens(8);
    request.set_seed(seed);
    if (recall) request.mutable_recall_rows();
    const auto job = simulation.Adapt(request);
    EXPECT_TRUE(job.ok()) << job.status();
    simulation.Run();
    return simulation.rank(0).trained;
  };
  std::set<int64_t> places;
  int64_t step = 0;
  for (const wire::Span& span : trained(50, false, 7)) {
    EXPECT_EQ(span.ids_size(), 9);
    if (++step <= 7) {
      EXPECT_EQ(span.behind(), 0) << step << " of 30";
      continue;
    }
    EXPECT_GE(span.behind(), 600);
    EXPECT_LE(span.behind() + 8, 650);
    places.insert(span.behind());
  }
  EXPECT_GT(places.size(), 10u);
  EXPECT_EQ(step, 30);
  EXPECT_LT(places.size(), 23u) << "of 43 places";
  std::vector<std::string> first, second, other;
  for (const wire::Span& span : trained(50, false, 7)) first.push_back(span.SerializeAsString());
  for (const wire::Span& span : trained(50, false, 7)) second.push_back(span.SerializeAsString());
  for (const wire::Span& span : trained(50, false, 8)) other.push_back(span.SerializeAsString());
  EXPECT_EQ(first, second);
  EXPECT_NE(first, other);
  for (const wire::Span& span : trained(0, false, 7)) EXPECT_EQ(span.behind(), 0);
  std::map<int64_t, std::set<int64_t>> of_row;
  for (const wire::Span& span : trained(1000, true, 7)) {
    if (span.behind() == 0) continue;
    EXPECT_EQ(span.ids_size(), 2);
    of_row[span.start()].insert(span.behind());
  }
  EXPECT_TRUE(std::any_of(of_row.begin(), of_row.end(), [](const auto& row) { return row.second.size() > 1; }));
}

TEST(AdaptPlanTest, SurprisalSpans) {
  const auto plan = [](auto set) {
    return Plan([=](auto& r) {
      r.set_span_tokens(10);
      set(r.mutable_surprisal_spans());
    });
  };
  const auto all = plan([](auto) {});
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_EQ(all->effective.candidate_share(), 0.25);
  EXPECT_EQ(all->effective.candidate_skip(), 0);
  ASSERT_EQ(all->probes.size(), 2u);
  // 500 tokens hold 45 spans that read 11 tokens each; two probes take their own and what no span fits beside.
  EXPECT_EQ(all->effective.candidates(), static_cast<int64_t>(all->candidates.size()));
  EXPECT_GE(all->candidates.size(), 41u);
  EXPECT_LE(all->candidates.size(), 43u);
  const auto few = plan([](auto spans) { spans->set_candidates(5); });
  EXPECT_EQ(few->effective.candidates(), 5);
  EXPECT_EQ(plan([](auto spans) { spans->set_skip(0.9); })->effective.candidate_share(), 1 - 0.9);
  EXPECT_TRUE(plan([](auto spans) { spans->set_skip(0.9), spans->set_share(0.1); }).ok());
  EXPECT_TRUE(plan([](auto spans) { spans->set_skip(1), spans->set_share(0); }).ok());
  const auto refused = [&](auto set, const std::string& field) {
    const Status status = plan(set).status();
    EXPECT_EQ(ReasonOf(status), "FIELD_OUT_OF_RANGE") << status;
    EXPECT_NE(std::string(status.message()).find("surprisal_spans." + field), std::string::npos) << status;
  };
  refused([](auto spans) { spans->set_candidates(0); }, "candidates");
  refused([](auto spans) { spans->set_candidates(-1); }, "candidates");
  refused([](auto spans) { spans->set_candidates(4097); }, "candidates");
  refused([](auto spans) { spans->set_share(1.01); }, "share");
  refused([](auto spans) { spans->set_share(-0.1); }, "share");
  refused([](auto spans) { spans->set_share(std::nan("")); }, "share");
  refused([](auto spans) { spans->set_skip(0.5), spans->set_share(0.6); }, "share");
  refused([](auto spans) { spans->set_skip(1.5); }, "skip");
  refused([](auto spans) { spans->set_skip(std::nan("")); }, "skip");
}

TEST(AdaptPlanTest, KeepBest) {
  const auto keep = [](int64_t steps) {
    return [steps](auto& r) {
      r.set_keep_best(true);
      r.set_steps(steps);
      r.set_span_tokens(20);
    };
  };
  EXPECT_EQ(Plan([](auto&) {})->effective.probe_every(), 0);
  EXPECT_EQ(Plan(keep(32))->effective.probe_every(), 4);
  EXPECT_EQ(Plan(keep(3))->effective.probe_every(), 1);
  const auto with = [&](auto set) {
    return Plan([&](auto& r) {
             keep(32)(r);
             set(r);
           }).status();
  };
  EXPECT_EQ(ReasonOf(with([](auto& r) { r.set_probe_spans(0); })), "NO_PROBE_SPANS");
  EXPECT_EQ(ReasonOf(with([](auto& r) { r.set_span_tokens(499); })), "NO_PROBE_SPANS");
  EXPECT_FALSE(with([](auto& r) { r.set_probe_every(33); }).ok());
  EXPECT_FALSE(with([](auto& r) { r.set_probe_every(-1); }).ok());
  EXPECT_FALSE(with([](auto& r) { r.set_patience(-1); }).ok());
  EXPECT_TRUE(with([](auto& r) { r.set_patience(2); }).ok());
  EXPECT_FALSE(Plan([](auto& r) { r.set_patience(2); }).ok());
}

}  // namespace
}  // namespace refocus
