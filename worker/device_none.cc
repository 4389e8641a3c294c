#include "base/check.h"
#include "worker/device.h"

namespace refocus {

StatusOr<Gpu> UseGpu(int, int) {
  return Error(StatusCode::kFailedPrecondition, "HARDWARE",
               "--device: got cuda, but this refocus-worker was built without CUDA; use --device cpu, or a build "
               "configured with -DREFOCUS_CUDA=ON");
}

int64_t GpuUsedBytes() { return 0; }
void GpuReleaseCached() {}

// Not reached: UseGpu refused.
std::unique_ptr<Backend> MakeGpuBackend(const ModelConfig&, const Gpu&, KvType) {
  REFOCUS_CHECK(false);
  return nullptr;
}
std::string MakeGpuGroupId() {
  REFOCUS_CHECK(false);
  return "";
}
std::shared_ptr<Collective> MakeGpuCollective(const std::string&, int, int, double, bool) {
  REFOCUS_CHECK(false);
  return nullptr;
}

}  // namespace refocus
