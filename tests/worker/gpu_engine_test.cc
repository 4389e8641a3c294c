// Whole groups on GPUs, one thread and one GPU a rank, against the fp64 oracle: our error is at most twice that of plain
// torch in bf16 on the same GPU. One GPU against two, two runs against each other. Needs a GPU.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <set>

#include "base/limits.h"
#include "tests/worker/engine_harness.h"
#include "tests/worker/golden.h"
#include "tests/worker/softmax_oracle.h"
#include "tests/worker/torch_oracle.h"
#include "worker/device.h"
#include "worker/query_delta.h"
#include "worker/random_weights.h"

namespace refocus {
namespace {

constexpr uint64_t kContext = 1;
constexpr uint64_t kAdapter = 2;
constexpr uint64_t kSeed = 7;

struct Case {
  std::string name;
  ModelConfig config;
};

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

// Awkward and real shapes, at reduced depth.
std::vector<Case> Cases() {
  return {{"awkward_llama", Config(Family::kLlama, 3, 200, 9, 3, 80, 328, 1111)},
          {"one_head_qwen3", Config(Family::kQwen3, 2, 64, 4, 1, 16, 96, 257)},
          {"smollm2_shape", Config(Family::kLlama, 4, 576, 9, 3, 64, 1536, 49152)},
          {"qwen3_4b_shape", Config(Family::kQwen3, 3, 2560, 32, 8, 128, 9728, 151936)},
          // Biases, and windows that end before most of the context's positions.
          {"qwen2_yarn", Stretched(Config(Family::kQwen2, 3, 448, 7, 1, 64, 1216, 4099), "yarn:4:512")},
          {"llama3_scaled", Stretched(Config(Family::kLlama, 3, 512, 8, 2, 64, 1024, 4099), "llama3:8:256")},
          {"nemo_shape", Config(Family::kMistral, 2, 640, 4, 1, 128, 1792, 4099)}};
}

int GpuCount() {
  for (int count = 0;; ++count) {
    if (!UseGpu(count, count + 1).ok()) return count;
  }
}

std::shared_ptr<const Weights> Random(const ModelConfig& config, at::Device device) {
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

std::unique_ptr<Group> GpuGroup(const ModelConfig& config, int ranks) {
  const std::string id = ranks > 1 ? MakeGpuGroupId() : std::string();
  return std::make_unique<Group>(
      ranks,
      [config, ranks, id](int rank) {
        StatusOr<Gpu> gpu = UseGpu(rank, ranks);
        if (!gpu.ok()) {
          std::fprintf(stderr, "%s\n", gpu.status().ToString().c_str());
          std::abort();
        }
        return RankParts{Random(config, at::Device(at::kCUDA, static_cast<int8_t>(rank))), MakeGpuBackend(config, *gpu),
                         MakeGpuCollective(id, rank, ranks, 60.0)};
      },
      int64_t{16} << 30);
}

std::vector<int32_t> Ids(int64_t count, int64_t vocab, uint64_t seed) {
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

class GpuEngineTest : public ::testing::TestWithParam<std::tuple<int, int>> {
 protected:
  void SetUp() override {
    if (GpuCount() < ranks_) GTEST_SKIP() << "needs " << ranks_ << " CUDA devices, found " << GpuCount();
    ids_ = Ids(tokens_, config_.vocab, 3);
  }

  // Log-probabilities of `targets` behind context and question: ours, and the largest errors of both.
  void CompareScores(Group& group, const at::Tensor& delta, uint64_t adapter, int64_t revision) {
    const std::vector<int32_t> text = Ids(65, config_.vocab, 5);
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
    std::printf("%s, %d ranks, %s: rms error of log-probabilities %.2e, torch bf16 %.2e\n",
                Cases()[std::get<0>(GetParam())].name.c_str(), ranks_, adapter == 0 ? "base" : "adapted",
                std::sqrt(ours / count), std::sqrt(theirs / count));
    EXPECT_LE(std::sqrt(ours / count), 2.0 * std::sqrt(theirs / count) + 1e-6);
  }

  void MakeOracles() {
    const at::Device device(at::kCUDA, 0);
    const std::shared_ptr<const Weights> weights = Random(config_, device);
    oracle_ = std::make_unique<TorchOracle>(*weights, device, at::kDouble);
    plain_ = std::make_unique<TorchOracle>(*weights, device, at::kBFloat16);
    oracle_->Prefill(ids_);
    plain_->Prefill(ids_);
  }

  const ModelConfig config_ = Cases()[std::get<0>(GetParam())].config;
  const int ranks_ = std::get<1>(GetParam());
  const int64_t tokens_ = 2600;
  std::vector<int32_t> ids_;
  std::unique_ptr<TorchOracle> oracle_, plain_;
};

TEST_P(GpuEngineTest, ScoresGradientsAndEightSteps) {
  MakeOracles();
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  group->Prefill(kContext, ids_, 2560);
  CompareScores(*group, at::Tensor(), 0, 0);

  // Eight AdamW steps; the oracles take theirs from the same start with autograd.
  constexpr float kRate = 1e-3f;
  const OptimizerConfig adamw;
  group->Do(BeginAdapt{kContext, kAdapter, 0, adamw});
  const std::vector<int64_t> shape = {config_.layers, config_.q_dim(), config_.hidden};
  struct Descent {
    TorchOracle* model;
    at::Tensor delta, m, v;
    double loss = 0.0, norm = 0.0;
  };
  std::vector<Descent> both;
  for (TorchOracle* model : {oracle_.get(), plain_.get()}) {
    both.push_back({model, at::zeros(shape, at::kDouble), at::zeros(shape, at::kDouble), at::zeros(shape, at::kDouble)});
  }
  double ours = 0.0, theirs = 0.0;
  for (int64_t step = 1; step <= 8; ++step) {
    // One span, two spans, and so many rows that two ranks split them.
    std::vector<Span> spans = {SpanAt(ids_, 300 + 40 * step, 97)};
    if (step % 2 == 0) spans.push_back(SpanAt(ids_, 1000, 130));
    if (step == 8) spans.push_back(SpanAt(ids_, 10, 700));
    const Result result = group->Do(AdaptStep{kAdapter, step, spans, kRate}).result();
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
  std::printf("%s, %d ranks: largest error of 8 losses %.2e, torch bf16 %.2e; last loss %.4f, gradient norm %.4f\n",
              Cases()[std::get<0>(GetParam())].name.c_str(), ranks_, ours, theirs, both[0].loss, both[0].norm);
  EXPECT_LE(ours, 2.0 * theirs + 1e-3);
  group->Do(ProbeLoss{kAdapter, {SpanAt(ids_, 700, 64)}});
  group->Do(EndAdapt{kAdapter, true, 1});
  CompareScores(*group, both[0].delta, kAdapter, 1);
  CompareScores(*group, at::Tensor(), 0, 0);
}

// A LoRA that comes in as an import, trained on by both optimizers with a rate that changes every step, recorded steps
// included. The oracles step A and B by the chain rule from the gradient G of the dense delta: dB = s G A^T, dA = s B^T
// G.
TEST_P(GpuEngineTest, LoraStepsUnderASchedule) {
  MakeOracles();
  const DeltaConfig lora{.lora_rank = 8, .lora_alpha = 16.0f};
  const double s = 2.0;
  const at::Tensor first =
      at::randn(DeltaSizes(config_, lora), at::make_generator<at::CPUGeneratorImpl>(uint64_t{9}), at::kFloat)
          .mul_(0.02);
  const std::string bytes(static_cast<const char*>(first.const_data_ptr()), first.nbytes());
  for (const bool sgd : {false, true}) {
    const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
    group->Prefill(kContext, ids_, 2560);
    group->Do(BeginImport{kContext, kAdapter, lora});
    for (size_t at = 0; at < bytes.size(); at += 4 * kDeltaPieceNumbers) {
      group->Do(WriteDelta{kAdapter, static_cast<int64_t>(at / 4), bytes.substr(at, 4 * kDeltaPieceNumbers)});
    }
    group->Do(EndAdapt{kAdapter, true, 1});
    std::string back;
    for (int64_t at = 0; at < first.numel(); at += kDeltaPieceNumbers) {
      back += group->Do(ReadDelta{kAdapter, 1, at, std::min(kDeltaPieceNumbers, first.numel() - at)}).result().data;
    }
    EXPECT_EQ(back, bytes) << "out as it came in";
    BeginAdapt begin{kContext, kAdapter, kAdapter};
    begin.delta = lora;
    begin.optimizer.sgd = sgd;
    begin.optimizer.momentum = sgd ? 0.9f : 0.0f;
    group->Do(begin);
    struct Descent {
      TorchOracle* model;
      at::Tensor p, m, v;  // numbers of the delta and moments, fp64
      double loss = 0.0, norm = 0.0;
    };
    std::vector<Descent> both;
    for (TorchOracle* model : {oracle_.get(), plain_.get()}) {
      const at::Tensor p = first.to(at::kDouble);
      both.push_back({model, p, at::zeros_like(p), at::zeros_like(p)});
    }
    const auto dense = [&](const at::Tensor& p) {
      const QueryDelta view = DeltaOver(config_, lora, p);
      return at::matmul(view.b, view.a) * s;
    };
    double ours = 0.0, theirs = 0.0;
    for (int64_t step = 1; step <= 6; ++step) {
      const double rate = (sgd ? 2e-2 : 1e-3) * (1.0 - static_cast<double>(step - 1) / 6);
      const std::vector<Span> spans = {SpanAt(ids_, 300 + 40 * step, step == 6 ? 400 : 97)};
      const Result result = group->Do(AdaptStep{kAdapter, step, spans, static_cast<float>(rate)}).result();
      for (Descent& d : both) {
        const TorchOracle::Gradient g = d.model->SpanGradient(spans, dense(d.p));
        const QueryDelta view = DeltaOver(config_, lora, d.p);
        at::Tensor grad = at::zeros_like(d.p);
        DeltaOver(config_, lora, grad).a.copy_(at::matmul(view.b.transpose(1, 2), g.grad) * s);
        DeltaOver(config_, lora, grad).b.copy_(at::matmul(g.grad, view.a.transpose(1, 2)) * s);
        d.loss = g.loss;
        d.norm = std::sqrt(grad.square().sum().item<double>());
        grad = grad * std::min(1.0, 1.0 / (d.norm + 1e-6));
        const double t = static_cast<double>(step);
        if (sgd) {
          d.m = 0.9 * d.m + grad + 0.01 * d.p;
          d.p = d.p - rate * d.m;
        } else {
          d.m = 0.9 * d.m + 0.1 * grad;
          d.v = 0.999 * d.v + 0.001 * grad.square();
          d.p = d.p * (1.0 - rate * 0.01) - rate * (d.m / (1.0 - std::pow(0.9, t))) /
                                                ((d.v / (1.0 - std::pow(0.999, t))).sqrt() + 1e-8);
        }
      }
      ours = std::max(ours, std::abs(result.loss - both[0].loss));
      theirs = std::max(theirs, std::abs(both[1].loss - both[0].loss));
      EXPECT_NEAR(result.grad_norm, both[0].norm, 0.05 * both[0].norm) << "step " << step;
    }
    std::printf("%s, %d ranks, LoRA with %s: largest error of 6 losses %.2e, torch bf16 %.2e\n",
                Cases()[std::get<0>(GetParam())].name.c_str(), ranks_, sgd ? "SGD" : "AdamW", ours, theirs);
    EXPECT_LE(ours, 2.0 * theirs + 1e-3);
    group->Do(ProbeLoss{kAdapter, {SpanAt(ids_, 700, 64)}});  // ranks are compared here
    group->Do(EndAdapt{kAdapter, true, 2});
    CompareScores(*group, dense(both[0].p), kAdapter, 2);
    CompareScores(*group, at::Tensor(), 0, 0);
  }
}

// A LoRA on which nothing was learned is the base, to the bit.
TEST_P(GpuEngineTest, UntrainedLoraIsTheBase) {
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  group->Prefill(kContext, ids_);
  BeginAdapt begin{kContext, kAdapter};
  begin.delta = {.lora_rank = 5, .lora_alpha = 7.0f};
  group->Do(begin);
  group->Do(EndAdapt{kAdapter, true, 1});
  std::vector<std::vector<std::pair<int32_t, float>>> answers;
  for (const int64_t revision : {0, 1}) {
    auto& bits = answers.emplace_back();
    for (const Token& t : group->Ask(kContext, tokens_, {1, 2, 3}, 0, 20, revision == 0 ? 0 : kAdapter, revision)) {
      bits.emplace_back(t.id, t.logprob);
    }
  }
  EXPECT_EQ(answers[0], answers[1]);
}

// Decoding is recorded as a graph from the second step on: every token must be what scoring says of it.
TEST_P(GpuEngineTest, DecodedTokensAreWhatScoringExpects) {
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  group->Prefill(kContext, ids_);
  const std::vector<int32_t> question = Ids(9, config_.vocab, 8);
  const std::vector<Token> answer = group->Ask(kContext, tokens_, question, 0, 300, 0, 0, 3);
  ASSERT_EQ(answer.size(), 300u);
  std::vector<int32_t> tokens;
  for (const Token& token : answer) tokens.push_back(token.id);
  const Result scores = group->Score(kContext, question, tokens_, tokens);
  double worst = 0.0;
  int other = 0;
  for (size_t i = 0; i < answer.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(answer[i].logprob) - scores.score_logprobs[i]));
    other += scores.score_greedy[i] ? 0 : 1;
    ASSERT_EQ(answer[i].top_ids.size(), 3u);
    EXPECT_EQ(answer[i].top_ids[0], answer[i].id) << i;
    EXPECT_NEAR(answer[i].top_logprobs[0], answer[i].logprob, 1e-5) << i;
  }
  std::printf("%s, %d ranks: 300 tokens decoded, worst difference from scoring %.2e, %d no longer the best\n",
              Cases()[std::get<0>(GetParam())].name.c_str(), ranks_, worst, other);
  EXPECT_LE(worst, 0.1);
  EXPECT_LE(other, 30);  // near ties of a random model
}

// Questions of different lengths, adapters and contexts decode together, join and leave, while the step is replayed from
// recordings: every token is what scoring expects of it, as for one alone.
TEST_P(GpuEngineTest, BatchedTokensAreWhatScoringExpects) {
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  constexpr uint64_t kShorter = 9;
  const int64_t shared = 700, shorter = 1100;
  group->Prefill(kContext, ids_);
  std::vector<int32_t> other(ids_.begin(), ids_.begin() + shared);
  for (const int32_t id : Ids(shorter - shared, config_.vocab, 21)) other.push_back(id);
  group->Do(OpenContext{kShorter, shorter, kContext, shared});
  group->Do(PrefillChunk{kShorter, shared, {other.begin() + shared, other.end()}});
  for (const uint64_t adapter : {uint64_t{2}, uint64_t{3}}) {
    BeginAdapt begin{kContext, adapter};
    if (adapter == 3) begin.delta = {.lora_rank = 8, .lora_alpha = 64.0f};  // a full delta and a LoRA in one batch
    group->Do(begin);
    for (int64_t step = 1; step <= 2; ++step) {
      group->Do(AdaptStep{adapter, step, {SpanAt(ids_, 200 * static_cast<int64_t>(adapter) + step, 64)}, 1e-3f});
    }
    group->Do(EndAdapt{adapter, true, 1});
  }
  struct Asked {
    uint64_t context, adapter;
    std::vector<int32_t> question, answer;
    std::vector<float> logprobs;
  };
  std::map<uint64_t, Asked> all;
  std::vector<float> prompt_logprobs;  // of request 104
  const auto take = [&](const Answer& answer) {
    for (const Token& token : answer.tokens) {
      all.at(token.sequence).answer.push_back(token.id);
      all.at(token.sequence).logprobs.push_back(token.logprob);
    }
  };
  const auto ask = [&](uint64_t uid) {
    const uint64_t adapter = uid % 4 == 3 ? 0 : uid % 4;  // 0, 1 (none such), 2; 1 asks the shorter context
    Asked asked{adapter == 1 ? kShorter : kContext, adapter == 1 ? 0 : adapter == 0 && uid % 8 == 0 ? 3 : adapter,
                Ids(1 + 7 * static_cast<int64_t>(uid % 5), config_.vocab, uid), {}, {}};
    OpenSequence open{uid, asked.context, asked.adapter, asked.adapter == 0 ? 0 : 1, 400};
    if (uid % 5 == 1) open.sampling = {.temperature = 3, .seed = uid, .top_k = 1};  // greedy all the same
    if (uid % 5 == 2) open.sampling.repetition_penalty = 1000;
    group->Do(open);
    ExtendSequence extend{uid, asked.context == kContext ? tokens_ : shorter, asked.question, true};
    if (uid == 104) extend.score_ids.assign(asked.question.begin() + 1, asked.question.end());
    all.emplace(uid, std::move(asked));
    const Answer answer = group->Do(extend);
    if (uid == 104) prompt_logprobs = answer.result().score_logprobs;
    take(answer);
  };
  for (uint64_t uid = 100; uid < 111; ++uid) ask(uid);
  const auto decode = [&](uint64_t first, uint64_t last, int32_t steps) {
    std::vector<uint64_t> uids;
    for (uint64_t uid = first; uid < last; ++uid) uids.push_back(uid);
    take(group->Do(DecodeSteps{uids, steps}));
  };
  decode(100, 111, 40);
  for (uint64_t uid = 111; uid < 117; ++uid) ask(uid);
  decode(100, 117, 30);
  decode(104, 117, 60);  // four wait
  group->Do(CloseSequence{107});
  decode(100, 107, 20);
  // A fork goes on where its parent's prompt ended.
  const Asked& parent = all.at(110);
  OpenSequence fork{200, parent.context, parent.adapter, parent.adapter == 0 ? 0 : 1, 50};
  fork.parent = 110;
  group->Do(fork);
  double worst = 0.0;
  int other_best = 0, tokens = 0;
  for (const auto& [uid, asked] : all) {
    const int64_t end = asked.context == kContext ? tokens_ : shorter;
    const Result scores =
        group->Score(asked.context, asked.question, end, asked.answer, asked.adapter, asked.adapter == 0 ? 0 : 1);
    for (size_t i = 0; i < asked.answer.size(); ++i, ++tokens) {
      worst = std::max(worst, std::abs(static_cast<double>(asked.logprobs[i]) - scores.score_logprobs[i]));
      if (uid % 5 != 2) other_best += scores.score_greedy[i] ? 0 : 1;
    }
    if (uid % 5 != 2) continue;
    std::set<int32_t> seen(asked.question.begin(), asked.question.end());
    for (const int32_t id : asked.answer) EXPECT_TRUE(seen.insert(id).second) << uid << " has " << id << " again";
  }
  const Asked& scored = all.at(104);
  const std::vector<int32_t>& prompt = scored.question;
  ASSERT_EQ(scored.adapter, 3);
  const Result alone =
      group->Score(kContext, {prompt[0]}, tokens_, {prompt.begin() + 1, prompt.end()}, scored.adapter, 1);
  ASSERT_EQ(prompt_logprobs.size(), prompt.size() - 1);
  for (size_t i = 0; i < prompt_logprobs.size(); ++i) {
    EXPECT_NEAR(prompt_logprobs[i], alone.score_logprobs[i], 0.1) << i;
  }
  std::printf("%s, %d ranks: %d tokens decoded in batches, worst difference from scoring %.2e, %d no longer the best\n",
              Cases()[std::get<0>(GetParam())].name.c_str(), ranks_, tokens, worst, other_best);
  EXPECT_GE(tokens, 1500);
  EXPECT_LE(worst, 0.1);
  EXPECT_LE(other_best, tokens / 10);
  // The shared prefix is freed with the last context that holds it.
  group->Do(CloseContext{kContext});
  EXPECT_GT(group->Do(OpenSequence{300, kShorter, 0, 0, 10}).result().kv_used_bytes, 0);
  EXPECT_EQ(group->Do(CloseContext{kShorter}).result().kv_used_bytes, 0);
}

// How the context was cut into chunks and how many GPUs hold it changes nothing but roundings: teacher-forced
// log-probabilities agree, and so does the most likely token wherever the gap to the next is more than noise.
TEST_P(GpuEngineTest, ChunksAndRanksAgree) {
  const std::vector<int32_t> text = Ids(200, config_.vocab, 12);
  const std::vector<int32_t> question(text.begin(), text.begin() + 1), targets(text.begin() + 1, text.end());
  // Chunks of 16384 rows: two ranks overlap the exchange of one half with the attention of the other.
  const int64_t tokens = 16'384 + 40;
  const std::vector<int32_t> ids = Ids(tokens, config_.vocab, 14);
  std::vector<Result> results;
  std::vector<std::vector<Token>> answers;
  for (const auto& [ranks, chunk] : {std::pair<int, int64_t>{1, 1000}, {ranks_, 16'384}}) {
    const std::unique_ptr<Group> group = GpuGroup(config_, ranks);
    group->Prefill(kContext, ids, chunk);
    results.push_back(group->Score(kContext, question, tokens, targets));
    answers.push_back(group->Ask(kContext, tokens, question, 0, 1, 0, 0, 2));
  }
  double worst = 0.0;
  for (size_t i = 0; i < targets.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(results[0].score_logprobs[i]) - results[1].score_logprobs[i]));
  }
  std::printf("%s, %d ranks in one chunk against 1 in many: log-probabilities off by at most %.2e\n",
              Cases()[std::get<0>(GetParam())].name.c_str(), ranks_, worst);
  EXPECT_LE(worst, 0.1);
  const Token& first = answers[0].at(0);
  if (first.top_logprobs[0] - first.top_logprobs[1] > 4 * worst) {
    EXPECT_EQ(answers[1].at(0).id, first.id);
  }
}

// Few rows and many: the kernels differ. Views cut at any slot, within tiles and at their borders.
TEST_P(GpuEngineTest, AttentionMass) {
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  group->Prefill(kContext, ids_, 700);
  const at::Device device(at::kCUDA, 0);
  const std::shared_ptr<const Weights> weights = Random(config_, device);
  SoftmaxOracle oracle(*weights, device, at::kDouble), plain(*weights, device, at::kBFloat16);
  oracle.Prefill(ids_);
  plain.Prefill(ids_);
  const std::vector<KeyRange> ranges = {{0, tokens_}, {0, 1},     {255, 257},  {7, 7},       {1000, 1003},
                                        {3, 1700},    {512, 768}, {64, 2591}, {2599, 2600}, {tokens_, tokens_}};
  for (const int64_t rows : {1, 9, 300}) {
    group->Do(OpenSequence{5, kContext, 0, 0, rows});
    ProbeAttention probe{5, {}, Ids(rows, config_.vocab, 5), {}, ranges, {}, {}};
    for (int64_t i = 0; i < rows; ++i) probe.positions.push_back(tokens_ + i);
    for (int64_t i = 0; i < rows; ++i) probe.rows.push_back(i);
    for (int64_t i = 0; i < config_.layers; ++i) probe.layers.push_back(i);
    for (int64_t i = 0; i < config_.heads; ++i) probe.heads.push_back(i);
    const std::vector<float> masses = group->Do(probe).masses;
    group->Do(CloseSequence{5});
    const at::Tensor exact = oracle.TailSoftmax(probe.ids, {}), torch = plain.TailSoftmax(probe.ids, {});
    ASSERT_EQ(masses.size(), static_cast<size_t>(config_.layers * rows * config_.heads) * ranges.size());
    double ours = 0.0, theirs = 0.0;
    const float* mass = masses.data();
    for (int64_t layer = 0; layer < config_.layers; ++layer) {
      for (int64_t row = 0; row < rows; ++row) {
        for (const KeyRange& range : ranges) {
          const auto of = [&](const at::Tensor& softmax) {  // [H]
            return softmax[layer].select(1, row).narrow(1, range.begin, range.end - range.begin).sum(1);
          };
          const at::Tensor expected = of(exact), rounded = of(torch);
          for (int64_t head = 0; head < config_.heads; ++head, ++mass) {
            if (range.begin == range.end) {
              ASSERT_EQ(*mass, 0.0f);
            }
            ours += std::pow(*mass - expected[head].item<double>(), 2);
            theirs += std::pow(rounded[head].item<double>() - expected[head].item<double>(), 2);
          }
        }
      }
    }
    const double count = static_cast<double>(masses.size());
    std::printf("%s, %d ranks, %lld rows: rms error of attention masses %.2e, torch bf16 %.2e\n",
                Cases()[std::get<0>(GetParam())].name.c_str(), ranks_, static_cast<long long>(rows),
                std::sqrt(ours / count), std::sqrt(theirs / count));
    EXPECT_LE(std::sqrt(ours / count), 2.0 * std::sqrt(theirs / count) + 1e-6);
  }
}

TEST_P(GpuEngineTest, TheSameBitsTwice) {
  std::vector<std::vector<double>> runs;
  for (int run = 0; run < 2; ++run) {
    const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
    group->Prefill(kContext, ids_, 400);
    group->Do(BeginAdapt{kContext, kAdapter});
    std::vector<double> seen;
    for (int64_t step = 1; step <= 5; ++step) {
      const Result r = group->Do(AdaptStep{kAdapter, step, {SpanAt(ids_, 100 * step, 128)}}).result();
      seen.push_back(r.loss);
      seen.push_back(r.grad_norm);
    }
    seen.push_back(static_cast<double>(group->Do(ProbeLoss{kAdapter, {}}).result().agree));
    group->Do(EndAdapt{kAdapter, true, 1});
    for (const Token& t : group->Ask(kContext, tokens_, {1, 2, 3}, 0, 40, kAdapter, 1)) {
      seen.push_back(t.id);
      seen.push_back(t.logprob);
    }
    runs.push_back(std::move(seen));
  }
  EXPECT_EQ(runs[0], runs[1]);
}

INSTANTIATE_TEST_SUITE_P(Shapes, GpuEngineTest,
                         ::testing::Combine(::testing::Range(0, static_cast<int>(Cases().size())), ::testing::Values(1, 2)),
                         [](const auto& info) {
                           return Cases()[std::get<0>(info.param)].name + "_" +
                                  std::to_string(std::get<1>(info.param)) + "_ranks";
                         });

}  // namespace
}  // namespace refocus
