// The Hopper kernels behind Attend and QueryGrad, on K and V in bf16 or (Int8) in eight bits; internal to kernels/. The shape is valid, has rows and UsesHopper.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/attention.h"
#include "kernels/attention_plan.h"

namespace refocus::kernels {

// out [splits, rows, heads, head_dim], lse [splits, rows, heads].
cudaError_t AttendHopper(const AttendParams& params, int splits, float* out, float* lse, int sm_count,
                         cudaStream_t stream);
cudaError_t AttendHopperInt8(const AttendParams& params, int splits, float* out, float* lse, int sm_count,
                             cudaStream_t stream);

// dq [splits, rows, heads, head_dim].
cudaError_t QueryGradHopper(const QueryGradParams& params, int splits, float* dq, int sm_count, cudaStream_t stream);
cudaError_t QueryGradHopperInt8(const QueryGradParams& params, int splits, float* dq, int sm_count,
                                cudaStream_t stream);

}  // namespace refocus::kernels
