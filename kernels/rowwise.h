// The row-wise neighbours of the matrix products, each one pass over memory: RMSNorm, QK-norm with rotary embedding,
// the append to the K/V cache, SwiGLU, cross-entropy, sampling, and their gradients where adaptation needs them.
//
// The residual stream and its gradient are fp32; what matrix products read is bf16 (__nv_bfloat16 behind void*). All
// pointers are device memory, contiguous row-major. Functions enqueue on `stream`, allocate nothing, may be captured,
// and give the same bits for the same inputs. rows may be 0. They return the launch's error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention_shape.h"

#include "base/sampling.h"

namespace refocus::kernels {

// x[row] = table[ids[row]] : table bf16 [vocab, hidden], ids [rows] int64, x fp32 [rows, hidden]. A negative id gives a
// row of NaN: what Sample says when there is no token must not read elsewhere in a replayed step.
cudaError_t Embed(const void* table, const int64_t* ids, int64_t rows, int64_t hidden, float* x, cudaStream_t stream);

// sum = x + y (y bf16, may be null: sum = x, then `sum` may be null too); h = sum / sqrt(mean(sum^2) + eps) * weight,
// bf16. weight bf16 [hidden]. sum may alias x.
struct NormParams {
  int64_t rows = 0;
  int64_t hidden = 0;
  float eps = 0.0f;
  const float* x = nullptr;
  const void* y = nullptr;
  const void* weight = nullptr;
  float* sum = nullptr;
  void* h = nullptr;
};
cudaError_t Norm(const NormParams& params, cudaStream_t stream);

// dx = residual + gradient of Norm(x) behind dh. With r = 1 / sqrt(mean(x^2) + eps), g = dh * weight:
// r * (g - x * r^2 * mean(g * x)). residual fp32 (null: 0) may alias dx; dx_bf16 (may be null) is dx rounded.
struct NormGradParams {
  int64_t rows = 0;
  int64_t hidden = 0;
  float eps = 0.0f;
  const float* x = nullptr;
  const void* weight = nullptr;   // bf16
  const void* dh = nullptr;       // bf16 [rows, hidden]
  const float* residual = nullptr;
  float* dx = nullptr;
  void* dx_bf16 = nullptr;
};
cudaError_t NormGrad(const NormGradParams& params, cudaStream_t stream);

// Heads of queries or keys: an optional bias, optional RMSNorm over head_dim, then rotary embedding at each row's position: element i
// pairs with i + head_dim / 2, angle = position * inverse_frequencies[i] formed in fp64 and reduced modulo 2 pi before
// sine and cosine are taken in fp32 (a million times a frequency does not fit fp32), each times attention_factor.
struct RotateParams {
  int64_t rows = 0;
  int heads = 0;
  int head_dim = 0;                             // even
  float eps = 0.0f;
  const float* raw = nullptr;                   // fp32 [rows, heads, head_dim]
  const void* norm = nullptr;                   // bf16 [head_dim]; null: no norm
  const int64_t* pos = nullptr;                 // [rows]
  const float* inverse_frequencies = nullptr;   // [head_dim / 2]
  void* out = nullptr;                          // bf16 [rows, heads, head_dim]
  const void* bias = nullptr;                   // bf16 [heads, head_dim]; null: none
  float attention_factor = 1.0f;
};
cudaError_t Rotate(const RotateParams& params, cudaStream_t stream);

// draw of Rotate behind dq (fp32 [rows, heads, head_dim], after rotation): draw bf16 [rows, heads, head_dim].
struct RotateGradParams {
  RotateParams forward;       // raw, bias, norm, pos, inverse_frequencies; out unused
  const float* dq = nullptr;
  void* draw = nullptr;
};
cudaError_t RotateGrad(const RotateGradParams& params, cudaStream_t stream);

// Keys as Rotate, then K and V of row i written to slot slots[i] of an extent; slots[i] < 0: the row is not this GPU's
// (or writes none) and is skipped.
struct AppendParams {
  RotateParams key;             // heads = kv_heads; raw = keys; out unused
  const void* value = nullptr;  // bf16 [rows, kv_heads, head_dim]
  const int64_t* slots = nullptr;  // [rows]
  void* k = nullptr;            // bf16 [kv_heads, capacity, head_dim]
  void* v = nullptr;
  int64_t head_stride = 0;      // elements from one K/V head to the next
  // Instead of k, v and head_stride: row i goes to the first of tails[i], [rows, kTailExtents] in device memory.
  const TailExtent* tails = nullptr;
  int64_t layer = 0;
  // In eight bits (base/kv_int8.h): k and v are codes, and these their scales as in KvSlots (kernels/attention_shape.h),
  // which also says what must be a multiple of 16. `int8` alone says it of tails.
  bool int8 = false;
  void* k_scale = nullptr;
  void* v_scale = nullptr;
};
cudaError_t Append(const AppendParams& params, cudaStream_t stream);

// Rotate and Append, one launch where rows are few: a decode step's queries and keys.
cudaError_t RotateAndAppend(const RotateParams& rotate, const AppendParams& append, cudaStream_t stream);

// act = silu(gate) * up, all bf16 with `count` elements; arithmetic in fp32.
cudaError_t SiluMul(const void* gate, const void* up, int64_t count, void* act, cudaStream_t stream);
// dgate = dact * up * silu'(gate), dup = dact * silu(gate); dgate may alias gate's or dact's memory, dup up's.
cudaError_t SiluMulGrad(const void* dact, const void* gate, const void* up, int64_t count, void* dgate, void* dup,
                        cudaStream_t stream);

// dot[row, head] = sum_i dout[row, head, i] * out[row, head, i]: dout bf16, out fp32, rows counts row-head pairs.
cudaError_t RowDot(const void* dout, const float* out, int64_t rows, int head_dim, float* dot, cudaStream_t stream);

// Next-token cross-entropy of fp32 logits [rows, vocab]: loss[row] = lse(logits[row]) - logits[row, target]; greedy[row]
// (may be null) = 1 when the target is the arg max (the lowest id among equals), else 0. With dlogits (bf16 [rows,
// vocab], may be null): (softmax - onehot(target)) * grad_scale.
struct CrossEntropyParams {
  int64_t rows = 0;
  int64_t vocab = 0;
  const float* logits = nullptr;
  const int64_t* targets = nullptr;
  float* loss = nullptr;
  float* greedy = nullptr;
  void* dlogits = nullptr;
  float grad_scale = 1.0f;
};
cudaError_t CrossEntropy(const CrossEntropyParams& params, cudaStream_t stream);

// One token from each row of fp32 logits [rows, vocab], as base/sampling.h defines it; a row's result depends on that row
// and its sampler alone. The id is -1, and the sampler keeps its state, where a logit is NaN or infinite, none is finite,
// or nothing is left to draw from.
struct SampleParams {
  int64_t rows = 0;                    // at most 65535
  int64_t vocab = 0;
  const float* logits = nullptr;
  SamplerState* const* samplers = nullptr;  // [rows] device; null: the row is skipped, its id is -1. Each at most once
  int64_t* tokens = nullptr;           // [rows]
  float* logprobs = nullptr;           // [rows], at temperature 1
  void* workspace = nullptr;           // SampleWorkspaceBytes(rows, vocab)
};
int64_t SampleWorkspaceBytes(int64_t rows, int64_t vocab);
cudaError_t Sample(const SampleParams& params, cudaStream_t stream);

}  // namespace refocus::kernels
