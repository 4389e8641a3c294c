// Whole groups on GPUs against the fp64 oracle, one GPU against two, two runs against each other. Needs a GPU.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <set>

#include "base/limits.h"
#include "tests/worker/gpu_engine_fixture.h"
#include "tests/worker/softmax_oracle.h"
#include "worker/query_delta.h"

namespace refocus {
namespace {

TEST_P(GpuEngineTest, ScoresGradientsAndEightSteps) {
  MakeOracles();
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  group->Prefill(kContext, ids_, 2560);
  CompareScores(*group, at::Tensor(), 0, 0);
  const at::Tensor delta = CompareSteps(*group, 8);
  CompareScores(*group, delta, kAdapter, 1);
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
      std::vector<Span> spans = {SpanAt(ids_, 300 + 40 * step, step == 6 ? 400 : 97)};
      if (step % 2 == 1) spans[0].behind = static_cast<int64_t>(ids_.size()) + 5 * step;
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
                name().c_str(), ranks_, sgd ? "SGD" : "AdamW", ours, theirs);
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

TEST_P(GpuEngineTest, DecodedTokensAreWhatScoringExpects) {
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  group->Prefill(kContext, ids_);
  CompareDecoding(*group, 300);
}

// Questions of different lengths, adapters and contexts decode together, join and leave, while the step is replayed from
// recordings: every token is what scoring expects of it, as for one alone.
TEST_P(GpuEngineTest, BatchedTokensAreWhatScoringExpects) {
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_);
  constexpr uint64_t kShorter = 9;
  const int64_t shared = 700, shorter = 1100;
  group->Prefill(kContext, ids_);
  std::vector<int32_t> other(ids_.begin(), ids_.begin() + shared);
  for (const int32_t id : RandomIds(shorter - shared, config_.vocab, 21)) other.push_back(id);
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
                RandomIds(1 + 7 * static_cast<int64_t>(uid % 5), config_.vocab, uid), {}, {}};
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
              name().c_str(), ranks_, tokens, worst, other_best);
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
  const std::vector<int32_t> text = RandomIds(200, config_.vocab, 12);
  const std::vector<int32_t> question(text.begin(), text.begin() + 1), targets(text.begin() + 1, text.end());
  // Chunks of 16384 rows: two ranks overlap the exchange of one half with the attention of the other.
  const int64_t tokens = 16'384 + 40;
  const std::vector<int32_t> ids = RandomIds(tokens, config_.vocab, 14);
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
              name().c_str(), ranks_, worst);
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
  const std::shared_ptr<const Weights> weights = RandomWeights(config_, device);
  SoftmaxOracle oracle(*weights, device, at::kDouble), plain(*weights, device, at::kBFloat16);
  oracle.Prefill(ids_);
  plain.Prefill(ids_);
  const std::vector<KeyRange> ranges = {{0, tokens_}, {0, 1},     {255, 257},  {7, 7},       {1000, 1003},
                                        {3, 1700},    {512, 768}, {64, 2591}, {2599, 2600}, {tokens_, tokens_}};
  for (const int64_t rows : {1, 9, 300}) {
    group->Do(OpenSequence{5, kContext, 0, 0, rows});
    ProbeAttention probe{5, {}, RandomIds(rows, config_.vocab, 5), {}, ranges, {}, {}};
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
                name().c_str(), ranks_, static_cast<long long>(rows),
                std::sqrt(ours / count), std::sqrt(theirs / count));
    EXPECT_LE(std::sqrt(ours / count), 2.0 * std::sqrt(theirs / count) + 1e-6);
  }
}

// However partials and dq travel: of several ranks the last two runs exchange through NCCL alone, where ranks do not
// share the MLP (worker/model.h).
TEST_P(GpuEngineTest, TheSameBitsTwice) {
  std::vector<std::vector<double>> runs;
  for (int run = 0; run < (ranks_ == 1 ? 2 : 4); ++run) {
    const std::unique_ptr<Group> group = GpuGroup(config_, ranks_, KvType::kDevice, /*peer_memory=*/run < 2);
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
  if (ranks_ == 1) return;
  EXPECT_EQ(runs[2], runs[3]) << "through NCCL";
  const bool shared = config_.mlp % (8 * ranks_) == 0;
  if (!shared) {
    EXPECT_EQ(runs[0], runs[2]) << "another way";
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, GpuEngineTest,
                         ::testing::Combine(::testing::Range(0, static_cast<int>(GpuCases().size())),
                                            ::testing::Values(1, 2)),
                         GpuTestName);

}  // namespace
}  // namespace refocus
