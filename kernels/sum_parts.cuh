#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace refocus::kernels {

// sum[i] = parts[0][i] + parts[1][i] + ...: parts [count, elements] fp32, elements a multiple of 4.
cudaError_t SumParts(const float* parts, int count, int64_t elements, float* sum, cudaStream_t stream);

}  // namespace refocus::kernels
