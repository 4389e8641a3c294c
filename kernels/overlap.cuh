// Programmatic dependent launch (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"): a
// kernel may begin while the one enqueued before it still runs, once all of that one's blocks have called LetNextBegin
// or ended. It hides what a launch and the first loads cost, which counts where passes are made of hundreds of small
// kernels.
//
// Rules, so that a stream stays a sequence: every kernel launched by LaunchOverlapping calls AwaitPrevious in every
// block that does anything, and before it reads nothing but what was complete when the kernel before began, and writes
// nothing. Complete then is what stands before a graph's launch, a copy, or a kernel that has passed its wait; of a kernel
// that does not call LetNextBegin the blocks have ended, but what they wrote need not be seen yet. Since a kernel that
// waits has already let the next one begin, several may be waiting at once; each ends after all before it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace refocus::kernels {

__device__ __forceinline__ void LetNextBegin() { asm volatile("griddepcontrol.launch_dependents;"); }

// Returns when all kernels enqueued before are complete and what they wrote is seen.
__device__ __forceinline__ void AwaitPrevious() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// For kernels that have nothing to do before.
__device__ __forceinline__ void BeginInTurn() {
  LetNextBegin();
  AwaitPrevious();
}

// In clusters of so many blocks; 1: none. Returns this launch's own error, not what an earlier call left behind.
template <typename... Expected, typename... Actual>
cudaError_t LaunchOverlappingClusters(void (*kernel)(Expected...), dim3 blocks, int cluster, int threads,
                                      size_t shared_bytes, cudaStream_t stream, Actual&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Actual&&>(arguments)...);
}

template <typename... Expected, typename... Actual>
cudaError_t LaunchOverlapping(void (*kernel)(Expected...), dim3 blocks, int threads, size_t shared_bytes,
                              cudaStream_t stream, Actual&&... arguments) {
  return LaunchOverlappingClusters(kernel, blocks, 1, threads, shared_bytes, stream,
                                   static_cast<Actual&&>(arguments)...);
}

}  // namespace refocus::kernels
