#include "bench/attention_peers.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/headeronly/version.h>

#include <cmath>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace refocus {
namespace {

constexpr size_t kLongestReason = 140;

// LibTorch's words up to the first line's end: a stack follows.
std::string FirstLine(const std::string& words) {
  const std::string line = words.substr(0, words.find('\n'));
  return line.size() <= kLongestReason ? line : line.substr(0, kLongestReason) + "...";
}

// Runs `work` with what it enqueues on `stream`, without autograd.
template <typename Work>
auto OnStream(cudaStream_t stream, int device, const Work& work) {
  try {
    const c10::InferenceMode inference;
    const c10::cuda::CUDAStreamGuard guard(
        c10::cuda::getStreamFromExternal(stream, static_cast<c10::DeviceIndex>(device)));
    return work();
  } catch (const c10::Error& error) {
    throw std::runtime_error(FirstLine(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    throw std::runtime_error(FirstLine(error.what()));
  }
}

at::Tensor View(const void* data, int device, at::IntArrayRef sizes, at::IntArrayRef strides) {
  // The device is said, so that nothing asks CUDA for it while a graph is captured.
  const at::Device cuda(at::kCUDA, static_cast<c10::DeviceIndex>(device));
  return at::for_blob(const_cast<void*>(data), sizes)
      .strides(strides)
      .options(at::TensorOptions(at::kBFloat16).device(cuda))
      .target_device(cuda)
      .make_tensor();
}

// What the operators give each other: out, logsumexp, and what names the batch's sequences and the dropout, of which
// there is none.
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor,
                           at::Tensor, at::Tensor>;

class Attention {
 public:
  Attention(PeerLibrary library, bool packed, const PeerShape& shape, const PeerMemory& memory, int device)
      : library_(library), shape_(shape), device_(device), scale_(1.0 / std::sqrt(double(shape.head_dim))) {
    // Rows outermost in memory, as the engine has them: the gradient operators take such rows without a copy.
    const int64_t heads = packed ? shape.kv_heads : shape.heads;
    const int64_t rows = packed ? shape.rows * (shape.heads / shape.kv_heads) : shape.rows;
    const int64_t d = shape.head_dim;
    const std::vector<int64_t> sizes = {1, heads, rows, d}, strides = {rows * heads * d, d, heads * d, 1};
    q_ = View(memory.q, device, sizes, strides);
    dout_ = View(memory.dout, device, sizes, strides);
  }

  Forward RunForward(const void* k, const void* v, bool with_logsumexp) const {
    if (library_ == PeerLibrary::kCudnn) {
      return at::_scaled_dot_product_cudnn_attention(q_, Keys(k), Keys(v), std::nullopt, with_logsumexp, 0.0,
                                                     shape_.causal, false, scale_);
    }
    return at::_scaled_dot_product_flash_attention(q_, Keys(k), Keys(v), 0.0, shape_.causal, false, scale_);
  }

  void RunGradient(const void* k, const void* v, const Forward& forward) const {
    const auto& [out, logsumexp, sequences_q, sequences_k, most_q, most_k, seed, offset, mask] = forward;
    const int64_t rows = q_.size(2);
    if (library_ == PeerLibrary::kCudnn) {
      at::_scaled_dot_product_cudnn_attention_backward(dout_, q_, Keys(k), Keys(v), out, logsumexp, seed, offset,
                                                       at::Tensor(), sequences_q, sequences_k, rows, shape_.keys, 0.0,
                                                       shape_.causal, scale_);
      return;
    }
    at::_scaled_dot_product_flash_attention_backward(dout_, q_, Keys(k), Keys(v), out, logsumexp, sequences_q,
                                                     sequences_k, rows, shape_.keys, 0.0, shape_.causal, seed, offset,
                                                     scale_);
  }

 private:
  at::Tensor Keys(const void* data) const {
    const int64_t heads = shape_.kv_heads, d = shape_.head_dim;
    const std::vector<int64_t> sizes = {1, heads, shape_.keys, d};
    return View(data, device_, sizes, std::vector<int64_t>{heads * shape_.head_stride, shape_.head_stride, d, 1});
  }

  PeerLibrary library_;
  PeerShape shape_;
  int device_;
  double scale_;
  at::Tensor q_, dout_;
};

}  // namespace

AttentionPeers::AttentionPeers(cudaStream_t stream) : stream_(stream) {
  if (cudaGetDevice(&device_) != cudaSuccess) throw std::runtime_error("no CUDA device");
  at::globalContext().lazyInitDevice(at::kCUDA);
}

std::string AttentionPeers::Versions() {
  const long cudnn = at::detail::getCUDAHooks().versionRuntimeCuDNN();
  return "LibTorch " + std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + "." +
         std::to_string(TORCH_VERSION_PATCH) + ", cuDNN " + std::to_string(cudnn / 10000) + "." +
         std::to_string(cudnn / 100 % 100) + "." + std::to_string(cudnn % 100);
}

AttentionPeers::Call AttentionPeers::Make(PeerLibrary library, PeerWork work, bool packed, const PeerShape& shape,
                                          const PeerMemory& memory) {
  return OnStream(stream_, device_, [&]() -> Call {
    const Attention attention(library, packed, shape, memory, device_);
    const auto wrap = [stream = stream_, device = device_](auto run) -> Call {
      return [=](const void* k, const void* v) { OnStream(stream, device, [&] { run(k, v); }); };
    };
    if (work == PeerWork::kForward) {
      return wrap([=](const void* k, const void* v) { attention.RunForward(k, v, false); });
    }
    if (work == PeerWork::kGradient) {
      const Forward forward = attention.RunForward(memory.k, memory.v, true);
      return wrap([=](const void* k, const void* v) { attention.RunGradient(k, v, forward); });
    }
    return wrap([=](const void* k, const void* v) { attention.RunGradient(k, v, attention.RunForward(k, v, true)); });
  });
}

std::function<void()> AttentionPeers::Product(const void* a, const void* b, void* out, int64_t n) {
  return [=, this] {
    OnStream(stream_, device_, [&] {
      at::Tensor product = View(out, device_, {n, n}, {n, 1});
      at::mm_out(product, View(a, device_, {n, n}, {n, 1}), View(b, device_, {n, n}, {n, 1}));
    });
  };
}

void AttentionPeers::FillRandom(void* data, int64_t elements) {
  const double bound = std::sqrt(3.0);
  OnStream(stream_, device_, [&] { View(data, device_, {elements}, {1}).uniform_(-bound, bound); });
}

void AttentionPeers::Fill(void* data, int64_t elements, double value) {
  OnStream(stream_, device_, [&] { View(data, device_, {elements}, {1}).fill_(value); });
}

void AttentionPeers::Release() {
  OnStream(stream_, device_, [] { c10::cuda::CUDACachingAllocator::emptyCache(); });
}

}  // namespace refocus
