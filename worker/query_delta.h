// What adapters add to the query projections: q = h . W_Q^T + h . Delta^T, in every layer, added in fp32 before any
// rounding. Delta is full rank, or a product of two thin matrices (LoRA; Hu et al., arXiv 2106.09685, section 4.1), which
// is never formed: h . Delta^T = scale * (h . A^T) . B^T.
//
// H = query heads, d = head_dim, r = rank of a LoRA. Deltas that queries read have the backend's dtype; masters and
// gradients are fp32 and have the same views.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "base/model_config.h"
#include "worker/backend.h"
#include "worker/command.h"

namespace refocus {

// Views of tensors that others may hold as well; none, full or LoRA.
struct QueryDelta {
  QueryDelta() = default;
  // A full delta, or none where `full` is undefined.
  QueryDelta(at::Tensor full) : full(std::move(full)) {}  // NOLINT(google-explicit-constructor)

  bool defined() const { return full.defined() || a.defined(); }
  bool lora() const { return a.defined(); }
  // Tells deltas apart while they live; null: none.
  const void* identity() const {
    return full.defined() ? full.const_data_ptr() : a.defined() ? a.const_data_ptr() : nullptr;
  }
  // The same kind over other numbers, as DeltaSizes lays them out.
  QueryDelta Over(const at::Tensor& numbers) const;

  at::Tensor full;     // [layers, H * d, hidden]
  at::Tensor a;        // [layers, r, hidden]; contiguous within a layer, as b
  at::Tensor b;        // [layers, H * d, r]
  double scale = 1.0;  // of LoRA: alpha / r
};

// All numbers of a delta lie in one contiguous tensor, so that it is reduced, hashed, optimised and exported in one piece:
// full [layers, H * d, hidden]; LoRA [layers, hidden + H * d, r], a layer's A and then its B.
std::vector<int64_t> DeltaSizes(const ModelConfig& model, const DeltaConfig& config);
QueryDelta DeltaOver(const ModelConfig& model, const DeltaConfig& config, const at::Tensor& numbers);

// Rows [first, first + count) of a pass's own rows read this delta, which may be none.
struct AdapterRows {
  int64_t first = 0;
  int64_t count = 0;
  QueryDelta delta;
};

// Queries of rows h [n, hidden] dtype with base weights wq [H * d, hidden] of this layer: -> [n, H * d] fp32. `adapters`
// do not overlap; rows that none of them names get base queries. With `beside`: Backend::ProjectRows, for a decode pass.
at::Tensor ProjectQueries(Backend& backend, const at::Tensor& h, const at::Tensor& wq,
                          const std::vector<AdapterRows>& adapters, int64_t layer,
                          const KeyValueWeights* beside = nullptr, KeyValueRows* keys = nullptr);

// From dq [n, H * d] dtype: the gradient of this layer's part of the delta, overwritten or (`add`) added to.
void DeltaGrad(Backend& backend, const at::Tensor& dq, const at::Tensor& h, const QueryDelta& delta, int64_t layer,
               bool add, const QueryDelta& grad);

// The gradient behind the projection: dq . (W_Q + Delta) -> [n, hidden] dtype.
at::Tensor QueriesGrad(Backend& backend, const at::Tensor& dq, const at::Tensor& wq, const QueryDelta& delta,
                       int64_t layer);

}  // namespace refocus
