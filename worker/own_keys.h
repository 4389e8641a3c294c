// Attention of rows to keys of their own, beside what they see of the cache: spans that are read again behind a context
// (Span::behind in worker/command.h). Their K and V are computed on the way, take no gradient and are kept nowhere.
//
// n rows, H / Hk = query / KV heads, d = head_dim. Everything is of replicated rows: each rank does the same.
#pragma once

#include <ATen/core/Tensor.h>

#include "worker/backend.h"

namespace refocus {

struct OwnKeys {
  at::Tensor k;  // [n, Hk, d] dtype, after RoPE
  at::Tensor v;  // [n, Hk, d] dtype
};

// Of rows h [n, hidden] dtype.
OwnKeys MakeOwnKeys(Backend& backend, const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation,
                    int64_t head_dim);

// q [n, H, d] dtype, after RoPE; mask [n, n] fp32: 0 where row i sees row j's key, else -inf. Rows that see none have
// out 0 and lse -inf.
Partial OwnAttend(const at::Tensor& q, const OwnKeys& own, const at::Tensor& mask);

// Backend::QueryGrad over these keys -> [n, H, d] fp32.
at::Tensor OwnQueryGrad(const at::Tensor& q, const OwnKeys& own, const at::Tensor& mask, const at::Tensor& dout,
                        const at::Tensor& lse, const at::Tensor& row_dot);

}  // namespace refocus
