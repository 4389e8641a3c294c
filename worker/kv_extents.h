// The K and V that this rank owns: one contiguous extent per context, one more per request (its own tail of tokens).
// Reserved whole when opened; nothing is copied, nothing grows.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "base/model_config.h"
#include "base/shard_plan.h"
#include "worker/backend.h"

namespace refocus {

// Tokens [first_position, first_position + capacity) as far as this shard owns them.
class KvExtent {
 public:
  // Reserves k and v [layers, kv_heads, slots, head_dim] fp32; `poison` fills them with NaN. Throws c10::Error when the
  // memory cannot be had.
  KvExtent(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity, bool poison);

  // Bytes that such an extent takes on this shard.
  static int64_t Bytes(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity);

  // One layer's K/V; what Append wrote with Advance still to come is visible too when `pending` says how many slots.
  KvView View(int64_t layer, int64_t pending) const;

  // Writes k, v [rows, kv_heads, head_dim] behind the `length` slots of this layer. Advance makes them part of every
  // layer.
  void Append(int64_t layer, const at::Tensor& k, const at::Tensor& v);
  void Advance(int64_t rows);

  int64_t first_position() const { return first_position_; }
  int64_t capacity() const { return capacity_; }
  int64_t length() const { return length_; }
  int64_t bytes() const { return bytes_; }
  // Over the written slots of all layers; for tests and debug checks.
  uint64_t Hash() const;

 private:
  ShardPlan plan_;
  int64_t first_position_;
  int64_t capacity_;
  int64_t first_index_;
  int64_t slots_;
  int64_t bytes_;
  int64_t length_ = 0;
  at::Tensor k_;  // [layers, kv_heads, slots, head_dim]
  at::Tensor v_;
};

}  // namespace refocus
