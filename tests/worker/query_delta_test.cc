// Projections of rows that read different adapters, against products in fp64 of the numbers that the device holds. On
// the CPU, and on a GPU where there is one.
#include "worker/query_delta.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>

#include <gtest/gtest.h>

#include "worker/device.h"

namespace refocus {
namespace {

constexpr int64_t kLayers = 2, kRows = 40;

class ProjectQueriesTest : public ::testing::TestWithParam<DeviceKind> {
 protected:
  void SetUp() override {
    model_.layers = kLayers;
    model_.heads = 4;
    model_.kv_heads = 1;
    model_.head_dim = 8;
    model_.hidden = 24;
    model_.vocab = 10;
    model_.mlp = 8;
    if (GetParam() == DeviceKind::kCpu) {
      backend_ = MakeCpuBackend(model_);
    } else {
      const StatusOr<Gpu> gpu = UseGpu(0, 1);
      if (!gpu.ok()) GTEST_SKIP() << gpu.status();
      backend_ = MakeGpuBackend(model_, *gpu);
    }
    backend_->Bind();
    h_ = Drawn({kRows, model_.hidden});
    wq_ = Drawn({model_.q_dim(), model_.hidden});
  }

  at::Tensor Drawn(at::IntArrayRef sizes) {
    return at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(++seed_), at::kFloat)
        .to(at::TensorOptions(backend_->device()).dtype(backend_->dtype()));
  }

  QueryDelta Delta(int64_t rank) {
    const DeltaConfig config{.lora_rank = rank, .lora_alpha = 3.0f};
    return DeltaOver(model_, config, Drawn(DeltaSizes(model_, config)));
  }

  static at::Tensor Exact(const at::Tensor& t) { return t.to(at::TensorOptions(at::kCPU).dtype(at::kDouble)); }

  at::Tensor Expected(const std::vector<AdapterRows>& adapters, int64_t layer) const {
    const at::Tensor h = Exact(h_);
    at::Tensor q = at::mm(h, Exact(wq_).t());
    for (const AdapterRows& rows : adapters) {
      const QueryDelta& d = rows.delta;
      if (!d.defined()) continue;
      at::Tensor x = h.narrow(0, rows.first, rows.count);
      if (d.lora()) x = Exact(at::mm(x, Exact(d.a.select(0, layer)).t()).to(backend_->dtype()));
      const at::Tensor w = Exact((d.lora() ? d.b : d.full).select(0, layer));
      q.narrow(0, rows.first, rows.count).add_(at::mm(x, w.t()), d.scale);
    }
    return q;
  }

  at::Tensor Project(const std::vector<AdapterRows>& adapters, int64_t layer) {
    return ProjectQueries(*backend_, h_, wq_, adapters, layer);
  }

  // Sums are fp32. A thin product that lies between two numbers of bf16 may be rounded to either.
  void ExpectNear(const at::Tensor& q, const std::vector<AdapterRows>& adapters, int64_t layer) {
    ASSERT_EQ(q.scalar_type(), at::kFloat);
    const at::Tensor error = (Exact(q) - Expected(adapters, layer)).abs();
    for (int64_t row = 0; row < error.size(0); ++row) {
      bool rounded = false;
      for (const AdapterRows& a : adapters) {
        rounded = rounded || (a.delta.lora() && a.first <= row && row < a.first + a.count);
      }
      const double bound = rounded && backend_->dtype() == at::kBFloat16 ? 0.1 : 1e-4;
      EXPECT_LE(error[row].max().item<double>(), bound) << "row " << row << " layer " << layer;
    }
  }

  void Compare(const std::vector<AdapterRows>& adapters) {
    for (int64_t layer = 0; layer < kLayers; ++layer) ExpectNear(Project(adapters, layer), adapters, layer);
  }

  // Row 10 and those from 38 on are nobody's; 11 and 12 are of no adapter by name.
  std::vector<AdapterRows> Mixed() {
    const QueryDelta full = Delta(0), other = Delta(0), odd = Delta(5), eight = Delta(8), one = Delta(1);
    return {{0, 3, full}, {3, 1, odd},   {4, 0, eight}, {4, 2, other}, {6, 4, eight},
            {11, 2, {}},  {13, 8, full}, {21, 9, odd},  {30, 1, one},  {31, 7, other}};
  }

  ModelConfig model_;
  std::unique_ptr<Backend> backend_;
  at::Tensor h_, wq_;
  uint64_t seed_ = 0;
};

TEST_P(ProjectQueriesTest, MixedAdapters) {
  const std::vector<AdapterRows> mixed = Mixed();
  Compare(mixed);
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    const at::Tensor q = Project(mixed, layer), base = Project({}, layer);
    for (const int64_t row : {10, 11, 12, 38, 39}) EXPECT_TRUE(at::equal(q[row], base[row])) << row;
    for (const int64_t row : {0, 3, 5, 9, 20, 29, 30, 37}) EXPECT_FALSE(at::equal(q[row], base[row])) << row;
  }
}

TEST_P(ProjectQueriesTest, OneAdapterOfAllRowsOrNone) {
  for (const int64_t rank : {0, 3, 8, 9}) Compare({{0, kRows, Delta(rank)}});
  Compare({});
  Compare({{0, kRows, {}}});
  h_ = h_.narrow(0, 0, 0);
  EXPECT_EQ(Project({{0, 0, Delta(3)}, {0, 0, Delta(0)}}, 0).sizes(), (std::vector<int64_t>{0, model_.q_dim()}));
}

// So few rows that the base product is one of few rows, too: adapters side by side give the bits that each gives alone.
TEST_P(ProjectQueriesTest, NeighboursDoNotMatter) {
  const at::Tensor all = h_.narrow(0, 0, 8);
  for (const int64_t rank : {0, 8}) {
    const QueryDelta first = Delta(rank), second = Delta(rank);
    h_ = all;
    const at::Tensor mixed = Project({{0, 3, first}, {3, 5, second}}, 1);
    h_ = all.narrow(0, 0, 3);
    EXPECT_TRUE(at::equal(mixed.narrow(0, 0, 3), Project({{0, 3, first}}, 1))) << rank;
    h_ = all.narrow(0, 3, 5);
    EXPECT_TRUE(at::equal(mixed.narrow(0, 3, 5), Project({{0, 5, second}}, 1))) << rank;
  }
}

TEST_P(ProjectQueriesTest, Repeats) {
  const std::vector<AdapterRows> mixed = Mixed();
  const at::Tensor expected = Project(mixed, 1);
  at::Tensor q;
  const auto repeat = backend_->Repeated([&] { q = Project(mixed, 1); });
  for (int run = 0; run < 4; ++run) {
    if (q.defined()) q.zero_();
    repeat->Run();
    EXPECT_TRUE(at::equal(q, expected)) << "run " << run;
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, ProjectQueriesTest, ::testing::Values(DeviceKind::kCpu, DeviceKind::kCuda),
                         [](const auto& info) { return info.param == DeviceKind::kCpu ? "cpu" : "cuda"; });

}  // namespace
}  // namespace refocus
