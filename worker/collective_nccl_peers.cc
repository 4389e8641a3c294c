#include "worker/collective_nccl_peers.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/check.h"

namespace refocus::nccl {
namespace {

constexpr double kSlackSeconds = 1.0;  // the watchdog's message, which says more, comes before a kernel's own deadline
constexpr double kTrialSeconds = 10.0;
constexpr int64_t kTrialFloats = 4096;
constexpr size_t kTroubleBytes = 192;

// What tells processes apart, also those of different containers with the same process id.
uint64_t ThisProcess() {
  static const uint64_t number = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return number;
}

std::string BootId() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id;
}

template <size_t kSize>
void SetText(char (&to)[kSize], const std::string& text) {
  std::snprintf(to, kSize, "%s", text.c_str());
}

// Memory of this process between two groups.
struct Block {
  int device;
  int ranks;
  void* memory;        // nullptr: none
  uint32_t* given_up;
};
std::mutex idle_mutex;
std::vector<Block>& Idle() {
  static auto* blocks = new std::vector<Block>;
  return *blocks;
}

Block TakeIdle(int device, int ranks) {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  std::vector<Block>& blocks = Idle();
  const auto at = std::find_if(blocks.begin(), blocks.end(),
                               [&](const Block& b) { return b.device == device && b.ranks == ranks; });
  if (at == blocks.end()) return {};
  const Block block = *at;
  blocks.erase(at);
  return block;
}

// Empty when all is well. An error is not left behind for others to find.
std::string Failed(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(what) + ": " + cudaGetErrorString(error);
}

}  // namespace

// What a rank tells the others about its memory.
struct Peers::Offer {
  char trouble[kTroubleBytes];  // empty: there is memory
  char boot[40];
  char bus[32];
  uint64_t process;
  void* memory;  // of use in the same process, which cannot open its own handle
  int32_t device;
  cudaIpcMemHandle_t handle;
};

Peers::Peers(int rank, int size, double deadline_seconds, bool wanted, cudaStream_t stream, const Gather& gather) {
  static_assert(std::is_trivially_copyable_v<Offer>);
  REFOCUS_CHECK_GE(size, 2);
  memory_.rank = rank;
  memory_.ranks = size;
  Offer offer = {};
  SetText(offer.trouble, size > kernels::kMostPeers
                             ? "more than " + std::to_string(kernels::kMostPeers) + " ranks"
                             : Take(wanted, &offer));
  const std::string offers = gather({reinterpret_cast<const char*>(&offer), sizeof(offer)});
  // A handle that opens is no proof that what is written there arrives.
  memory_.deadline_ns = static_cast<int64_t>(kTrialSeconds * 1e9);
  used_ = Agreed(Open(offers), gather) && Agreed(Try(stream), gather);
  memory_.deadline_ns = static_cast<int64_t>((deadline_seconds + kSlackSeconds) * 1e9);
  if (!used_) GiveBack();
}

void Peers::GiveBack() {
  used_ = false;
  if (given_up_ == nullptr) return;  // no memory of its own, so none of others
  int current = 0;
  cudaGetDevice(&current);
  cudaSetDevice(device_);
  for (int r = 0; r < std::min(memory_.ranks, kernels::kMostPeers); ++r) {
    if (opened_[r]) cudaIpcCloseMemHandle(memory_.memory[r]);
    opened_[r] = false;
    if (r != memory_.rank) memory_.memory[r] = nullptr;
  }
  cudaSetDevice(current);
  const std::lock_guard<std::mutex> lock(idle_mutex);
  Idle().push_back({device_, memory_.ranks, std::exchange(memory_.memory[memory_.rank], nullptr),
                    std::exchange(given_up_, nullptr)});
}

std::string Peers::Take(bool wanted, Offer* offer) {
  std::string trouble = Failed("cudaGetDevice", cudaGetDevice(&device_));
  if (!wanted) return "switched off";
  if (!trouble.empty()) return trouble;
  const auto bytes =
      static_cast<size_t>(kernels::PeerMemoryBytes(memory_.ranks)) + 2 * kTrialFloats * sizeof(float);
  void*& own = memory_.memory[memory_.rank];
  if (const Block block = TakeIdle(device_, memory_.ranks); block.memory != nullptr) {
    own = block.memory;
    given_up_ = block.given_up;
  } else {
    trouble = Failed("cudaMalloc", cudaMalloc(&own, bytes));
    if (!trouble.empty()) return trouble;
    void* word = nullptr;
    trouble = Failed("cudaHostAlloc",
                     cudaHostAlloc(&word, sizeof(uint32_t), cudaHostAllocMapped | cudaHostAllocPortable));
    given_up_ = static_cast<uint32_t*>(word);
    if (!trouble.empty()) {
      cudaFree(std::exchange(own, nullptr));
      return trouble;
    }
  }
  *given_up_ = 0;
  trouble = Failed("cudaHostGetDevicePointer",
                   cudaHostGetDevicePointer(reinterpret_cast<void**>(&memory_.given_up), given_up_, 0));
  if (trouble.empty()) trouble = Failed("cudaMemset", cudaMemset(own, 0, bytes));
  if (trouble.empty()) trouble = Failed("cudaDeviceSynchronize", cudaDeviceSynchronize());  // before others write
  if (trouble.empty()) trouble = Failed("cudaIpcGetMemHandle", cudaIpcGetMemHandle(&offer->handle, own));
  if (trouble.empty()) {
    trouble = Failed("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(offer->bus, sizeof(offer->bus), device_));
  }
  SetText(offer->boot, BootId());
  offer->process = ThisProcess();
  offer->memory = own;
  offer->device = device_;
  return trouble;
}

std::string Peers::Open(const std::string& offers) {
  std::vector<Offer> all(static_cast<size_t>(memory_.ranks));
  REFOCUS_CHECK_EQ(offers.size(), all.size() * sizeof(Offer));
  std::memcpy(all.data(), offers.data(), offers.size());
  const Offer& own = all[static_cast<size_t>(memory_.rank)];
  if (own.trouble[0] != '\0') return own.trouble;
  for (int r = 0; r < memory_.ranks; ++r) {
    const Offer& other = all[static_cast<size_t>(r)];
    if (r == memory_.rank) continue;
    const std::string name = "rank " + std::to_string(r);
    if (other.trouble[0] != '\0') continue;  // it says so itself
    if (std::strcmp(own.boot, other.boot) != 0 || own.boot[0] == '\0') return name + " is on another host";
    if (std::strcmp(own.bus, other.bus) == 0) return name + " has the same GPU";
    std::string trouble;
    if (other.process == own.process) {
      const cudaError_t error = cudaDeviceEnablePeerAccess(other.device, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
      } else {
        trouble = Failed("cudaDeviceEnablePeerAccess", error);
      }
      memory_.memory[r] = other.memory;
    } else {
      trouble = Failed("cudaIpcOpenMemHandle", cudaIpcOpenMemHandle(&memory_.memory[r], other.handle,
                                                                    cudaIpcMemLazyEnablePeerAccess));
      opened_[r] = trouble.empty();
    }
    if (!trouble.empty()) return trouble + " (" + name + "'s)";
  }
  return "";
}

std::string Peers::Try(cudaStream_t stream) {
  const size_t bytes = kTrialFloats * sizeof(float);
  // Nothing is allocated here: that could wait for a GPU on which a trial waits for this one.
  float* const device = reinterpret_cast<float*>(static_cast<char*>(memory_.memory[memory_.rank]) +
                                                 kernels::PeerMemoryBytes(memory_.ranks));
  std::string trouble;
  std::vector<float> mine(kTrialFloats), sum(kTrialFloats);
  const auto value = [](int rank, int64_t i) { return static_cast<float>((i * 7 + 13) % 1009 * (rank + 1)); };
  for (const kernels::ExchangeWay way : {kernels::ExchangeWay::kPacked, kernels::ExchangeWay::kFlagged}) {
    for (int64_t i = 0; i < kTrialFloats; ++i) mine[i] = value(memory_.rank, i);
    const auto run = [&] {
      cudaError_t error = cudaMemcpyAsync(device, mine.data(), bytes, cudaMemcpyHostToDevice, stream);
      if (error != cudaSuccess) return error;
      error = kernels::ExchangeSum(device, kTrialFloats, device + kTrialFloats, nullptr, memory_, stream, way);
      if (error != cudaSuccess) return error;
      error = cudaMemcpyAsync(sum.data(), device + kTrialFloats, bytes, cudaMemcpyDeviceToHost, stream);
      return error != cudaSuccess ? error : cudaStreamSynchronize(stream);  // ends: the kernel has a deadline
    };
    if (trouble.empty()) trouble = Failed("a trial", run());
    if (trouble.empty() && *given_up_ != 0) trouble = "what other GPUs write does not arrive";
    for (int64_t i = 0; i < kTrialFloats && trouble.empty(); ++i) {
      float expected = 0.0f;
      for (int r = 0; r < memory_.ranks; ++r) expected += value(r, i);
      if (sum[i] != expected) trouble = "what other GPUs write arrives wrong";
    }
  }
  return trouble;
}

bool Peers::Agreed(const std::string& trouble, const Gather& gather) {
  char mine[kTroubleBytes] = {};
  SetText(mine, trouble);
  const std::string all = gather({mine, sizeof(mine)});
  for (int r = 0; r < memory_.ranks; ++r) {
    const char* theirs = all.data() + r * sizeof(mine);
    if (*theirs == '\0') continue;
    why_not_ = "rank " + std::to_string(r) + ": " + std::string(theirs, strnlen(theirs, sizeof(mine)));
    return false;
  }
  return true;
}

}  // namespace refocus::nccl
