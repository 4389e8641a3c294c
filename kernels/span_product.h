// Products of the rows of a span with weight matrices, on Hopper: up to 128 rows, as an adaptation step, a short prompt
// or a wide decode batch has them. Bound by reading the weights; forward and of up to eight rows kernels/few_rows.h is
// faster.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "kernels/span_plan.h"

namespace refocus::kernels {

// Device memory, row-major, aligned to 16 bytes.
struct SpanTerm {
  const void* x = nullptr;  // bf16 [rows, in]; backward [rows, out]
  // May be read while the kernel enqueued before still runs: what wrote it must be complete when that begins.
  const void* w = nullptr;  // bf16 [out, in]
};

// y = x . w^T, or backward y = x . w, summed over the terms in fp32 and rounded once.
struct SpanProduct {
  int64_t rows = 0;  // 0 to kMostSpanRows
  int64_t in = 0;    // multiples of 8
  int64_t out = 0;
  int64_t stride = 0;  // elements from a row of w to its next, a multiple of 8, at least in; 0: in
  bool backward = false;
  int terms = 1;  // 1 or 2
  SpanTerm term[2];
  bool wide = false;  // y in fp32, else bf16
  void* y = nullptr;  // [rows, out]; backward [rows, in]
};

inline bool SpanFits(int64_t rows, int64_t in, int64_t out) {
  return rows > 0 && rows <= kMostSpanRows && in > 0 && in % 8 == 0 && out > 0 && out % 8 == 0;
}

// Of the current device. Host calls only; once is enough.
cudaError_t MeasureSpanGpu(SpanGpu* gpu);

// One product, or two of one term each that differ in w, y and wide alone, in one launch. The order of the sums depends
// on the sizes but rows, on the number of multiprocessors, and on whether there are two: a row's result does not depend
// on other rows. Enqueues on `stream`, may be captured. Needs compute capability 9.0. Returns the launch's error;
// cudaErrorInvalidValue, and nothing is launched, for what does not fit.
cudaError_t SpanProducts(std::span<const SpanProduct> products, const SpanGpu& gpu, cudaStream_t stream);

// Cut so instead of as PlanSpan says.
cudaError_t SpanProducts(std::span<const SpanProduct> products, SpanPlan plan, const SpanGpu& gpu, cudaStream_t stream);

SpanSize SpanSizeOf(std::span<const SpanProduct> products);

}  // namespace refocus::kernels
