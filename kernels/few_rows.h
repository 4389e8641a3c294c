// Products of a few rows with weight matrices: decoding, where a matrix is read once and everything else is small.
// Bound by reading the weights.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

namespace refocus::kernels {

inline constexpr int kFewRows = 8;  // of a product, at most

// Device memory, row-major, matrices and x aligned to 16 bytes.
struct FewRowsProduct {
  enum class Kind { kFloat, kBf16, kGated };
  Kind kind = Kind::kFloat;
  float scale = 1.0f;            // kFloat
  int64_t rows = 0;              // 0 to kFewRows
  int64_t in = 0;                // a multiple of 8
  int64_t out = 0;
  int64_t stride = 0;            // elements from a row of a matrix to its next, a multiple of 8, at least in; 0: in
  const void* x = nullptr;       // bf16 [rows, in]
  // Matrices may be read while the kernel enqueued before still runs: what wrote them must be complete when that begins.
  const void* w = nullptr;       // bf16 [out, in]
  // kFloat, kBf16: a second matrix, bf16 [out, in], or null: y = x . w^T + x . second^T, summed in fp32.
  // kGated: y = silu(x . w^T) * (x . second^T), bf16, both products rounded to bf16 first.
  const void* second = nullptr;
  const void* bias = nullptr;    // bf16 [out] or null; not for kGated
  const float* add = nullptr;    // kFloat: [rows, out], or null, may be y: y = add + scale * (the sum)
  void* y = nullptr;             // [rows, out], fp32 or bf16
};

inline bool FewRowsFit(int64_t rows, int64_t in) { return rows <= kFewRows && in % 8 == 0; }

// Products that do not read what another one writes; up to 32 are one launch, of more there are several. fp32 sums in
// an order that depends on `in` alone: a row's result does not depend on other rows or products. Enqueues on `stream`,
// may be captured. Returns the launches' error; cudaErrorInvalidValue, and nothing is launched, for what does not fit.
cudaError_t FewRows(std::span<const FewRowsProduct> products, cudaStream_t stream);

}  // namespace refocus::kernels
