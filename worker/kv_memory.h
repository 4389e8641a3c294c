// Counts the K/V bytes of one rank: an extent counts from its reservation until nobody holds it any more.
#pragma once

#include <cstdint>
#include <memory>

#include "worker/kv_extents.h"
#include "worker/model.h"

namespace refocus {

class KvMemory {
 public:
  // Outlives its extents; `model` outlives it. `poison`: as in KvExtent.
  KvMemory(const Model& model, bool poison) : model_(model), poison_(poison) {}

  // Reserves an extent on every rank or on none (KV_CAPACITY). `free_bytes`: what this rank may still take.
  Status Reserve(int64_t first_position, int64_t capacity, int64_t free_bytes, std::shared_ptr<KvExtent>* extent);

  int64_t used_bytes() const { return used_bytes_; }

 private:
  const Model& model_;
  const bool poison_;
  int64_t used_bytes_ = 0;
};

}  // namespace refocus
