// Host side of the attention kernels' launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/key_tiles.cuh"
#include "kernels/overlap.cuh"

namespace refocus::kernels {

// false where the grid would exceed 2^31 - 1 blocks.
inline bool MakeGrid(const AttentionShape& shape, int tile_rows, int splits, GridShape* grid, uint32_t* blocks) {
  const int64_t row_tiles = (PackedRows(shape) + tile_rows - 1) / tile_rows;
  constexpr int64_t kMost = 0x7fffffff;
  if (row_tiles > kMost || row_tiles * shape.kv_heads > kMost / splits) return false;
  grid->row_tiles = static_cast<int>(row_tiles);
  grid->splits = splits;
  grid->group = shape.heads / shape.kv_heads;
  *blocks = static_cast<uint32_t>(row_tiles * shape.kv_heads * splits);
  return true;
}

template <typename Args>
cudaError_t LaunchBlocks(void (*kernel)(Args), const Args& args, uint32_t blocks, int threads, int shared_bytes,
                         cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return LaunchOverlapping(kernel, dim3(blocks), threads, static_cast<size_t>(shared_bytes), stream, args);
}

}  // namespace refocus::kernels
