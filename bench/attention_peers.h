// What kernel_bench has LibTorch do in its process: the attention operators that ours are compared with, the matrix
// product that is the ceiling of arithmetic, random memory. Keeps LibTorch's headers out of the bench.
//
// Everything is enqueued on the stream that the constructor gets and may be captured into a CUDA graph once it has run.
// Device memory is bf16, 16-byte aligned, and the caller's; results are LibTorch's and are dropped. Errors of LibTorch
// come as std::runtime_error of one line. One thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <string>

namespace refocus {

enum class PeerLibrary { kCudnn, kFlash };
enum class PeerWork { kForward, kGradient, kBoth };

// A row sees all keys, or, if causal (rows = keys), itself and those before it.
struct PeerShape {
  int64_t rows = 0;
  int64_t keys = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int64_t head_stride = 0;  // elements from one K/V head of the cache to the next
  bool causal = false;
};

struct PeerMemory {
  const void* q = nullptr;     // rows * heads * head_dim elements
  const void* dout = nullptr;  // as many
  const void* k = nullptr;     // [kv_heads, keys, head_dim], heads head_stride apart
  const void* v = nullptr;
};

class AttentionPeers {
 public:
  // On the current device.
  explicit AttentionPeers(cudaStream_t stream);

  // LibTorch's version and cuDNN's.
  static std::string Versions();

  // One call of the operator with other keys than those it was made with. Unpacked: q [1, heads, rows, head_dim], the
  // operator shares K/V heads among query heads. Packed, not causal: q [1, kv_heads, rows * group, head_dim], already
  // in that order, so that an operator reads K and V once. Gradients are those of q, k and v: no operator gives q's
  // alone. The forward pass that a gradient goes back through runs here, once. Forward alone, cuDNN is spared the
  // logsumexp.
  using Call = std::function<void(const void* k, const void* v)>;
  Call Make(PeerLibrary library, PeerWork work, bool packed, const PeerShape& shape, const PeerMemory& memory);

  // out = a . b, all [n, n].
  std::function<void()> Product(const void* a, const void* b, void* out, int64_t n);

  // Uniform with mean 0 and variance 1.
  void FillRandom(void* data, int64_t elements);
  void Fill(void* data, int64_t elements, double value);

  // Returns the memory that LibTorch keeps for later.
  void Release();

 private:
  cudaStream_t stream_;
  int device_ = 0;
};

}  // namespace refocus
