#include "kernels/query_grad_hopper.cuh"

namespace refocus::kernels {

cudaError_t QueryGradHopper(const QueryGradParams& params, int splits, float* dq, int sm_count,
                            cudaStream_t stream) {
  return QueryGradOnHopper<false>(params, splits, dq, sm_count, stream);
}

}  // namespace refocus::kernels
