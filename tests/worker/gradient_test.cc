// The gradient of the query deltas, AdamW and what they must leave alone, on 1 to 4 ranks, below the engine's commands.
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include "base/memory_plan.h"
#include "tests/worker/engine_harness.h"
#include "tests/worker/golden.h"
#include "tests/worker/gradient_fixture.h"
#include "worker/adapt.h"
#include "worker/hash.h"
#include "worker/prefill.h"

namespace refocus {
namespace {

using nlohmann::json;

constexpr double kDifferenceBound = 1e-3;  // of finite differences in fp32

TEST_P(GradientTest, LogitsOfBaseAndAdaptedRows) {
  OnRanks(golden_.context(), [&](const Rank& rank) {
    const at::Tensor base = LogitsAt(rank, golden_.json.at("rows"), QueryDelta());
    EXPECT_LE(RelativeError(base, golden_.tensor("logits.rows")), kTensorBound);
    const at::Tensor adapted = LogitsAt(rank, golden_.json.at("adapt").at("adapted_rows"), golden_.layers("delta"));
    EXPECT_LE(RelativeError(adapted, golden_.tensor("adapted.logits.rows")), kTensorBound);
  });
}

TEST_P(GradientTest, EqualsAutogradInEveryLayer) {
  for (const std::string name : {"one_span", "two_spans"}) {
    const json& expected = golden_.json.at("gradients").at(name);
    const at::Tensor gradient = golden_.layers("gradient." + name);
    std::vector<uint64_t> hashes(ranks_);
    OnRanks(golden_.context(), [&](const Rank& rank) {
      at::Tensor actual = at::full_like(NewDelta(), std::numeric_limits<float>::quiet_NaN());
      const double loss =
          SpanGradient(rank.model, rank.context, NewDelta(), golden_.spans(expected.at("spans")), actual);
      EXPECT_NEAR(loss, expected.at("loss").get<double>(), kLossBound) << name;
      ASSERT_EQ(actual.sizes(), gradient.sizes());
      for (int64_t layer = 0; layer < actual.size(0); ++layer) {
        const double error = RelativeError(actual.select(0, layer), gradient.select(0, layer));
        EXPECT_LE(error, kTensorBound) << name << ", layer " << layer;
      }
      hashes[rank.index] = HashTensor(actual);
    });
    for (const uint64_t hash : hashes) EXPECT_EQ(hash, hashes[0]) << name << ": every rank holds the same bits";
  }
}

// Eight bits turn the gradient by less than 8 degrees in every layer, and all ranks see the same keys.
TEST_P(GradientTest, PointsTheSameWayInEightBits) {
  const json& expected = golden_.json.at("gradients").at("two_spans");
  const at::Tensor gradient = golden_.layers("gradient.two_spans");
  OnRanks(
      golden_.context(),
      [&](const Rank& rank) {
        at::Tensor actual = NewDelta();
        const double loss =
            SpanGradient(rank.model, rank.context, NewDelta(), golden_.spans(expected.at("spans")), actual);
        EXPECT_NEAR(loss, expected.at("loss").get<double>(), 0.01);  // 1% of perplexity
        for (int64_t layer = 0; layer < actual.size(0); ++layer) {
          const double cosine = Cosine(actual.select(0, layer), gradient.select(0, layer));
          EXPECT_GE(cosine, 0.99) << "layer " << layer;
          EXPECT_LE(cosine, 1 - 1e-7) << "layer " << layer << ": eight bits cannot be as good as 32";
        }
      },
      KvType::kInt8);
}

// At a delta that is not zero, which the stored gradients do not reach: along a layer's gradient the loss rises by its
// norm.
TEST_P(GradientTest, EqualsFiniteDifferencesWhenAdapted) {
  const at::Tensor delta = golden_.layers("delta");
  OnRanks(golden_.context(), [&](const Rank& rank) {
    const std::vector<Span> spans = golden_.spans(golden_.json.at("gradients").at("two_spans").at("spans"));
    at::Tensor gradient = NewDelta();
    SpanGradient(rank.model, rank.context, delta, spans, gradient);
    constexpr double kStep = 3e-3;
    for (int64_t layer = 0; layer < delta.size(0); ++layer) {
      const double norm = std::sqrt(gradient.select(0, layer).to(at::kDouble).square().sum().item<double>());
      at::Tensor step = NewDelta();
      step.select(0, layer).copy_(gradient.select(0, layer) * (kStep / norm));
      const double up = SpanLoss(rank.model, rank.context, delta + step, spans);
      const double down = SpanLoss(rank.model, rank.context, delta - step, spans);
      EXPECT_NEAR((up - down) / (2 * kStep) / norm, 1.0, kDifferenceBound) << "layer " << layer;
    }
  });
}

// scale * B . A, as a full delta.
at::Tensor Dense(const QueryDelta& lora) { return at::matmul(lora.b, lora.a).mul_(lora.scale); }

TEST_P(GradientTest, LoraEqualsItsDenseDelta) {
  const json rows = golden_.json.at("rows");
  for (const int64_t lora_rank : {1, 3, 8}) {
    const QueryDelta lora = DrawnLora(lora_rank, 6.0f, 11);
    OnRanks(golden_.context(), [&](const Rank& rank) {
      const at::Tensor dense = LogitsAt(rank, rows, Dense(lora));
      EXPECT_LE(RelativeError(LogitsAt(rank, rows, lora), dense), kTensorBound) << "rank " << lora_rank;
      EXPECT_GE(RelativeError(LogitsAt(rank, rows, QueryDelta()), dense), 10 * kTensorBound) << "a delta that matters";
      QueryDelta zero = lora;
      zero.b = at::zeros_like(lora.b);
      EXPECT_TRUE(at::equal(LogitsAt(rank, rows, zero), LogitsAt(rank, rows, QueryDelta()))) << "B = 0 is the base";
    });
  }
}

// With G the gradient of the dense delta: dB = scale * G . A^T, dA = scale * B^T . G.
TEST_P(GradientTest, LoraGradientFollowsFromTheDenseOne) {
  const std::vector<Span> spans = golden_.spans(golden_.json.at("gradients").at("two_spans").at("spans"));
  const QueryDelta lora = DrawnLora(4, 8.0f, 12);
  std::vector<uint64_t> hashes(ranks_);
  OnRanks(golden_.context(), [&](const Rank& rank) {
    at::Tensor dense = NewDelta();
    const double loss = SpanGradient(rank.model, rank.context, Dense(lora), spans, dense);
    at::Tensor numbers = at::full(DeltaSizes(weights_->config, {.lora_rank = 4, .lora_alpha = 8.0f}),
                                  std::numeric_limits<float>::quiet_NaN(), at::kFloat);
    EXPECT_NEAR(SpanGradient(rank.model, rank.context, lora, spans, numbers), loss, kLossBound);
    const QueryDelta grad = lora.Over(numbers);
    const at::Tensor expected_b = at::matmul(dense, lora.a.transpose(1, 2)).mul_(lora.scale);
    const at::Tensor expected_a = at::matmul(lora.b.transpose(1, 2), dense).mul_(lora.scale);
    for (int64_t layer = 0; layer < dense.size(0); ++layer) {
      EXPECT_LE(RelativeError(grad.a.select(0, layer), expected_a.select(0, layer)), kTensorBound)
          << "A, layer " << layer;
      EXPECT_LE(RelativeError(grad.b.select(0, layer), expected_b.select(0, layer)), kTensorBound)
          << "B, layer " << layer;
    }
    hashes[rank.index] = HashTensor(numbers);
  });
  for (const uint64_t hash : hashes) EXPECT_EQ(hash, hashes[0]) << "every rank holds the same bits";
}

// The numbers of a LoRA in the layout of a delta, from A and B [layers, ...].
at::Tensor LoraNumbers(const ModelConfig& model, const DeltaConfig& config, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor numbers = at::empty(DeltaSizes(model, config), at::kFloat);
  const QueryDelta view = DeltaOver(model, config, numbers);
  view.a.copy_(a);
  view.b.copy_(b);
  return numbers;
}

TEST_P(GradientTest, LoraEqualsAutograd) {
  const Golden& golden = LoadGolden(std::get<0>(GetParam()) + ".adapter");
  const DeltaConfig config{.lora_rank = golden.json.at("rank"), .lora_alpha = golden.json.at("alpha")};
  const at::Tensor numbers = LoraNumbers(weights_->config, config, golden.layers("a"), golden.layers("b"));
  OnRanks(golden.context(), [&](const Rank& rank) {
    const QueryDelta lora = DeltaOver(weights_->config, config, numbers);
    at::Tensor gradient = at::full_like(numbers, std::numeric_limits<float>::quiet_NaN());
    const double loss =
        SpanGradient(rank.model, rank.context, lora, golden.spans(golden.json.at("spans")), gradient);
    EXPECT_NEAR(loss, golden.json.at("loss").get<double>(), kLossBound);
    const QueryDelta grad = lora.Over(gradient);
    for (int64_t layer = 0; layer < weights_->config.layers; ++layer) {
      EXPECT_LE(RelativeError(grad.a.select(0, layer), golden.layers("gradient.a").select(0, layer)), kTensorBound);
      EXPECT_LE(RelativeError(grad.b.select(0, layer), golden.layers("gradient.b").select(0, layer)), kTensorBound);
    }
  });
}

std::string BytesOf(const at::Tensor& t) { return {static_cast<const char*>(t.const_data_ptr()), t.nbytes()}; }

// Six steps each of torch.optim.AdamW and torch.optim.SGD under torch's schedulers; the first delta comes in as an
// import.
TEST_P(GradientTest, OptimizersAndSchedulesEqualTorch) {
  const Golden& golden = LoadGolden(std::get<0>(GetParam()) + ".adapter");
  const DeltaConfig lora{.lora_rank = golden.json.at("rank"), .lora_alpha = golden.json.at("alpha")};
  for (const auto& [name, run] : golden.json.at("runs").items()) {
    const DeltaConfig config = name.starts_with("full") ? DeltaConfig{} : lora;
    OptimizerConfig optimizer{.weight_decay = run.at("weight_decay"), .clip_norm = run.at("clip_norm")};
    optimizer.sgd = run.at("optimizer") == "sgd";
    if (optimizer.sgd) optimizer.momentum = run.at("momentum");
    const at::Tensor first = config.lora_rank == 0 ? NewDelta()
                                                   : LoraNumbers(weights_->config, config, golden.layers("a"),
                                                                 golden.layers("b"));
    std::vector<uint64_t> hashes(ranks_);
    OnRanks(golden.context(), [&, &name = name, &run = run](const Rank& rank) {
      Adapter start(1), adapter(1);
      start.BeginImport(rank.model, config);
      ASSERT_TRUE(start.Write(0, BytesOf(first)).ok());
      ASSERT_TRUE(start.complete());
      start.Commit(1);
      adapter.Begin(rank.model, config, optimizer, 0, &start);
      for (size_t step = 0; step < run.at("rates").size(); ++step) {
        const std::vector<Span> spans = golden.spans(golden.json.at("step_spans").at(step));
        const float rate = run.at("rates").at(step);
        const Adapter::StepResult result = adapter.Step(rank.model, rank.context, spans, rate);
        EXPECT_NEAR(result.loss, run.at("losses").at(step).get<double>(), 3 * kLossBound) << name << " " << step;
        const double norm = run.at("grad_norms").at(step);
        EXPECT_NEAR(result.grad_norm, norm, 1e-3 * norm) << name << " " << step;
      }
      if (config.lora_rank > 0) {
        const at::Tensor expected =
            LoraNumbers(weights_->config, config, golden.layers(name + ".a"), golden.layers(name + ".b"));
        // What the steps changed, not what they started from.
        EXPECT_LE(RelativeError(adapter.working() - first, expected - first), 1e-3) << name;
      }
      EXPECT_LE(RelativeError(LogitsAt(rank, golden.json.at("probe_rows"), adapter.working_rounded()),
                              golden.tensor(name + ".probe")),
                kTensorBound)
          << name;
      EXPECT_EQ(adapter.bytes(), AdaptationBytes(weights_->config, DeviceKind::kCpu,
                                                 {config.lora_rank, optimizer.moments()}));
      hashes[rank.index] = HashTensor(adapter.working());
      adapter.Commit(1);
      EXPECT_EQ(adapter.bytes(), AdapterBytes(weights_->config, DeviceKind::kCpu, config.lora_rank));
    });
    for (const uint64_t hash : hashes) EXPECT_EQ(hash, hashes[0]) << name << ": every rank holds the same bits";
  }
}

// A begins as PEFT draws it, B at zero: the queries are the base ones to the bit, and the seed decides.
TEST_P(GradientTest, LoraBeginsAsTheBase) {
  const DeltaConfig config{.lora_rank = 4, .lora_alpha = 8.0f};
  const double bound = 1.0 / std::sqrt(static_cast<double>(weights_->config.hidden));
  std::vector<uint64_t> hashes(ranks_);
  const json rows = golden_.json.at("rows");
  OnRanks(golden_.context(), [&](const Rank& rank) {
    Adapter adapter(1), other(1);
    adapter.Begin(rank.model, config, {}, 77);
    other.Begin(rank.model, config, {}, 78);
    const QueryDelta& lora = adapter.working_rounded();
    EXPECT_EQ(lora.b.abs().max().item<float>(), 0.0f);
    EXPECT_LE(lora.a.abs().max().item<double>(), bound);
    EXPECT_NEAR(lora.a.to(at::kDouble).square().mean().item<double>(), bound * bound / 3, 0.2 * bound * bound / 3);
    EXPECT_FALSE(at::equal(lora.a, other.working_rounded().a));
    EXPECT_TRUE(at::equal(LogitsAt(rank, rows, lora), LogitsAt(rank, rows, QueryDelta())));
    hashes[rank.index] = HashTensor(adapter.working());
  });
  static std::map<std::string, uint64_t> seen;  // over the numbers of ranks
  const uint64_t first = seen.try_emplace(std::get<0>(GetParam()), hashes[0]).first->second;
  for (const uint64_t hash : hashes) EXPECT_EQ(hash, first) << "the same on every rank and number of ranks";
}

// One pass over rows of several adapters, and rows of none, gives each row what a pass with its own adapter gives.
TEST_P(GradientTest, RowsReadTheirOwnAdapters) {
  json rows = golden_.json.at("rows");
  rows.erase(0);  // the first token sees only itself, whatever it asks
  const auto count = static_cast<int64_t>(rows.size());
  ASSERT_GE(count, 4);
  const QueryDelta full = golden_.layers("delta"), lora = DrawnLora(2, 4.0f, 13);
  const std::vector<AdapterRows> mixed = {{0, 1, full}, {1, 1, lora}, {3, count - 3, full}};  // row 2: base
  OnRanks(golden_.context(), [&](const Rank& rank) {
    const at::Tensor together = LogitsAt(rank, rows, mixed);
    const at::Tensor by_full = LogitsAt(rank, rows, full), by_lora = LogitsAt(rank, rows, lora);
    const at::Tensor base = LogitsAt(rank, rows, QueryDelta());
    for (int64_t row = 0; row < count; ++row) {
      const at::Tensor& alone = row == 1 ? by_lora : row == 2 ? base : by_full;
      EXPECT_LE(RelativeError(together[row], alone[row]), kTensorBound) << "row " << row;
      const at::Tensor& other = row == 2 ? by_full : base;
      EXPECT_GE(RelativeError(together[row], other[row]), 10 * kTensorBound) << "row " << row;
    }
  });
}

TEST_P(GradientTest, EightStepsEqualTheReference) {
  const json& adapt = golden_.json.at("adapt");
  const at::Tensor expected = golden_.layers("delta");
  std::vector<uint64_t> hashes(ranks_);
  OnRanks(golden_.context(), [&](const Rank& rank) {
    const uint64_t before = rank.context.shares()[0].extent->Hash();
    Adapter adapter(1);
    adapter.Begin(rank.model, {}, golden_.optimizer());
    for (size_t step = 0; step < adapt.at("spans").size(); ++step) {
      const std::vector<Span> spans = golden_.spans(adapt.at("spans").at(step));
      const Adapter::StepResult result = adapter.Step(rank.model, rank.context, spans, golden_.learning_rate());
      EXPECT_NEAR(result.loss, adapt.at("losses").at(step).get<double>(), kLossBound) << "step " << step + 1;
    }
    for (int64_t layer = 0; layer < expected.size(0); ++layer) {
      EXPECT_LE(RelativeError(adapter.working().select(0, layer), expected.select(0, layer)), kTensorBound) << layer;
    }
    hashes[rank.index] = HashTensor(adapter.working());
    EXPECT_EQ(rank.context.shares()[0].extent->Hash(), before) << "K/V of the context must not change";
  });
  for (const uint64_t hash : hashes) EXPECT_EQ(hash, hashes[0]) << "every rank holds the same bits";
}

// Steps of few rows that every rank has go by the gradient's factors, others by the written gradient, in turn: both
// move the delta as the written gradient would. A written gradient's norm is an fp32 number.
TEST_P(GradientTest, FactorsAndWrittenGradientsAgree) {
  const std::vector<int32_t> ids = golden_.context();
  std::vector<uint64_t> hashes(ranks_);
  OnRanks(ids, [&](const Rank& rank) {
    const OptimizerConfig config{.weight_decay = 0.1f, .clip_norm = 0.3f};
    Adapter adapter(1);
    adapter.Begin(rank.model, {}, config);
    const int64_t bytes = adapter.bytes();
    at::Tensor grad = NewDelta();
    const at::Tensor delta = NewDelta();
    Optimizer optimizer(config, delta, delta);
    optimizer.SetRate(1e-3f);
    for (const auto& [rows, behind] :
         {std::pair{100, true}, {100, true}, {128, true}, {129, true}, {60, false}, {100, true}}) {
      Span span{rows, {ids.begin() + rows, ids.begin() + 2 * rows + 1}, behind ? static_cast<int64_t>(ids.size()) : 0};
      const double loss = SpanGradient(rank.model, rank.context, delta, {span}, grad);
      const double norm = std::sqrt(grad.to(at::kDouble).square().sum().item<double>());
      optimizer.Step(at::tensor({loss, norm}, at::kDouble), grad);
      const Adapter::StepResult result = adapter.Step(rank.model, rank.context, {span}, 1e-3f);
      EXPECT_NEAR(result.loss, loss, kLossBound) << rows;
      EXPECT_NEAR(result.grad_norm, norm, 1e-5 * norm) << rows;
      EXPECT_GT(norm, 2 * config.clip_norm) << "clipped";
      const bool in_factors = rows <= 128 && (behind || ranks_ == 1);
      EXPECT_EQ(result.grad_norm != static_cast<float>(result.grad_norm), in_factors) << rows;
      EXPECT_LE(RelativeError(adapter.working(), delta), 1e-3) << rows;
      EXPECT_EQ(adapter.bytes(), bytes);
    }
    hashes[rank.index] = HashTensor(adapter.working());
  });
  for (const uint64_t hash : hashes) EXPECT_EQ(hash, hashes[0]) << "every rank holds the same bits";
}

TEST_P(GradientTest, BaseWeightsAreNeverWritten) {
  const uint64_t before = HashWeights(*weights_);
  OnRanks(golden_.context(), [&](const Rank& rank) {
    Adapter adapter(1);
    adapter.Begin(rank.model, {}, golden_.optimizer());
    adapter.Step(rank.model, rank.context, golden_.spans(golden_.json.at("gradients").at("one_span").at("spans")),
                 1e-2f);
    adapter.Commit(1);
    LogitsAt(rank, json::array({5, 699}), adapter.committed().full);
  });
  EXPECT_EQ(HashWeights(*weights_), before);
}

// A span sees nothing behind itself: the context cut right after its last target gives the same loss and gradient.
TEST_P(GradientTest, LaterTokensDoNotMatter) {
  const json& expected = golden_.json.at("gradients").at("one_span");
  const std::vector<Span> spans = golden_.spans(expected.at("spans"));
  const int64_t end = spans[0].start + spans[0].rows() + 1;
  std::vector<int32_t> other = golden_.context();
  for (size_t i = static_cast<size_t>(end); i < other.size(); ++i) other[i] = (other[i] + 1) % 100;
  for (const std::vector<int32_t>& ids : {golden_.context(end), other}) {
    OnRanks(ids, [&](const Rank& rank) {
      at::Tensor gradient = NewDelta();
      const double loss = SpanGradient(rank.model, rank.context, NewDelta(), spans, gradient);
      EXPECT_NEAR(loss, expected.at("loss").get<double>(), kLossBound) << ids.size() << " tokens";
      EXPECT_LE(RelativeError(gradient, golden_.layers("gradient.one_span")), kTensorBound) << ids.size() << " tokens";
    });
  }
}

TEST_P(GradientTest, RateSetsTheSizeOfAStep) {
  const std::vector<Span> spans = golden_.spans(golden_.json.at("gradients").at("one_span").at("spans"));
  OnRanks(golden_.context(), [&](const Rank& rank) {
    Adapter zero(1);
    zero.Begin(rank.model, {}, {});
    for (int step = 0; step < 2; ++step) zero.Step(rank.model, rank.context, spans, 0.0f);
    EXPECT_EQ(HashTensor(zero.working()), HashTensor(NewDelta())) << "a zero rate changes nothing";

    Adapter small(1);
    small.Begin(rank.model, {}, {});
    small.Step(rank.model, rank.context, spans, 1e-5f);  // fp32 deltas do not swallow it
    EXPECT_NEAR(small.working().abs().median().item<double>(), 1e-5, 1e-7);
  });
}

TEST_P(GradientTest, NonFiniteStepLeavesTheDelta) {
  const std::vector<Span> spans = golden_.spans(golden_.json.at("gradients").at("one_span").at("spans"));
  OnRanks(golden_.context(), [&](const Rank& rank) {
    constexpr float kEndless = std::numeric_limits<float>::infinity();
    Adapter adapter(1);
    adapter.Begin(rank.model, {}, {.weight_decay = 0.0f});
    EXPECT_TRUE(std::isfinite(adapter.Step(rank.model, rank.context, spans, kEndless).loss));
    const uint64_t broken = HashTensor(adapter.working());
    EXPECT_FALSE(std::isfinite(adapter.Step(rank.model, rank.context, spans, kEndless).loss));
    EXPECT_EQ(HashTensor(adapter.working()), broken);
    adapter.Rollback();
    EXPECT_FALSE(adapter.committed().defined());
  });
}

// The delta [1, n] after one step per (gradient, its norm).
at::Tensor AfterSteps(float rate, const OptimizerConfig& config, const std::vector<float>& delta,
                      const std::vector<std::pair<std::vector<float>, double>>& steps) {
  const at::Tensor parameter = at::tensor(delta).unsqueeze(0);
  const at::Tensor grad = at::empty(parameter.sizes(), at::kFloat);
  Optimizer adamw(config, parameter, parameter);
  adamw.SetRate(rate);
  for (const auto& [values, norm] : steps) {
    grad.copy_(at::tensor(values).unsqueeze(0));
    adamw.Step(at::tensor({1.0, norm}, at::kDouble), grad);
  }
  return parameter;
}

TEST(AdamWTest, DecayPullsTheDeltaTowardsZero) {
  const at::Tensor delta = AfterSteps(0.1f, {.weight_decay = 0.5f}, {4.0f, -2.0f, 0.0f}, {{{0.0f, 0.0f, 0.0f}, 0.0}});
  EXPECT_LE(RelativeError(delta.squeeze(0), at::tensor({3.8f, -1.9f, 0.0f})), 1e-6);
}

TEST(AdamWTest, ClipsByTheNormGiven) {
  const OptimizerConfig config{.clip_norm = 1.0f};
  const std::pair<std::vector<float>, double> small = {{0.01f, -0.5f}, 0.5};
  // The norm is of all layers, not of these two entries.
  const at::Tensor clipped = AfterSteps(1e-5f, config, {0.0f, 0.0f}, {{{3.0f, 4.0f}, 10.0}, small});
  const at::Tensor divided = AfterSteps(1e-5f, config, {0.0f, 0.0f}, {{{0.3f, 0.4f}, 0.5}, small});
  const at::Tensor whole = AfterSteps(1e-5f, config, {0.0f, 0.0f}, {{{3.0f, 4.0f}, 0.5}, small});
  EXPECT_LE(RelativeError(clipped, divided), 1e-5);
  EXPECT_GE(RelativeError(whole, divided), 1e-2);
}

TEST(AdamWTest, NothingChangesWhenTheNormIsNotFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::pair<std::vector<float>, double> good = {{0.3f, 0.4f}, 0.5};
  const at::Tensor expected = AfterSteps(1e-5f, {}, {0.5f, 1.0f}, {good, good});
  const at::Tensor actual = AfterSteps(1e-5f, {}, {0.5f, 1.0f}, {good, {{nan, 1.0f}, static_cast<double>(nan)}, good});
  EXPECT_TRUE(at::equal(actual, expected));
}

INSTANTIATE_TEST_SUITE_P(Models, GradientTest,
                         ::testing::Combine(::testing::Values("llama", "qwen3"), ::testing::Values(1, 2, 3, 4)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" + std::to_string(std::get<1>(info.param)) + "_ranks";
                         });

}  // namespace
}  // namespace refocus
