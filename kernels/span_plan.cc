#include "kernels/span_plan.h"

#include <algorithm>

namespace refocus::kernels {
namespace {

// Rates of one H100/H200 multiprocessor, in bytes a microsecond, that the choice balances: its share of the memory
// stream and of the L2 cache's, and what it can take in alone. Rough is good enough: they only rank the plans.
constexpr double kMemoryRate = 3.2e4;
constexpr double kCacheRate = 4.8e4;
constexpr double kOwnRate = 5.0e4;
constexpr double kBlockUs = 2.0;    // first loads, epilogue
constexpr double kClusterUs = 1.5;  // two barriers of a cluster and the way to the others' sums
constexpr double kExchangeRate = 5e4;

constexpr int kRowBytes = kMostSpanRows * kSpanDepth * 2;  // of a step

constexpr int kWidths[] = {64, 128, 160, 192};

int64_t ClustersAtOnce(int cluster, const SpanGpu& gpu) {
  const int at = cluster == 1 ? 0 : cluster == 2 ? 1 : cluster == 4 ? 2 : 3;
  return std::max(1, gpu.clusters[at]);
}

double TimeUs(const SpanSize& size, const SpanPlan& plan, const SpanGpu& gpu) {
  const int64_t tiles = SpanTiles(size, plan) * size.products;
  const int64_t at_once = ClustersAtOnce(plan.splits, gpu);
  const double rounds = static_cast<double>((tiles + at_once - 1) / at_once);
  const int64_t stages = (size.depth + kSpanDepth - 1) / kSpanDepth;
  const double steps = static_cast<double>(size.terms * ((stages + plan.splits - 1) / plan.splits));
  const double weights = plan.columns * kSpanDepth * 2;
  const double rows = size.shared_rows ? static_cast<double>(kRowBytes) / size.terms : kRowBytes;
  const double share =
      static_cast<double>(gpu.multiprocessors) / static_cast<double>(std::min(tiles, at_once) * plan.splits);
  const double step_us = std::max(weights / std::min(kOwnRate, kMemoryRate * share),
                                  (weights + rows) / std::min(kOwnRate, kCacheRate * share));
  if (plan.splits == 1) return rounds * steps * step_us + kBlockUs;
  const double exchange_us = kClusterUs + kMostSpanRows * plan.columns * 4 / kExchangeRate;
  return rounds * (steps * step_us + kBlockUs + exchange_us);
}

// The best of the widths with so many splits.
SpanPlan BestWidth(const SpanSize& size, int splits, const SpanGpu& gpu) {
  SpanPlan best{kWidths[0], splits};
  for (const int width : kWidths) {
    const SpanPlan plan{width, splits};
    if (TimeUs(size, plan, gpu) < TimeUs(size, best, gpu)) best = plan;
  }
  return best;
}

}  // namespace

SpanGpu SpanGpu::Usual(int multiprocessors) {
  const int eights = multiprocessors / kMostSpanCluster;
  return {multiprocessors, {multiprocessors, multiprocessors / 2, 2 * eights, eights}};
}

SpanPlan PlanSpan(const SpanSize& size, const SpanGpu& gpu) {
  const SpanGpu usual = SpanGpu::Usual(gpu.multiprocessors);
  const int64_t stages = (size.depth + kSpanDepth - 1) / kSpanDepth;
  SpanPlan best = BestWidth(size, 1, usual);
  for (int splits = 2; splits <= kMostSpanCluster && splits <= stages; splits *= 2) {
    const SpanPlan plan = BestWidth(size, splits, usual);
    if (TimeUs(size, plan, usual) < TimeUs(size, best, usual)) best = plan;
  }
  return BestWidth(size, best.splits, gpu);
}

int64_t SpanBlocks(const SpanSize& size, const SpanPlan& plan, const SpanGpu& gpu) {
  const int64_t tiles = SpanTiles(size, plan) * size.products;
  return plan.splits > 1 ? tiles * plan.splits : std::min(tiles, ClustersAtOnce(1, gpu));
}

}  // namespace refocus::kernels
