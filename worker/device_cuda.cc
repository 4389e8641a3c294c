#include "worker/device.h"

#include <cuda_runtime_api.h>

#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdlib>
#include <vector>

namespace refocus {
namespace {

constexpr int kLeastMajor = 9;  // the kernels are built for compute capability 9.0 alone

Status Hardware(const std::string& what, const std::string& got, const std::string& allowed) {
  return Error(StatusCode::kFailedPrecondition, "HARDWARE", what + ": got " + got + ", allowed " + allowed,
               {{"got", got}, {"allowed", allowed}});
}

std::string Version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string Versions() {
  int driver = 0;
  int runtime = 0;
  cudaDriverGetVersion(&driver);  // 0: there is none
  cudaRuntimeGetVersion(&runtime);
  return "driver for CUDA " + (driver == 0 ? std::string("none") : Version(driver)) + ", built for CUDA " +
         Version(runtime);
}

// What CUDA_VISIBLE_DEVICES hides is the most frequent reason for finding too little.
std::string Visible() {
  const char* value = std::getenv("CUDA_VISIBLE_DEVICES");
  return value == nullptr ? "CUDA_VISIBLE_DEVICES unset" : "CUDA_VISIBLE_DEVICES='" + std::string(value) + "'";
}

Status CheckCapability(const cudaDeviceProp& properties, int index) {
  if (properties.major == kLeastMajor) return {};
  return Hardware("GPU " + std::to_string(index) + " (" + properties.name + ") compute capability",
                  std::to_string(properties.major) + "." + std::to_string(properties.minor),
                  std::to_string(kLeastMajor) + ".0 (Hopper: H100, H200)");
}

}  // namespace

StatusOr<Gpu> UseGpu(int local_rank, int ranks_on_host) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    return Hardware("CUDA devices", std::string(cudaGetErrorString(error)) + " (" + Versions() + ", " + Visible() + ")",
                    "at least " + std::to_string(ranks_on_host) + ", one for each rank of this host");
  }
  if (count < ranks_on_host) {
    std::string names;
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp properties;
      if (cudaGetDeviceProperties(&properties, i) == cudaSuccess) names += ", " + std::string(properties.name);
    }
    return Hardware("CUDA devices", std::to_string(count) + names + " (" + Visible() + ")",
                    "at least " + std::to_string(ranks_on_host) + ", one for each rank of this host");
  }
  Gpu gpu;
  gpu.index = local_rank;
  cudaDeviceProp properties;
  error = cudaGetDeviceProperties(&properties, gpu.index);
  if (error == cudaSuccess) {
    gpu.name = properties.name;
    REFOCUS_RETURN_IF_ERROR(CheckCapability(properties, gpu.index));
    error = cudaSetDevice(gpu.index);
  }
  size_t free = 0;
  size_t total = 0;
  if (error == cudaSuccess) error = cudaFree(nullptr);  // starts CUDA on the device: its own memory is taken now
  if (error == cudaSuccess) error = cudaMemGetInfo(&free, &total);
  if (error != cudaSuccess) {
    return Hardware("GPU " + std::to_string(gpu.index) + (gpu.name.empty() ? "" : " (" + gpu.name + ")"),
                    std::string(cudaGetErrorString(error)) + " (" + Versions() + ")",
                    "a device that this process may use");
  }
  gpu.free_bytes = static_cast<int64_t>(free);
  gpu.total_bytes = static_cast<int64_t>(total);
  return gpu;
}

int64_t GpuUsedBytes() {
  size_t free = 0;
  size_t total = 0;
  return cudaMemGetInfo(&free, &total) == cudaSuccess ? static_cast<int64_t>(total - free) : 0;
}

void GpuReleaseCached() { c10::cuda::CUDACachingAllocator::emptyCache(); }

std::unique_ptr<Backend> MakeGpuBackend(const ModelConfig& config, const Gpu& gpu, KvType kv) {
  return MakeCudaBackend(config, gpu.index, kv);
}

std::string MakeGpuGroupId() { return MakeNcclId(); }

std::shared_ptr<Collective> MakeGpuCollective(const std::string& id, int rank, int size, double deadline_seconds,
                                              bool peer_memory) {
  return MakeNcclCollective(id, rank, size, deadline_seconds, peer_memory);
}

}  // namespace refocus
