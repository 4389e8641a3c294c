// The small pure parts: spans, stop strings, chunk sizes, memory, uploads, validation, names.
#include <cmath>
#include <limits>
#include <set>

#include "base/limits.h"
#include "coordinator/core/chunk_clock.h"
#include "coordinator/core/upload.h"
#include "coordinator/core/validate.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

bool Intersect(const SpanRange& a, const SpanRange& b) {
  return a.start <= b.start + b.rows && b.start <= a.start + a.rows;
}

SpanRange Next(SpanPolicy& policy) { return policy.NextStep().at(0); }

TEST(SpanPolicyTest, KnownSequence) {
  SplitMix64 random(0);
  EXPECT_EQ(random.Next(), 0xe220a8397b1dcdafu);  // the generator's published first output for seed 0
  const auto policy = MakeUniformSpans(1000, 10, {}, 42);
  const auto again = MakeUniformSpans(1000, 10, {}, 42);
  const auto other = MakeUniformSpans(1000, 10, {}, 43);
  int differ = 0;
  for (int i = 0; i < 50; ++i) {
    const SpanRange span = Next(*policy);
    EXPECT_EQ(span.start, Next(*again).start);
    differ += span.start != Next(*other).start;
  }
  EXPECT_GT(differ, 40);
}

TEST(SpanPolicyTest, EveryLegalStartAndNoOther) {
  const int64_t tokens = 60, rows = 7;
  const std::vector<SpanRange> probes = ProbeSpans(tokens, rows, 2);
  ASSERT_EQ(probes.size(), 2u);
  EXPECT_FALSE(Intersect(probes[0], probes[1]));
  std::set<int64_t> expected;
  for (int64_t start = 0; start + rows < tokens; ++start) {
    if (!Intersect({start, rows}, probes[0]) && !Intersect({start, rows}, probes[1])) expected.insert(start);
  }
  std::set<int64_t> seen;
  const auto policy = MakeUniformSpans(tokens, rows, probes, 5);
  for (int i = 0; i < 5000; ++i) seen.insert(Next(*policy).start);
  EXPECT_EQ(seen, expected);
}

TEST(SpanPolicyTest, ShortestContexts) {
  EXPECT_EQ(Next(*MakeUniformSpans(2, 1, {}, 1)).start, 0);
  EXPECT_TRUE(ProbeSpans(2, 1, 2).empty());
  EXPECT_TRUE(ProbeSpans(129, 128, 2).empty());
  EXPECT_TRUE(ProbeSpans(1000, 128, 0).empty());
  for (int64_t tokens = 2; tokens < 400; ++tokens) {
    const int64_t rows = std::min<int64_t>(16, tokens - 1);
    const auto probes = ProbeSpans(tokens, rows, 3);
    for (const SpanRange& probe : probes) EXPECT_LT(probe.start + probe.rows, tokens);
    const auto policy = MakeUniformSpans(tokens, rows, probes, tokens);
    for (int i = 0; i < 20; ++i) {
      const SpanRange span = Next(*policy);
      EXPECT_LT(span.start + span.rows, tokens);
      for (const SpanRange& probe : probes) EXPECT_FALSE(Intersect(span, probe)) << tokens;
    }
  }
}

TEST(SpanPolicyTest, ExplicitSpansCycle) {
  const auto policy = MakeExplicitSpans({{1, 2}, {5, 3}});
  EXPECT_EQ(Next(*policy).start, 1);
  EXPECT_EQ(Next(*policy).rows, 3);
  EXPECT_EQ(Next(*policy).start, 1);
}

TEST(SpanPolicyTest, SeveralSpansInAStep) {
  const auto one = MakeUniformSpans(1000, 10, {}, 42);
  const std::vector<SpanRange> step = MakeUniformSpans(1000, 10, {}, 42, 3)->NextStep();
  ASSERT_EQ(step.size(), 3u);
  for (const SpanRange& span : step) EXPECT_EQ(span.start, Next(*one).start);
  EXPECT_EQ(MakeExplicitSpans({{1, 2}, {5, 3}}, 3)->NextStep().size(), 3u);
}

// The definition, word for word.
std::vector<int64_t> RecallRowsSlowly(const std::vector<int32_t>& tokens) {
  std::vector<int64_t> rows;
  const auto size = static_cast<int64_t>(tokens.size());
  for (int64_t row = 0; row + 1 < size; ++row) {
    for (int64_t length = std::min<int64_t>(4, row + 1); length >= 1; --length) {
      int64_t seen = 0, followed = 0;
      for (int64_t end = length - 1; end < row; ++end) {
        if (!std::equal(tokens.begin() + end + 1 - length, tokens.begin() + end + 1,
                        tokens.begin() + row + 1 - length)) {
          continue;
        }
        ++seen;
        followed += tokens[end + 1] == tokens[row + 1];
      }
      if (seen == 0) continue;
      if (followed == seen) rows.push_back(row);
      break;
    }
  }
  return rows;
}

TEST(RecallRowsTest, AsDefined) {
  EXPECT_TRUE(RecallRows(std::vector<int32_t>{}).empty());
  EXPECT_TRUE(RecallRows(std::vector<int32_t>{3}).empty());
  EXPECT_TRUE(RecallRows(std::vector<int32_t>{3, 4, 5, 6}).empty());
  // 7 was followed by 1; "2 7" is new, so the single 7 decides.
  EXPECT_EQ(RecallRows(std::vector<int32_t>{7, 1, 2, 7, 1}), std::vector<int64_t>{3});
  EXPECT_TRUE(RecallRows(std::vector<int32_t>{7, 1, 2, 7, 3}).empty());
  SplitMix64 random(9);
  for (int round = 0; round < 60; ++round) {
    std::vector<int32_t> tokens(2 + random.Below(200));
    for (int32_t& token : tokens) token = static_cast<int32_t>(random.Below(2 + round));
    EXPECT_EQ(RecallRows(tokens), RecallRowsSlowly(tokens)) << round;
  }
  // Texts that repeat themselves, with a change now and then.
  for (int round = 0; round < 30; ++round) {
    std::vector<int32_t> tokens(400);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const uint64_t changed = random.Below(1 << 30);
      tokens[i] = static_cast<int32_t>(random.Below(20) == 0 ? changed : i % (static_cast<uint64_t>(round) + 1));
    }
    EXPECT_EQ(RecallRows(tokens), RecallRowsSlowly(tokens)) << round;
  }
}

TEST(RecallRowsTest, StopsWhenToldTo) {
  const std::vector<int32_t> tokens(300'000, 7);
  int asked = 0;
  EXPECT_EQ(RecallRows(tokens, [&] { return ++asked < 0; }).size(), tokens.size() - 2) << "the first 7 is new";
  EXPECT_GE(asked, 12) << "some times for each length";
  asked = 0;
  RecallRows(tokens, [&] { return ++asked == 3; });
  EXPECT_EQ(asked, 3);
}

TEST(RecallRowsTest, HoldsOutTokensWhereverTheyStand) {
  std::vector<int32_t> tokens(4000);
  SplitMix64 random(3);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random.Below(300));
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < 3999; row += 2) rows.push_back(row);
  const HeldOutRows all = HoldOut(tokens, rows, 4000);
  EXPECT_EQ(all.training.size() + all.held_out.size(), rows.size());
  EXPECT_NEAR(static_cast<double>(all.held_out.size()) / static_cast<double>(rows.size()), 1.0 / 8, 0.06);
  std::set<int32_t> trained;
  for (const int64_t row : all.training) trained.insert(tokens[row]);
  for (const int64_t row : all.held_out) EXPECT_FALSE(trained.contains(tokens[row])) << row;
  const HeldOutRows few = HoldOut(tokens, rows, 10);
  EXPECT_EQ(few.training, all.training);
  ASSERT_EQ(few.held_out.size(), 10u);
  EXPECT_GT(few.held_out.back(), 3000);
  EXPECT_TRUE(HoldOut(tokens, rows, 0).held_out.empty());
  EXPECT_EQ(HoldOut(tokens, rows, 0).training, rows);
  for (const int64_t row : all.held_out) {  // alone it is trained on
    EXPECT_EQ(HoldOut(tokens, {row}, 10).training, std::vector<int64_t>{row});
    break;
  }
}

TEST(CandidateSpansTest, DisjointSpreadAndSeeded) {
  const std::vector<SpanRange> probes = ProbeSpans(1000, 10, 2);
  const auto sorted = [](std::vector<SpanRange> spans) {
    std::sort(spans.begin(), spans.end(), [](const auto& a, const auto& b) { return a.start < b.start; });
    return spans;
  };
  const auto starts = [](const std::vector<SpanRange>& spans) {
    std::vector<int64_t> starts;
    for (const SpanRange& span : spans) starts.push_back(span.start);
    return starts;
  };
  for (const int64_t count : {1, 2, 7, 20, 1000}) {
    const std::vector<SpanRange> spans = CandidateSpans(1000, 10, probes, count, 3), rising = sorted(spans);
    EXPECT_EQ(starts(CandidateSpans(1000, 10, probes, count, 3)), starts(spans));
    EXPECT_EQ(starts(sorted(CandidateSpans(1000, 10, probes, count, 4))), starts(rising)) << "the seed orders only";
    if (count > 2) {
      EXPECT_NE(starts(CandidateSpans(1000, 10, probes, count, 4)), starts(spans));
    }
    ASSERT_EQ(static_cast<int64_t>(spans.size()), std::min<int64_t>(count, 22 + 44 + 22));
    for (size_t i = 0; i < rising.size(); ++i) {
      EXPECT_EQ(rising[i].rows, 10);
      EXPECT_LT(rising[i].start + 10, 1000);
      if (i > 0) {
        EXPECT_GT(rising[i].start, rising[i - 1].start + 10);
      }
      for (const SpanRange& probe : probes) {
        EXPECT_TRUE(rising[i].start + 10 < probe.start || probe.start + probe.rows < rising[i].start);
      }
      // One in each stretch of an equal size, to two spans.
      const auto share = static_cast<int64_t>(i) * 1000 / static_cast<int64_t>(rising.size());
      EXPECT_GE(rising[i].start, share - 25);
      EXPECT_LE(rising[i].start, share + 1000 / static_cast<int64_t>(rising.size()) + 25);
    }
  }
  EXPECT_EQ(starts(CandidateSpans(2, 1, {}, 4096, 1)), std::vector<int64_t>{0});
}

TEST(ChooseByLossTest, ABandOfTheRanks) {
  using Indices = std::vector<size_t>;
  const std::vector<double> losses = {3, 9, 1, 7, 5, 8, 2, 6};
  EXPECT_EQ(ChooseByLoss(losses, 0.25, 0), (Indices{1, 5}));
  EXPECT_EQ(ChooseByLoss(losses, 0.25, 0.25), (Indices{3, 7}));
  EXPECT_EQ(ChooseByLoss(losses, 1, 0), (Indices{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(ChooseByLoss(losses, 0.25, 0.75), (Indices{2, 6}));
  EXPECT_EQ(ChooseByLoss(losses, 0, 0), Indices{1}) << "at least one";
  EXPECT_EQ(ChooseByLoss(losses, 0, 1), Indices{2}) << "at least one, the last";
  EXPECT_EQ(ChooseByLoss(losses, 0.5, 0.75), (Indices{2, 6})) << "and no more than there are";
  EXPECT_EQ(ChooseByLoss({4, 4, 4, 4}, 0.5, 0), (Indices{0, 1})) << "equal ones as they come";
  EXPECT_EQ(ChooseByLoss({4}, 0.25, 0.5), Indices{0});
}

TEST(ScatteredRowsTest, EachOnceARound) {
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < 50; ++i) rows.push_back(3 * i + i / 10);
  const auto policy = MakeScatteredRows(rows, 10, 7), again = MakeScatteredRows(rows, 10, 7);
  for (int round = 0; round < 3; ++round) {
    std::set<int64_t> seen;
    for (int step = 0; step < 5; ++step) {
      int64_t count = 0, before = -1;
      const std::vector<SpanRange> same = again->NextStep();
      size_t i = 0;
      for (const SpanRange& span : policy->NextStep()) {
        EXPECT_EQ(span.start, same.at(i++).start);
        EXPECT_GT(span.start, before);
        before = span.start + span.rows - 1;
        count += span.rows;
        for (int64_t row = span.start; row <= before; ++row) EXPECT_TRUE(seen.insert(row).second);
      }
      EXPECT_EQ(count, 10);
    }
    EXPECT_EQ(seen, std::set<int64_t>(rows.begin(), rows.end())) << round;
  }
  // Steps are of one size: the rest of a round waits.
  const auto odd = MakeScatteredRows({1, 2, 3, 9, 11}, 3, 1);
  for (int step = 0; step < 4; ++step) {
    int64_t count = 0;
    for (const SpanRange& span : odd->NextStep()) count += span.rows;
    EXPECT_EQ(count, 3);
  }
  EXPECT_EQ(MakeScatteredRows({4, 5, 6}, 100, 1)->NextStep().at(0).rows, 3);
}

api::CreateContextRequest::Chunk TextChunk(int64_t offset, const std::string& text) {
  api::CreateContextRequest::Chunk chunk;
  chunk.set_offset(offset);
  chunk.set_text(text);
  return chunk;
}

std::string Sha(const std::string& text) {
  Sha256 hash;
  hash.Update(text.data(), text.size());
  return hash.Finish();
}

TEST(ChunkClockTest, FitsALineAndPredicts) {
  ChunkClock clock;
  EXPECT_EQ(clock.NextRows(0, 10'000, 512), 512);
  EXPECT_EQ(clock.NextRows(0, 100, 512), 100);
  const double a = 1e-5, b = 2e-9;
  int64_t pos = 0;
  for (int i = 0; i < 40; ++i) {
    const int64_t rows = clock.NextRows(pos, int64_t{1} << 20, 512);
    const double from = static_cast<double>(pos), to = static_cast<double>(pos + rows);
    const double seconds = a * (to - from) + b * (to * to - from * from) / 2;
    EXPECT_LE(seconds, kChunkSeconds * 1.05) << pos;
    clock.Measured(pos, rows, seconds);
    pos += rows;
  }
  const double to = 1 << 20, from = static_cast<double>(pos);
  EXPECT_NEAR(clock.Seconds(pos, 1 << 20), a * (to - from) + b * (to * to - from * from) / 2,
              0.02 * clock.Seconds(pos, 1 << 20));
  ChunkClock slow;
  slow.Measured(0, 512, 1000);
  EXPECT_EQ(slow.NextRows(512, 10'000, 512), 512);  // never below one unit
  EXPECT_EQ(slow.NextRows(512, 100'000, 256 * 100), kMaxChunkRows);
}

TEST(KvLedgerTest, RefusesByTheFullestRank) {
  KvLedger ledger;
  ledger.Reset({1000 * 10, 600 * 10}, 10);
  EXPECT_EQ(ledger.capacity_bytes(), 16'000);
  {
    const auto held = ledger.Reserve(0, 1100);  // 256 + 256 + 76 | 256 + 256
    ASSERT_TRUE(held.ok());
    EXPECT_EQ((*held)->bytes(), 11'000);
    EXPECT_EQ(ledger.used_bytes(), 11'000);
    const Status full = ledger.Check(0, 512);
    EXPECT_EQ(ReasonOf(full), "KV_CAPACITY");
    const ErrorDetail detail = DetailOf(full);
    EXPECT_EQ(detail.metadata[0].second, "5120");
    EXPECT_EQ(detail.metadata[1].second, "5000");
    EXPECT_TRUE(ledger.Check(1100, 180).ok());  // rank 0's block still
  }
  EXPECT_EQ(ledger.used_bytes(), 0);
  auto stale = ledger.Reserve(0, 100);
  ledger.Reset({100, 100}, 10);
  stale = absl::CancelledError("");
  EXPECT_EQ(ledger.used_bytes(), 0);
}

TEST(UploadTest, AnyCutGivesTheSame) {
  const ModelConfig model = FakeModel(1000);
  const auto tokenizer = FakeTokenizer();
  const std::string text = "some text with \xc3\xa9 in it";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    Upload upload(model, tokenizer.get(), 1000);
    ASSERT_TRUE(upload.Add(TextChunk(0, text.substr(0, cut))).ok());
    ASSERT_TRUE(upload.Add(TextChunk(static_cast<int64_t>(cut), text.substr(cut))).ok());
    const auto ids = upload.Finish({}, {});
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ((*ids)->size(), text.size());
    EXPECT_EQ(upload.content_hash(), "text:" + Sha(text));
  }
}

TEST(UploadTest, ChunksAreCapped) {
  const ModelConfig model = FakeModel(10);
  Upload upload(model, nullptr, 10);
  api::CreateContextRequest::Chunk chunk;
  chunk.mutable_ids();
  for (int64_t i = 0; i < kMaxUploadChunks; ++i) ASSERT_TRUE(upload.Add(chunk).ok());
  EXPECT_EQ(ReasonOf(upload.Add(chunk)), "TOO_MANY_CHUNKS");
  EXPECT_LT(upload.held_bytes(), 1024);
}

TEST(UploadTest, TextThatCannotFitIsRefusedEarly) {
  EXPECT_EQ(MaxTextBytes(10, 3), 120);
  EXPECT_EQ(MaxTextBytes(10, 0), 40);
  EXPECT_EQ(MaxTextBytes(kMaxContextTokens, 1000), kMaxTextBytes);
  const ModelConfig model = FakeModel(10);
  const auto tokenizer = FakeTokenizer();
  Upload upload(model, tokenizer.get(), 10, MaxTextBytes(10, 1));
  EXPECT_TRUE(upload.Add(TextChunk(0, std::string(40, 'x'))).ok());
  EXPECT_EQ(ReasonOf(upload.Add(TextChunk(40, "x"))), "CONTEXT_TOO_LONG");
}

TEST(PlanTest, RowsOfAStepAreBounded) {
  api::AdaptContextRequest request;
  request.set_spans_per_step(9);
  request.set_span_tokens(8192);
  const Status status = PlanAdapt(request, FakeModel(100'000), nullptr, 100'000, 1).status();
  EXPECT_EQ(ReasonOf(status), "FIELD_OUT_OF_RANGE");
  EXPECT_NE(std::string(status.message()).find("73728"), std::string::npos) << status;
  EXPECT_TRUE(PlanAdapt(request, FakeModel(100'000), nullptr, 1000, 1).ok());  // spans shrink to the context
  auto* span = request.mutable_explicit_spans()->add_spans();
  span->set_length(8192);
  EXPECT_FALSE(PlanAdapt(request, FakeModel(100'000), nullptr, 100'000, 1).ok());
  span->set_length(7000);
  EXPECT_TRUE(PlanAdapt(request, FakeModel(100'000), nullptr, 100'000, 1).ok());
  request.set_spans_per_step(8);
  span->set_length(8192);
  EXPECT_TRUE(PlanAdapt(request, FakeModel(100'000), nullptr, 100'000, 1).ok());
}

TEST(UploadTest, BeginToken) {
  const ModelConfig model = FakeModel(10);
  const auto tokenizer = FakeTokenizer(/*adds_bos=*/true);
  Upload upload(model, tokenizer.get(), 10);
  ASSERT_TRUE(upload.Add(TextChunk(0, "123456789")).ok());
  EXPECT_EQ((**upload.Finish({}, {}))[0], kFakeBos);
  Upload over(model, tokenizer.get(), 10);
  ASSERT_TRUE(over.Add(TextChunk(0, "1234567890")).ok());
  EXPECT_EQ(ReasonOf(over.Finish({}, {}).status()), "CONTEXT_TOO_LONG");
  Upload plain(model, tokenizer.get(), 10);
  ASSERT_TRUE(plain.Add(TextChunk(0, "1234567890")).ok());
  api::CreateContextRequest::Header header;
  header.set_no_bos(true);
  EXPECT_EQ((*plain.Finish(header, {}))->size(), 10u);
}

TEST(CatalogTest, RequestTableIsBounded) {
  RequestTable table;
  for (int i = 0; i < 20'000; ++i) table.Put("create/" + std::to_string(i), "body", CreateOutcome{});
  EXPECT_LE(table.size(), 8192u);
  EXPECT_EQ(*table.Find("create/0", "body"), nullptr);
  EXPECT_NE(*table.Find("create/19999", "body"), nullptr);
  EXPECT_EQ(ReasonOf(table.Find("create/19999", "other").status()), "REQUEST_ID_REUSED");
}

class CoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    simulation_.Launch(1);
    simulation_.Run();
  }
  Simulation simulation_;
};

TEST_F(CoreTest, RepeatedRequestIdsRunOnce) {
  ASSERT_TRUE(simulation_.Create("a", 100, "r1").ok());
  EXPECT_TRUE(simulation_.Create("a", 100, "r1").ok());
  EXPECT_EQ(ReasonOf(simulation_.Create("a", 101, "r1")), "REQUEST_ID_REUSED");
  EXPECT_EQ(ReasonOf(simulation_.Create("b", 100, "r1")), "REQUEST_ID_REUSED");
  EXPECT_EQ(ReasonOf(simulation_.Create("a", 100)), "CONTEXT_EXISTS");
  EXPECT_EQ(simulation_.core().catalog().sessions().size(), 1u);

  ASSERT_TRUE(simulation_.Prefill("a").ok());
  simulation_.Run();
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 2);
  request.set_request_id("r2");
  const auto first = *simulation_.Adapt(request);
  EXPECT_EQ(*simulation_.Adapt(request), first);  // attached
  simulation_.Run();
  ASSERT_TRUE(first->status().ok());
  const auto done = simulation_.core().Adapt(request);
  ASSERT_TRUE(done.ok());
  EXPECT_EQ(done->job, nullptr);
  ASSERT_EQ(done->events.size(), 2u);
  EXPECT_EQ(done->events[1].adapter().revision(), 1);
  EXPECT_EQ(simulation_.Get("a").adapters(0).revision(), 1);
  request.set_steps(3);
  EXPECT_EQ(ReasonOf(simulation_.Adapt(request).status()), "REQUEST_ID_REUSED");
}

TEST_F(CoreTest, ARequestIdCreatesAnewWhenItsContextIsGone) {
  ASSERT_TRUE(simulation_.Create("a", 100, "r").ok());
  const auto first = simulation_.core().catalog().Find("contexts/a");
  simulation_.Advance(1800);
  ASSERT_TRUE(simulation_.Create("a", 100, "r").ok());
  EXPECT_EQ(simulation_.core().catalog().Find("contexts/a"), first);
  simulation_.Advance(2000);  // expired
  ASSERT_EQ(simulation_.core().catalog().Find("contexts/a"), nullptr);
  ASSERT_TRUE(simulation_.Create("a", 100, "r").ok());
  const auto second = simulation_.core().catalog().Find("contexts/a");
  ASSERT_NE(second, nullptr);
  EXPECT_NE(second, first);

  // While it is being deleted, and when its name belongs to another creation.
  ASSERT_TRUE(simulation_.Prefill("a").ok());
  api::DeleteContextRequest request;
  request.set_name("contexts/a");
  request.set_force(true);
  ASSERT_TRUE(simulation_.core().DeleteContext(request).ok());
  EXPECT_EQ(ReasonOf(simulation_.Create("a", 100, "r")), "CONTEXT_BUSY");
  simulation_.Run();
  ASSERT_TRUE(simulation_.Create("a", 100, "other").ok());
  EXPECT_EQ(ReasonOf(simulation_.Create("a", 100, "r")), "CONTEXT_EXISTS");
}

TEST_F(CoreTest, ARequestIdRunsAgainWhenItsAdapterIsGone) {
  simulation_.CreateReady("a", 100);
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 2);
  request.set_request_id("r");
  const auto first = *simulation_.Adapt(request);
  simulation_.Run();
  ASSERT_TRUE(first->status().ok());
  EXPECT_EQ(*simulation_.Adapt(request), nullptr);  // answered from the table
  simulation_.Kill(0);
  EXPECT_EQ(ReasonOf(simulation_.Adapt(request).status()), "GROUP_REBUILDING");
  simulation_.Launch(1);
  simulation_.Run();
  EXPECT_EQ(ReasonOf(simulation_.Adapt(request).status()), "CONTEXT_NOT_READY");
  ASSERT_TRUE(simulation_.Prefill("a").ok());
  simulation_.Run();
  const auto second = *simulation_.Adapt(request);
  ASSERT_NE(second, nullptr);
  simulation_.Run();
  EXPECT_TRUE(second->status().ok());
  EXPECT_EQ(*simulation_.Adapt(request), nullptr);
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 1);
}

TEST_F(CoreTest, NobodyAttachesToAStoppingAdaptation) {
  simulation_.CreateReady("a", 100);
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 50);
  request.set_request_id("r");
  const auto first = *simulation_.Adapt(request);
  simulation_.StepRank(simulation_.links()[0]);
  simulation_.StepAnswer(simulation_.links()[0]);
  simulation_.Stop(*first);
  ASSERT_FALSE(first->ended());
  const Status status = simulation_.Adapt(request).status();
  EXPECT_EQ(status.code(), StatusCode::kAborted);
  EXPECT_EQ(ReasonOf(status), "CONTEXT_BUSY");
  simulation_.DeliverCancels();
  simulation_.Run();
  EXPECT_NE(*simulation_.Adapt(request), nullptr);
  simulation_.Run();
  simulation_.ExpectConsistent();
}

// Whoever has the whole answer may go on at once: what is left is between the coordinator and its ranks.
TEST_F(CoreTest, AContextIsDeletedBehindItsLastAnswer) {
  simulation_.CreateReady("a", 100);
  const auto job = *simulation_.Generate("a", 0, 3);
  api::DeleteContextRequest request;
  request.set_name("contexts/a");
  EXPECT_EQ(ReasonOf(simulation_.core().DeleteContext(request).status()), "CONTEXT_BUSY");
  for (Simulation::Link& link : simulation_.links()) {
    while (!job->answered() && (simulation_.CanStepRank(link) || !link.outbox.empty())) {
      if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
      while (!job->answered() && !link.outbox.empty()) simulation_.StepAnswer(link);
    }
  }
  ASSERT_TRUE(job->answered());
  ASSERT_FALSE(job->ended());
  EXPECT_TRUE(simulation_.core().DeleteContext(request).ok());
  simulation_.Run();
  EXPECT_TRUE(job->ended());
  EXPECT_TRUE(job->status().ok());
  simulation_.ExpectConsistent();
}

TEST_F(CoreTest, AContextThatIsBeingDeletedIsHidden) {
  simulation_.CreateReady("a", 100);
  const auto job = *simulation_.Generate("a", 0, 1000);
  simulation_.StepRank(simulation_.links()[0]);
  simulation_.StepAnswer(simulation_.links()[0]);
  api::DeleteContextRequest request;
  request.set_name("contexts/a");
  request.set_force(true);
  ASSERT_TRUE(simulation_.core().DeleteContext(request).ok());
  EXPECT_FALSE(job->ended());
  EXPECT_EQ(simulation_.core().ListContexts({})->contexts_size(), 0);
  const Status status = simulation_.Create("a", 5);
  EXPECT_EQ(status.code(), StatusCode::kAborted);
  EXPECT_EQ(ReasonOf(status), "CONTEXT_BUSY");
  simulation_.Collect();
  simulation_.Run();
  EXPECT_TRUE(simulation_.Create("a", 5).ok());
}

TEST_F(CoreTest, AnswersAreNamedInTheLogAndTheSummary) {
  simulation_.CreateReady("a", 100);
  testing::internal::CaptureStderr();
  api::GenerateRequest request;
  request.set_name("contexts/a");
  request.set_max_tokens(2);
  request.set_request_id("mine");
  const auto job = *simulation_.core().Generate(request, {65});
  request.clear_request_id();
  const auto other = *simulation_.core().Generate(request, {65});
  simulation_.Run();
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_EQ(job->TakeEvents().back().summary().request_id(), "mine");
  const std::string made = other->TakeEvents().back().summary().request_id();
  EXPECT_EQ(made.size(), 16u);
  for (const std::string& id : {std::string("mine"), made}) {
    EXPECT_NE(log.find("generate " + id + ": begin"), std::string::npos) << log;
    EXPECT_NE(log.find("generate " + id + ": end, OK, 2 tokens"), std::string::npos) << log;
  }
}

TEST_F(CoreTest, AFailedAdaptationMayBeRepeatedAndDrawsTheSameSeed) {
  simulation_.CreateReady("a", 100);
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 5);
  request.set_request_id("again");
  const auto first = *simulation_.Adapt(request);
  simulation_.Kill(0);
  EXPECT_EQ(ReasonOf(first->status()), "WORKER_LOST");
  simulation_.Launch(2);
  simulation_.Run();
  ASSERT_TRUE(simulation_.Prefill("a").ok());
  simulation_.Run();
  const auto second = *simulation_.Adapt(request);
  simulation_.Run();
  ASSERT_TRUE(second->status().ok());
  EXPECT_EQ(second->events()[0].effective().seed(), first->events()[0].effective().seed());
}

TEST_F(CoreTest, IdleContextsExpireBusyOnesDoNot) {
  simulation_.CreateReady("a", 100);
  simulation_.Advance(3000);
  const auto job = *simulation_.Generate("a", 0, 50);
  simulation_.links()[0].frozen = true;
  simulation_.Advance(100);
  simulation_.links()[0].frozen = false;
  simulation_.Run();
  ASSERT_TRUE(job->ended());
  simulation_.Advance(3500);
  EXPECT_TRUE(simulation_.core().GetContext("contexts/a").ok());
  simulation_.Advance(200);
  EXPECT_EQ(ReasonOf(simulation_.core().GetContext("contexts/a").status()), "CONTEXT_NOT_FOUND");
  simulation_.Run();
  EXPECT_TRUE(simulation_.rank(0).contexts.empty());
  simulation_.ExpectConsistent();
}

TEST_F(CoreTest, PagesAreCompleteAndInOrder) {
  for (int i = 0; i < 25; ++i) ASSERT_TRUE(simulation_.Create("c" + std::to_string(100 + i), 1).ok());
  api::ListContextsRequest request;
  request.set_page_size(10);
  std::vector<std::string> names;
  do {
    const auto page = *simulation_.core().ListContexts(request);
    for (const auto& context : page.contexts()) names.push_back(context.name());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  ASSERT_EQ(names.size(), 25u);
  EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
}

TEST_F(CoreTest, MemoryIsRefusedBeforeAnyCommand) {
  Simulation small;
  small.Launch(2, [](FakeRank& rank, int32_t) { rank.kv_capacity_bytes = 1000 * kFakeKvBytesPerToken; });
  small.Run();
  EXPECT_EQ(ReasonOf(small.Create("big", 2100)), "KV_CAPACITY");
  small.CreateReady("a", 1500);
  const size_t before = small.rank(0).executed.size();
  EXPECT_EQ(ReasonOf(small.Generate("a", 300, 300).status()), "KV_CAPACITY");
  ASSERT_TRUE(small.Create("b", 200).ok());
  const auto answer = *small.Generate("a", 100, 130);
  EXPECT_EQ(ReasonOf(small.Prefill("b").status()), "KV_CAPACITY");
  EXPECT_EQ(small.rank(0).executed.size(), before);
  small.Run();
  EXPECT_TRUE(small.Prefill("b").ok());
  small.Run();
  small.ExpectConsistent();
}

TEST_F(CoreTest, QueueIsBounded) {
  simulation_.CreateReady("a", 100);
  std::vector<std::shared_ptr<GenerateJob>> jobs;
  for (int64_t i = 0; i < kMaxQueuedJobs; ++i) {
    const auto job = simulation_.Generate("a", 0, 1);
    ASSERT_TRUE(job.ok());
    jobs.push_back(*job);
  }
  EXPECT_EQ(ReasonOf(simulation_.Generate("a", 0, 1).status()), "QUEUE_FULL");
  simulation_.Run();
  for (const auto& job : jobs) EXPECT_TRUE(job->status().ok());
  EXPECT_TRUE(simulation_.Generate("a", 0, 1).ok());
  simulation_.Run();
  simulation_.ExpectConsistent();
}

TEST_F(CoreTest, RejectedRequestsLeaveNoTrace) {
  for (int i = 0; i < 100'000; ++i) {
    (void)simulation_.Generate("absent", 1, 1);
    (void)simulation_.Prefill("absent");
  }
  EXPECT_EQ(simulation_.core().jobs(), 0);
  simulation_.ExpectConsistent();
}

TEST(ValidateTest, ProbeValuesAreBounded) {
  ModelConfig model = FakeModel(100'000);
  model.layers = 32;
  model.heads = 32;
  api::ProbeAttentionRequest request;
  for (int64_t pos = 0; pos < kMaxProbeRows; ++pos) request.add_positions(pos);
  request.add_ranges()->set_end(10);
  EXPECT_TRUE(PlanProbe(request, model, 100'000, 0).ok());  // exactly as many as are allowed
  request.add_ranges()->set_end(10);
  const Status status = PlanProbe(request, model, 100'000, 0).status();
  EXPECT_EQ(DetailOf(status).reason, "FIELD_OUT_OF_RANGE");
  EXPECT_NE(status.message().find(std::to_string(2 * kMaxProbeValues)), std::string::npos) << status;
  request.add_layers(31);
  EXPECT_TRUE(PlanProbe(request, model, 100'000, 0).ok());
}

}  // namespace
}  // namespace refocus
