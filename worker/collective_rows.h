// What the implementations of Collective share: shapes in bytes and the sum in rank order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/check.h"

namespace refocus {

// Bytes of one row of contiguous t [rows, ...]; a row of a 1-dimensional tensor is one element. Defined for 0 rows.
inline int64_t RowBytes(const at::Tensor& t) {
  REFOCUS_CHECK_GE(t.dim(), 1);
  int64_t bytes = t.element_size();
  for (int64_t i = 1; i < t.dim(); ++i) bytes *= t.size(i);
  return bytes;
}

inline char* Bytes(const at::Tensor& t) { return static_cast<char*>(t.data_ptr()); }

inline int64_t SumOfRows(const std::vector<int64_t>& rows) {
  int64_t sum = 0;
  for (const int64_t n : rows) {
    REFOCUS_CHECK_GE(n, 0);
    sum += n;
  }
  return sum;
}

// The caller's side of the contract: a broken one is a bug of this program, not of a peer.
inline void CheckRows(const at::Tensor& t, int64_t rows) {
  REFOCUS_CHECK(t.is_contiguous());
  REFOCUS_CHECK_GE(t.dim(), 1);
  REFOCUS_CHECK_EQ(t.size(0), rows);
}

inline void CheckSameRow(const at::Tensor& in, const at::Tensor& out) {
  REFOCUS_CHECK(in.scalar_type() == out.scalar_type());
  REFOCUS_CHECK_EQ(RowBytes(in), RowBytes(out));
}

inline void CheckSummable(const at::Tensor& t) {
  REFOCUS_CHECK(t.is_contiguous());
  REFOCUS_CHECK(t.scalar_type() == at::kFloat);
}

// The arguments of each call, as collective.h wants them.
inline void CheckGather(const at::Tensor& in, const std::vector<int64_t>& rows, const at::Tensor& out, int rank,
                        int size) {
  REFOCUS_CHECK_EQ(static_cast<int>(rows.size()), size);
  CheckRows(in, rows[rank]);
  CheckRows(out, SumOfRows(rows));
  CheckSameRow(in, out);
}

inline void CheckAllToAll(const at::Tensor& in, const std::vector<int64_t>& send_rows, const at::Tensor& out,
                          const std::vector<int64_t>& recv_rows, int rank, int size) {
  REFOCUS_CHECK_EQ(static_cast<int>(send_rows.size()), size);
  REFOCUS_CHECK_EQ(static_cast<int>(recv_rows.size()), size);
  REFOCUS_CHECK_EQ(send_rows[rank], recv_rows[rank]);
  CheckRows(in, SumOfRows(send_rows));
  CheckRows(out, SumOfRows(recv_rows));
  CheckSameRow(in, out);
}

inline void CheckReduceScatter(const at::Tensor& in, const std::vector<int64_t>& rows, const at::Tensor& out, int rank,
                               int size) {
  REFOCUS_CHECK_EQ(static_cast<int>(rows.size()), size);
  CheckSummable(in);
  CheckSummable(out);
  CheckRows(in, SumOfRows(rows));
  CheckRows(out, rows[rank]);
  CheckSameRow(in, out);
}

inline void CheckBroadcast(const at::Tensor& t, int root, int size) {
  REFOCUS_CHECK(t.is_contiguous());
  REFOCUS_CHECK(root >= 0 && root < size);
}

inline void CopyBytes(void* to, const void* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// first[j] .. first[j + 1]: where rank j's rows begin, in units of `unit`.
inline std::vector<int64_t> Offsets(const std::vector<int64_t>& rows, int64_t unit) {
  std::vector<int64_t> first(rows.size() + 1, 0);
  for (size_t i = 0; i < rows.size(); ++i) first[i + 1] = first[i] + rows[i] * unit;
  return first;
}

// Nearly equal parts of `count` floats for `size` ranks, cut at pages: copies between pages of different alignment take
// twice the time.
inline constexpr int64_t kPageFloats = 1024;
inline std::vector<int64_t> EqualParts(int64_t count, int size) {
  const int64_t pages = (count + kPageFloats - 1) / kPageFloats;
  std::vector<int64_t> first(size + 1, 0);
  for (int i = 1; i <= size; ++i) first[i] = std::min(count, pages * i / size * kPageFloats);
  return first;
}

// out[i] = ((parts[0][i] + parts[1][i]) + parts[2][i]) + ...; out may be one of the parts.
inline void SumInOrder(const std::vector<const float*>& parts, int64_t count, float* out) {
  constexpr int64_t kBlock = 1024;  // stays in the first-level cache
  float sum[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin);
    std::memcpy(sum, parts[0] + begin, n * sizeof(float));
    for (size_t p = 1; p < parts.size(); ++p) {
      const float* part = parts[p] + begin;
      for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
    }
    std::memcpy(out + begin, sum, n * sizeof(float));
  }
}

}  // namespace refocus
