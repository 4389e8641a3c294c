// The forward pass of every family, driven by ModelConfig, and its backward pass to the query projections.
//
// Shapes: n = this rank's own rows, rows = all ranks' rows, H / Hk = query / KV heads, d = head_dim. Linear layers run
// on own rows; q travels to every rank, partial attention comes back and is combined. Nothing here writes weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "worker/backend.h"
#include "worker/collective.h"
#include "worker/kv_extents.h"
#include "worker/row_plan.h"
#include "worker/weights.h"

namespace refocus {

// What one layer's backward pass needs from its forward pass; own rows unless said otherwise.
struct LayerTrace {
  at::Tensor x;      // [n, hidden] input of the layer
  at::Tensor h;      // [n, hidden] attn_norm(x)
  at::Tensor q_raw;  // [n, H, d] before QK-norm; only with qk_norm
  at::Tensor q_all;  // [rows, H, d] all ranks' rows, after RoPE
  at::Tensor out;    // [n, H, d] combined attention
  at::Tensor lse;    // [n, H]
  at::Tensor x_mid;  // [n, hidden] after attention
  at::Tensor gate;   // [n, mlp] before SiLU
  at::Tensor up;     // [n, mlp]
};

struct ForwardInput {
  const RowPlan* rows = nullptr;
  at::Tensor ids;                        // [n] int64, of own rows
  std::vector<const KvExtent*> extents;  // that attention reads besides `append`
  KvExtent* append = nullptr;            // rows at its positions write their K/V there; others write none
  at::Tensor delta;                      // [layers, H * d, hidden] fp32, or undefined: base queries
  bool keys_only = false;                // stop when the last layer's K/V are written; returns an undefined tensor
};

class Model {
 public:
  // All outlive the model. `progress` grows by one with every layer.
  Model(const Weights& weights, Backend& backend, Collective& collective, std::atomic<int64_t>& progress);

  const ModelConfig& config() const { return weights_.config; }
  const ShardPlan& plan() const { return plan_; }
  Collective& collective() { return collective_; }

  // -> [n, hidden] before the final norm. Throws CollectiveError. `append` is advanced at the end. `trace` gets one
  // entry a layer.
  at::Tensor Forward(const ForwardInput& input, std::vector<LayerTrace>* trace = nullptr);

  // [m, hidden] -> [m, vocab]
  at::Tensor Logits(const at::Tensor& hidden);

  // Gradient with respect to the hidden rows of a loss with gradient `dlogits` [m, vocab] behind Logits. -> [m, hidden]
  at::Tensor LogitsGrad(const at::Tensor& hidden, const at::Tensor& dlogits);

  // From dx [n, hidden] at Forward's output down to the queries: activation gradients and this rank's share of
  // grad [layers, H * d, hidden] is added to `grad`. K and V get no gradient (they are frozen). `input` as in Forward,
  // with split rows.
  void Backward(const ForwardInput& input, const std::vector<LayerTrace>& trace, at::Tensor dx, at::Tensor& grad);

 private:
  struct Rotation {
    at::Tensor cos;  // [n, 1, d]
    at::Tensor sin;  // [n, 1, d], first half negated: rotated = x * cos + swap_halves(x) * sin
  };
  Rotation RotationAt(const std::vector<int64_t>& positions) const;
  at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) const;
  at::Tensor NormGrad(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dy) const;
  at::Tensor QueryRows(const LayerWeights& w, const at::Tensor& h, const at::Tensor& delta);
  // The partials of this rank's keys for all rows -> combined attention of own rows.
  Partial Exchange(const RowPlan& rows, const Partial& partial);
  at::Tensor GatherRows(const RowPlan& rows, const at::Tensor& own);
  std::vector<KvView> Views(const ForwardInput& input, int64_t layer, int64_t pending) const;

  const Weights& weights_;
  Backend& backend_;
  Collective& collective_;
  std::atomic<int64_t>& progress_;
  ShardPlan plan_;
  std::vector<float> inverse_frequencies_;  // [d / 2]
};

}  // namespace refocus
