#include "kernels/attend_tiles.cuh"

namespace refocus::kernels {

cudaError_t AttendInt8(const AttendParams& params, int splits, float* out, float* lse, cudaStream_t stream) {
  return AttendTiles<true>(params, splits, out, lse, stream);
}

}  // namespace refocus::kernels
