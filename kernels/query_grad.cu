// The gradient with respect to the queries: which kernel, and what is left to add up.
#include "kernels/hopper_paths.h"
#include "kernels/query_grad_tiles.cuh"
#include "kernels/sum_parts.cuh"

namespace refocus::kernels {

cudaError_t QueryGrad(const QueryGradParams& params, int sm_count, cudaStream_t stream) {
  const AttentionShape& shape = params.shape;
  if (!ValidShape(shape) || sm_count <= 0) return cudaErrorInvalidValue;
  if (shape.rows == 0) return cudaSuccess;
  const int splits = QueryGradSplits(shape, sm_count);
  float* const dq = splits == 1 ? params.dq : static_cast<float*>(params.workspace);
  const auto run = [&] {
    if (UsesHopper(shape)) {
      return (shape.int8 ? QueryGradHopperInt8 : QueryGradHopper)(params, splits, dq, sm_count, stream);
    }
    return (shape.int8 ? QueryGradInt8 : QueryGradTiles<false>)(params, splits, dq, stream);
  };
  const cudaError_t error = run();
  if (error != cudaSuccess || splits == 1) return error;
  return SumParts(dq, splits, shape.rows * shape.heads * shape.head_dim, params.dq, stream);
}

}  // namespace refocus::kernels
