#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/tile_maps.h"

namespace refocus::kernels {
namespace {

constexpr uint64_t kElementBytes = 2;
constexpr int kPanelColumns = 64;

// The driver's function, found without linking to the driver library; null where there is none.
PFN_cuTensorMapEncodeTiled_v12000 EncodeFunction() {
  static const PFN_cuTensorMapEncodeTiled_v12000 function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

// strides: bytes, of all dimensions but the first.
template <int kRank>
cudaError_t Encode(const void* data, const uint64_t (&sizes)[kRank], const uint64_t (&strides)[kRank - 1],
                   const uint32_t (&box)[kRank], CUtensorMap* map,
                   CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                   CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  const PFN_cuTensorMapEncodeTiled_v12000 encode = EncodeFunction();
  if (encode == nullptr) return cudaErrorNotSupported;
  uint32_t steps[kRank];
  for (uint32_t& step : steps) step = 1;
  const CUresult result =
      encode(map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t MapRows(const AttentionShape& shape, const void* data, int group, int row_count, CUtensorMap* map) {
  const uint64_t dim = shape.head_dim;
  const uint64_t heads = shape.heads;
  return Encode<3>(data, {dim, heads, static_cast<uint64_t>(shape.rows)},
                   {dim * kElementBytes, heads * dim * kElementBytes},
                   {kPanelColumns, static_cast<uint32_t>(group), static_cast<uint32_t>(row_count)}, map);
}

cudaError_t MapKeys(const AttentionShape& shape, const KvSlots& kv, const void* data, int keys, CUtensorMap* map) {
  const uint64_t dim = shape.head_dim;
  const uint64_t slots = kv.slots;
  const uint64_t panels = dim / kPanelColumns;
  // Of one head there is no next.
  const uint64_t head_stride = shape.kv_heads == 1 ? slots * dim : static_cast<uint64_t>(kv.head_stride);
  return Encode<4>(data, {kPanelColumns, slots, panels, static_cast<uint64_t>(shape.kv_heads)},
                   {dim * kElementBytes, kPanelColumns * kElementBytes, head_stride * kElementBytes},
                   {kPanelColumns, static_cast<uint32_t>(keys), static_cast<uint32_t>(panels), 1}, map);
}

cudaError_t MapCodes(const AttentionShape& shape, const KvSlots& kv, const void* data, int keys, CUtensorMap* map) {
  const uint64_t dim = shape.head_dim;
  const uint64_t slots = kv.slots;
  const uint64_t panels = dim / kPanelColumns;
  const uint64_t head_stride = shape.kv_heads == 1 ? slots * dim : static_cast<uint64_t>(kv.head_stride);
  return Encode<4>(data, {kPanelColumns, slots, panels, static_cast<uint64_t>(shape.kv_heads)},
                   {dim, kPanelColumns, head_stride},
                   {kPanelColumns, static_cast<uint32_t>(keys), static_cast<uint32_t>(panels), 1}, map,
                   CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_NONE);
}

cudaError_t MapMatrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows, int box_columns,
                      CUtensorMap* map) {
  return Encode<2>(data, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                   {static_cast<uint64_t>(stride) * kElementBytes},
                   {static_cast<uint32_t>(box_columns), static_cast<uint32_t>(box_rows)}, map,
                   CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                   box_columns == kPanelColumns ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace refocus::kernels
