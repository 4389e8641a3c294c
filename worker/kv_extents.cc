#include "worker/kv_extents.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "base/check.h"
#include "worker/hash.h"

namespace refocus {

KvExtent::KvExtent(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity,
                   bool poison)
    : plan_(plan),
      first_position_(first_position),
      capacity_(capacity),
      first_index_(plan.CountBelow(first_position)),
      slots_(plan.CountBelow(first_position + capacity) - first_index_),
      bytes_(Bytes(config, plan, first_position, capacity)) {
  const std::vector<int64_t> shape = {config.layers, config.kv_heads, slots_, config.head_dim};
  k_ = at::empty(shape, at::kFloat);
  v_ = at::empty(shape, at::kFloat);
  if (poison) {
    k_.fill_(std::numeric_limits<float>::quiet_NaN());
    v_.fill_(std::numeric_limits<float>::quiet_NaN());
  }
}

int64_t KvExtent::Bytes(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity) {
  const int64_t slots = plan.CountBelow(first_position + capacity) - plan.CountBelow(first_position);
  return slots * config.kv_bytes_per_token(sizeof(float));
}

KvView KvExtent::View(int64_t layer, int64_t pending) const {
  return KvView{k_.select(0, layer), v_.select(0, layer), length_ + pending, first_index_, plan_};
}

void KvExtent::Append(int64_t layer, const at::Tensor& k, const at::Tensor& v) {
  const int64_t rows = k.size(0);
  if (rows == 0) return;
  REFOCUS_CHECK_LE(length_ + rows, slots_);
  k_.select(0, layer).narrow(1, length_, rows).copy_(k.transpose(0, 1));
  v_.select(0, layer).narrow(1, length_, rows).copy_(v.transpose(0, 1));
}

void KvExtent::Advance(int64_t rows) {
  REFOCUS_CHECK_LE(length_ + rows, slots_);
  length_ += rows;
}

uint64_t KvExtent::Hash() const {
  uint64_t hash = 0;
  for (const at::Tensor& all : {k_, v_}) {
    for (int64_t layer = 0; layer < all.size(0); ++layer) {
      for (int64_t head = 0; head < all.size(1); ++head) {
        hash = HashTensor(all.select(0, layer).select(0, head).narrow(0, 0, length_), hash);
      }
    }
  }
  return hash;
}

}  // namespace refocus
