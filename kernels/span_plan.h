// How the products of a span's rows (kernels/span_product.h) are cut into blocks: without CUDA, so that the choice is
// tested on any machine.
#pragma once

#include <cstdint>

namespace refocus::kernels {

inline constexpr int64_t kMostSpanRows = 128;
inline constexpr int kSpanDepth = 64;  // elements of the sum that a block takes at once
inline constexpr int kMostSpanCluster = 8;

struct SpanSize {
  int64_t columns = 0;  // of one product's result
  int64_t depth = 0;    // of the sum, of each term
  int products = 1;
  int terms = 1;
  bool shared_rows = false;  // the terms have the same left factor
};

// What decides about blocks. Clusters lie within parts of the GPU whose sizes differ from one GPU to another of a kind.
struct SpanGpu {
  int multiprocessors = 0;
  int clusters[4] = {};  // of 1, 2, 4 and 8 blocks that run at once, a block to a multiprocessor

  // As GPUs of so many multiprocessors have them if no part is smaller than 16.
  static SpanGpu Usual(int multiprocessors);
};

// Where cuBLAS is slower (bench/span_bench, H200). For 65 to 128 rows and one matrix it is not: the kernel reads the
// rows again in every block; backward cuBLAS is as fast with fewer. Two matrices it reads in two launches.
constexpr bool SpanPays(int64_t rows, int terms, bool backward) { return terms == 2 || (!backward && rows <= 64); }

// A block makes `columns` columns of a result, 64, 128, 160 or 192, of all rows. The sum's depth is split among the
// `splits` blocks (1, 2, 4 or 8) of a cluster.
struct SpanPlan {
  int columns = 64;
  int splits = 1;
};

// Neither depends on the number of rows nor, in `splits`, on how many clusters fit: so the order in which a row's
// products are added is the same in every batch and on all GPUs with as many multiprocessors, which ranks need that
// compute the same.
SpanPlan PlanSpan(const SpanSize& size, const SpanGpu& gpu);

// Of one product.
inline int64_t SpanTiles(const SpanSize& size, const SpanPlan& plan) {
  return (size.columns + plan.columns - 1) / plan.columns;
}

// A whole number of clusters. Blocks without splits take one tile after the other, split ones a tile each.
int64_t SpanBlocks(const SpanSize& size, const SpanPlan& plan, const SpanGpu& gpu);

}  // namespace refocus::kernels
