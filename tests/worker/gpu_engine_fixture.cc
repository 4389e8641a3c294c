#include "tests/worker/gpu_engine_fixture.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "worker/device.h"

namespace refocus {
namespace {

constexpr uint64_t kSeed = 7;

ModelConfig Config(Family family, int64_t layers, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim,
                   int64_t mlp, int64_t vocab) {
  ModelConfig c;
  c.family = family;
  c.name = "random";
  c.layers = layers;
  c.hidden = hidden;
  c.heads = heads;
  c.kv_heads = kv_heads;
  c.head_dim = head_dim;
  c.mlp = mlp;
  c.vocab = vocab;
  c.max_positions = 1 << 20;
  c.rope_theta = 5e5;
  c.rms_eps = 1e-6;
  c.qk_norm = family == Family::kQwen3;
  c.qkv_bias = family == Family::kQwen2;
  c.tied_embeddings = family == Family::kQwen3;
  return c;
}

ModelConfig Stretched(ModelConfig c, const std::string& scaling) {
  c.rope = *ParseRopeScaling(scaling);
  return c;
}

int GpuCount() {
  for (int count = 0;; ++count) {
    if (!UseGpu(count, count + 1).ok()) return count;
  }
}

}  // namespace

std::vector<GpuCase> GpuCases() {
  return {{"awkward_llama", Config(Family::kLlama, 3, 200, 9, 3, 80, 328, 1111)},
          {"one_head_qwen3", Config(Family::kQwen3, 2, 64, 4, 1, 16, 96, 257)},
          {"smollm2_shape", Config(Family::kLlama, 4, 576, 9, 3, 64, 1536, 49152)},
          {"qwen3_4b_shape", Config(Family::kQwen3, 3, 2560, 32, 8, 128, 9728, 151936)},
          // Biases, and windows that end before most of the context's positions.
          {"qwen2_yarn", Stretched(Config(Family::kQwen2, 3, 448, 7, 1, 64, 1216, 4099), "yarn:4:512")},
          {"llama3_scaled", Stretched(Config(Family::kLlama, 3, 512, 8, 2, 64, 1024, 4099), "llama3:8:256")},
          {"nemo_shape", Config(Family::kMistral, 2, 640, 4, 1, 128, 1792, 4099)}};
}

std::shared_ptr<const Weights> RandomWeights(const ModelConfig& config, at::Device device) {
  LoadOptions options;
  options.threads = 4;
  options.device = device;
  options.random_seed = kSeed;
  StatusOr<Weights> weights = LoadWeights("", config, options);
  if (!weights.ok()) {
    std::fprintf(stderr, "%s\n", weights.status().ToString().c_str());
    std::abort();
  }
  return std::make_shared<const Weights>(std::move(weights).value());
}

std::unique_ptr<Group> GpuGroup(const ModelConfig& config, int ranks, KvType kv, bool peer_memory) {
  const std::string id = ranks > 1 ? MakeGpuGroupId() : std::string();
  return std::make_unique<Group>(
      ranks,
      [config, ranks, id, kv, peer_memory](int rank) {
        StatusOr<Gpu> gpu = UseGpu(rank, ranks);
        if (!gpu.ok()) {
          std::fprintf(stderr, "%s\n", gpu.status().ToString().c_str());
          std::abort();
        }
        return RankParts{RandomWeights(config, at::Device(at::kCUDA, static_cast<int8_t>(rank))),
                         MakeGpuBackend(config, *gpu, kv),
                         MakeGpuCollective(id, rank, ranks, 60.0, peer_memory)};
      },
      int64_t{16} << 30);
}

std::vector<int32_t> RandomIds(int64_t count, int64_t vocab, uint64_t seed) {
  std::vector<int32_t> ids;
  uint64_t x = seed * 2654435761u + 1;
  for (int64_t i = 0; i < count; ++i) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    ids.push_back(static_cast<int32_t>((x >> 33) % static_cast<uint64_t>(vocab)));
  }
  return ids;
}

Span SpanAt(const std::vector<int32_t>& ids, int64_t start, int64_t rows) {
  return Span{start, {ids.begin() + start, ids.begin() + start + rows + 1}};
}

void GpuEngineTest::SetUp() {
  if (GpuCount() < ranks_) GTEST_SKIP() << "needs " << ranks_ << " CUDA devices, found " << GpuCount();
  ids_ = RandomIds(tokens_, config_.vocab, 3);
}

void GpuEngineTest::CompareScores(Group& group, const at::Tensor& delta, uint64_t adapter, int64_t revision) {
  const std::vector<int32_t> text = RandomIds(65, config_.vocab, 5);
  const std::vector<int32_t> question(text.begin(), text.begin() + 1), targets(text.begin() + 1, text.end());
  const Result result = group.Score(kContext, question, tokens_, targets, adapter, revision);
  std::vector<int32_t> rows(text.begin(), text.end() - 1);
  const at::Tensor exact = oracle_->TailLogprobs(rows, delta);
  const at::Tensor torch = plain_->TailLogprobs(rows, delta);
  double ours = 0.0, theirs = 0.0;
  for (size_t i = 0; i < targets.size(); ++i) {
    const double expected = exact[static_cast<int64_t>(i)][targets[i]].item<double>();
    ours += std::pow(result.score_logprobs[i] - expected, 2);
    theirs += std::pow(torch[static_cast<int64_t>(i)][targets[i]].item<double>() - expected, 2);
  }
  const double count = static_cast<double>(targets.size());
  std::printf("%s, %d ranks, %s: rms error of log-probabilities %.2e, torch bf16 %.2e\n", name().c_str(), ranks_,
              adapter == 0 ? "base" : "adapted", std::sqrt(ours / count), std::sqrt(theirs / count));
  EXPECT_LE(std::sqrt(ours / count), 2.0 * std::sqrt(theirs / count) + 1e-6);
}

at::Tensor GpuEngineTest::CompareSteps(Group& group, int64_t last) {
  constexpr float kRate = 1e-3f;
  const OptimizerConfig adamw;
  group.Do(BeginAdapt{kContext, kAdapter, 0, adamw});
  const std::vector<int64_t> shape = {config_.layers, config_.q_dim(), config_.hidden};
  struct Descent {
    TorchOracle* model;
    at::Tensor delta, m, v;
    double loss = 0.0, norm = 0.0;
  };
  std::vector<Descent> both;
  for (TorchOracle* model : {oracle_.get(), plain_.get()}) {
    both.push_back(
        {model, at::zeros(shape, at::kDouble), at::zeros(shape, at::kDouble), at::zeros(shape, at::kDouble)});
  }
  double ours = 0.0, theirs = 0.0;
  for (int64_t step = 1; step <= last; ++step) {
    // One span, two spans, and so many rows that two ranks split them.
    std::vector<Span> spans = {SpanAt(ids_, 300 + 40 * step, 97)};
    if (step % 2 == 0) spans.push_back(SpanAt(ids_, 1000, 130));
    if (step == last) spans.push_back(SpanAt(ids_, 10, 700));
    const Result result = group.Do(AdaptStep{kAdapter, step, spans, kRate}).result();
    for (Descent& d : both) {
      const TorchOracle::Gradient g = d.model->SpanGradient(spans, d.delta);
      d.loss = g.loss;
      d.norm = std::sqrt(g.grad.square().sum().item<double>());
      const at::Tensor grad = g.grad * std::min(1.0, adamw.clip_norm / (d.norm + 1e-6));
      d.m = 0.9 * d.m + 0.1 * grad;
      d.v = 0.999 * d.v + 0.001 * grad.square();
      const double t = static_cast<double>(step);
      d.delta = d.delta * (1.0 - static_cast<double>(kRate) * adamw.weight_decay) -
                static_cast<double>(kRate) * (d.m / (1.0 - std::pow(0.9, t))) /
                    ((d.v / (1.0 - std::pow(0.999, t))).sqrt() + 1e-8);
    }
    ours = std::max(ours, std::abs(result.loss - both[0].loss));
    theirs = std::max(theirs, std::abs(both[1].loss - both[0].loss));
    EXPECT_NEAR(result.grad_norm, both[0].norm, 0.05 * both[0].norm) << "step " << step;
  }
  std::printf("%s, %d ranks: largest error of %d losses %.2e, torch bf16 %.2e; last loss %.4f, gradient norm %.4f\n",
              name().c_str(), ranks_, static_cast<int>(last), ours, theirs, both[0].loss, both[0].norm);
  EXPECT_LE(ours, 2.0 * theirs + 1e-3);
  group.Do(ProbeLoss{kAdapter, {SpanAt(ids_, 700, 64)}});  // ranks are compared here
  group.Do(EndAdapt{kAdapter, true, 1});
  return both[0].delta;
}

void GpuEngineTest::CompareDecoding(Group& group, int count) {
  const std::vector<int32_t> question = RandomIds(9, config_.vocab, 8);
  const std::vector<Token> answer = group.Ask(kContext, tokens_, question, 0, count, 0, 0, 3);
  ASSERT_EQ(answer.size(), static_cast<size_t>(count));
  std::vector<int32_t> tokens;
  for (const Token& token : answer) tokens.push_back(token.id);
  const Result scores = group.Score(kContext, question, tokens_, tokens);
  double worst = 0.0;
  int other = 0;
  for (size_t i = 0; i < answer.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(answer[i].logprob) - scores.score_logprobs[i]));
    other += scores.score_greedy[i] ? 0 : 1;
    ASSERT_EQ(answer[i].top_ids.size(), 3u);
    EXPECT_EQ(answer[i].top_ids[0], answer[i].id) << i;
    EXPECT_NEAR(answer[i].top_logprobs[0], answer[i].logprob, 1e-5) << i;
  }
  std::printf("%s, %d ranks: %d tokens decoded, worst difference from scoring %.2e, %d no longer the best\n",
              name().c_str(), ranks_, count, worst, other);
  EXPECT_LE(worst, 0.1);
  EXPECT_LE(other, count / 10);  // near ties of a random model
}

std::string GpuTestName(const ::testing::TestParamInfo<std::tuple<int, int>>& info) {
  return GpuCases()[static_cast<size_t>(std::get<0>(info.param))].name + "_" + std::to_string(std::get<1>(info.param)) +
         "_ranks";
}

}  // namespace refocus
