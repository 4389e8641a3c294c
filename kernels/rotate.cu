// Bias and QK-norm with rotary embedding, its gradient, and the append of rotated keys and values to the cache. A group of lanes
// takes one head of one row: each lane four neighbouring pairs, elements i..i+3 and half+i..half+i+3. The angles of a
// row are the same for all its heads: the block forms them once, in shared memory.
#include "base/kv_int8.h"
#include "kernels/rowwise.cuh"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

using row::Bf16;
using row::Four;

enum class Task { kRotate, kGrad, kAppend, kAppendInt8 };

constexpr bool Appends(Task task) { return task == Task::kAppend || task == Task::kAppendInt8; }

constexpr int kMaxThreads = 512;
constexpr int kScalarWarps = 8;
constexpr int kMaxVectorDim = 8 * row::kWarp;
constexpr int64_t kFewRows = 256;  // up to here a block takes one row, so that the first result comes soonest

struct Arguments {
  RotateParams p;
  const float* dq;
  AppendParams append;  // of kAppend
  int rows_per_block;
  int width;  // lanes of a group
};

// fp64 holds position * frequency to 1e-9 rad at 2^24. The reduced angle is kept in half turns, whose sine and cosine
// need no further reduction.
__device__ float2 CosSin(const RotateParams& p, int64_t row, int i) {
  constexpr double kTurnsPerRadian = 0.15915494309189533577;
  const double radians = static_cast<double>(p.pos[row]) * static_cast<double>(p.inverse_frequencies[i]);
  const double turns = radians * kTurnsPerRadian;
  float2 result;
  sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &result.y, &result.x);
  return {result.x * p.attention_factor, result.y * p.attention_factor};
}

// One lane's share of a head.
struct Share {
  Four low, high;    // of raw, with the bias
  Four dlow, dhigh;  // of dq; kGrad
  uint4 value;       // eight elements of V; kAppend
  int64_t slot;      // kAppend
  bool active;
};

template <Task kTask>
__device__ Share LoadShare(const Arguments& a, int64_t first_row, int items, int item, int lane) {
  const RotateParams& p = a.p;
  Share s = {};
  s.active = item < items && 8 * lane < p.head_dim;
  if (!s.active) return s;
  const int row = item / p.heads;
  if constexpr (Appends(kTask)) {
    s.slot = a.append.slots[first_row + row];
    s.active = s.slot >= 0;
    if (!s.active) return s;
  }
  const int64_t head = (first_row * p.heads + item) * p.head_dim;  // items are (row, head) in memory's order
  const int half = p.head_dim / 2;
  if (kTask != Task::kGrad || p.norm != nullptr) {
    s.low = row::Load(p.raw + head + 4 * lane);
    s.high = row::Load(p.raw + head + half + 4 * lane);
    if (p.bias != nullptr) {
      const Bf16* bias = static_cast<const Bf16*>(p.bias) + item % p.heads * p.head_dim + 4 * lane;
      const Four low = row::Load(bias), high = row::Load(bias + half);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s.low.v[j] += low.v[j];
        s.high.v[j] += high.v[j];
      }
    }
  }
  if constexpr (kTask == Task::kGrad) {
    s.dlow = row::Load(a.dq + head + 4 * lane);
    s.dhigh = row::Load(a.dq + head + half + 4 * lane);
  }
  if constexpr (Appends(kTask))
    s.value = *reinterpret_cast<const uint4*>(static_cast<const Bf16*>(a.append.value) + head + 8 * lane);
  return s;
}

// Norm over the group's head, then the rotation; leaves the result in low and high.
__device__ void RotateShare(const RotateParams& p, int width, const float2* angle, const Four& weight_low,
                            const Four& weight_high, Share& s) {
  if (p.norm != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) squares += s.low.v[j] * s.low.v[j] + s.high.v[j] * s.high.v[j];
    const float r = rsqrtf(row::GroupSum(squares, width) / static_cast<float>(p.head_dim) + p.eps);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s.low.v[j] *= r * weight_low.v[j];
      s.high.v[j] *= r * weight_high.v[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float low = s.low.v[j], high = s.high.v[j];
    s.low.v[j] = low * angle[j].x - high * angle[j].y;
    s.high.v[j] = high * angle[j].x + low * angle[j].y;
  }
}

// The inverse rotation of dq, then the norm's gradient; leaves the result in low and high.
__device__ void RotateShareGrad(const RotateParams& p, int width, const float2* angle, const Four& weight_low,
                                const Four& weight_high, Share& s) {
  Four glow, ghigh;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    glow.v[j] = s.dlow.v[j] * angle[j].x + s.dhigh.v[j] * angle[j].y;
    ghigh.v[j] = s.dhigh.v[j] * angle[j].x - s.dlow.v[j] * angle[j].y;
  }
  if (p.norm != nullptr) {
    float squares = 0.0f, products = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      glow.v[j] *= weight_low.v[j];
      ghigh.v[j] *= weight_high.v[j];
      squares += s.low.v[j] * s.low.v[j] + s.high.v[j] * s.high.v[j];
      products += glow.v[j] * s.low.v[j] + ghigh.v[j] * s.high.v[j];
    }
    const float dim = static_cast<float>(p.head_dim);
    const float r = rsqrtf(row::GroupSum(squares, width) / dim + p.eps);
    const float pull = r * r * (row::GroupSum(products, width) / dim);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      glow.v[j] = r * (glow.v[j] - s.low.v[j] * pull);
      ghigh.v[j] = r * (ghigh.v[j] - s.high.v[j] * pull);
    }
  }
  s.low = glow;
  s.high = ghigh;
}

// Where a head of a row goes.
struct Target {
  Bf16* k;
  Bf16* v;
};

__device__ __forceinline__ Target TargetOf(const AppendParams& append, int64_t row, int head, int64_t element) {
  if (append.tails == nullptr) {
    const int64_t to = head * append.head_stride + element;
    return {static_cast<Bf16*>(append.k) + to, static_cast<Bf16*>(append.v) + to};
  }
  const TailExtent& tail = append.tails[row * kTailExtents];
  const int64_t to = append.layer * tail.layer_stride + head * tail.head_stride + element;
  return {static_cast<Bf16*>(const_cast<void*>(tail.k)) + to, static_cast<Bf16*>(const_cast<void*>(tail.v)) + to};
}

// The largest magnitude's bits over a group; all lanes of the warp take part.
__device__ uint32_t GroupLargest(uint32_t magnitude, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, magnitude, mask);
    magnitude = other > magnitude ? other : magnitude;
  }
  return magnitude;
}

__device__ uint32_t LargestOf(const Four& a) {
  uint32_t most = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t bits = __float_as_uint(a.v[j]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

__device__ uint32_t Codes(const Four& a, float inverse) {
  uint32_t codes = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int whole = __float2int_rn(fabsf(a.v[j]) * inverse);  // NaN gives 0
    const uint32_t magnitude = whole < kInt8Largest ? whole : kInt8Largest;
    codes |= (magnitude | (__float_as_uint(a.v[j]) >> 31 << 7)) << (8 * j);
  }
  return codes;
}

// A head's K and V as codes with their scales. All lanes of the warp take part.
__device__ void StoreCodes(const Arguments& a, int64_t first_row, int item, int lane, const Share& s) {
  const RotateParams& p = a.p;
  const Four value_low = {row::Unpack(s.value.x, 0), row::Unpack(s.value.x, 1), row::Unpack(s.value.y, 0),
                          row::Unpack(s.value.y, 1)};
  const Four value_high = {row::Unpack(s.value.z, 0), row::Unpack(s.value.z, 1), row::Unpack(s.value.w, 0),
                           row::Unpack(s.value.w, 1)};
  const uint16_t k_scale = Int8Scale(GroupLargest(max(LargestOf(s.low), LargestOf(s.high)), a.width));
  const uint16_t v_scale = Int8Scale(GroupLargest(max(LargestOf(value_low), LargestOf(value_high)), a.width));
  if (!s.active) return;
  const AppendParams& append = a.append;
  const int head = item % p.heads;
  auto* k = static_cast<uint8_t*>(append.k);
  auto* v = static_cast<uint8_t*>(append.v);
  auto* k_scales = static_cast<uint16_t*>(append.k_scale);
  auto* v_scales = static_cast<uint16_t*>(append.v_scale);
  int64_t to = head * append.head_stride + s.slot * p.head_dim;
  if (append.tails != nullptr) {
    const TailExtent& tail = append.tails[(first_row + item / p.heads) * kTailExtents];
    k = static_cast<uint8_t*>(const_cast<void*>(tail.k));
    v = static_cast<uint8_t*>(const_cast<void*>(tail.v));
    k_scales = static_cast<uint16_t*>(const_cast<void*>(tail.k_scale));
    v_scales = static_cast<uint16_t*>(const_cast<void*>(tail.v_scale));
    to = append.layer * tail.layer_stride + head * tail.head_stride + s.slot * p.head_dim;
  }
  const float k_inverse = Int8Inverse(k_scale), v_inverse = Int8Inverse(v_scale);
  *reinterpret_cast<uint32_t*>(k + to + 4 * lane) = Codes(s.low, k_inverse);
  *reinterpret_cast<uint32_t*>(k + to + p.head_dim / 2 + 4 * lane) = Codes(s.high, k_inverse);
  *reinterpret_cast<uint2*>(v + to + 8 * lane) = make_uint2(Codes(value_low, v_inverse), Codes(value_high, v_inverse));
  if (lane != 0) return;
  k_scales[to / p.head_dim] = k_scale;
  v_scales[to / p.head_dim] = v_scale;
}

template <Task kTask>
__device__ void StoreShare(const Arguments& a, int64_t first_row, int item, int lane, const Share& s) {
  const RotateParams& p = a.p;
  int64_t head = (first_row * p.heads + item) * p.head_dim;
  Bf16* out = static_cast<Bf16*>(p.out);
  if constexpr (kTask == Task::kAppend) {
    const Target to = TargetOf(a.append, first_row + item / p.heads, item % p.heads, s.slot * p.head_dim);
    head = 0;
    out = to.k;
    *reinterpret_cast<uint4*>(to.v + 8 * lane) = s.value;
  }
  row::Store(out + head + 4 * lane, s.low);
  row::Store(out + head + p.head_dim / 2 + 4 * lane, s.high);
}

template <Task kTask>
__device__ __forceinline__ void RotateRows(const Arguments& a) {
  extern __shared__ float4 shared[];  // float2 (cos, sin) [rows_per_block, head_dim / 2]
  float2* angles = reinterpret_cast<float2*>(shared);
  const RotateParams& p = a.p;
  const int half = p.head_dim / 2;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * a.rows_per_block;
  const int rows = static_cast<int>(min(static_cast<int64_t>(a.rows_per_block), p.rows - first_row));
  const int items = rows * p.heads;
  const int groups = blockDim.x / a.width;
  const int lane = threadIdx.x % a.width;

  int item = threadIdx.x / a.width;
  Share next = LoadShare<kTask>(a, first_row, items, item, lane);  // on its way while the angles are formed
  Four weight_low = {}, weight_high = {};
  if (p.norm != nullptr && 8 * lane < p.head_dim) {
    weight_low = row::Load(static_cast<const Bf16*>(p.norm) + 4 * lane);
    weight_high = row::Load(static_cast<const Bf16*>(p.norm) + half + 4 * lane);
  }
  for (int t = threadIdx.x; t < rows * half; t += blockDim.x)
    angles[t] = CosSin(p, first_row + t / half, t % half);
  __syncthreads();

  const int passes = (items + groups - 1) / groups;  // the same for all lanes of a warp: they shuffle
  for (int pass = 0; pass < passes; ++pass, item += groups) {
    Share s = next;
    if (pass + 1 < passes) next = LoadShare<kTask>(a, first_row, items, item + groups, lane);
    const float2* angle = angles + (s.active ? item / p.heads * half + 4 * lane : 0);
    if constexpr (kTask == Task::kGrad) {
      RotateShareGrad(p, a.width, angle, weight_low, weight_high, s);
    } else {
      RotateShare(p, a.width, angle, weight_low, weight_high, s);
    }
    if constexpr (kTask == Task::kAppendInt8) {
      StoreCodes(a, first_row, item, lane, s);
    } else if (s.active) {
      StoreShare<kTask>(a, first_row, item, lane, s);
    }
  }
}

struct Pair {
  float low, high;
};

__device__ Pair TurnBack(const float* dq, int half, int i, float2 angle) {
  const Pair d = {dq[i], dq[half + i]};
  return {d.low * angle.x + d.high * angle.y, d.high * angle.x - d.low * angle.y};
}

template <Task kTask>
__global__ void __launch_bounds__(kMaxThreads) RotateKernel(const __grid_constant__ Arguments a) {
  BeginInTurn();
  RotateRows<kTask>(a);
}

// Few rows: both in one launch, blocks of the one beside blocks of the other. The threads of a block suit more heads.
template <Task kTask>
__global__ void __launch_bounds__(kMaxThreads)
    RotateAndAppendKernel(const __grid_constant__ Arguments rotate, const __grid_constant__ Arguments append) {
  BeginInTurn();
  if (blockIdx.y == 0) {
    RotateRows<Task::kRotate>(rotate);
  } else {
    RotateRows<kTask>(append);
  }
}

// Any even head_dim and any alignment: a warp a head, which it reads twice.
template <Task kTask>
__global__ void __launch_bounds__(kScalarWarps* row::kWarp) RotateScalarKernel(const __grid_constant__ Arguments a) {
  BeginInTurn();
  const RotateParams& p = a.p;
  const int half = p.head_dim / 2;
  const int lane = threadIdx.x % row::kWarp;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kScalarWarps + threadIdx.x / row::kWarp;
  if (item >= p.rows * p.heads) return;
  const int64_t row = item / p.heads;
  const int64_t head = item * p.head_dim;
  const Bf16* norm = static_cast<const Bf16*>(p.norm);
  const Bf16* bias = p.bias != nullptr ? static_cast<const Bf16*>(p.bias) + item % p.heads * p.head_dim : nullptr;
  const auto raw = [&](int i) { return p.raw[head + i] + (bias != nullptr ? __bfloat162float(bias[i]) : 0.0f); };
  Bf16* out = static_cast<Bf16*>(p.out) + head;
  if constexpr (kTask == Task::kAppend) {
    const int64_t slot = a.append.slots[row];
    if (slot < 0) return;
    const Target to = TargetOf(a.append, row, static_cast<int>(item % p.heads), slot * p.head_dim);
    out = to.k;
    for (int i = lane; i < p.head_dim; i += row::kWarp) to.v[i] = static_cast<const Bf16*>(a.append.value)[head + i];
  }
  const auto weight = [&](int i) { return norm != nullptr ? __bfloat162float(norm[i]) : 1.0f; };
  float squares = 0.0f, products = 0.0f;
  for (int i = lane; i < half && norm != nullptr; i += row::kWarp) {
    const float low = raw(i), high = raw(half + i);
    squares += low * low + high * high;
    if constexpr (kTask == Task::kGrad) {
      const Pair d = TurnBack(a.dq + head, half, i, CosSin(p, row, i));
      products += d.low * weight(i) * low + d.high * weight(half + i) * high;
    }
  }
  const float dim = static_cast<float>(p.head_dim);
  const float r = norm != nullptr ? rsqrtf(row::WarpSum(squares) / dim + p.eps) : 1.0f;
  const float pull = norm != nullptr ? r * r * (row::WarpSum(products) / dim) : 0.0f;
  for (int i = lane; i < half; i += row::kWarp) {
    const float2 angle = CosSin(p, row, i);
    Pair result;
    if constexpr (kTask == Task::kGrad) {
      const Pair d = TurnBack(a.dq + head, half, i, angle);
      const Pair x = norm != nullptr ? Pair{raw(i), raw(half + i)} : Pair{0.0f, 0.0f};
      result = {r * (d.low * weight(i) - x.low * pull), r * (d.high * weight(half + i) - x.high * pull)};
    } else {
      const float low = raw(i) * (r * weight(i)), high = raw(half + i) * (r * weight(half + i));
      result = {low * angle.x - high * angle.y, high * angle.x + low * angle.y};
    }
    out[i] = __float2bfloat16_rn(result.low);
    out[half + i] = __float2bfloat16_rn(result.high);
  }
}

int64_t RowThreads(const RotateParams& p, int width) {
  return row::CeilDiv(static_cast<int64_t>(p.heads) * width, row::kWarp) * row::kWarp;
}

bool Vectors(const RotateParams& p, bool aligned) {
  return p.head_dim % 8 == 0 && p.head_dim <= kMaxVectorDim && aligned;
}

template <Task kTask>
cudaError_t Run(Arguments a, bool aligned, cudaStream_t stream) {
  const RotateParams& p = a.p;
  if (p.rows < 0 || p.heads <= 0 || p.head_dim <= 0 || p.head_dim % 2 != 0) return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  if (!Vectors(p, aligned)) {
    if constexpr (kTask == Task::kAppendInt8) return cudaErrorInvalidValue;
    else return row::Launch(RotateScalarKernel<kTask>, row::CeilDiv(p.rows * p.heads, kScalarWarps),
                       kScalarWarps * row::kWarp, 0, stream, a);
  }
  a.width = row::GroupWidth(p.head_dim / 8);
  const int64_t row_threads = RowThreads(p, a.width);
  int threads = static_cast<int>(row_threads < kMaxThreads ? row_threads : kMaxThreads);
  a.rows_per_block = 1;
  if (p.rows > kFewRows) {
    threads = 256;
    a.rows_per_block = static_cast<int>(row::CeilDiv(4 * threads, row_threads));  // some four passes
    if (a.rows_per_block > 16) a.rows_per_block = 16;
  }
  const int64_t shared_bytes = int64_t{8} * a.rows_per_block * (p.head_dim / 2);
  return row::Launch(RotateKernel<kTask>, row::CeilDiv(p.rows, a.rows_per_block), threads, shared_bytes, stream, a);
}

Arguments RotateArguments(const RotateParams& params) {
  Arguments a = {};
  a.p = params;
  return a;
}

Arguments AppendArguments(const AppendParams& params) {
  Arguments a = RotateArguments(params.key);
  a.append = params;
  return a;
}

bool Aligned(const RotateParams& p) { return row::Aligned(p.raw, p.bias, p.norm, p.out); }

bool Aligned(const AppendParams& params) {
  const RotateParams& p = params.key;
  if (params.int8 && (p.head_dim <= 0 || p.head_dim % 16 != 0 || params.head_stride % p.head_dim != 0)) return false;
  return row::Aligned(p.raw, p.bias, p.norm, params.value, params.k, params.v) && params.head_stride % 8 == 0;
}

}  // namespace

cudaError_t Rotate(const RotateParams& params, cudaStream_t stream) {
  return Run<Task::kRotate>(RotateArguments(params), Aligned(params), stream);
}

cudaError_t RotateAndAppend(const RotateParams& rotate, const AppendParams& append, cudaStream_t stream) {
  const RotateParams& key = append.key;
  const bool together = rotate.rows == key.rows && rotate.head_dim == key.head_dim && rotate.rows > 0 &&
                        rotate.rows <= kFewRows && rotate.heads > 0 && key.heads > 0 && rotate.head_dim > 0 &&
                        Vectors(rotate, Aligned(rotate)) && Vectors(key, Aligned(append));
  if (!together) {
    const cudaError_t error = Rotate(rotate, stream);
    return error != cudaSuccess ? error : Append(append, stream);
  }
  Arguments queries = RotateArguments(rotate), keys = AppendArguments(append);
  queries.width = keys.width = row::GroupWidth(rotate.head_dim / 8);
  queries.rows_per_block = keys.rows_per_block = 1;
  const int64_t threads = RowThreads(rotate.heads > key.heads ? rotate : key, queries.width);
  const dim3 blocks(static_cast<unsigned>(rotate.rows), 2);
  const auto kernel = append.int8 ? RotateAndAppendKernel<Task::kAppendInt8> : RotateAndAppendKernel<Task::kAppend>;
  return LaunchOverlapping(kernel, blocks, static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads),
                           sizeof(float2) * static_cast<size_t>(rotate.head_dim / 2), stream, queries, keys);
}

cudaError_t RotateGrad(const RotateGradParams& params, cudaStream_t stream) {
  Arguments a = {};
  a.p = params.forward;
  a.p.out = params.draw;
  a.dq = params.dq;
  return Run<Task::kGrad>(a, row::Aligned(a.p.raw, a.p.bias, a.p.norm, params.dq, params.draw), stream);
}

cudaError_t Append(const AppendParams& params, cudaStream_t stream) {
  const Arguments a = AppendArguments(params);
  const bool aligned = Aligned(params);
  return params.int8 ? Run<Task::kAppendInt8>(a, aligned, stream) : Run<Task::kAppend>(a, aligned, stream);
}

}  // namespace refocus::kernels
