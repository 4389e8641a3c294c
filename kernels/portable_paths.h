// The portable kernels on K and V in eight bits, compiled apart from those on bf16; internal to kernels/. Shapes are
// valid and have rows.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention.h"

namespace refocus::kernels {

// out [splits, rows, heads, head_dim], lse [splits, rows, heads].
cudaError_t AttendInt8(const AttendParams& params, int splits, float* out, float* lse, cudaStream_t stream);

// dq [splits, rows, heads, head_dim].
cudaError_t QueryGradInt8(const QueryGradParams& params, int splits, float* dq, cudaStream_t stream);

}  // namespace refocus::kernels
