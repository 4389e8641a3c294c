// The K and V that this rank owns: contiguous extents, one per context for the tokens that no other context had before it,
// one per request for its own tail of tokens. Reserved whole when opened; nothing is copied, nothing grows. Contexts with
// a common prefix and forks of a request share extents: each holds a reference, the last one gone frees the memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "base/model_config.h"
#include "base/shard_plan.h"
#include "worker/backend.h"

namespace refocus {

// Tokens [first_position, first_position + capacity) as far as this shard owns them.
class KvExtent {
 public:
  // Reserves k and v [layers, kv_heads, slots, head_dim] of the backend's kv_dtype on its device, with the scales of kByte;
  // `poison` fills them with NaN. Throws c10::Error when the memory cannot be had.
  KvExtent(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity,
           const at::TensorOptions& options, bool poison);

  // Bytes that such an extent takes on this shard.
  static int64_t Bytes(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity,
                       at::ScalarType kv_dtype);

  // One layer's K/V, all slots.
  KvView View(int64_t layer) const;

  // The same, cut to what this shard owns of the positions [begin, end): may be empty.
  KvView View(int64_t layer, int64_t begin, int64_t end) const;

  // Where all layers lie, with `slots` slots: kTailWords (worker/backend.h).
  void Write(int64_t slots, int64_t* words) const;

  // The slot that holds `position`, or -1 when it is not this shard's or not in this extent.
  int64_t SlotOf(int64_t position) const;

  // All slots written with normally distributed values.
  void FillRandom();

  // `rows` more slots were written in every layer, behind the others.
  void Advance(int64_t rows);

  int64_t first_position() const { return first_position_; }
  int64_t capacity() const { return capacity_; }
  int64_t length() const { return length_; }
  int64_t bytes() const { return bytes_; }
  // Over the written slots of all layers; for tests.
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
  at::Tensor k_scale_;  // [layers, kv_heads, slots] bf16; undefined unless k is kByte
  at::Tensor v_scale_;
};

// The tokens of an extent below position `end`, all of them written once the holder reads.
struct KvShare {
  std::shared_ptr<const KvExtent> extent;
  int64_t end = 0;

  KvView View(int64_t layer) const;
  // The positions [first, behind) of them.
  KvView View(int64_t layer, int64_t first, int64_t behind) const;
  // The same of all layers, as decode rows read it: kTailWords (worker/backend.h).
  void Write(int64_t* words) const;
};

// Extents that follow each other without a gap, read-only: what a context consists of, or a fork's prompt.
class KvChain {
 public:
  KvChain() = default;
  explicit KvChain(std::shared_ptr<const KvExtent> extent) { Add(std::move(extent)); }

  // The whole of `extent`, which begins where the chain ends; one without tokens is left out.
  void Add(std::shared_ptr<const KvExtent> extent);
  // The same extents as far as they hold tokens below `end`.
  KvChain Below(int64_t end) const;

  const std::vector<KvShare>& shares() const { return shares_; }
  // Position behind the last token; 0 when empty.
  int64_t end() const { return shares_.empty() ? 0 : shares_.back().end; }

 private:
  std::vector<KvShare> shares_;
};

}  // namespace refocus
