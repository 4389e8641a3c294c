// Steps by a gradient in factors against fp64, and against those by the written gradient, which go through LibTorch's
// own operators. On the CPU, and on a GPU where there is one.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <limits>

#include "worker/backend.h"
#include "worker/device.h"
#include "worker/optimizer.h"

namespace refocus {
namespace {

constexpr int64_t kLayers = 2;

class QueryUpdateTest : public ::testing::TestWithParam<DeviceKind> {
 protected:
  void SetUp() override { Make(3, 40); }

  void Make(int64_t heads, int64_t hidden) {
    model_.layers = kLayers;
    model_.heads = heads;
    model_.kv_heads = 1;
    model_.head_dim = 8;
    model_.hidden = hidden;
    model_.vocab = 10;
    model_.mlp = 8;
    at::set_num_threads(1);
    if (GetParam() == DeviceKind::kCpu) {
      backend_ = MakeCpuBackend(model_);
    } else {
      const StatusOr<Gpu> gpu = UseGpu(0, 1);
      if (!gpu.ok()) GTEST_SKIP() << gpu.status();
      backend_ = MakeGpuBackend(model_, *gpu);
    }
    backend_->Bind();
  }

  at::Tensor Drawn(at::IntArrayRef sizes, double scale) {
    return at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(++seed_), at::kFloat)
        .mul_(scale)
        .to(at::TensorOptions(backend_->device()).dtype(backend_->dtype()));
  }

  GradFactors Factors(int64_t rows) {
    GradFactors factors;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      factors.dq.push_back(Drawn({rows, model_.q_dim()}, 0.01));
      factors.h.push_back(Drawn({rows, model_.hidden}, 1.0) + Drawn({1, model_.hidden}, 1.0));
    }
    return factors;
  }

  std::vector<int64_t> Sizes() const { return {kLayers, model_.q_dim(), model_.hidden}; }
  at::TensorOptions Options() const { return at::TensorOptions(backend_->device()).dtype(at::kFloat); }
  static at::Tensor Exact(const at::Tensor& t) { return t.to(at::TensorOptions(at::kCPU).dtype(at::kDouble)); }

  static at::Tensor GradientOf(const GradFactors& factors) {
    std::vector<at::Tensor> layers;
    for (size_t i = 0; i < factors.dq.size(); ++i) {
      layers.push_back(at::matmul(Exact(factors.dq[i]).t(), Exact(factors.h[i])));
    }
    return at::stack(layers);
  }

  double NormOf(const GradFactors& factors) {
    at::Tensor norm = at::zeros({1}, Options().dtype(at::kDouble));
    backend_->FactorNorm(factors, norm);
    return norm.cpu().item<double>();
  }

  at::Tensor Stats(double loss, double norm) {
    return at::tensor({loss, norm}, at::kDouble).to(backend_->device());
  }

  // A delta that is optimised.
  struct Trained {
    Trained(const OptimizerConfig& config, const at::Tensor& start, Backend& backend)
        : master(start.clone()), rounded(backend.Rounded(master)), optimizer(config, master, rounded) {}
    at::Tensor master, rounded;
    Optimizer optimizer;
  };

  void StepByGradient(Trained& trained, const GradFactors& factors, const at::Tensor& stats) {
    const at::Tensor grad = at::empty(Sizes(), Options());
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      at::Tensor of_layer = grad.select(0, layer);
      backend_->WeightGrad(factors.dq[layer], factors.h[layer], /*add=*/false, of_layer);
    }
    trained.optimizer.Step(stats, grad);
  }

  ModelConfig model_;
  std::unique_ptr<Backend> backend_;
  uint64_t seed_ = 0;
};

double Rms(const at::Tensor& error) { return std::sqrt(error.square().mean().item<double>()); }

TEST_P(QueryUpdateTest, NormEqualsTheWrittenGradients) {
  for (const int64_t rows : {1, 3, 63, 127, 128}) {
    const GradFactors factors = Factors(rows);
    const double exact = std::sqrt(GradientOf(factors).square().sum().item<double>());
    EXPECT_NEAR(NormOf(factors), exact, 1e-5 * exact) << rows;
    EXPECT_EQ(NormOf(factors), NormOf(factors)) << rows;
  }
  GradFactors broken = Factors(20);
  broken.h[1][19][39] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(NormOf(broken)));
}

TEST_P(QueryUpdateTest, StepsAreAsExactAsByTheWrittenGradient) {
  for (const auto& [heads, hidden] : {std::pair<int64_t, int64_t>{3, 40}, {33, 328}}) {
    Make(heads, hidden);
    for (const int64_t rows : {1, 3, 63, 127, 128}) {
      const OptimizerConfig config{.weight_decay = rows == 63 ? 0.0f : 0.1f, .clip_norm = rows == 1 ? 1e3f : 0.5f};
      ASSERT_LE(rows, backend_->factor_rows());
      const at::Tensor start = rows < 100 ? at::zeros(Sizes(), Options()) : Drawn(Sizes(), 0.01).to(at::kFloat);
      Trained ours(config, start, *backend_), theirs(config, start, *backend_);
      at::Tensor p = Exact(start), m = at::zeros(Sizes(), at::kDouble), v = at::zeros(Sizes(), at::kDouble);
      for (int step = 1; step <= 4; ++step) {
        const float rate = 1e-3f / static_cast<float>(step);
        const GradFactors factors = Factors(rows);
        const double norm = std::sqrt(GradientOf(factors).square().sum().item<double>());
        ours.optimizer.SetRate(rate);
        ours.optimizer.Step(*backend_, Stats(1.0, norm), factors);
        theirs.optimizer.SetRate(rate);
        StepByGradient(theirs, factors, Stats(1.0, norm));
        const at::Tensor g = GradientOf(factors) / std::max(1.0, (norm + 1e-6) / config.clip_norm);
        const double beta1 = config.beta1, beta2 = config.beta2;
        m = beta1 * m + (1 - beta1) * g;
        v = beta2 * v + (1 - beta2) * g.square();
        p = p * (1.0 - static_cast<double>(rate) * config.weight_decay) -
            rate * (m / (1 - std::pow(beta1, step))) / ((v / (1 - std::pow(beta2, step))).sqrt() + config.epsilon);
      }
      // Where a gradient is next to nothing, its sign decides and no precision helps: the median says how exact it is.
      const at::Tensor errors = (Exact(ours.master) - p).abs(), others = (Exact(theirs.master) - p).abs();
      const double error = errors.median().item<double>(), other = others.median().item<double>();
      std::printf("%lld x %lld, %lld rows: median error of the delta %.2e, by the written gradient %.2e\n",
                  static_cast<long long>(model_.q_dim()), static_cast<long long>(hidden), static_cast<long long>(rows),
                  error, other);
      EXPECT_LE(error, 2.0 * other + 1e-12) << rows;
      EXPECT_LE(Rms(errors), 1e-4 * Rms(p - Exact(start))) << rows;
      EXPECT_TRUE(at::equal(ours.rounded, ours.master.to(backend_->dtype()))) << rows;
    }
  }
}

// Neither a skipped step nor a recording leaves a trace.
TEST_P(QueryUpdateTest, SkipsAndRepeats) {
  const at::Tensor start = Drawn(Sizes(), 0.01).to(at::kFloat);
  const OptimizerConfig config;
  Trained plain(config, start, *backend_), recorded(config, start, *backend_);
  std::vector<GradFactors> steps = {Factors(50), Factors(50), Factors(50), Factors(50)};
  for (size_t i = 0; i < steps.size(); ++i) {
    plain.optimizer.SetRate(0.01f * static_cast<float>(1 + i));
    plain.optimizer.Step(*backend_, Stats(1.0, 2.0), steps[i]);
  }
  GradFactors now = Factors(50);
  at::Tensor stats = Stats(1.0, 2.0);
  const auto repeat = backend_->Repeated([&] { recorded.optimizer.Step(*backend_, stats, now); });
  const auto run = [&](const GradFactors& factors, double loss, double norm, float rate) {
    for (size_t layer = 0; layer < factors.dq.size(); ++layer) {
      now.dq[layer].copy_(factors.dq[layer]);
      now.h[layer].copy_(factors.h[layer]);
    }
    stats.copy_(Stats(loss, norm));
    recorded.optimizer.SetRate(rate);
    repeat->Run();
  };
  const double nan = std::numeric_limits<double>::quiet_NaN(), endless = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < steps.size(); ++i) {
    run(steps[i], 1.0, 2.0, 0.01f * static_cast<float>(1 + i));
    const at::Tensor before = recorded.master.clone();
    for (const auto& [loss, norm] : {std::pair{nan, 1.0}, {1.0, nan}, {endless, 1.0}, {1.0, endless}}) {
      run(steps[i], loss, norm, 1.0f);
    }
    EXPECT_TRUE(at::equal(recorded.master, before)) << i;
  }
  EXPECT_TRUE(at::equal(recorded.master, plain.master));
  EXPECT_TRUE(at::equal(recorded.rounded, plain.rounded));
  EXPECT_FALSE(at::equal(plain.master, start));
}

INSTANTIATE_TEST_SUITE_P(Devices, QueryUpdateTest, ::testing::Values(DeviceKind::kCpu, DeviceKind::kCuda),
                         [](const auto& info) { return info.param == DeviceKind::kCpu ? "cpu" : "cuda"; });

}  // namespace
}  // namespace refocus
