// How products of a span's rows are cut into blocks, without a GPU.
#include "kernels/span_plan.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

namespace refocus::kernels {
namespace {

constexpr int kSms = 132;
const SpanGpu kGpu = SpanGpu::Usual(kSms);

SpanSize Size(int64_t columns, int64_t depth, int products = 1, int terms = 1, bool shared_rows = false) {
  return {columns, depth, products, terms, shared_rows};
}

// The most of the matrices that one multiprocessor reads, over an equal share.
double Imbalance(const SpanSize& size) {
  const SpanPlan plan = PlanSpan(size, kGpu);
  const int64_t clusters = SpanBlocks(size, plan, kGpu) / plan.splits;
  const int64_t tiles = SpanTiles(size, plan) * size.products;
  const int64_t at_once = plan.splits == 1 ? kSms : kSms / plan.splits;
  const int64_t rounds = plan.splits == 1 ? (tiles + clusters - 1) / clusters : (clusters + at_once - 1) / at_once;
  const int64_t stages = (size.depth + kSpanDepth - 1) / kSpanDepth;
  const double most =
      static_cast<double>(rounds * plan.columns * ((stages + plan.splits - 1) / plan.splits) * kSpanDepth);
  return most * kSms / static_cast<double>(size.products * size.columns * size.depth);
}

TEST(SpanPlan, ShapesOfA4BModelFillTheGpu) {
  const SpanSize sizes[] = {Size(4096, 2560),       Size(4096, 2560, 1, 2, true),
                            Size(2560, 4096),       Size(2560, 4096, 1, 2, true),
                            Size(9728, 2560, 2),    Size(2560, 9728),
                            Size(2560, 9728, 1, 2), Size(9728, 2560),
                            Size(151936, 2560),     Size(2560, 151936)};
  for (const SpanSize& size : sizes) {
    const SpanPlan plan = PlanSpan(size, kGpu);
    EXPECT_LE(Imbalance(size), 1.1) << size.columns << " columns, depth " << size.depth << ": tiles of " << plan.columns
                                    << ", " << plan.splits << " splits";
  }
}

TEST(SpanPlan, ReadsNoMoreOfTheRowsThanOfTheWeights) {
  for (const SpanSize& size : {Size(4096, 2560), Size(2560, 4096), Size(9728, 2560, 2), Size(2560, 9728, 1, 2)}) {
    EXPECT_GE(PlanSpan(size, kGpu).columns, kMostSpanRows) << size.columns << " columns, depth " << size.depth;
  }
}

TEST(SpanPlan, EveryPlanIsOneThatThereIs) {
  for (const int sms : {1, 8, 100, 132, 144}) {
    for (const int64_t columns : {8, 72, 200, 1024, 4096, 32000, 151936}) {
      for (const int64_t depth : {8, 64, 72, 200, 2560, 9728, 151936}) {
        for (const int matrices : {1, 2, 3}) {
          const SpanSize size = Size(columns, depth, matrices == 2 ? 2 : 1, matrices == 3 ? 2 : 1, columns == 72);
          const SpanPlan plan = PlanSpan(size, SpanGpu::Usual(sms));
          const std::string what = std::to_string(columns) + " columns, depth " + std::to_string(depth);
          EXPECT_TRUE(plan.columns == 64 || plan.columns == 128 || plan.columns == 160 || plan.columns == 192) << what;
          EXPECT_TRUE(plan.splits == 1 || plan.splits == 2 || plan.splits == 4 || plan.splits == 8) << what;
          EXPECT_LE(plan.splits, (depth + kSpanDepth - 1) / kSpanDepth) << what;
          const int64_t blocks = SpanBlocks(size, plan, SpanGpu::Usual(sms)),
                        tiles = SpanTiles(size, plan) * size.products;
          EXPECT_GE(blocks, 1) << what;
          EXPECT_TRUE(plan.splits == 1 ? blocks <= sms && blocks <= tiles : blocks == tiles * plan.splits) << what;
        }
      }
    }
  }
}

TEST(SpanPlan, ShortSumsAreNotSplit) {
  EXPECT_EQ(PlanSpan(Size(151936, 2560), kGpu).splits, 1);
  EXPECT_EQ(PlanSpan(Size(8, 8), kGpu).splits, 1);
  EXPECT_EQ(PlanSpan(Size(4096, 16), kGpu).splits, 1);
}

// GPUs of one kind differ in how many clusters they hold: the order of sums must not.
TEST(SpanPlan, FewerClustersChangeTheWidthAlone) {
  SpanGpu gpu = kGpu;
  gpu.clusters[2] = 30;
  gpu.clusters[3] = 14;
  for (const int64_t columns : {1024, 2560, 4096, 9728, 151936}) {
    for (const int64_t depth : {64, 2560, 4096, 9728}) {
      for (const int terms : {1, 2}) {
        const SpanSize size = Size(columns, depth, 1, terms);
        EXPECT_EQ(PlanSpan(size, gpu).splits, PlanSpan(size, kGpu).splits) << columns << " " << depth;
      }
    }
  }
  const SpanSize down = Size(2560, 9728);
  EXPECT_EQ(PlanSpan(down, kGpu).splits, 8);
  EXPECT_GT(SpanTiles(down, PlanSpan(down, kGpu)), 14);
  EXPECT_LE(SpanTiles(down, PlanSpan(down, gpu)), 14);
}

}  // namespace
}  // namespace refocus::kernels
