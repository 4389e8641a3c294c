// Groups on GPUs with K and V in eight bits: against fp64 over what the codes stand for, beside plain torch in bf16
// over the same, and against groups with K and V in bf16. Needs a GPU.
#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "base/limits.h"
#include "tests/worker/gpu_engine_fixture.h"

namespace refocus {
namespace {

// Keeps of K and V what base/kv_int8.h's codes stand for. Numbers that lie between two codes may go to either, here and
// in the engine: that is part of both errors.
class Int8Oracle : public TorchOracle {
 public:
  using TorchOracle::TorchOracle;

 protected:
  at::Tensor Kept(const at::Tensor& numbers) const override {
    const at::Tensor wide = numbers.to(at::kDouble);
    const at::Tensor scale = (at::amax(wide.abs(), {-1}, true) / 127.0).to(at::kBFloat16).to(at::kDouble);
    const at::Tensor codes = (wide / scale).round().clamp(-127.0, 127.0);
    return (codes * scale).to(at::kBFloat16).to(dtype_);
  }
};

class GpuInt8Test : public GpuEngineTest {
 protected:
  // The direction of one plain SGD step [layers, H * d, hidden]: that of the clipped gradient.
  at::Tensor Direction(Group& group, uint64_t adapter) {
    BeginAdapt begin{kContext, adapter};
    begin.optimizer.sgd = true;
    begin.optimizer.weight_decay = 0.0f;
    group.Do(begin);
    group.Do(AdaptStep{adapter, 1, {SpanAt(ids_, 900, 97), SpanAt(ids_, 2000, 130)}, 1.0f});
    group.Do(EndAdapt{adapter, true, 1});
    const at::Tensor step = at::empty({config_.layers, config_.q_dim(), config_.hidden}, at::kFloat);
    std::string bytes;
    for (int64_t at = 0; at < step.numel(); at += kDeltaPieceNumbers) {
      bytes += group.Do(ReadDelta{adapter, 1, at, std::min(kDeltaPieceNumbers, step.numel() - at)}).result().data;
    }
    EXPECT_EQ(bytes.size(), step.nbytes());
    std::memcpy(step.mutable_data_ptr(), bytes.data(), std::min(bytes.size(), step.nbytes()));
    return step.to(at::kDouble);
  }

  std::vector<double> Losses(Group& group, uint64_t adapter) {
    group.Do(BeginAdapt{kContext, adapter});
    std::vector<double> losses;
    for (int64_t step = 1; step <= 8; ++step) {
      losses.push_back(group.Do(AdaptStep{adapter, step, {SpanAt(ids_, 1200, 128)}, 1e-3f}).result().loss);
    }
    group.Do(EndAdapt{adapter, true, 1});
    return losses;
  }
};

TEST_P(GpuInt8Test, ScoresGradientsAndFourStepsOverWhatCodesStandFor) {
  MakeOracles<Int8Oracle>();
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_, KvType::kInt8);
  group->Prefill(kContext, ids_, 2560);
  CompareScores(*group, at::Tensor(), 0, 0);
  const at::Tensor delta = CompareSteps(*group, 4);
  CompareScores(*group, delta, kAdapter, 1);
}

// Eight bits turn the gradient by less than 8 degrees in every layer, and lead to the same losses.
TEST_P(GpuInt8Test, PointsTheSameWayAsBf16) {
  std::vector<at::Tensor> directions;
  std::vector<std::vector<double>> losses;
  for (const KvType kv : {KvType::kDevice, KvType::kInt8}) {
    const std::unique_ptr<Group> group = GpuGroup(config_, ranks_, kv);
    group->Prefill(kContext, ids_, 1000);
    directions.push_back(Direction(*group, 3));
    losses.push_back(Losses(*group, 4));
  }
  double least = 1.0;
  for (int64_t layer = 0; layer < config_.layers; ++layer) {
    const at::Tensor a = directions[0][layer], b = directions[1][layer];
    const double cosine =
        (a * b).sum().item<double>() / std::sqrt(a.square().sum().item<double>() * b.square().sum().item<double>());
    EXPECT_GE(cosine, 0.99) << "layer " << layer;
    EXPECT_LE(cosine, 1 - 1e-7) << "layer " << layer << ": eight bits are not bf16";
    least = std::min(least, cosine);
  }
  double worst = 0.0;
  for (size_t i = 0; i < losses[0].size(); ++i) worst = std::max(worst, std::abs(losses[0][i] - losses[1][i]));
  std::printf(
      "%s, %d ranks: least cosine of a layer's gradient in eight bits and in bf16 %.5f; losses %.4f to %.4f, off "
      "by at most %.2e\n",
      name().c_str(), ranks_, least, losses[1].front(), losses[1].back(), worst);
  EXPECT_LE(worst, 0.02);
  EXPECT_LT(losses[1].back(), losses[1].front());
}

TEST_P(GpuInt8Test, DecodedTokensAreWhatScoringExpects) {
  const std::unique_ptr<Group> group = GpuGroup(config_, ranks_, KvType::kInt8);
  group->Prefill(kContext, ids_);
  CompareDecoding(*group, 100);
}

// Head dimensions 80 and 16 (the portable kernels), 64 and 128 (Hopper's).
INSTANTIATE_TEST_SUITE_P(Shapes, GpuInt8Test, ::testing::Combine(::testing::Range(0, 4), ::testing::Values(1, 2)),
                         GpuTestName);

}  // namespace
}  // namespace refocus
