// The three operations that sharding changes: partial attention, its gradient with respect to the queries, and the
// combination of partials. Everything else is LibTorch. Implemented by backend_cpu (fp32).
//
// A partial is attention over the keys that one rank holds: `out` normalised within the slice, `lse` the natural
// logarithm of the sum of exponentials of the scaled scores. No visible key <=> lse = -inf and out = 0, which is
// Combine's identity. Scores are scaled by 1 / sqrt(head_dim). Query head h reads K/V head h / (heads / kv_heads).
//
// Threads: called from the engine thread only; may use several threads inside. Outputs never alias inputs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "base/shard_plan.h"

namespace refocus {

// One extent's K and V of one layer. Slot i holds the token with local index first_index + i of `plan`; slots hold
// rising positions, so the keys that a query at position p may see (key_pos <= p) are the first VisibleSlots(p) ones.
struct KvView {
  at::Tensor k;             // [kv_heads, capacity, head_dim] after RoPE (and QK-norm); slots >= length are never read
  at::Tensor v;             // [kv_heads, capacity, head_dim]
  int64_t length = 0;       // written slots
  int64_t first_index = 0;  // local index of slot 0
  ShardPlan plan;

  int64_t VisibleSlots(int64_t query_pos) const {
    const int64_t count = plan.CountBelow(query_pos + 1) - first_index;
    return count < 0 ? 0 : (count > length ? length : count);
  }
};

struct Partial {
  at::Tensor out;  // [rows, heads, head_dim] fp32
  at::Tensor lse;  // [rows, heads] fp32, natural log
};

class Backend {
 public:
  virtual ~Backend() = default;

  // q [rows, heads, head_dim] contiguous, after RoPE; pos [rows] int64 on the CPU, any order, may repeat. `extents` may
  // be empty or have empty members; a key is visible iff its position <= the row's. rows may be 0.
  virtual Partial Attend(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents) = 0;

  // dq of this rank's keys; slices' dq add up. lse and row_dot = rowsum(dout * out) [rows, heads] fp32 are those of the
  // *combined* attention; dout [rows, heads, head_dim]. With P = exp(s - lse): ds = P * (dout.v - row_dot),
  // dq = scale * ds.k. Rows with lse = -inf give 0. -> [rows, heads, head_dim]
  virtual at::Tensor QueryGrad(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents,
                               const at::Tensor& dout, const at::Tensor& lse, const at::Tensor& row_dot) = 0;

  // out [parts, rows, heads, head_dim], lse [parts, rows, heads], added up in fp32 in the order of parts.
  virtual Partial Combine(const at::Tensor& out, const at::Tensor& lse) = 0;

  // y = x . w^T: x [rows, in], w [out, in] -> [rows, out]. The one linear layer of the model; here because few rows
  // are bound by reading w and deserve a kernel of their own.
  virtual at::Tensor Linear(const at::Tensor& x, const at::Tensor& w) = 0;
};

std::unique_ptr<Backend> MakeCpuBackend();

}  // namespace refocus
