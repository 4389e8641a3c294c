// From host memory to a GPU at the speed of the bus, for threads that produce tensors piece by piece. Needs no CUDA
// header: LibTorch's device-independent streams and events do it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>

namespace refocus {

// Two pinned buffers of one thread, filled in turn while the other travels to the device on a stream of its own, which
// is this thread's current one as long as this lives. Made, used and destroyed on one thread; throws what the device
// reports.
class Uplink {
 public:
  explicit Uplink(const at::Device& device)
      : stream_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)),
        guard_(stream_),
        buffers_{Buffer{{}, c10::Event(device.type())}, Buffer{{}, c10::Event(device.type())}} {}
  Uplink(const Uplink&) = delete;
  ~Uplink() {  // the buffers are still read until then; after Finish there is nothing to wait for
    try {
      stream_.synchronize();
    } catch (...) {
    }
  }

  // `bytes` to fill; those handed out last but one have left.
  uint8_t* Take(int64_t bytes) {
    turn_ = 1 - turn_;
    Buffer& buffer = buffers_[turn_];
    buffer.left.synchronize();
    if (!buffer.memory.defined() || buffer.memory.numel() < bytes) {
      buffer.memory = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
    }
    return buffer.memory.data_ptr<uint8_t>();
  }

  // Sends what the last Take handed out to `target`, contiguous.
  void Send(const at::Tensor& target) {
    Buffer& buffer = buffers_[turn_];
    const at::Tensor values = buffer.memory.narrow(0, 0, static_cast<int64_t>(target.nbytes()));
    target.copy_(values.view(target.scalar_type()).view(target.sizes()), /*non_blocking=*/true);
    buffer.left.record(stream_);
  }

  // Everything sent has arrived.
  void Finish() { stream_.synchronize(); }

 private:
  struct Buffer {
    at::Tensor memory;
    c10::Event left;
  };
  c10::Stream stream_;
  c10::StreamGuard guard_;  // pinned memory too belongs to the current device
  Buffer buffers_[2];
  int turn_ = 0;
};

}  // namespace refocus
