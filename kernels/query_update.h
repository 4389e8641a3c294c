// A step of AdamW on a full delta of the query projections whose gradient is never written. With few rows the gradient
// of layer l is a product of two thin factors, dW_l = dq_l^T . h_l, and all that a step needs of it follows from them:
//
//   norm^2 = sum_l |dW_l|^2 = sum_l sum_ij (h_l . h_l^T)_ij * (dq_l . dq_l^T)_ij        rows x rows products
//   g = dW / divisor                               max(1, (norm + 1e-6) / clip): torch.nn.utils.clip_grad_norm_
//   m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2
//   p = p - rate * weight_decay * p - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)
//
// (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), with tiles of dW computed where p, m and v pass by: each of
// them is read and written once, and the rounded delta written, 26 bytes a number.
//
// All pointers but those of QueryFactors itself are device memory, contiguous row-major, aligned to 16 bytes. Functions
// enqueue on `stream`, allocate nothing, may be captured, and give the same bits for the same inputs. They return the
// launches' error; cudaErrorInvalidValue, and nothing is launched, for what does not fit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace refocus::kernels {

inline constexpr int64_t kFactorRows = 128;  // at most

struct QueryFactors {
  int64_t layers = 0;
  int64_t rows = 0;  // at most kFactorRows; 0: the gradient is zero
  int64_t out = 0;   // multiples of 8
  int64_t in = 0;
  // Host memory, read before the call returns: of each layer
  const void* const* dq = nullptr;  // bf16 [rows, out]
  const void* const* h = nullptr;   // bf16 [rows, in]
};

inline bool FactorsFit(int64_t rows, int64_t out, int64_t in) {
  return rows <= kFactorRows && out % 8 == 0 && in % 8 == 0;
}

// norm [1] = |dW| over all layers. Products of rows are summed in fp32 over 512 columns, all other sums are fp64. NaN
// and infinity come through.
int64_t QueryNormWorkspaceBytes(const QueryFactors& factors);
cudaError_t QueryNorm(const QueryFactors& factors, void* workspace, double* norm, cudaStream_t stream);

struct QueryUpdateParams {
  QueryFactors factors;
  float* p = nullptr;              // [layers, out, in]
  float* m = nullptr;
  float* v = nullptr;
  void* rounded = nullptr;         // bf16 [layers, out, in]: p rounded
  const float* rate = nullptr;     // [1], as the three that follow: read when the kernels run
  const float* steps = nullptr;    // t, the number of this one
  const float* divisor = nullptr;  // of the gradient
  const float* skip = nullptr;     // not 0: nothing changes
  float* workspace = nullptr;      // [kQueryUpdateWords]
  double beta1 = 0.0;
  double beta2 = 0.0;
  double epsilon = 0.0;
  double weight_decay = 0.0;
};
inline constexpr int64_t kQueryUpdateWords = 8;
cudaError_t QueryUpdate(const QueryUpdateParams& params, cudaStream_t stream);

}  // namespace refocus::kernels
