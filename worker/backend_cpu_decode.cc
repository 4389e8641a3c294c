// Decode rows on the CPU: shared keys in one sweep for all rows that read them, and each row's own keys by themselves.
#include "worker/backend_cpu_rowwise.h"

#include <algorithm>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "base/check.h"
#include "base/limits.h"

namespace refocus {

KvView CpuRowwise::TailView(const int64_t* words, int64_t layer, const ShardPlan& plan) const {
  const int64_t offset = layer * words[2], slots = words[4];
  const auto elements = [&](int64_t address) {
    const auto bytes = static_cast<int64_t>(c10::elementSize(kv_dtype()));
    return at::from_blob(reinterpret_cast<char*>(address) + offset * bytes, {kv_heads_, slots, head_dim_},
                         {words[3], head_dim_, 1}, at::TensorOptions(kv_dtype()));
  };
  KvView view;
  view.k = elements(words[0]);
  view.v = elements(words[1]);
  view.length = slots;
  view.first_index = words[5];
  view.plan = plan;
  if (kv_ != KvType::kInt8) return view;
  const auto scales = [&](int64_t address) {
    return at::from_blob(reinterpret_cast<uint16_t*>(address) + offset / head_dim_, {kv_heads_, slots},
                         {words[3] / head_dim_, 1}, at::TensorOptions(at::kBFloat16));
  };
  view.k_scale = scales(words[6]);
  view.v_scale = scales(words[7]);
  return view;
}

at::Tensor CpuRowwise::RotateAndAppendRows(const at::Tensor& raw, const HeadWeights& queries, const at::Tensor& h,
                                           const KeyValueWeights& weights, const KeyValueRows& /*keys*/,
                                           const Rotation& rotation, const at::Tensor& slots, const at::Tensor& tails,
                                           int64_t layer) {
  const int64_t rows = h.size(0);
  const int64_t* const slot = slots.const_data_ptr<int64_t>();
  at::Tensor rotated = Rotate(raw, queries, rotation);
  if (std::all_of(slot, slot + rows, [](int64_t s) { return s < 0; })) return rotated;  // others own them
  const KeysValues made = MakeKeysValues(h, weights, rotation);
  for (int64_t row = 0; row < rows; ++row) {
    if (slot[row] < 0) continue;
    const KvView own = TailView(tails.const_data_ptr<int64_t>() + row * tails.stride(0), layer, ShardPlan());
    REFOCUS_CHECK_LT(slot[row], own.length);
    Store(made, row, own, slot[row]);
  }
  return rotated;
}

Partial CpuRowwise::AttendRows(const at::Tensor& q, const at::Tensor& pos, const std::vector<RowSweep>& sweeps,
                               const at::Tensor& tails, int64_t layer, const ShardPlan& plan,
                               const kernels::PeerMemory* peers) {
  REFOCUS_CHECK(peers == nullptr);
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
      if (words[4] > 0) own.push_back(TailView(words, layer, plan));
    }
    attend(1, row, 1, own);
  }
  return Combine(out, lse);
}

}  // namespace refocus
