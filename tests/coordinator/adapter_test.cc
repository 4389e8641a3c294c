// Adapters as resources, in the state machine: files, forecasts, time limits, exports and imports.
#include <cmath>
#include <functional>

#include "base/limits.h"
#include "coordinator/core/adapter_file.h"
#include "tests/coordinator/simulation.h"

namespace refocus {
namespace {

// ---- Files.

api::AdapterFileHeader Header(int64_t lora_rank = 2) {
  const ModelConfig model = FakeModel(1000);
  api::AdapterFileHeader header;
  header.set_model_fingerprint("0123");
  header.set_weights_hash("4567");
  header.set_layers(model.layers);
  header.set_hidden_size(model.hidden);
  header.set_query_size(model.q_dim());
  header.set_dtype("F32");
  header.set_data_bytes(4 * DeltaNumbers(model, lora_rank));
  header.mutable_adapter()->set_id("from-file");
  header.mutable_adapter()->set_kind(lora_rank > 0 ? api::LORA : api::FULL);
  header.mutable_adapter()->set_lora_rank(lora_rank);
  header.mutable_adapter()->set_lora_alpha(lora_rank > 0 ? 4 : 0);
  header.mutable_adapter()->set_steps(7);
  return header;
}

std::string File(const api::AdapterFileHeader& header) {
  std::string file = AdapterFilePrefix(header) + FakeNumbers(static_cast<size_t>(header.data_bytes()), 3);
  Sha256 hash;
  hash.Update(file.data(), file.size());
  return file + hash.Finish();
}

// Whatever the pieces are that it comes in. -> its numbers.
StatusOr<std::string> ReadAll(const std::string& file, size_t piece) {
  AdapterFileReader reader;
  std::string numbers;
  for (size_t at = 0; at < file.size(); at += piece) {
    REFOCUS_RETURN_IF_ERROR(reader.Add(std::string_view(file).substr(at, piece)));
    for (std::string part; reader.has_header() && !(part = reader.TakeNumbers(5)).empty();) {
      EXPECT_LE(part.size(), 20u);
      numbers += part;
    }
  }
  REFOCUS_RETURN_IF_ERROR(reader.Finish());
  return numbers;
}

TEST(AdapterFileTest, ComesThroughInAnyPieces) {
  for (const int64_t rank : {0, 2}) {
    const std::string file = File(Header(rank));
    for (const size_t piece : {size_t{1}, size_t{3}, size_t{20}, size_t{64}, file.size()}) {
      const auto numbers = ReadAll(file, piece);
      ASSERT_TRUE(numbers.ok()) << numbers.status();
      EXPECT_EQ(*numbers, FakeNumbers(static_cast<size_t>(Header(rank).data_bytes()), 3)) << piece;
    }
  }
}

TEST(AdapterFileTest, EveryChangedByteAndEveryLengthIsNoticed) {
  const std::string file = File(Header());
  for (size_t i = 0; i < file.size(); ++i) {
    std::string bad = file;
    bad[i] = static_cast<char>(bad[i] ^ 0x10);
    EXPECT_FALSE(ReadAll(bad, 50).ok()) << "byte " << i;
    const Status cut = ReadAll(file.substr(0, i), 50).status();
    EXPECT_EQ(ReasonOf(cut), "ADAPTER_FILE_INVALID") << i << " bytes: " << cut;
  }
  EXPECT_EQ(ReasonOf(ReadAll(file + "x", 50).status()), "ADAPTER_FILE_INVALID");
  std::string numbers = file;
  numbers[file.size() - 40] ^= 1;
  EXPECT_EQ(ReasonOf(ReadAll(numbers, 50).status()), "CHECKSUM_MISMATCH");
  std::string version = file;
  version[7] = '2';
  EXPECT_NE(std::string(ReadAll(version, 50).status().message()).find("version"), std::string::npos);
  std::string length = file;
  length[11] = '\x7f';
  EXPECT_NE(std::string(ReadAll(length, 50).status().message()).find("65536"), std::string::npos);
}

TEST(AdapterFileTest, OfAnotherModelOrContradictingItself) {
  const ModelConfig model = FakeModel(1000);
  const ModelIdentity same{"0123", "4567"};
  EXPECT_TRUE(CheckAdapterFile(Header(), model, same).ok());
  EXPECT_TRUE(CheckAdapterFile(Header(0), model, {}).ok());
  EXPECT_TRUE(CheckAdapterFile(Header(), model, {"", "4567"}).ok());
  EXPECT_EQ(ReasonOf(CheckAdapterFile(Header(), model, {"0124", "4567"})), "MODEL_MISMATCH");
  EXPECT_EQ(ReasonOf(CheckAdapterFile(Header(), model, {"0123", "0000"})), "MODEL_MISMATCH");
  struct Case {
    std::string reason;
    std::function<void(api::AdapterFileHeader&)> set;
  };
  const std::vector<Case> cases = {
      {"MODEL_MISMATCH", [](auto& h) { h.set_layers(3); }},
      {"MODEL_MISMATCH", [](auto& h) { h.set_hidden_size(-8); }},
      {"MODEL_MISMATCH", [](auto& h) { h.set_query_size(INT64_MAX); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.set_data_bytes(h.data_bytes() + 4); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.set_dtype("BF16"); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.mutable_adapter()->set_kind(api::ADAPTER_KIND_UNSPECIFIED); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.mutable_adapter()->set_kind(api::FULL); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.mutable_adapter()->set_lora_rank(0); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.mutable_adapter()->set_lora_rank(INT64_MAX); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.mutable_adapter()->set_lora_alpha(std::nan("")); }},
      {"ADAPTER_FILE_INVALID", [](auto& h) { h.mutable_adapter()->set_steps(-1); }}};
  for (const Case& c : cases) {
    api::AdapterFileHeader header = Header();
    c.set(header);
    EXPECT_EQ(ReasonOf(CheckAdapterFile(header, model, same)), c.reason) << header.DebugString();
  }
}

// ---- Jobs.

class AdapterTest : public ::testing::Test {
 protected:
  void SetUp() override {
    simulation_.Launch(2);
    simulation_.Run();
    simulation_.CreateReady("a", 600);
  }
  void TearDown() override { simulation_.Run(); }

  Coordinator& core() { return simulation_.core(); }
  std::shared_ptr<AdaptJob> Adapted(const std::function<void(api::AdaptContextRequest&)>& set, int64_t steps = 3) {
    api::AdaptContextRequest request = Simulation::AdaptRequest("a", steps);
    set(request);
    const auto job = simulation_.Adapt(request);
    if (!job.ok()) {
      ADD_FAILURE() << job.status();
      return nullptr;
    }
    simulation_.Run();
    return *job;
  }
  // Both ranks do their next command and answer.
  void Step() {
    for (auto& link : simulation_.links()) {
      if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
    }
    for (auto& link : simulation_.links()) {
      while (!link.outbox.empty()) simulation_.StepAnswer(link);
    }
  }
  // The whole export.
  StatusOr<std::string> Export(const std::string& id, std::shared_ptr<ExportJob>* out = nullptr) {
    api::ExportAdapterRequest request;
    request.set_name("contexts/a");
    request.set_adapter_id(id);
    REFOCUS_ASSIGN_OR_RETURN(const auto job, core().Export(request));
    if (out != nullptr) *out = job;
    std::string numbers;
    for (int turn = 0; turn < 100 && (!job->ended() || turn == 0); ++turn) {
      simulation_.Collect();
      simulation_.Run();
      for (std::string piece; !(piece = core().TakeExported(*job)).empty();) numbers += piece;
    }
    REFOCUS_RETURN_IF_ERROR(job->status());
    return numbers;
  }
  StatusOr<std::shared_ptr<ImportJob>> StartImport(const std::string& id, const api::AdapterFileHeader& header) {
    api::ImportAdapterRequest::Header request;
    request.set_name("contexts/a");
    request.set_adapter_id(id);
    request.set_allow_other_model(true);
    auto job = core().Import(request, header);
    simulation_.Collect();
    return job;
  }
  const api::Adapter& Find(const std::string& id) {
    api::GetAdapterRequest request;
    request.set_name("contexts/a");
    request.set_adapter_id(id);
    const auto found = core().GetAdapter(request);
    EXPECT_TRUE(found.ok()) << found.status();
    if (found.ok()) adapter_ = *found;
    return adapter_;
  }

  Simulation simulation_;
  api::Adapter adapter_;
};

TEST_F(AdapterTest, RatesTravelWithTheStepsAndComeBack) {
  const auto job = Adapted([](auto& r) {
    r.set_schedule(api::LINEAR);
    r.set_warmup_steps(1);
    r.set_learning_rate(4e-3);
    r.set_optimizer(api::SGD);
    r.set_momentum(0.5);
  });
  std::vector<double> rates;
  for (const auto& event : job->events()) {
    if (event.has_step()) rates.push_back(event.step().learning_rate());
  }
  EXPECT_EQ(rates, (std::vector<double>{2e-3, 4e-3, 2e-3}));
  EXPECT_EQ(job->events().front().effective().optimizer(), api::SGD);
  EXPECT_EQ(job->events().front().effective().momentum(), 0.5);
  EXPECT_EQ(job->events().front().effective().schedule(), api::LINEAR);
}

TEST_F(AdapterTest, MemoryFollowsKindAndOptimizer) {
  const int64_t before = core().kv_used_bytes();
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 2);
  request.set_lora_rank(2);
  request.set_optimizer(api::SGD);
  request.set_validate_only(true);
  const int64_t numbers = DeltaNumbers(core().model(), 2);
  ASSERT_EQ(numbers, 2 * (8 + 8) * 2);
  const auto checked = core().Adapt(request);
  ASSERT_TRUE(checked.ok()) << checked.status();
  const auto& forecast = checked->events.at(0).forecast();
  EXPECT_EQ(forecast.adapter_bytes(), 4 * numbers);
  EXPECT_EQ(forecast.adapting_bytes(), 8 * numbers) << "delta and gradient";
  EXPECT_GT(forecast.free_bytes(), 0);
  EXPECT_GT(forecast.seconds(), 0) << "by the prefill";
  EXPECT_EQ(core().kv_used_bytes(), before) << "nothing changed";
  request.set_validate_only(false);
  const auto job = simulation_.Adapt(request);
  ASSERT_TRUE(job.ok());
  EXPECT_EQ(core().kv_used_bytes(), before + 2 * 12 * numbers);
  simulation_.Run();
  EXPECT_EQ(core().kv_used_bytes(), before + 2 * 4 * numbers);
  const api::Adapter& adapter = Find("default");
  EXPECT_EQ(adapter.kind(), api::LORA);
  EXPECT_EQ(adapter.lora_rank(), 2);
  EXPECT_EQ(adapter.memory_bytes(), 4 * numbers);
  EXPECT_GT(adapter.create_time().seconds(), 0);
  // Another kind may replace it.
  Adapted([](auto& r) { r.set_kind(api::FULL); });
  EXPECT_EQ(Find("default").kind(), api::FULL);
  EXPECT_EQ(Find("default").revision(), 2);
  EXPECT_EQ(core().kv_used_bytes(), before + 2 * AdapterBytes(core().model(), DeviceKind::kCpu));
}

TEST_F(AdapterTest, ForecastFollowsMeasuredSteps) {
  Adapted([](auto&) {}, 20);
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 40);
  request.set_validate_only(true);
  request.set_probe_spans(0);
  const double one = core().Adapt(request)->events.at(0).forecast().seconds();
  EXPECT_NEAR(one, 40 * simulation_.rank(0).command_seconds, 0.5 * one);
  request.set_steps(80);
  EXPECT_NEAR(core().Adapt(request)->events.at(0).forecast().seconds(), 2 * one, 1e-9);
}

TEST_F(AdapterTest, OnTopOfAnother) {
  Adapted([](auto& r) { r.set_lora_rank(3); }, 4);
  const auto job = Adapted([](auto& r) { r.set_adapter_id("question"), r.set_base_adapter("default"); }, 2);
  ASSERT_TRUE(job->status().ok()) << job->status();
  EXPECT_EQ(Find("question").steps(), 6);
  EXPECT_EQ(Find("question").lora_rank(), 3);
  EXPECT_EQ(Find("question").base_adapter(), "default");
  EXPECT_EQ(Find("question").revision(), 1);
  EXPECT_EQ(Find("default").steps(), 4) << "stays as it is";
  EXPECT_EQ(simulation_.rank(1).adapters.size(), 2u);
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 1);
  request.set_base_adapter("nobody");
  request.set_adapter_id("x");
  EXPECT_EQ(ReasonOf(simulation_.Adapt(request).status()), "ADAPTER_NOT_FOUND");
  api::ListAdaptersRequest list;
  list.set_name("contexts/a");
  const auto all = core().ListAdapters(list);
  ASSERT_EQ(all->adapters_size(), 2);
  EXPECT_EQ(all->adapters(0).id(), "default");
  EXPECT_EQ(all->adapters(1).id(), "question");
}

TEST_F(AdapterTest, TimeLimitCommitsWhatThereIs) {
  // A step takes a virtual second: the clock moves when the test says so.
  api::AdaptContextRequest request = Simulation::AdaptRequest("a", 100);
  request.set_max_seconds(3.5);
  for (Simulation::Link& link : simulation_.links()) link.rank->command_seconds = 1.0;
  const auto job = *simulation_.Adapt(request);
  const auto steps = [&] {
    int64_t count = 0;
    for (const auto& event : job->events()) count += event.has_step() ? 1 : 0;
    return count;
  };
  for (int turn = 0; turn < 1000 && !job->ended(); ++turn) {
    const int64_t before = steps();
    Step();
    if (steps() > before || turn == 0) simulation_.Advance(1.0);
  }
  ASSERT_TRUE(job->status().ok()) << job->status();
  const api::AdaptEvent& last = job->events().back();
  EXPECT_TRUE(last.out_of_time());
  EXPECT_EQ(last.adapter().steps(), steps());
  EXPECT_GE(steps(), 3);
  EXPECT_LE(steps(), 5);
  EXPECT_TRUE(last.adapter().has_probe_loss_after());
  EXPECT_EQ(simulation_.rank(0).adapters.begin()->second.steps, steps());
  EXPECT_FALSE(Adapted([](auto& r) { r.set_max_seconds(1e6); }, 3)->events().back().out_of_time());
}

TEST_F(AdapterTest, ExportedIsWhatTheRanksHoldAndComesBack) {
  Adapted([](auto&) {}, 5);
  std::shared_ptr<ExportJob> job;
  const auto numbers = Export("default", &job);
  ASSERT_TRUE(numbers.ok()) << numbers.status();
  EXPECT_EQ(*numbers, simulation_.rank(0).adapters.begin()->second.numbers);
  EXPECT_EQ(job->header().adapter().steps(), 5);
  EXPECT_EQ(job->header().training().steps(), 5);
  EXPECT_EQ(job->header().data_bytes(), static_cast<int64_t>(numbers->size()));

  const auto import = *StartImport("copy", job->header());
  EXPECT_EQ(ReasonOf(simulation_.Adapt(Simulation::AdaptRequest("a", 1)).status()), "CONTEXT_BUSY");
  for (size_t at = 0; at < numbers->size(); at += 100) core().PushImported(*import, numbers->substr(at, 100));
  simulation_.Collect();
  simulation_.Run();
  EXPECT_FALSE(import->ended()) << "not before the file is known to be whole";
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 1);
  core().FinishImport(*import);
  simulation_.Collect();
  simulation_.Run();
  ASSERT_TRUE(import->committed().has_value()) << import->status();
  EXPECT_EQ(import->committed()->id(), "copy");
  EXPECT_TRUE(import->committed()->imported());
  EXPECT_EQ(import->committed()->steps(), 5);
  EXPECT_EQ(import->committed()->revision(), 1);
  for (Simulation::Link& link : simulation_.links()) {
    for (const auto& [uid, adapter] : link.rank->adapters) EXPECT_EQ(adapter.numbers, *numbers);
  }
  simulation_.ExpectConsistent();
}

// What a file says beside its numbers is not passed on unread.
TEST_F(AdapterTest, AnImportedHeaderStaysSmall) {
  api::AdapterFileHeader header = Header(0);
  header.mutable_training()->set_steps(5);
  header.mutable_training()->set_base_adapter(std::string(60'000, 'x'));
  const auto reflection = header.adapter().GetReflection();
  reflection->MutableUnknownFields(header.mutable_adapter())->AddLengthDelimited(999, std::string(60'000, 'x'));
  const auto import = *StartImport("big", header);
  core().PushImported(*import, std::string(static_cast<size_t>(header.data_bytes()), '\0'));
  core().FinishImport(*import);
  simulation_.Collect();
  simulation_.Run();
  ASSERT_TRUE(import->committed().has_value()) << import->status();
  std::shared_ptr<ExportJob> job;
  ASSERT_TRUE(Export("big", &job).ok());
  EXPECT_LT(AdapterFilePrefix(job->header()).size(), 1000u);
  EXPECT_EQ(job->header().training().steps(), 5);
}

TEST_F(AdapterTest, AStoppedImportLeavesNothing) {
  Adapted([](auto&) {}, 2);
  for (const std::string id : {"new", "default"}) {
    const auto import = *StartImport(id, Header(0));
    core().PushImported(*import, std::string(64, '\0'));
    simulation_.Collect();
    simulation_.Run();
    simulation_.Stop(*import);
    simulation_.DeliverCancels();
    simulation_.Run();
    EXPECT_TRUE(import->ended());
    EXPECT_FALSE(import->committed().has_value());
    EXPECT_EQ(Find("default").revision(), 1);
    simulation_.ExpectConsistent();
  }
  // Too few numbers: the ranks refuse the commit.
  const auto import = *StartImport("new", Header(0));
  core().PushImported(*import, std::string(64, '\0'));
  core().FinishImport(*import);
  simulation_.Collect();
  simulation_.Run();
  EXPECT_FALSE(import->status().ok());
  simulation_.ExpectConsistent();
}

TEST_F(AdapterTest, ExportEndsWhenTheAdapterChanges) {
  Adapted([](auto&) {}, 2);
  api::ExportAdapterRequest request;
  request.set_name("contexts/a");
  request.set_adapter_id("default");
  api::DeleteAdapterRequest drop;
  drop.set_name("contexts/a");
  drop.set_adapter_id("default");
  simulation_.rank(0).tamper = [](const wire::Command& command, wire::Result& result) {
    if (command.has_read_delta()) result.mutable_data()->pop_back();
  };
  const auto job = *core().Export(request);
  EXPECT_EQ(ReasonOf(core().DeleteAdapter(drop)), "CONTEXT_BUSY") << "it is being read";
  simulation_.Collect();
  simulation_.Run();
  EXPECT_EQ(ReasonOf(job->status()), "RANK_DIVERGENCE") << "numbers are missing";
  simulation_.rank(0).tamper = nullptr;
  for (Simulation::Link& link : simulation_.links()) link.rank->adapters.begin()->second.revision = 9;
  EXPECT_EQ(ReasonOf(Export("default").status()), "ADAPTER_CHANGED");
  for (Simulation::Link& link : simulation_.links()) link.rank->adapters.begin()->second.revision = 1;
  request.set_adapter_id("nobody");
  EXPECT_EQ(ReasonOf(core().Export(request).status()), "ADAPTER_NOT_FOUND");
  EXPECT_TRUE(core().DeleteAdapter(drop).ok());
}

// Whoever has the whole answer may delete its adapter at once, and make another of that name.
TEST_F(AdapterTest, IsDeletedBehindItsLastAnswer) {
  Adapted([](auto&) {}, 2);
  api::DeleteAdapterRequest drop;
  drop.set_name("contexts/a");
  drop.set_adapter_id("default");
  for (const bool cancelled : {false, true}) {
    const auto base = *simulation_.Generate("a", 0, 3000);
    const auto job = *simulation_.Generate("a", 0, 3, "default");
    EXPECT_EQ(ReasonOf(core().DeleteAdapter(drop)), "CONTEXT_BUSY");
    for (int turn = 0; turn < 100 && !job->answered() && !(cancelled && job->started()); ++turn) {
      for (auto& link : simulation_.links()) {
        if (simulation_.CanStepRank(link)) simulation_.StepRank(link);
        while (!job->answered() && !link.outbox.empty()) simulation_.StepAnswer(link);
      }
    }
    if (cancelled) simulation_.Stop(*job);
    ASSERT_TRUE(job->answered());
    ASSERT_FALSE(job->ended());
    EXPECT_FALSE(base->answered()) << "base queries do not count";
    const Status dropped = core().DeleteAdapter(drop);
    EXPECT_TRUE(dropped.ok()) << dropped;
    EXPECT_EQ(ReasonOf(core().DeleteAdapter(drop)), "ADAPTER_NOT_FOUND");
    const auto again = simulation_.Adapt(Simulation::AdaptRequest("a", 4));
    ASSERT_TRUE(again.ok()) << again.status();
    simulation_.Stop(*base);
    simulation_.DeliverCancels();
    simulation_.Run();
    EXPECT_TRUE(job->ended());
    EXPECT_EQ(job->status().ok(), !cancelled) << job->status();
    EXPECT_TRUE((*again)->status().ok()) << (*again)->status();
    EXPECT_EQ(Find("default").revision(), 1);
    EXPECT_EQ(Find("default").steps(), 4);
    simulation_.ExpectConsistent();
  }
}

TEST_F(AdapterTest, ALostGroupEndsTransfersCleanly) {
  Adapted([](auto&) {}, 2);
  api::ExportAdapterRequest request;
  request.set_name("contexts/a");
  request.set_adapter_id("default");
  const auto export_job = *core().Export(request);
  const auto import = *StartImport("new", Header(0));
  simulation_.Collect();
  simulation_.Kill(1);
  EXPECT_EQ(ReasonOf(export_job->status()), "WORKER_LOST");
  EXPECT_EQ(ReasonOf(import->status()), "WORKER_LOST");
  EXPECT_TRUE(export_job->ended());
  EXPECT_TRUE(import->ended());
  EXPECT_EQ(simulation_.Get("a").adapters_size(), 0);
}

}  // namespace
}  // namespace refocus
