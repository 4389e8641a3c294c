// Decode rows on the CPU: shared keys in one sweep for all rows that read them, and each row's own keys by themselves.
#include "worker/backend_cpu_rowwise.h"

#include <algorithm>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "base/check.h"
#include "base/limits.h"

namespace refocus {
namespace {

// What `words` says of one layer.
KvView TailView(const int64_t* words, int64_t kv_heads, int64_t head_dim, int64_t layer, const ShardPlan& plan) {
  const auto tensor = [&](int64_t address) {
    float* const data = reinterpret_cast<float*>(address) + layer * words[2];
    return at::from_blob(data, {kv_heads, words[4], head_dim}, {words[3], head_dim, 1}, at::TensorOptions(at::kFloat));
  };
  return {tensor(words[0]), tensor(words[1]), words[4], words[5], plan};
}

}  // namespace

void CpuRowwise::AppendRows(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation,
                            const at::Tensor& slots, const at::Tensor& tails, int64_t layer) {
  const int64_t rows = h.size(0);
  const int64_t* const slot = slots.const_data_ptr<int64_t>();
  if (std::all_of(slot, slot + rows, [](int64_t s) { return s < 0; })) return;  // others own them
  const auto [k, v] = MakeKeysValues(h, weights, rotation);
  for (int64_t row = 0; row < rows; ++row) {
    if (slot[row] < 0) continue;
    const KvView own =
        TailView(tails.const_data_ptr<int64_t>() + row * tails.stride(0), k.size(1), head_dim_, layer, ShardPlan());
    REFOCUS_CHECK_LT(slot[row], own.length);
    own.k.select(1, slot[row]).copy_(k.select(0, row));
    own.v.select(1, slot[row]).copy_(v.select(0, row));
  }
}

Partial CpuRowwise::AttendRows(const at::Tensor& q, const at::Tensor& pos, const std::vector<RowSweep>& sweeps,
                               const at::Tensor& tails, int64_t layer, const ShardPlan& plan) {
  const int64_t rows = q.size(0);
  std::vector<int64_t> shape = q.sizes().vec();
  shape.insert(shape.begin(), 2);
  const at::Tensor out = at::empty(shape, q.options());
  const at::Tensor lse = at::empty({2, rows, q.size(1)}, q.options());
  const auto attend = [&](int64_t part, int64_t first, int64_t count, const std::vector<KvView>& extents) {
    const Partial partial = Attend(q.narrow(0, first, count), pos.narrow(0, first, count), extents);
    out.select(0, part).narrow(0, first, count).copy_(partial.out);
    lse.select(0, part).narrow(0, first, count).copy_(partial.lse);
  };
  int64_t swept = 0;
  for (const RowSweep& sweep : sweeps) {
    REFOCUS_CHECK_EQ(sweep.first, swept);
    swept += sweep.rows;
    attend(0, sweep.first, sweep.rows, sweep.extents);
  }
  REFOCUS_CHECK_EQ(swept, rows);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<KvView> own;
    for (int64_t i = 0; i < kMaxTailExtents; ++i) {
      const int64_t* const words = tails.const_data_ptr<int64_t>() + row * tails.stride(0) + i * kTailWords;
      if (words[4] > 0) own.push_back(TailView(words, kv_heads_, head_dim_, layer, plan));
    }
    attend(1, row, 1, own);
  }
  return Combine(out, lse);
}

}  // namespace refocus
