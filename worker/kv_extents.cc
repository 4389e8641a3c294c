#include "worker/kv_extents.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "base/memory_plan.h"
#include "worker/hash.h"

namespace refocus {

KvExtent::KvExtent(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity,
                   const at::TensorOptions& options, bool poison)
    : plan_(plan),
      first_position_(first_position),
      capacity_(capacity),
      first_index_(plan.CountBelow(first_position)),
      slots_(plan.CountBelow(first_position + capacity) - first_index_) {
  const std::vector<int64_t> shape = {config.layers, config.kv_heads, slots_, config.head_dim};
  k_ = at::empty(shape, options);
  v_ = at::empty(shape, options);
  bytes_ = static_cast<int64_t>(k_.nbytes() + v_.nbytes());
  if (k_.scalar_type() == at::kByte) {
    k_scale_ = at::empty({config.layers, config.kv_heads, slots_}, options.dtype(at::kBFloat16));
    v_scale_ = at::empty_like(k_scale_);
    bytes_ += static_cast<int64_t>(k_scale_.nbytes() + v_scale_.nbytes());
  }
  if (!poison) return;
  const bool scaled = k_scale_.defined();
  for (const at::Tensor& all : {scaled ? k_scale_ : k_, scaled ? v_scale_ : v_}) {
    all.fill_(std::numeric_limits<float>::quiet_NaN());
  }
}

int64_t KvExtent::Bytes(const ModelConfig& config, const ShardPlan& plan, int64_t first_position, int64_t capacity,
                        at::ScalarType kv_dtype) {
  const int64_t slots = plan.CountBelow(first_position + capacity) - plan.CountBelow(first_position);
  if (kv_dtype == at::kByte) return slots * KvBytesPerToken(config, DeviceKind::kCpu, KvType::kInt8);  // as on CUDA
  return slots * config.kv_bytes_per_token(static_cast<int64_t>(c10::elementSize(kv_dtype)));
}

KvView KvExtent::View(int64_t layer) const {
  KvView view;
  view.k = k_.select(0, layer);
  view.v = v_.select(0, layer);
  if (k_scale_.defined()) {
    view.k_scale = k_scale_.select(0, layer);
    view.v_scale = v_scale_.select(0, layer);
  }
  view.length = slots_;
  view.first_index = first_index_;
  view.plan = plan_;
  return view;
}

KvView KvExtent::View(int64_t layer, int64_t begin, int64_t end) const {
  const auto slot = [&](int64_t position) {
    return std::clamp<int64_t>(plan_.CountBelow(position) - first_index_, 0, slots_);
  };
  KvView view = View(layer);
  const int64_t first = slot(begin);
  view.length = std::max<int64_t>(slot(end) - first, 0);
  for (at::Tensor* tensor : {&view.k, &view.v, &view.k_scale, &view.v_scale}) {
    if (tensor->defined()) *tensor = tensor->narrow(1, first, view.length);
  }
  view.first_index += first;
  return view;
}

KvView KvShare::View(int64_t layer) const {
  KvView view = extent->View(layer);
  view.length = std::min(view.length, view.plan.CountBelow(end) - view.first_index);
  return view;
}

void KvShare::Write(int64_t* words) const { extent->Write(View(0).length, words); }

KvView KvShare::View(int64_t layer, int64_t first, int64_t behind) const {
  return extent->View(layer, first, std::min(behind, end));
}

void KvChain::Add(std::shared_ptr<const KvExtent> extent) {
  if (extent->capacity() == 0) return;
  REFOCUS_CHECK(shares_.empty() || extent->first_position() == end());
  const int64_t behind = extent->first_position() + extent->capacity();
  shares_.push_back({std::move(extent), behind});
}

KvChain KvChain::Below(int64_t end) const {
  KvChain below;
  for (const KvShare& share : shares_) {
    if (share.extent->first_position() < end) below.shares_.push_back({share.extent, std::min(share.end, end)});
  }
  return below;
}

void KvExtent::Write(int64_t slots, int64_t* words) const {
  words[0] = reinterpret_cast<int64_t>(k_.const_data_ptr());
  words[1] = reinterpret_cast<int64_t>(v_.const_data_ptr());
  words[2] = k_.stride(0);
  words[3] = k_.stride(1);
  words[4] = slots;
  words[5] = first_index_;
  words[6] = k_scale_.defined() ? reinterpret_cast<int64_t>(k_scale_.const_data_ptr()) : 0;
  words[7] = v_scale_.defined() ? reinterpret_cast<int64_t>(v_scale_.const_data_ptr()) : 0;
}

int64_t KvExtent::SlotOf(int64_t position) const {
  if (position < first_position_ || position >= first_position_ + capacity_ || !plan_.Owns(position)) return -1;
  return plan_.CountBelow(position) - first_index_;
}

void KvExtent::FillRandom() {
  for (int64_t layer = 0; layer < k_.size(0); ++layer) {
    for (const at::Tensor& all : {k_, v_}) {
      const at::Tensor one = all.select(0, layer);
      one.copy_(k_scale_.defined() ? at::randint(256, one.sizes(), one.options()) : at::randn(one.sizes(), one.options()));
    }
  }
  for (const at::Tensor& scale : {k_scale_, v_scale_}) {
    if (scale.defined()) scale.fill_(1.0 / 64);
  }
  length_ = slots_;
}

void KvExtent::Advance(int64_t rows) {
  REFOCUS_CHECK_LE(length_ + rows, slots_);
  length_ += rows;
}

uint64_t KvExtent::Hash() const {
  uint64_t hash = 0;
  for (const at::Tensor& all : {k_, v_, k_scale_, v_scale_}) {
    if (!all.defined()) continue;
    for (int64_t layer = 0; layer < all.size(0); ++layer) {
      for (int64_t head = 0; head < all.size(1); ++head) {
        hash = HashTensor(all.select(0, layer).select(0, head).narrow(0, 0, length_), hash);
      }
    }
  }
  return hash;
}

}  // namespace refocus
