// What this process needs to know about its GPU before anything of the model exists. device_cuda.cc, or device_none.cc
// in a build without CUDA, where every use is refused.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/model_config.h"
#include "base/status.h"
#include "worker/backend.h"
#include "worker/collective.h"

namespace refocus {

struct Gpu {
  int index = 0;            // among the visible devices
  std::string name;         // "NVIDIA H200"
  int64_t free_bytes = 0;   // when it was looked at
  int64_t total_bytes = 0;
};

// Makes device `local_rank` of the visible ones (CUDA_VISIBLE_DEVICES) the calling thread's current device and starts
// CUDA on it. HARDWARE, naming what was found: no device or driver, fewer devices than `ranks_on_host`, a driver too
// old for this build, another compute capability than 9.0, a device that cannot be used.
StatusOr<Gpu> UseGpu(int local_rank, int ranks_on_host);

// Of the calling thread's current device, by everybody; 0 without one.
int64_t GpuUsedBytes();

// Gives memory that LibTorch keeps for reuse back to the device.
void GpuReleaseCached();

// For ranks whose UseGpu succeeded.
std::unique_ptr<Backend> MakeGpuBackend(const ModelConfig& config, const Gpu& gpu, KvType kv = KvType::kDevice);
std::string MakeGpuGroupId();  // MakeNcclId
std::shared_ptr<Collective> MakeGpuCollective(const std::string& id, int rank, int size, double deadline_seconds,
                                              bool peer_memory = true);

}  // namespace refocus
