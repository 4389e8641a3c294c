// What a device does for the model: the three operations that sharding changes (partial attention, its gradient with
// respect to the queries, the combination of partials), the matrix products, and the row-wise steps between them.
// Implemented by backend_cpu (fp32 throughout) and backend_cuda (bf16 with fp32 accumulation). K and V may be kept in
// eight bits by both (base/kv_int8.h): the arithmetic is that of the numbers which the codes stand for.
//
// Two kinds of floating-point tensors: `dtype()` is what matrix products read (weights, activations); everything
// said to be fp32 (residual stream and its gradient, attention partials, logits, dq, gradients of the delta) is fp32 on
// both devices. All tensors, positions and ids included, are contiguous and live on `device()`.
//
// A partial is attention over the keys that one rank holds: `out` normalised within the slice, `lse` the natural
// logarithm of the sum of exponentials of the scaled scores. No visible key <=> lse = -inf and out = 0, which is
// Combine's identity. Scores are scaled by 1 / sqrt(head_dim). Query head h reads K/V head h / (heads / kv_heads).
//
// Threads: called from the engine thread only; may use several threads inside. Outputs never alias inputs. On a GPU
// calls enqueue work and return; nothing reads results on the host but Synchronize and Repeat.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/check.h"
#include "base/memory_plan.h"
#include "base/model_config.h"
#include "base/shard_plan.h"
#include "worker/command.h"

namespace refocus {

namespace kernels {
struct PeerMemory;
}  // namespace kernels

// One extent's K and V of one layer. Slot i holds the token with local index first_index + i of `plan`; slots hold
// rising positions, so the keys that a query at position p may see (key_pos <= p) are the first VisibleSlots(p) ones.
// They must have been written; no other slot is read.
struct KvView {
  at::Tensor k;             // [kv_heads, capacity, head_dim] kv_dtype, after RoPE (and QK-norm)
  at::Tensor v;             // [kv_heads, capacity, head_dim]
  at::Tensor k_scale;       // [kv_heads, capacity] bf16 (base/kv_int8.h); undefined unless kv_dtype is kByte
  at::Tensor v_scale;
  int64_t length = 0;       // slots that belong to the extent, written or not; at most capacity
  int64_t first_index = 0;  // local index of slot 0
  ShardPlan plan;

  int64_t VisibleSlots(int64_t query_pos) const {
    const int64_t count = plan.CountBelow(query_pos + 1) - first_index;
    return count < 0 ? 0 : (count > length ? length : count);
  }
};

struct Partial {
  at::Tensor out;      // [rows, heads, head_dim] fp32
  at::Tensor lse;      // [rows, heads] fp32, natural log
  at::Tensor rounded;  // out in dtype, where the backend made it along the way; else undefined
};

// What heads go through between their projection and the rotation; undefined: nothing.
struct HeadWeights {
  at::Tensor bias;  // [heads * head_dim] dtype
  at::Tensor norm;  // [head_dim] dtype
};

struct KeyValueWeights {
  at::Tensor wk, wv;  // [kv_heads * head_dim, hidden] dtype
  HeadWeights k;
  at::Tensor v_bias;  // [kv_heads * head_dim] dtype, or undefined
};

// Of n rows, before bias, norm and rotation.
struct KeyValueRows {
  at::Tensor k;  // [n, kv_heads, head_dim] fp32
  at::Tensor v;  // [n, kv_heads * head_dim] dtype, with its bias
};

// Rotary embedding at the positions of n rows: whatever the device keeps for it.
struct Rotation {
  at::Tensor pos;  // [n] int64
  at::Tensor cos;  // [n, 1, head_dim] fp32, times the RoPE's attention factor; CPU only
  at::Tensor sin;  // the same, first half negated: rotated = x * cos + swap_halves(x) * sin
};

struct Normed {
  at::Tensor sum;  // [n, hidden] fp32: the residual stream behind the addition
  at::Tensor h;    // [n, hidden] dtype: its norm
};

// A gradient in the residual stream, and rounded for the next matrix product (the same tensor on the CPU).
struct Gradient {
  at::Tensor sum;      // [n, hidden] fp32
  at::Tensor rounded;  // [n, hidden] dtype
};

struct Losses {
  at::Tensor loss;     // [m] fp32, nats
  at::Tensor greedy;   // [m] fp32: 1 when the target has the highest logit
  at::Tensor dlogits;  // [m, vocab] dtype; undefined unless asked for
};

// Own keys of a decode row lie in up to kMaxTailExtents (base/limits.h) extents, each told by so many int64 words: address
// of K, of V, elements from a layer to the next, from a K/V head to the next, slots, the local index of slot 0, and the
// addresses of K's and V's scales, whose strides are those of the elements divided by head_dim (0: none). Slots are
// head_dim elements; without any the addresses are not used. As in KvView, the first VisibleSlots are seen.
inline constexpr int64_t kTailWords = 8;

// y += scale * z . w^T, added in fp32, with z = x, or z = x . inner^T rounded to dtype.
struct AddedProduct {
  at::Tensor x;      // [rows, in] dtype
  at::Tensor inner;  // [thin, in] dtype, or undefined
  at::Tensor w;      // [out, in or thin] dtype
  double scale = 1.0;
  at::Tensor y;      // [rows, out] fp32, contiguous
};

// The gradient of a full delta of W_Q as few rows leave it: that of layer l is dq[l]^T . h[l].
struct GradFactors {
  std::vector<at::Tensor> dq;  // by layer [rows, H * d] dtype
  std::vector<at::Tensor> h;   // [rows, hidden] dtype
};

// What one step of AdamW reads and writes of a full delta (worker/optimizer.h).
struct AdamWStep {
  at::Tensor parameter;                    // [layers, H * d, hidden] fp32
  at::Tensor first, second;                // moments, the same
  at::Tensor rounded;                      // dtype: gets the parameter; the same tensor where that is fp32
  at::Tensor rate, steps, divisor, skip;   // [] fp32; with `skip` not 0 nothing changes
};

// Rows [first, first + rows) of a decode pass read these.
struct RowSweep {
  int64_t first = 0;
  int64_t rows = 0;
  std::vector<KvView> extents;
};

// A pass that is run many times over tensors that stay where they are.
class Repeat {
 public:
  virtual ~Repeat() = default;
  // Enqueues one run. Throws what the pass throws.
  virtual void Run() = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual at::Device device() const = 0;
  virtual at::ScalarType dtype() const = 0;
  // Of K and V: dtype(), or kByte with scales.
  virtual at::ScalarType kv_dtype() const = 0;
  // Fewer rows than this a rank are not worth splitting over the ranks: the linear layers are bound by reading weights.
  virtual int64_t min_split_rows() const = 0;

  // Once, on the thread that will call everything else, before anything else.
  virtual void Bind() = 0;
  // Returns when everything enqueued is done. Throws what the device reports.
  virtual void Synchronize() = 0;
  // `pass` enqueues work whose shapes and addresses are the same in every run; it must not synchronize and must stay
  // valid as long as the result. On a GPU the first run is eager, the second is recorded as a graph, the others replay
  // it; where recording fails all are eager, with one warning.
  virtual std::unique_ptr<Repeat> Repeated(std::function<void()> pass) = 0;

  // Enqueues `work` behind what was enqueued before and beside what comes after, until Await of the ticket. Works follow
  // each other in order. What they use must live until then and be allocated outside. On the CPU it runs at once.
  virtual int64_t Aside(const std::function<void()>& work) = 0;
  virtual void Await(int64_t ticket) = 0;

  // q [rows, heads, head_dim] dtype, after RoPE; pos [rows] int64, any order, may repeat. `extents` may be empty or have
  // empty members; a key is visible iff its position <= the row's. rows may be 0.
  virtual Partial Attend(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents) = 0;

  // dq of this rank's keys; slices' dq add up. lse and row_dot = rowsum(dout * out) [rows, heads] fp32 are those of the
  // *combined* attention; dout [rows, heads, head_dim] dtype. With P = exp(s - lse): ds = P * (dout.v - row_dot),
  // dq = scale * ds.k. Rows with lse = -inf give 0. -> [rows, heads, head_dim] fp32
  virtual at::Tensor QueryGrad(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents,
                               const at::Tensor& dout, const at::Tensor& lse, const at::Tensor& row_dot) = 0;

  // out [parts, rows, heads, head_dim], lse [parts, rows, heads], added up in fp32 in the order of parts.
  virtual Partial Combine(const at::Tensor& out, const at::Tensor& lse) = 0;

  // Where the group's GPUs reach each other's memory (Collective::NextPeerExchange), of rows that all ranks compute, in
  // rank order: the combination of all ranks' partials, and the sum of their x, fp32, as `type`. All ranks call it
  // alike.
  virtual Partial CombineOverPeers(const Partial& /*own*/, const kernels::PeerMemory& /*peers*/) {
    REFOCUS_CHECK(false);
    return {};
  }
  virtual at::Tensor SumOverPeers(const at::Tensor& /*x*/, at::ScalarType /*type*/,
                                  const kernels::PeerMemory& /*peers*/) {
    REFOCUS_CHECK(false);
    return {};
  }

  // y = x . w^T: x [rows, in], w [out, in], both dtype -> [rows, out] dtype. Rows of w may lie apart, here, in
  // LinearSum without a delta and in LinearGrad.
  virtual at::Tensor Linear(const at::Tensor& x, const at::Tensor& w) = 0;
  // Both x . one^T and x . other^T, of equal sizes: together where that costs less than by themselves.
  virtual std::array<at::Tensor, 2> LinearPair(const at::Tensor& x, const at::Tensor& one, const at::Tensor& other) {
    return {Linear(x, one), Linear(x, other)};
  }
  // x . w^T + x . delta^T, added in fp32 before any rounding; delta [out, in] dtype or undefined -> [rows, out] fp32.
  virtual at::Tensor LinearSum(const at::Tensor& x, const at::Tensor& w, const at::Tensor& delta) = 0;
  // Products whose y do not overlap; on a GPU those of few rows run together: many cost no more than their bytes.
  virtual void AddLinears(const std::vector<AddedProduct>& products) = 0;
  // dx = dy . w (+ dy . delta): dy [rows, out], w and delta [out, in] -> [rows, in] dtype.
  virtual at::Tensor LinearGrad(const at::Tensor& dy, const at::Tensor& w, const at::Tensor& delta) = 0;
  // The gradient behind LinearPair: dx = dy . one + other_dy . other; `wide`: fp32.
  virtual at::Tensor LinearPairGrad(const at::Tensor& dy, const at::Tensor& one, const at::Tensor& other_dy,
                                    const at::Tensor& other, bool wide) = 0;
  // grad [out, in] fp32 = dy^T . x, or += when `add`: dy [rows, out], x [rows, in] dtype.
  virtual void WeightGrad(const at::Tensor& dy, const at::Tensor& x, bool add, at::Tensor& grad) = 0;

  // Of at most so many rows the gradient of a full delta is never written: its norm [1] fp64, over all layers, and the
  // step that it makes follow from its factors. 0: of none.
  virtual int64_t factor_rows() const = 0;
  virtual void FactorNorm(const GradFactors& grad, at::Tensor norm) = 0;
  virtual void FactorAdamW(const GradFactors& grad, const OptimizerConfig& config, const AdamWStep& step) = 0;

  // A tensor as matrix products read it.
  virtual at::Tensor Rounded(const at::Tensor& t) = 0;
  // table [vocab, hidden] dtype, ids [n] -> [n, hidden] fp32.
  virtual at::Tensor Embed(const at::Tensor& table, const at::Tensor& ids) = 0;
  // RMSNorm of x [n, hidden] fp32: x / sqrt(mean(x^2) + eps) * weight -> dtype.
  virtual at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) = 0;
  // The same of x + y; y [n, hidden] dtype.
  virtual Normed AddNorm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight) = 0;
  // x + y -> fp32.
  virtual at::Tensor Add(const at::Tensor& x, const at::Tensor& y) = 0;
  // The gradient behind Norm(x), added to `residual` (fp32, may be undefined); dh [n, hidden] dtype.
  virtual Gradient NormGrad(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dh,
                            const at::Tensor& residual) = 0;

  virtual Rotation RotationAt(const at::Tensor& pos) = 0;
  // raw [n, heads, head_dim] fp32, plus the bias, RMSNorm over head_dim, then RoPE -> dtype.
  virtual at::Tensor Rotate(const at::Tensor& raw, const HeadWeights& weights, const Rotation& rotation) = 0;
  // The gradient behind it with respect to raw: dq [n, heads, head_dim] fp32 -> [n, heads, head_dim] dtype.
  virtual at::Tensor RotateGrad(const at::Tensor& dq, const at::Tensor& raw, const HeadWeights& weights,
                                const Rotation& rotation) = 0;
  // Keys and values of rows h [n, hidden] dtype, written to slots[i] of `extent`; rows with slots[i] < 0 are skipped.
  virtual void Append(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation,
                      const at::Tensor& slots, const KvView& extent) = 0;

  // Decode passes. `tails` [n, kMaxTailExtents, kTailWords] int64; recorded passes read it anew in every run.
  // LinearSum of queries; with it the rows' keys and values, where that costs less than by themselves.
  virtual at::Tensor ProjectRows(const at::Tensor& h, const at::Tensor& wq, const at::Tensor& delta,
                                 const KeyValueWeights& /*weights*/, KeyValueRows* /*keys*/) {
    return LinearSum(h, wq, delta);
  }
  // Rotate of the queries `raw`, and as Append, with row i to slots[i] of the first extent of tails[i]. `keys`: of these
  // rows from ProjectRows, or undefined.
  virtual at::Tensor RotateAndAppendRows(const at::Tensor& raw, const HeadWeights& queries, const at::Tensor& h,
                                         const KeyValueWeights& weights, const KeyValueRows& keys,
                                         const Rotation& rotation, const at::Tensor& slots, const at::Tensor& tails,
                                         int64_t layer) = 0;
  // Attention of each row over the extents of its sweep and its own in `tails`, which `plan` cuts. The sweeps name every
  // row once, in order. Rows at position -1 see nothing. With `peers` as CombineOverPeers of it.
  virtual Partial AttendRows(const at::Tensor& q, const at::Tensor& pos, const std::vector<RowSweep>& sweeps,
                             const at::Tensor& tails, int64_t layer, const ShardPlan& plan,
                             const kernels::PeerMemory* peers) = 0;
  // Rows of a group of a decode pass, at least `rows`: few different numbers where a pass is recorded.
  virtual int64_t PaddedRows(int64_t rows) const = 0;

  // silu(x . gate^T) * (x . up^T): x [rows, in], gate and up [out, in], all dtype; both products are rounded first.
  virtual at::Tensor GatedLinear(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up) = 0;
  // silu(gate) * up, [n, mlp] dtype.
  virtual at::Tensor SiluMul(const at::Tensor& gate, const at::Tensor& up) = 0;
  struct SiluGrads {
    at::Tensor gate;
    at::Tensor up;
  };
  virtual SiluGrads SiluMulGrad(const at::Tensor& dact, const at::Tensor& gate, const at::Tensor& up) = 0;
  // rowsum(dout * out): dout dtype, out fp32 [n, heads, head_dim] -> [n, heads] fp32.
  virtual at::Tensor RowDot(const at::Tensor& dout, const at::Tensor& out) = 0;

  // Next-token cross-entropy of logits [m, vocab] fp32, which may be overwritten; targets [m] int64. With `grad`:
  // dlogits = (softmax - onehot) * grad_scale.
  virtual Losses CrossEntropy(at::Tensor logits, const at::Tensor& targets, bool grad, double grad_scale) = 0;

  // tokens [rows] int64 and logprobs [rows] fp32 from logits [rows, vocab] fp32 and samplers [rows] int64, each the
  // SamplerAddress of a sampler of this device (worker/sampler.h), named at most once: the next token of its answer, which
  // the sampler then counts. Depends on the row and its sampler alone. Where the address is 0, a logit is NaN or infinite,
  // or nothing is left to draw from, the token is -1, and the sampler is as before. A recorded pass reads addresses and
  // samplers anew in every run: sequences may join, leave and change rows by writing to `samplers`.
  virtual void Sample(const at::Tensor& logits, const at::Tensor& samplers, at::Tensor& tokens,
                      at::Tensor& logprobs) = 0;
};

// fp32; `config` gives rotary frequencies and epsilon.
std::unique_ptr<Backend> MakeCpuBackend(const ModelConfig& config = {}, KvType kv = KvType::kDevice);

// bf16 on GPU `index`; int8 needs a head_dim that is a multiple of 16. Throws c10::Error when the device cannot be used.
std::unique_ptr<Backend> MakeCudaBackend(const ModelConfig& config, int index, KvType kv = KvType::kDevice);

}  // namespace refocus
