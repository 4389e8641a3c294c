// Partial attention: which kernel, and what is left to combine.
#include "kernels/attend_tiles.cuh"
#include "kernels/hopper_paths.h"

namespace refocus::kernels {

cudaError_t Attend(const AttendParams& params, int sm_count, cudaStream_t stream) {
  const AttentionShape& shape = params.shape;
  if (!ValidShape(shape) || sm_count <= 0) return cudaErrorInvalidValue;
  if (shape.rows == 0) return cudaSuccess;
  const int splits = AttendSplits(shape, sm_count);
  const bool direct = splits == 1 || params.partials;
  float* const out = direct ? params.out : static_cast<float*>(params.workspace);
  float* const lse = direct ? params.lse : out + splits * shape.rows * shape.heads * shape.head_dim;
  const auto run = [&] {
    if (UsesHopper(shape)) {
      return (shape.int8 ? AttendHopperInt8 : AttendHopper)(params, splits, out, lse, sm_count, stream);
    }
    return (shape.int8 ? AttendInt8 : AttendTiles<false>)(params, splits, out, lse, stream);
  };
  const cudaError_t error = run();
  if (error != cudaSuccess || direct) return error;
  CombineParams combine;
  combine.parts = splits;
  combine.rows = shape.rows;
  combine.heads = shape.heads;
  combine.head_dim = shape.head_dim;
  combine.part_out = out;
  combine.part_lse = lse;
  combine.out = params.out;
  combine.lse = params.lse;
  return Combine(combine, stream);
}

}  // namespace refocus::kernels
