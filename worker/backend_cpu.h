// The CPU backend with chosen kernels, for tests and benches; everyone else takes MakeCpuBackend() of worker/backend.h.
#pragma once

#include <memory>

#include "worker/backend.h"
#include "worker/backend_cpu_kernels.h"

namespace refocus {

// `kernels` must run on this processor and outlive the backend.
std::unique_ptr<Backend> MakeCpuBackend(const CpuKernels& kernels, const ModelConfig& config = {},
                                        KvType kv = KvType::kDevice);

}  // namespace refocus
