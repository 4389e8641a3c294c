// What the backend's tests compare with: attention over unsharded keys by global position, in fp64, one scalar at a
// time. It knows nothing of slots, blocks, shards or the K/V layout of the worker.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace refocus {

// Key i lies at position i. q [rows, heads, head_dim], pos [rows], k and v [kv_heads, keys, head_dim], dout like q;
// fp32 or fp64.
struct OracleInput {
  at::Tensor q, pos, k, v, dout;
};

// All fp64: out [rows, heads, head_dim], lse and row_dot [rows, heads], dq like out.
struct OracleResult {
  at::Tensor out, lse, row_dot, dq;
};

OracleResult Oracle(const OracleInput& input);

// The same in fp32 with plain LibTorch operators over whole matrices: its distance to the oracle is what fp32 costs.
// The gradient takes the given lse and row_dot [rows, heads] fp32, as the backend does.
struct PlainResult {
  at::Tensor out, lse, dq;
};

PlainResult PlainTorch(const OracleInput& input, const at::Tensor& lse, const at::Tensor& row_dot);

}  // namespace refocus
