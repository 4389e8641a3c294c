#include "kernels/query_grad_hopper.cuh"

namespace refocus::kernels {

cudaError_t QueryGradHopperInt8(const QueryGradParams& params, int splits, float* dq, int sm_count,
                                cudaStream_t stream) {
  return QueryGradOnHopper<true>(params, splits, dq, sm_count, stream);
}

}  // namespace refocus::kernels
