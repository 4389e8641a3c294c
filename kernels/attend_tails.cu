// Attention of decode rows over the keys of their own requests: every row has its own extents, whose places it reads from
// device memory. One thread block: a row, up to four query heads of one K/V head, and a share of the keys. A few lanes
// share a key, eight columns each; every such group of lanes keeps its own running softmax, and they meet at the end.
// Tails are short beside a context, so that the tensor cores have nothing to gain here.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/int8_tiles.cuh"
#include "kernels/key_tiles.cuh"
#include "kernels/overlap.cuh"

namespace refocus::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostHeads = 4;
constexpr int64_t kLeastKeys = 64;  // of a share: fewer are not worth a block

struct Args {
  AttendTailsParams p;
  int splits;
  int chunks;  // blocks of query heads a K/V head
  float scale_log2;
};

struct Columns {
  float v[8];
};

__device__ __forceinline__ Columns ToColumns(const uint4& raw) {
  Columns columns;
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&raw);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    columns.v[2 * i] = pair.x;
    columns.v[2 * i + 1] = pair.y;
  }
  return columns;
}

__device__ __forceinline__ Columns Load(const __nv_bfloat16* from) {
  return ToColumns(*reinterpret_cast<const uint4*>(from));
}

__device__ __forceinline__ Columns Load(const uint8_t* codes, uint16_t scale_bits) {
  const uint2 raw = *reinterpret_cast<const uint2*>(codes);
  const CodeScale scale = CodeScale::Twice(scale_bits);
  const uint2 low = WidenCodes(raw.x, scale), high = WidenCodes(raw.y, scale);
  return ToColumns(make_uint4(low.x, low.y, high.x, high.y));
}

// The running softmax of one group of lanes: maximum in base-2 units of scale, sum of weights, weighted sum of V.
template <int kHeads>
struct Running {
  float max[kHeads];
  float sum[kHeads];
  float out[kHeads][8];

  __device__ Running() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      max[h] = -INFINITY;
      sum[h] = 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) out[h][c] = 0.0f;
    }
  }

  // A score of -inf adds nothing; a NaN comes through in the sum.
  __device__ __forceinline__ void Add(int h, float other_max, float other_sum, const float (&other)[8]) {
    const float high = fmaxf(max[h], other_max);
    const float base = high == -INFINITY ? 0.0f : high;
    const float mine = exp2f(max[h] - base);
    const float theirs = exp2f(other_max - base);
    max[h] = high;
    sum[h] = sum[h] * mine + other_sum * theirs;
#pragma unroll
    for (int c = 0; c < 8; ++c) out[h][c] = out[h][c] * mine + other[c] * theirs;
  }

  __device__ __forceinline__ void AddKey(int h, float score, const Columns& value) {
    const float high = fmaxf(max[h], score);
    const float base = high == -INFINITY ? 0.0f : high;
    const float mine = exp2f(max[h] - base);
    const float weight = exp2f(score - base);
    max[h] = high;
    sum[h] = sum[h] * mine + weight;
#pragma unroll
    for (int c = 0; c < 8; ++c) out[h][c] = fmaf(weight, value.v[c], out[h][c] * mine);
  }
};

struct Share {
  const void* k;
  const void* v;
  const uint16_t* k_scale;  // of int8
  const uint16_t* v_scale;
  int64_t begin, end;  // slots

  // Eight columns of a slot, which lie `place` elements behind k or v.
  template <bool kInt8>
  __device__ __forceinline__ Columns LoadColumns(bool value, int64_t slot, int64_t place) const {
    const void* const from = value ? v : k;
    if constexpr (kInt8) {
      return Load(static_cast<const uint8_t*>(from) + place, (value ? v_scale : k_scale)[slot]);
    } else {
      return Load(static_cast<const __nv_bfloat16*>(from) + place);
    }
  }
};

template <bool kInt8>
__device__ __forceinline__ Share ShareOf(const Args& a, const TailExtent& tail, int64_t count, int kv_head, int split) {
  Share share;
  const int64_t seen = count - tail.first_index;
  const int64_t visible = seen < 0 ? 0 : seen > tail.slots ? tail.slots : seen;
  int64_t keys = (visible + a.splits - 1) / a.splits;
  if (keys < kLeastKeys) keys = kLeastKeys;
  share.begin = split * keys < visible ? split * keys : visible;
  share.end = share.begin + keys < visible ? share.begin + keys : visible;
  const int64_t offset = a.p.layer * tail.layer_stride + kv_head * tail.head_stride;
  constexpr int kBytes = kInt8 ? 1 : 2;
  share.k = static_cast<const char*>(tail.k) + offset * kBytes;
  share.v = static_cast<const char*>(tail.v) + offset * kBytes;
  if constexpr (kInt8) {
    share.k_scale = static_cast<const uint16_t*>(tail.k_scale) + offset / a.p.head_dim;
    share.v_scale = static_cast<const uint16_t*>(tail.v_scale) + offset / a.p.head_dim;
  }
  return share;
}

template <int kHeads, int kLanes, bool kInt8>
__global__ void __launch_bounds__(kThreads) AttendTailsKernel(const __grid_constant__ Args a) {
  constexpr int kGroups = 32 / kLanes;  // keys that a warp looks at together
  constexpr int kStep = kWarps * kGroups;
  constexpr int kAhead = 2;  // keys of one group whose loads are on their way together
  // In this order: the next kernel may be one that reads what this one reads (AttendParams::beside_previous).
  AwaitPrevious();
  LetNextBegin();
  const AttendTailsParams& p = a.p;
  const int64_t row = blockIdx.x;
  const int kv_head = blockIdx.y / a.chunks;
  const int split = blockIdx.z;
  const int group = p.heads / p.kv_heads;
  const int first = static_cast<int>(blockIdx.y) % a.chunks * kHeads;  // within the K/V head's
  const int heads = min(kHeads, group - first);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % kLanes;
  const int member = threadIdx.x % 32 / kLanes;
  const bool active = lane * 8 < p.head_dim;
  const int64_t first_head = row * p.heads + kv_head * group + first;

  Columns q[kHeads] = {};
  const __nv_bfloat16* const queries = static_cast<const __nv_bfloat16*>(p.q) + first_head * p.head_dim + lane * 8;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (active && h < heads) q[h] = Load(queries + h * p.head_dim);
  }
  const int64_t pos = p.pos[row];
  const int64_t count =
      pos < 0 ? 0 : CountBelow(pos + 1, static_cast<uint32_t>(p.shards), static_cast<uint32_t>(p.shard));

  Running<kHeads> run;
  for (int e = 0; e < kTailExtents; ++e) {
    const TailExtent tail = p.tails[row * kTailExtents + e];
    if (tail.slots == 0) continue;
    const Share share = ShareOf<kInt8>(a, tail, count, kv_head, split);
    for (int64_t base = share.begin + warp * kGroups; base < share.end; base += kAhead * kStep) {
      Columns key[kAhead] = {}, value[kAhead] = {};
      bool there[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t slot = base + i * kStep + member;
        there[i] = slot < share.end;
        if (!there[i] || !active) continue;
        key[i] = share.LoadColumns<kInt8>(false, slot, slot * p.head_dim + lane * 8);
        value[i] = share.LoadColumns<kInt8>(true, slot, slot * p.head_dim + lane * 8);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          float score = 0.0f;
#pragma unroll
          for (int c = 0; c < 8; ++c) score = fmaf(q[h].v[c], key[i].v[c], score);
#pragma unroll
          for (int mask = kLanes / 2; mask > 0; mask /= 2) score += __shfl_xor_sync(0xffffffffu, score, mask);
          run.AddKey(h, there[i] ? score * a.scale_log2 : -INFINITY, value[i]);
        }
      }
    }
  }

  // The groups of a warp, then the warps, each in one order.
#pragma unroll
  for (int mask = kLanes; mask < 32; mask *= 2) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float other[8];
      const float other_max = __shfl_xor_sync(0xffffffffu, run.max[h], mask);
      const float other_sum = __shfl_xor_sync(0xffffffffu, run.sum[h], mask);
#pragma unroll
      for (int c = 0; c < 8; ++c) other[c] = __shfl_xor_sync(0xffffffffu, run.out[h][c], mask);
      run.Add(h, other_max, other_sum, other);
    }
  }
  __shared__ float outs[kWarps][kHeads][kLanes * 8];
  __shared__ float maxima[kWarps][kHeads];
  __shared__ float sums[kWarps][kHeads];
  if (member == 0) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int c = 0; c < 8; ++c) outs[warp][h][lane * 8 + c] = run.out[h][c];
      if (lane == 0) {
        maxima[warp][h] = run.max[h];
        sums[warp][h] = run.sum[h];
      }
    }
  }
  __syncthreads();
  const int64_t to = split * p.rows * p.heads + first_head;
  for (int i = threadIdx.x; i < heads * p.head_dim; i += kThreads) {
    const int h = i / p.head_dim;
    const int column = i - h * p.head_dim;
    float high = -INFINITY;
    for (int w = 0; w < kWarps; ++w) high = fmaxf(high, maxima[w][h]);
    const float base = high == -INFINITY ? 0.0f : high;
    float sum = 0.0f, out = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(maxima[w][h] - base);
      sum = fmaf(weight, sums[w][h], sum);
      out = fmaf(weight, outs[w][h][column], out);
    }
    // A sum of weights is 0 only where no key was visible; NaN stays NaN.
    p.out[(to + h) * p.head_dim + column] = sum == 0.0f ? 0.0f : out / sum;
    if (column == 0) p.lse[to + h] = sum == 0.0f ? -INFINITY : (high + log2f(sum)) * kLn2;
  }
}

template <int kHeads, bool kInt8>
cudaError_t Launch(const Args& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.p.rows), static_cast<unsigned>(a.p.kv_heads * a.chunks),
                  static_cast<unsigned>(a.splits));
  const auto kernel = a.p.head_dim <= 64    ? AttendTailsKernel<kHeads, 8, kInt8>
                      : a.p.head_dim <= 128 ? AttendTailsKernel<kHeads, 16, kInt8>
                                            : AttendTailsKernel<kHeads, 32, kInt8>;
  return LaunchOverlapping(kernel, grid, kThreads, 0, stream, a);
}

}  // namespace

cudaError_t AttendTails(const AttendTailsParams& params, int sm_count, cudaStream_t stream) {
  const AttendTailsParams& p = params;
  if (p.rows < 0 || p.rows > 65535 || p.kv_heads <= 0 || p.heads <= 0 || p.heads % p.kv_heads != 0)
    return cudaErrorInvalidValue;
  if (p.head_dim <= 0 || p.head_dim % (p.int8 ? 16 : 8) != 0 || p.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  if (p.shards < 1 || p.shard < 0 || p.shard >= p.shards || !(p.scale > 0.0f)) return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  const int group = p.heads / p.kv_heads;
  Args a{p, TailSplits(p.rows, p.kv_heads, sm_count), 1, p.scale * kLog2E};
  a.chunks = group == 1 ? 1 : (group + kMostHeads - 1) / kMostHeads;
  if (p.int8) return group == 1 ? Launch<1, true>(a, stream) : Launch<kMostHeads, true>(a, stream);
  return group == 1 ? Launch<1, false>(a, stream) : Launch<kMostHeads, false>(a, stream);
}

}  // namespace refocus::kernels
