// Tensor maps: what the copy engine needs to know of a tensor in device memory. Host only.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/attention_shape.h"

namespace refocus::kernels {

// bf16 [rows, heads, head_dim] in boxes of row_count query rows, `group` heads and 64 columns.
cudaError_t MapRows(const AttentionShape& shape, const void* data, int group, int row_count, CUtensorMap* map);

// K or V of an extent with slots > 0, in boxes of `keys` slots with all columns as panels of 64. Slots behind the
// extent read as zero.
cudaError_t MapKeys(const AttentionShape& shape, const KvSlots& kv, const void* data, int keys, CUtensorMap* map);

// Codes of K or V of such an extent, in the same boxes with a byte a column.
cudaError_t MapCodes(const AttentionShape& shape, const KvSlots& kv, const void* data, int keys, CUtensorMap* map);

// A bf16 matrix [rows, columns], columns a multiple of 8, rows `stride` elements apart, in boxes of box_rows rows and 64
// columns, or 32, which get the 64-byte swizzle. What lies behind the matrix reads as zero.
cudaError_t MapMatrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows, int box_columns,
                      CUtensorMap* map);

}  // namespace refocus::kernels
