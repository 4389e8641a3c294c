// Time of work on a stream, as the device takes it: replayed CUDA graphs of as many calls as fill a sample. No launch
// overhead counts, only what the device does.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#include "bench/kernel_report.h"

namespace refocus {

constexpr int kTimingSamples = 15;

// `call` enqueues on `stream` and gets its number, from 0; it throws when it cannot. The first two run eagerly, so that
// libraries set up what they keep. Throws std::runtime_error on CUDA's errors and what `call` throws.
Timing Time(cudaStream_t stream, const std::function<void(int)>& call, double sample_ms = 2.0);

// Throws std::runtime_error "what: CUDA's words".
void RequireCuda(cudaError_t error, const char* what);

}  // namespace refocus
