#include "kernels/attend_hopper.cuh"

namespace refocus::kernels {

cudaError_t AttendHopperInt8(const AttendParams& params, int splits, float* out, float* lse, int sm_count,
                             cudaStream_t stream) {
  return AttendOnHopper<true>(params, splits, out, lse, sm_count, stream);
}

}  // namespace refocus::kernels
