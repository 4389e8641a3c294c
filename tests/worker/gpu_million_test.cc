// A million tokens over all GPUs of this host, probed at random positions against fp64.
//
// A row of a context depends on the rows before it only through their K and V. So with the K and V that the ranks hold
// any position can be computed again by itself: its keys and values must be the stored ones (prefill), its logits the
// engine's (forward), the slope of its loss along the engine's gradient that gradient's norm (backward). Our error is
// at most twice that of plain torch in bf16 on the same cache. REFOCUS_MILLION_LAYERS (4) is the depth,
// REFOCUS_MILLION_TOKENS (2^20) the length.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "tests/worker/torch_oracle.h"
#include "worker/adapt.h"
#include "worker/device.h"
#include "worker/prefill.h"

namespace refocus {
namespace {

constexpr int64_t kChunkRows = 16'384;
constexpr int64_t kSliceKeys = 32'768;
constexpr int64_t kSpanRows = 128;

int64_t FromEnvironment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}

ModelConfig Shape() {
  ModelConfig c;
  c.family = Family::kQwen3;
  c.name = "random Qwen3-4B shape";
  c.layers = FromEnvironment("REFOCUS_MILLION_LAYERS", 4);
  c.hidden = 2560;
  c.heads = 32;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.mlp = 9728;
  c.vocab = 151'936;
  c.max_positions = 1 << 20;
  c.rope_theta = 1e6;
  c.rms_eps = 1e-6;
  c.qk_norm = true;
  c.tied_embeddings = true;
  return c;
}

// Whole rows against the K/V that the ranks hold, in fp64 or as plain torch does it in bf16.
class CacheOracle : public TorchOracle {
 public:
  CacheOracle(const Weights& weights, at::Device device, at::ScalarType dtype,
              const std::vector<const KvExtent*>& extents)
      : TorchOracle(weights, device, dtype), extents_(extents) {}

  struct Rows {
    at::Tensor logprobs;       // [n, vocab] fp64
    at::Tensor keys, values;   // [layers, Hk, n, d] of the rows themselves, fp64
  };
  Rows At(const std::vector<int64_t>& ids, const std::vector<int64_t>& positions, const at::Tensor& delta) const {
    std::vector<at::Tensor> keys(weights_.layers.size()), values = keys;
    const at::Tensor logits = Forward(Ids(ids), Ids(positions), Ids(positions), Layers(delta), true, keys, values);
    return {at::log_softmax(logits.to(at::kDouble), 1), at::stack(keys).to(at::kDouble),
            at::stack(values).to(at::kDouble)};
  }

 protected:
  // The rows' own keys are among the stored ones. A slice of keys at a time, softmax over all of them.
  at::Tensor Attention(int64_t layer, const at::Tensor& q, const at::Tensor& positions, const at::Tensor&,
                       const at::Tensor&) const override {
    const ModelConfig& c = weights_.config;
    const int64_t n = q.size(1), group = c.heads / c.kv_heads;
    const at::Tensor packed = q.reshape({c.kv_heads, group * n, c.head_dim});
    const at::Tensor row_pos = positions.repeat({group}).unsqueeze(1);  // [G n, 1]
    std::vector<at::Tensor> scores, values;
    at::Tensor out, lse;
    for (const KvExtent* extent : extents_) {
      const KvView view = extent->View(layer);
      for (int64_t first = 0; first < view.length; first += kSliceKeys) {
        const int64_t count = std::min(kSliceKeys, view.length - first);
        const at::Tensor k = view.k.narrow(1, first, count).to(device_, dtype_);
        const at::Tensor v = view.v.narrow(1, first, count).to(device_, dtype_);
        // Whole blocks of positions, as the plan lays them out.
        const at::Tensor index = at::arange(first, first + count, positions.options()) + view.first_index;
        const at::Tensor key_pos = (index.floor_divide(kBlockTokens) * view.plan.shards + view.plan.shard) * kBlockTokens +
                                   index.remainder(kBlockTokens);
        at::Tensor s = (at::matmul(packed, k.transpose(1, 2)) / std::sqrt(static_cast<double>(c.head_dim)))
                           .masked_fill((key_pos.unsqueeze(0) > row_pos).unsqueeze(0),
                                        -std::numeric_limits<double>::infinity());
        if (dtype_ != at::kDouble) {  // plain torch: one softmax in fp32, rounded
          scores.push_back(s.to(at::kFloat));
          values.push_back(v);
          continue;
        }
        const at::Tensor part_lse = at::logsumexp(s, -1, true);
        const at::Tensor part = at::matmul(at::exp(s - part_lse).nan_to_num(0.0), v);
        if (!out.defined()) {
          out = part;
          lse = part_lse;
          continue;
        }
        const at::Tensor both = at::logaddexp(lse, part_lse);
        out = out * at::exp(lse - both).nan_to_num(0.0) + part * at::exp(part_lse - both).nan_to_num(0.0);
        lse = both;
      }
    }
    if (dtype_ != at::kDouble) {
      out = at::matmul(at::softmax(at::cat(scores, -1), -1).to(dtype_), at::cat(values, 1));
    }
    return out.view({c.heads, n, c.head_dim});
  }

 private:
  const std::vector<const KvExtent*> extents_;
};

// One rank: a thread and a GPU; its weights and K/V stay for the oracle.
struct Rank {
  std::shared_ptr<const Weights> weights;
  std::shared_ptr<KvExtent> extent;
  at::Tensor logprobs;  // [probes, vocab] fp64
  double span_loss = 0.0, gradient_loss = 0.0;
  at::Tensor gradient;  // [layers, H * d, hidden] fp32
  double prefill_seconds = 0.0;
};

struct Probes {
  std::vector<int32_t> ids;         // of the whole context
  std::vector<int64_t> positions;   // rows of their own
  Span span;
};

void RunRank(const ModelConfig& config, const Probes& probes, const std::string& id, int index, int ranks, Rank* rank) {
  ASSERT_TRUE(UseGpu(index, ranks).ok());
  const at::Device device(at::kCUDA, static_cast<int8_t>(index));
  LoadOptions options;
  options.threads = 4;
  options.device = device;
  options.random_seed = 7;
  rank->weights = std::make_shared<const Weights>(std::move(LoadWeights("", config, options)).value());
  const c10::InferenceMode inference;  // not before: the loader's threads know nothing of it
  const std::unique_ptr<Backend> backend = MakeGpuBackend(config, UseGpu(index, ranks).value());
  backend->Bind();
  const std::shared_ptr<Collective> collective = MakeGpuCollective(id, index, ranks, 120.0);
  std::atomic<int64_t> progress{0};
  Model model(*rank->weights, *backend, *collective, progress);
  const auto tokens = static_cast<int64_t>(probes.ids.size());
  rank->extent = std::make_shared<KvExtent>(config, model.plan(), 0, tokens,
                                            at::TensorOptions(device).dtype(backend->dtype()), /*poison=*/true);
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t first = 0; first < tokens; first += kChunkRows) {
    const int64_t end = std::min(first + kChunkRows, tokens);
    PrefillRows(model, KvChain(), *rank->extent, first, {probes.ids.begin() + first, probes.ids.begin() + end});
    collective->Check();
    backend->Synchronize();
  }
  rank->prefill_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();

  const RowPlan plan = RowPlan::Replicated(probes.positions, model.plan());
  std::vector<int32_t> row_ids;
  for (const int64_t position : probes.positions) row_ids.push_back(probes.ids[position]);
  ForwardInput input = model.MakeInput(plan, row_ids);
  input.extents = KvChain(rank->extent).shares();
  rank->logprobs = at::log_softmax(model.Logits(model.Forward(input)).to(at::kDouble), 1);
  rank->span_loss = SpanLoss(model, KvChain(rank->extent), QueryDelta(), {probes.span});
  rank->gradient = at::empty({config.layers, config.q_dim(), config.hidden},
                             at::TensorOptions(device).dtype(at::kFloat));
  rank->gradient_loss = SpanGradient(model, KvChain(rank->extent), QueryDelta(), {probes.span}, rank->gradient);
  backend->Synchronize();
}

double Rms(const at::Tensor& difference) { return std::sqrt(difference.to(at::kDouble).square().mean().item<double>()); }

// The stored K or V of one position, [layers, Hk, d] fp64.
at::Tensor Stored(const std::vector<const KvExtent*>& extents, int64_t position, int64_t layers, bool key, at::Device to) {
  for (const KvExtent* extent : extents) {
    const int64_t slot = extent->SlotOf(position);
    if (slot < 0) continue;
    std::vector<at::Tensor> all;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const KvView view = extent->View(layer);
      all.push_back((key ? view.k : view.v).select(1, slot).to(to, at::kDouble));
    }
    return at::stack(all);
  }
  ADD_FAILURE() << "position " << position << " is nowhere";
  return {};
}

class GpuMillionTest : public ::testing::Test {
 protected:
  // Prefilled once for all tests.
  static void SetUpTestSuite() {
    while (UseGpu(gpus_, gpus_ + 1).ok()) ++gpus_;
    if (gpus_ == 0) return;
    std::mt19937_64 random(11);
    const int64_t tokens = FromEnvironment("REFOCUS_MILLION_TOKENS", 1 << 20);
    probes_ = {};
    for (int64_t i = 0; i < tokens; ++i) probes_.ids.push_back(static_cast<int32_t>(random() % config_.vocab));
    // The first, the last, both sides of a block's border, and anywhere.
    probes_.positions = {0, tokens - 1, tokens / 2 - 1, tokens / 2};
    for (int i = 0; i < 12; ++i) probes_.positions.push_back(static_cast<int64_t>(random() % tokens));
    const int64_t start = tokens - kSpanRows - 1 - static_cast<int64_t>(random() % (tokens / 8));
    probes_.span = {start, {probes_.ids.begin() + start, probes_.ids.begin() + start + kSpanRows + 1}};
    const std::string id = gpus_ > 1 ? MakeGpuGroupId() : std::string();
    ranks_.resize(gpus_);
    std::vector<std::thread> threads;
    for (int i = 0; i < gpus_; ++i) {
      threads.emplace_back([&, i] { RunRank(config_, probes_, id, i, gpus_, &ranks_[i]); });
    }
    for (std::thread& thread : threads) thread.join();
    for (const Rank& rank : ranks_) extents_.push_back(rank.extent.get());
    std::printf("%lld tokens, %lld layers on %d GPUs: prefill %.2f s\n", static_cast<long long>(tokens),
                static_cast<long long>(config_.layers), gpus_, ranks_[0].prefill_seconds);
  }
  static void TearDownTestSuite() {
    extents_.clear();
    ranks_.clear();
  }
  void SetUp() override {
    if (gpus_ == 0) GTEST_SKIP() << "needs a CUDA device, found none";
    for (const Rank& rank : ranks_) ASSERT_TRUE(rank.gradient.defined()) << "a rank failed";
  }

  // Mean loss of the span's rows at a delta, by the oracle.
  double SpanLossAt(const CacheOracle& oracle, const at::Tensor& delta) const {
    double sum = 0.0;
    constexpr int64_t kRows = 16;
    for (int64_t first = 0; first < kSpanRows; first += kRows) {
      std::vector<int64_t> ids, positions;
      for (int64_t i = first; i < first + kRows; ++i) {
        ids.push_back(probes_.span.ids[i]);
        positions.push_back(probes_.span.start + i);
      }
      const at::Tensor logprobs = oracle.At(ids, positions, delta).logprobs.cpu();
      for (int64_t i = 0; i < kRows; ++i) sum -= logprobs[i][probes_.span.ids[first + i + 1]].item<double>();
    }
    return sum / static_cast<double>(kSpanRows);
  }

  static inline const ModelConfig config_ = Shape();
  static inline int gpus_ = 0;
  static inline Probes probes_;
  static inline std::vector<Rank> ranks_;
  static inline std::vector<const KvExtent*> extents_;
};

TEST_F(GpuMillionTest, RandomPositionsAgreeWithFp64) {
  const c10::InferenceMode inference;
  const at::Device device(at::kCUDA, 0);
  const CacheOracle exact(*ranks_[0].weights, device, at::kDouble, extents_);
  const CacheOracle plain(*ranks_[0].weights, device, at::kBFloat16, extents_);
  double ours[3] = {}, torch[3] = {}, size[3] = {};
  for (size_t i = 0; i < probes_.positions.size(); ++i) {
    const int64_t position = probes_.positions[i];
    const std::vector<int64_t> id = {probes_.ids[position]};
    const CacheOracle::Rows want = exact.At(id, {position}, at::Tensor());
    const CacheOracle::Rows bf16 = plain.At(id, {position}, at::Tensor());
    const at::Tensor k = Stored(extents_, position, config_.layers, true, device);
    const at::Tensor v = Stored(extents_, position, config_.layers, false, device);
    const at::Tensor errors[] = {k - want.keys.select(2, 0), v - want.values.select(2, 0),
                                 ranks_[0].logprobs[static_cast<int64_t>(i)].to(device) - want.logprobs[0]};
    const at::Tensor others[] = {bf16.keys - want.keys, bf16.values - want.values, bf16.logprobs - want.logprobs};
    const at::Tensor sizes[] = {want.keys, want.values, want.logprobs};
    for (int what = 0; what < 3; ++what) {
      EXPECT_LE(Rms(errors[what]), 4.0 * Rms(others[what])) << "position " << position << ", quantity " << what;
      ours[what] += Rms(errors[what]);
      torch[what] += Rms(others[what]);
      size[what] += Rms(sizes[what]);
    }
    for (const Rank& rank : ranks_) {  // replicated rows
      EXPECT_LE(Rms(rank.logprobs[static_cast<int64_t>(i)].to(device) - want.logprobs[0]), 4.0 * Rms(others[2]));
    }
  }
  const char* names[] = {"keys", "values", "log-probabilities"};
  const auto count = static_cast<double>(probes_.positions.size());
  for (int what = 0; what < 3; ++what) {
    std::printf("%zu positions, %s: rms error %.2e, torch bf16 %.2e, of %.3f\n", probes_.positions.size(), names[what],
                ours[what] / count, torch[what] / count, size[what] / count);
    EXPECT_LE(ours[what], 2.0 * torch[what]) << names[what];
  }
}

TEST_F(GpuMillionTest, TheGradientIsTheSlopeOfTheExactLoss) {
  const c10::InferenceMode inference;
  const at::Device device(at::kCUDA, 0);
  const CacheOracle exact(*ranks_[0].weights, device, at::kDouble, extents_);
  const at::Tensor gradient = ranks_[0].gradient.to(device, at::kDouble);
  const double norm = gradient.norm().item<double>();
  const at::Tensor direction = gradient / norm;
  const double step = 1e-3 / norm;
  const double loss = SpanLossAt(exact, at::Tensor());
  const double slope =
      (SpanLossAt(exact, direction * step) - SpanLossAt(exact, direction * -step)) / (2.0 * step);
  std::printf("span at %lld: loss %.5f, exact %.5f; gradient's norm %.5f, exact slope along it %.5f\n",
              static_cast<long long>(probes_.span.start), ranks_[0].span_loss, loss, norm, slope);
  for (const Rank& rank : ranks_) {
    EXPECT_NEAR(rank.span_loss, loss, 2e-3 * loss);
    EXPECT_NEAR(rank.gradient_loss, loss, 2e-3 * loss);
    EXPECT_EQ(0.0, (rank.gradient.to(device) - ranks_[0].gradient).abs().max().item<double>());
  }
  EXPECT_NEAR(slope, norm, 0.03 * norm);
}

}  // namespace
}  // namespace refocus
