#include "kernels/attend_hopper.cuh"

namespace refocus::kernels {

cudaError_t AttendHopper(const AttendParams& params, int splits, float* out, float* lse, int sm_count,
                         cudaStream_t stream) {
  return AttendOnHopper<false>(params, splits, out, lse, sm_count, stream);
}

}  // namespace refocus::kernels
