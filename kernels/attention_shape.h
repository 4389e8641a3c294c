// What attention reads and how many key splits it makes of it: the part of kernels/attention.h that needs no CUDA
// toolkit, so that the choice of splits is tested on any machine.
#pragma once

#include <cstdint>

namespace refocus::kernels {

inline constexpr int kMaxExtents = 4;
inline constexpr int kMaxHeadDim = 256;  // head_dim: a multiple of 8

// K and V of one layer in one extent. Slot i holds the token with local index first_index + i of the block-cyclic plan
// (base/shard_plan.h); slots hold rising positions, so a query at position p sees the first
//   clamp(CountBelow(p + 1) - first_index, 0, slots)
// slots. Slots behind that are never read into a result (they may hold NaN).
struct KvSlots {
  const void* k = nullptr;  // bf16 [kv_heads, slots, head_dim]
  const void* v = nullptr;
  int64_t head_stride = 0;  // elements from one K/V head to the next
  int64_t slots = 0;
  int64_t first_index = 0;
  // In eight bits (base/kv_int8.h) k and v are codes with head_dim, head_stride and the pointers' alignment multiples of
  // 16, and these are bf16 scales [kv_heads, slots], head_stride / head_dim from one head to the next. Else unused.
  const void* k_scale = nullptr;
  const void* v_scale = nullptr;
};

// All layers of K and V of a few tokens that one row of a decode step reads by itself, in device memory. `slots` and
// `first_index` as in KvSlots. Without slots nothing else is looked at.
struct TailExtent {
  const void* k = nullptr;  // bf16 [layers, kv_heads, slots, head_dim] with these strides
  const void* v = nullptr;
  int64_t layer_stride = 0;  // elements
  int64_t head_stride = 0;
  int64_t slots = 0;
  int64_t first_index = 0;
  const void* k_scale = nullptr;  // of K and V in eight bits: bf16, strides are those of the codes / head_dim
  const void* v_scale = nullptr;
};
inline constexpr int kTailExtents = 4;  // a row

// Key splits of AttendTails: a pure function of the grid, for a replayed graph sees tails of any length.
int TailSplits(int64_t rows, int kv_heads, int sm_count);

struct AttentionShape {
  int64_t rows = 0;      // may be 0
  int heads = 0;         // query head h reads K/V head h / (heads / kv_heads)
  int kv_heads = 0;
  int head_dim = 0;
  float scale = 0.0f;    // of the scores, > 0
  int64_t shards = 1;    // of the block-cyclic plan
  int64_t shard = 0;
  int extents = 0;       // used entries of `kv`, may be 0
  KvSlots kv[kMaxExtents];
  const int64_t* pos = nullptr;  // [rows]
  bool int8 = false;             // what all extents hold
  // Upper bound of what one row sees over all extents, for choosing the number of key splits only; a wrong one costs
  // time, never correctness. Must be the same whenever the same bits are wanted.
  int64_t expected_keys = 0;
  bool portable_only = false;  // keep to the portable kernels: a second opinion for tests and benchmarks
};

// Key splits for few rows: pure functions of the shape, so that a replayed graph keeps its grid. Workspaces are 0 bytes
// where one split does.
int AttendSplits(const AttentionShape& shape, int sm_count);
int64_t AttendWorkspaceBytes(const AttentionShape& shape, int sm_count);
int QueryGradSplits(const AttentionShape& shape, int sm_count);
int64_t QueryGradWorkspaceBytes(const AttentionShape& shape, int sm_count);

}  // namespace refocus::kernels
