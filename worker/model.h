// The forward pass of every family, driven by ModelConfig, and its backward pass to the query projections.
//
// Shapes: n = this rank's own rows, rows = all ranks' rows, H / Hk = query / KV heads, d = head_dim. Linear layers run
// on own rows; q travels to every rank, partial attention comes back and is combined. Nothing here writes weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "worker/backend.h"
#include "worker/collective.h"
#include "worker/kv_extents.h"
#include "worker/own_keys.h"
#include "worker/query_delta.h"
#include "worker/row_plan.h"
#include "worker/weights.h"

namespace refocus {

// What one layer's backward pass needs from its forward pass; own rows unless said otherwise. fp32 and dtype as in
// worker/backend.h.
struct LayerTrace {
  at::Tensor x;      // [n, hidden] fp32, input of the layer
  at::Tensor h;      // [n, hidden] attn_norm(x)
  at::Tensor q_raw;  // [n, H, d] fp32, before bias, QK-norm and RoPE
  at::Tensor q_all;  // [rows, H, d] all ranks' rows, after RoPE
  at::Tensor out;    // [n, H, d] fp32, combined attention
  at::Tensor lse;    // [n, H] fp32
  at::Tensor x_mid;  // [n, hidden] fp32, after attention
  at::Tensor gate;   // [n, mlp or this rank's part of it] before SiLU
  at::Tensor up;     // the same
  OwnKeys own;       // with ForwardInput::own_mask
};

// The rows of one pass on the backend's device. A recorded pass reads the tensors at every run, `plan` when recorded.
struct ForwardInput {
  const RowPlan* rows = nullptr;
  at::Tensor ids;      // [n] int64, of own rows
  at::Tensor own_pos;  // [n] int64
  at::Tensor pos;      // [rows] int64
  at::Tensor slots;    // [n] int64: where own rows write K/V in `append`, < 0: nowhere; undefined: none writes
  std::vector<KvShare> extents;  // that attention reads besides `append`
  KvExtent* append = nullptr;
  // Rows also see keys of their own, which are written nowhere: worker/own_keys.h. Replicated rows only; undefined: none.
  at::Tensor own_mask;  // [n, n] fp32
  // A decode pass instead: rows read shared extents by ranges, in order, and each has keys of its own, where it also
  // writes.
  struct Sweep {
    int64_t first = 0;
    int64_t rows = 0;
    std::vector<KvShare> extents;
  };
  std::vector<Sweep> sweeps;
  at::Tensor tails;  // [n, kMaxTailExtents, kTailWords] int64 (worker/backend.h); undefined: no decode pass
  // Whose queries the own rows ask with, ordered by row; rows that are not named: base queries.
  std::vector<AdapterRows> adapters;
  // All own rows ask with one delta, or none.
  void SetDelta(QueryDelta delta) {
    adapters.clear();
    if (delta.defined()) adapters.push_back({0, ids.size(0), std::move(delta)});
  }
  // Called behind each layer's attention with the queries [rows, H, d] of all ranks' rows and their lse [rows, H]; false:
  // the pass ends there and returns an undefined tensor.
  std::function<bool(int64_t layer, const at::Tensor& q, const at::Tensor& lse)> observe;
  bool keys_only = false;  // stop when the last layer's K/V are written; returns an undefined tensor
};

class Model {
 public:
  // All outlive the model. `progress` grows by one with every layer.
  Model(const Weights& weights, Backend& backend, Collective& collective, std::atomic<int64_t>& progress);

  const ModelConfig& config() const { return weights_.config; }
  const ShardPlan& plan() const { return plan_; }
  Collective& collective() const { return collective_; }
  Backend& backend() const { return backend_; }

  // Input for `rows`, whose constructor saw the positions of `ids` in the same order. `append`, where given, gets the
  // K/V of the rows at its positions: the caller advances it by `writing` (this rank's) when the pass is done.
  ForwardInput MakeInput(const RowPlan& rows, const std::vector<int32_t>& ids, KvExtent* append = nullptr,
                         int64_t* writing = nullptr) const;

  // -> [n, hidden] fp32 before the final norm. Throws CollectiveError. `trace` gets one entry a layer.
  at::Tensor Forward(const ForwardInput& input, std::vector<LayerTrace>* trace = nullptr);

  // Natural log of the sum of exponentials of the scaled scores of q [m, H, d] over `chain`'s keys at [begin, end) on all
  // ranks -> [m, H] fp32. q and pos [m] int64 are those of `rows`, replicated.
  at::Tensor RangeLse(const RowPlan& rows, const at::Tensor& q, const at::Tensor& pos, const KvChain& chain,
                      int64_t layer, int64_t begin, int64_t end);

  // [m, hidden] fp32 -> [m, vocab] fp32
  at::Tensor Logits(const at::Tensor& hidden);
  // The same of a few rows that every rank has, each rank with a part of the vocabulary: reading its matrix is what
  // they cost. All ranks call it; defined on rank 0 alone.
  at::Tensor LogitsTogether(const at::Tensor& hidden);

  // Gradient with respect to the hidden rows of a loss with gradient `dlogits` [m, vocab] dtype behind Logits.
  Gradient LogitsGrad(const at::Tensor& hidden, const at::Tensor& dlogits);

  // From dx at Forward's output down to the queries: activation gradients, and this rank's share of the delta's
  // gradient goes to `grad` (fp32, of the delta's kind), or is added to it when `add`. Replicated rows give every rank
  // the whole gradient instead of a share. K and V get no gradient (they are frozen). `input` as in Forward, with one
  // delta or none for all rows. With `factors` they get the gradient of a full delta, and `grad` is not used.
  void Backward(const ForwardInput& input, const std::vector<LayerTrace>& trace, Gradient dx, bool add,
                const QueryDelta& grad, GradFactors* factors = nullptr);

 private:
  // Combined attention of own rows q [n, H, d]; `all` gets the rows of all ranks, `own` keys of their own, if they have
  // some. K and V of rows h are appended in between, while the queries travel.
  Partial Attention(const ForwardInput& input, int64_t layer, const at::Tensor& q, const at::Tensor& h,
                    const Rotation& rotation, at::Tensor* all, OwnKeys* own);
  void Append(const ForwardInput& input, int64_t layer, const at::Tensor& h, const Rotation& rotation);
  // For one exchange of rows that every rank computes, where GPUs reach each other's memory; else nullptr.
  const kernels::PeerMemory* PeersFor(const RowPlan& rows, const char* what);
  // The partials of this rank's keys for all rows -> combined attention of own rows.
  Partial Exchange(const RowPlan& rows, const Partial& partial);
  // terms [rows, ...] fp32 of this rank for all rows -> summed over ranks, own rows.
  at::Tensor SumOverRanks(const RowPlan& rows, const at::Tensor& terms);
  // The same as dtype, of rows that every rank has.
  at::Tensor RoundedSumOverRanks(const RowPlan& rows, const at::Tensor& terms);
  // A layer's MLP, or this rank's part of its inner columns: rows that every rank computes are bound by reading
  // weights, most of which are the MLP's, and its outputs are small.
  struct Mlp {
    at::Tensor gate, up;  // [inner or a part of it, hidden]
    at::Tensor down;      // [hidden, inner or a part of it]: of a part, rows lie `inner` apart
    bool part = false;
  };
  Mlp MlpOf(const RowPlan& rows, const LayerWeights& weights) const;
  // act [n, inner or a part of it] -> [n, hidden] dtype, summed over ranks where they have parts.
  at::Tensor MlpOut(const RowPlan& rows, const Mlp& mlp, const at::Tensor& act);
  // The gradient behind the MLP: dy [n, hidden] dtype -> [n, hidden] dtype.
  at::Tensor MlpGrad(const RowPlan& rows, const Mlp& mlp, const at::Tensor& dy, const LayerTrace& trace);
  // Whether a rank's rows are not every rank's rows.
  bool Travels(const RowPlan& rows) const { return rows.split() && collective_.size() > 1; }
  at::Tensor RoomForAll(const RowPlan& rows, const at::Tensor& own) const;
  at::Tensor GatherRows(const RowPlan& rows, const at::Tensor& own);
  Partial DecodeAttention(const ForwardInput& input, int64_t layer, const at::Tensor& q_raw, const at::Tensor& h,
                          const KeyValueRows& keys, const Rotation& rotation, at::Tensor* q);
  std::vector<KvView> Views(const ForwardInput& input, int64_t layer) const;

  const Weights& weights_;
  Backend& backend_;
  Collective& collective_;
  std::atomic<int64_t>& progress_;
  ShardPlan plan_;
};

}  // namespace refocus
