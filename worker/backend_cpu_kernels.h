// The inner loops of the CPU backend, free of torch: one table of functions per instruction set, chosen at run time.
//
// Two layouts. Many rows: rows lie across the vector lanes ("transposed" matrices [.., width]), so that a key or value
// element is a broadcast, K and V are read where they lie, and the softmax has no horizontal step. Few rows (decoding):
// head_dim lies across the lanes, so that no lane idles and the loop is bound by reading K and V.
//
// All pointers are fp32 and dense unless a stride is given; strides count elements. No function allocates, locks or
// throws.
#pragma once

#include <cstdint>

namespace refocus {

// Keys per block: scores of one block and its K or V stay in the first two cache levels.
inline constexpr int64_t kCpuBlockKeys = 128;
// Up to this many query rows per K/V head take the few-rows layout.
inline constexpr int64_t kCpuFewRows = 8;

// One block of keys of one K/V head: k and v are [keys, stride] with head_dim columns used.
struct CpuKeyBlock {
  const float* k = nullptr;
  const float* v = nullptr;
  const float* next_k = nullptr;  // where the next block's keys lie: a hint, may be null, never dereferenced
  int64_t keys = 0;  // <= kCpuBlockKeys
  int64_t stride = 0;
  int64_t head_dim = 0;
  float scale = 0;
  const float* visible = nullptr;  // [width]: how many of the keys each row sees (a small integer); null: all
};

// Running softmax of a set of rows: `out` is the sum of exp(score - peak) * v, `total` of exp(score - peak). Starts as
// out = 0, peak = -inf, total = 0.
struct CpuAttendState {
  float* out = nullptr;    // many rows: [head_dim, width]; few rows: [rows, head_dim]
  float* peak = nullptr;   // [width]
  float* total = nullptr;  // [width]
};

struct CpuGradState {
  const float* q = nullptr;        // [head_dim, width]
  const float* dout = nullptr;     // [head_dim, width]
  const float* lse = nullptr;      // [width], finite
  const float* row_dot = nullptr;  // [width]
  float* dq = nullptr;             // [head_dim, width], added to, without the factor `scale`
};

struct CpuKernels {
  const char* name;
  int64_t lanes;
  int64_t tile_vectors;  // width = vectors * lanes with 1 <= vectors <= tile_vectors

  // q [head_dim, width]; scratch [kCpuBlockKeys, width].
  void (*attend)(int64_t vectors, const CpuKeyBlock& block, const float* q, float* scratch,
                 const CpuAttendState& state);
  // scratch [2 * kCpuBlockKeys, width].
  void (*query_grad)(int64_t vectors, const CpuKeyBlock& block, float* scratch, const CpuGradState& state);
  // rows <= kCpuFewRows, head_dim a multiple of lanes; q [rows, head_dim]; scratch [rows, kCpuBlockKeys].
  void (*attend_few)(int64_t rows, const CpuKeyBlock& block, const float* q, float* scratch,
                     const CpuAttendState& state);
  // to [keys, head_dim] = the numbers that codes [keys, stride] and scales [keys] (bf16) stand for (base/kv_int8.h).
  void (*unpack)(int64_t keys, int64_t head_dim, const uint8_t* codes, int64_t stride, const uint16_t* scales, float* to);
  // y[r * y_stride + o] = x[r] . w[o] for r < rows <= kCpuFewRows, o < outputs; x [rows, in], w [outputs, in] with rows
  // w_stride apart.
  void (*linear_few)(int64_t rows, int64_t in, int64_t outputs, const float* x, const float* w, int64_t w_stride,
                     float* y, int64_t y_stride);
};

// Null where the compiler or this processor lacks the instruction set.
const CpuKernels* Avx512Kernels();
const CpuKernels* Avx2Kernels();
const CpuKernels& BaselineKernels();

// The widest that this processor runs.
const CpuKernels& BestCpuKernels();

}  // namespace refocus
