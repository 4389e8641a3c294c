// Spans that are read again behind the context: their loss and gradient against autograd in fp64, and what they see.
#include <ATen/TensorOperators.h>

#include "tests/worker/gradient_fixture.h"
#include "tests/worker/torch_oracle.h"

namespace refocus {
namespace {

class BehindTest : public GradientTest {
 protected:
  BehindTest() : oracle_(*weights_, at::kCPU, at::kDouble) {
    at::set_num_threads(1);
    oracle_.Prefill(golden_.context());
  }

  int64_t tokens() const { return static_cast<int64_t>(golden_.context().size()); }

  // `rows` rows of the context from `start` on, read again `at` tokens behind its end; at < 0: where they stand.
  Span SpanOf(int64_t start, int64_t rows, int64_t at) const {
    const std::vector<int32_t> ids = golden_.context();
    return {start, {ids.begin() + start, ids.begin() + start + rows + 1}, at < 0 ? 0 : tokens() + at};
  }

  TorchOracle oracle_;
};

TEST_P(BehindTest, LossAndGradientOfFp64) {
  const std::vector<std::vector<Span>> steps = {
      {SpanOf(3, 1, 0)},
      {SpanOf(40, 17, 5)},
      {SpanOf(3, 1, 700), SpanOf(9, 1, 0), SpanOf(3, 1, 31), SpanOf(50, 1, 1)},
      {SpanOf(0, 2, 0), SpanOf(20, 9, -1), SpanOf(31, 11, 3)},
  };
  const at::Tensor delta = golden_.layers("delta");
  for (const std::vector<Span>& spans : steps) {
    const TorchOracle::Gradient exact = oracle_.SpanGradient(spans, delta);
    OnRanks(golden_.context(), [&](const Rank& rank) {
      at::Tensor gradient = NewDelta();
      EXPECT_NEAR(SpanGradient(rank.model, rank.context, delta, spans, gradient), exact.loss, kLossBound);
      EXPECT_NEAR(SpanLoss(rank.model, rank.context, delta, spans), exact.loss, kLossBound);
      EXPECT_LE(RelativeError(gradient, exact.grad), kTensorBound) << spans.size() << " spans on rank " << rank.index;
    });
  }
}

// Read right behind the context they are a question's rows.
TEST_P(BehindTest, AsAQuestion) {
  const Span span = SpanOf(25, 12, 0);
  const at::Tensor logprobs = oracle_.TailLogprobs({span.ids.begin(), span.ids.end() - 1}, golden_.layers("delta"));
  double loss = 0;
  for (int64_t row = 0; row < span.rows(); ++row) loss -= logprobs[row][span.ids[row + 1]].item<double>() / span.rows();
  OnRanks(golden_.context(), [&](const Rank& rank) {
    EXPECT_NEAR(SpanLoss(rank.model, rank.context, golden_.layers("delta"), {span}), loss, kLossBound);
  });
}

TEST_P(BehindTest, SpansDoNotSeeEachOther) {
  const Span first = SpanOf(30, 6, 4), second = SpanOf(8, 10, 4), later = SpanOf(36, 1, 10);
  OnRanks(golden_.context(), [&](const Rank& rank) {
    const auto loss = [&](const std::vector<Span>& spans) {
      return SpanLoss(rank.model, rank.context, QueryDelta(), spans) * static_cast<double>(TotalRows(spans));
    };
    EXPECT_NEAR(loss({first, second, later}), loss({first}) + loss({second}) + loss({later}), 20 * kLossBound);
  });
}

// Micro-batches end where spans do, and steps may change from one kind of span to the other.
TEST_P(BehindTest, ManyRowsAndChangingSteps) {
  std::vector<Span> many, same(1, SpanOf(10, 8, -1)), alone;
  for (int64_t i = 0; i < 40; ++i) many.push_back(SpanOf(i, 15, 3 * i));
  for (int64_t i = 0; i < 8; ++i) alone.push_back(SpanOf(10 + i, 1, 40 + i));
  ASSERT_GT(TotalRows(many), kMicroBatchRows);
  const double exact = oracle_.SpanGradient(many, golden_.layers("delta")).loss;
  OnRanks(golden_.context(), [&](const Rank& rank) {
    EXPECT_NEAR(SpanLoss(rank.model, rank.context, golden_.layers("delta"), many), exact, kLossBound);
    Adapter adapter(1);
    adapter.Begin(rank.model, {}, {});
    for (const std::vector<Span>* spans : {&same, &alone, &same, &alone, &many, &alone}) {
      const double expected = SpanLoss(rank.model, rank.context, adapter.working_rounded(), *spans);
      EXPECT_NEAR(adapter.Step(rank.model, rank.context, *spans, 1e-3f).loss, expected, kLossBound);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Models, BehindTest,
                         ::testing::Combine(::testing::Values("llama", "qwen3"), ::testing::Values(1, 3)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" + std::to_string(std::get<1>(info.param)) + "_ranks";
                         });

}  // namespace
}  // namespace refocus
