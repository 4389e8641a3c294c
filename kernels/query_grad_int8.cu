#include "kernels/query_grad_tiles.cuh"

namespace refocus::kernels {

cudaError_t QueryGradInt8(const QueryGradParams& params, int splits, float* dq, cudaStream_t stream) {
  return QueryGradTiles<true>(params, splits, dq, stream);
}

}  // namespace refocus::kernels
