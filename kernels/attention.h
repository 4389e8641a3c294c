// Partial attention over the keys that one GPU holds, its gradient with respect to the queries, and the combination of
// partials: the CUDA side of worker/backend.h, which defines the terms. Plain structs, no LibTorch.
//
// All pointers are device memory, contiguous unless a stride says otherwise; bf16 is __nv_bfloat16 behind void*. All
// functions enqueue on `stream` and return at once, allocate nothing, may be captured into a CUDA graph, and read
// positions on the device only: a replayed graph sees the values of that moment. Same inputs, same bits: nothing is
// added up in an order that depends on timing. They return the launch's error, or cudaErrorInvalidValue for a shape
// outside the limits of kernels/attention_shape.h. Every pointer is 16-byte aligned and head_stride a multiple of 8.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention_shape.h"

namespace refocus::kernels {

// out [rows, heads, head_dim] fp32, lse [rows, heads] fp32 natural log; no visible key: out = 0, lse = -inf.
struct AttendParams {
  AttentionShape shape;
  const void* q = nullptr;  // bf16 [rows, heads, head_dim]
  float* out = nullptr;
  float* lse = nullptr;
  void* workspace = nullptr;  // AttendWorkspaceBytes(shape, sm_count), 256-byte aligned; not read before it is written
  // out and lse are [AttendSplits(shape, sm_count), ...] instead, a partial for each split, and nothing else is needed.
  bool partials = false;
  // Runs beside the kernel enqueued before, which must be AttendTails and write nothing that this one reads or writes.
  // The Hopper kernels, of more rows, ignore it.
  bool beside_previous = false;
};

cudaError_t Attend(const AttendParams& params, int sm_count, cudaStream_t stream);

// The same where every row has extents of its own: tails [rows, kTailExtents] in device memory, which a replayed graph
// reads anew, lengths included. Rows with pos < 0 see nothing. One partial a split, for Combine.
struct AttendTailsParams {
  int64_t rows = 0;  // at most 65535
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  float scale = 0.0f;
  int64_t shards = 1;
  int64_t shard = 0;
  int64_t layer = 0;
  const void* q = nullptr;       // bf16 [rows, heads, head_dim]
  const int64_t* pos = nullptr;  // [rows]
  const TailExtent* tails = nullptr;
  bool int8 = false;             // what the extents hold; head_dim is then a multiple of 16
  float* out = nullptr;          // [TailSplits(rows, kv_heads, sm_count), rows, heads, head_dim]
  float* lse = nullptr;          // [splits, rows, heads]
};
cudaError_t AttendTails(const AttendTailsParams& params, int sm_count, cudaStream_t stream);

// With P = exp(s - lse): ds = P * (dout . v - row_dot); dq = scale * ds . k, added over the extents' keys, no atomics.
// Rows with lse = -inf give 0. lse and row_dot are those of the attention combined over all GPUs.
struct QueryGradParams {
  AttentionShape shape;
  const void* q = nullptr;     // bf16 [rows, heads, head_dim]
  const void* dout = nullptr;  // bf16 [rows, heads, head_dim]
  const float* lse = nullptr;      // [rows, heads]
  const float* row_dot = nullptr;  // [rows, heads]
  float* dq = nullptr;             // fp32 [rows, heads, head_dim]
  void* workspace = nullptr;       // QueryGradWorkspaceBytes(shape, sm_count), as above
};
cudaError_t QueryGrad(const QueryGradParams& params, int sm_count, cudaStream_t stream);

// out [parts, rows, heads, head_dim], lse [parts, rows, heads] fp32, summed with weights exp(lse_i - lse) in an order
// that depends on `parts` alone, up to kPartsInOrder of them one after the other. Parts with lse = -inf are the identity
// whatever finite `out` they carry; only such parts: out = 0, lse = -inf.
inline constexpr int64_t kPartsInOrder = 8;
struct CombineParams {
  int64_t parts = 0;
  int64_t rows = 0;
  int heads = 0;
  int head_dim = 0;
  const float* part_out = nullptr;
  const float* part_lse = nullptr;
  float* out = nullptr;       // [rows, heads, head_dim]
  float* lse = nullptr;       // [rows, heads]
  void* out_bf16 = nullptr;   // the same, rounded; may be null
};
cudaError_t Combine(const CombineParams& params, cudaStream_t stream);

}  // namespace refocus::kernels
