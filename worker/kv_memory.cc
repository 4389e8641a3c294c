#include "worker/kv_memory.h"

#include <exception>
#include <string>

#include "worker/agreement.h"

namespace refocus {

Status KvMemory::Reserve(int64_t first_position, int64_t capacity, int64_t free_bytes,
                         std::shared_ptr<KvExtent>* extent) {
  const Backend& backend = model_.backend();
  const int64_t need = KvExtent::Bytes(model_.config(), model_.plan(), first_position, capacity,
                                       backend.kv_dtype());
  const auto refuse = [&](const std::string& why) {
    return Error(StatusCode::kResourceExhausted, "KV_CAPACITY",
                 "K/V memory of rank " + std::to_string(model_.collective().rank()) + ": need " + std::to_string(need) +
                     " bytes, free " + std::to_string(free_bytes) + why + "; delete a context or raise --kv-memory",
                 {{"need_bytes", std::to_string(need)}, {"free_bytes", std::to_string(free_bytes)}});
  };
  Status status;
  std::unique_ptr<KvExtent> made;
  if (need > free_bytes) {
    status = refuse("");
  } else {
    try {
      made = std::make_unique<KvExtent>(model_.config(), model_.plan(), first_position, capacity,
                                        at::TensorOptions(backend.device()).dtype(backend.kv_dtype()), poison_);
    } catch (const std::exception& error) {  // LibTorch reports a failed allocation as c10::Error
      status = refuse(" but the allocation failed");
    }
  }
  status = AllOrNone(model_.collective(), status, "KV_CAPACITY");
  if (!status.ok()) return status;
  used_bytes_ += need;
  *extent = std::shared_ptr<KvExtent>(made.release(), [this, need](const KvExtent* unused) {
    used_bytes_ -= need;
    delete unused;
  });
  return status;
}

}  // namespace refocus
