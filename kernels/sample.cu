// One token from each row of logits, as base/sampling.h defines it, and the step from one decoded token to the next.
//
// A cluster of blocks takes a row, each a run of its ids, and keeps nothing of it: rows are read again from the L2
// cache. No sort: the smallest value that top-k or top-p keeps is found digit by digit of its order-preserving key,
// eight passes over the row each. All sums are integers, so that no result depends on an order of additions.
#include <cooperative_groups.h>

#include "base/shard_plan.h"
#include "kernels/rowwise.cuh"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kBlocks = 8;  // of a cluster: what every GPU with clusters can run
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / row::kWarp;
constexpr int kPerThread = 4;  // neighbouring ids
constexpr int kTileIds = kThreads * kPerThread;
constexpr int kDigitBits = 4;
constexpr int kDigits = 1 << kDigitBits;
constexpr int64_t kMostIds = int64_t{1} << 22;  // so that sums of weights fit
static_assert(32 % kDigitBits == 0);

struct Shared {
  uint64_t own[2][kDigits];  // what the other blocks read, in turns
  uint64_t all[kBlocks][kDigits];
  uint64_t warps[kWarps][kDigits];
  SamplerState state;
};

struct Sum {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Max {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// Which ids stay: a prefix of the order "larger first, among equals the lower id first".
struct Cut {
  uint32_t key = 0;
  uint32_t last = UINT32_MAX;  // of those that have this key

  __device__ bool Keeps(uint32_t other, uint32_t id) const { return other > key || (other == key && id <= last); }
};

// One for all ids in the order of Cut; above all others for NaN.
__device__ uint64_t PlaceOf(float value, uint32_t id) {
  return value != value ? UINT64_MAX : static_cast<uint64_t>(OrderKey(value)) << 32 | static_cast<uint32_t>(~id);
}

__device__ float ValueOfKey(uint32_t key) { return __uint_as_float((key >> 31) != 0 ? key & 0x7fffffffu : ~key); }

// A block's part of one row's draw. Every thread of the cluster calls the same functions in the same order.
class Row {
 public:
  __device__ Row(const SampleParams& p, Shared& shared)
      : shared_(shared),
        logits_(p.logits + blockIdx.y * p.vocab),
        adjusted_(static_cast<float*>(p.workspace) + blockIdx.y * p.vocab),
        sampler_(p.samplers[blockIdx.y]),
        vocab_(p.vocab) {
    const int64_t share = (p.vocab + kBlocks * kPerThread - 1) / (kBlocks * kPerThread) * kPerThread;
    begin_ = min(share * static_cast<int64_t>(blockIdx.x), p.vocab);
    end_ = min(begin_ + share, p.vocab);
    if (threadIdx.x == 0) shared.state = *sampler_;
    __syncthreads();
  }

  // -1: nothing to draw.
  __device__ int64_t Draw(float* logprob);

 private:
  // f(id, value) of the block's ids, of one thread in rising order.
  template <typename F>
  __device__ void ForEach(const float* values, F f) const {
#pragma unroll 1  // the bodies are long
    for (int64_t first = begin_ + threadIdx.x * kPerThread; first < end_; first += kTileIds) ForQuad(values, first, f);
  }
  template <typename F>
  __device__ void ForQuad(const float* values, int64_t first, F f) const {
    float quad[kPerThread];
    const bool whole = first + kPerThread <= end_;
    if (whole && reinterpret_cast<uintptr_t>(values + first) % 16 == 0) {
      const float4 raw = *reinterpret_cast<const float4*>(values + first);
      quad[0] = raw.x, quad[1] = raw.y, quad[2] = raw.z, quad[3] = raw.w;
    } else {
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) quad[j] = first + j < end_ ? values[first + j] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      if (whole || first + j < end_) f(static_cast<uint32_t>(first + j), quad[j]);
    }
  }

  // shared_.all[block][i] becomes that block's threads' values[i], put together with `op`.
  template <int kCount, typename Op>
  __device__ void Gather(const uint64_t (&values)[kCount], Op op);
  template <int kCount, typename Op>
  __device__ void Reduce(uint64_t (&values)[kCount], Op op) {
    Gather(values, op);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = shared_.all[0][i];
      for (int block = 1; block < kBlocks; ++block) values[i] = op(values[i], shared_.all[block][i]);
    }
  }

  template <typename T>
  __device__ T* List(int64_t offset) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(sampler_) + offset);
  }
  __device__ void Adjust();
  template <bool kWeights>
  __device__ Cut FindCut(uint64_t need);
  __device__ uint32_t LastTie(uint32_t key, uint64_t count);
  // The id at which the running sum of measure(id, value), in rising order of ids, exceeds target_of(total), which is
  // below the total.
  template <typename Measure, typename Target>
  __device__ int64_t IdAt(Measure measure, Target target_of);

  Shared& shared_;
  const float* logits_;
  float* adjusted_;
  SamplerState* sampler_;
  int64_t vocab_;
  int64_t begin_, end_;  // its ids
  int turn_ = 0;
  const float* values_ = nullptr;  // after Adjust
  float max_ = 0.0f;
};

template <int kCount, typename Op>
__device__ void Row::Gather(const uint64_t (&values)[kCount], Op op) {
  static_assert(kCount <= kDigits && kCount * kBlocks <= kThreads);
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    uint64_t value = values[i];
#pragma unroll
    for (int mask = row::kWarp / 2; mask > 0; mask /= 2) value = op(value, __shfl_xor_sync(0xffffffffu, value, mask));
    if (t % row::kWarp == 0) shared_.warps[t / row::kWarp][i] = value;
  }
  __syncthreads();
  if (t < kCount) {
    uint64_t value = shared_.warps[0][t];
    for (int warp = 1; warp < kWarps; ++warp) value = op(value, shared_.warps[warp][t]);
    shared_.own[turn_][t] = value;
  }
  // Read behind this barrier, written again behind the next but one: two turns are enough.
  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  if (t < kCount * kBlocks) {
    shared_.all[t / kCount][t % kCount] = *cluster.map_shared_rank(&shared_.own[turn_][t % kCount], t / kCount);
  }
  __syncthreads();
  turn_ ^= 1;
}

// Bias, penalties, min_tokens: into the workspace where there are any.
__device__ void Row::Adjust() {
  const SamplerState& s = shared_.state;
  const bool ends = s.end_count > 0 && s.index < s.min_tokens;
  if (s.bias_count == 0 && s.counts == 0 && !ends) {
    values_ = logits_;
    return;
  }
  const auto count = [&](uint32_t id) { return s.counts != 0 ? List<uint32_t>(s.counts)[id] : 0u; };
  const auto mine = [&](int64_t id) { return id >= begin_ && id < end_; };
  ForEach(logits_, [&](uint32_t id, float value) { adjusted_[id] = Penalized(s, value, count(id)); });
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < s.bias_count; i += kThreads) {
    const int32_t id = List<int32_t>(s.bias_ids)[i];
    if (mine(id)) adjusted_[id] = Penalized(s, logits_[id] + List<float>(s.bias_values)[i], count(id));
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); ends && i < s.end_count; i += kThreads) {
    const int32_t id = List<int32_t>(s.end_ids)[i];
    if (mine(id)) adjusted_[id] = -INFINITY;
  }
  __syncthreads();
  values_ = adjusted_;
}

// The fewest of the largest that are `need` ids, or have that weight; need is 1 to what all have.
template <bool kWeights>
__device__ Cut Row::FindCut(uint64_t need) {
  uint32_t key = 0;
  uint64_t above = 0, equal = 0;  // measures of larger keys, and of those that share the digits found so far
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    uint64_t sums[kDigits] = {};
    ForEach(values_, [&](uint32_t, float value) {
      const uint32_t other = OrderKey(value);
      if (static_cast<uint64_t>(other ^ key) >> (shift + kDigitBits) != 0) return;
      const uint64_t measure = kWeights ? WeightOf(shared_.state, value, max_) : 1;
      const uint32_t digit = other >> shift & (kDigits - 1);
#pragma unroll
      for (uint32_t d = 0; d < kDigits; ++d) sums[d] += digit == d ? measure : 0;
    });
    Reduce(sums, Sum());
    bool found = false;
#pragma unroll
    for (int d = kDigits - 1; d >= 0; --d) {
      if (found) continue;
      found = above + sums[d] >= need;
      if (found) {
        key |= static_cast<uint32_t>(d) << shift;
        equal = sums[d];
      } else {
        above += sums[d];
      }
    }
  }
  const uint64_t each = kWeights ? WeightOf(shared_.state, ValueOfKey(key), max_) : 1;
  const uint64_t ties = (need - above + each - 1) / each;
  if (ties * each >= equal) return {key, UINT32_MAX};
  return {key, LastTie(key, ties)};
}

// The id of the count-th value with this key.
__device__ uint32_t Row::LastTie(uint32_t key, uint64_t count) {
  const auto is_tie = [&](uint32_t, float value) { return OrderKey(value) == key ? 1u : 0u; };
  return static_cast<uint32_t>(IdAt(is_tie, [&](uint64_t) { return count - 1; }));
}

template <typename Measure, typename Target>
__device__ int64_t Row::IdAt(Measure measure, Target target_of) {
  __shared__ uint64_t warps[kWarps];
  uint64_t sum[1] = {0};
  ForEach(values_, [&](uint32_t id, float value) { sum[0] += measure(id, value); });
  Gather(sum, Sum());
  uint64_t before = 0, total = 0;
  for (unsigned block = 0; block < kBlocks; ++block) {
    if (block < blockIdx.x) before += shared_.all[block][0];
    total += shared_.all[block][0];
  }
  const uint64_t target = target_of(total);
  uint64_t found[1] = {0};  // id + 1
  const int lane = static_cast<int>(threadIdx.x) % row::kWarp, warp = static_cast<int>(threadIdx.x) / row::kWarp;
  // Tile by tile in the one block that has it. The loops' conditions are the same in all its threads.
  const bool here = before <= target && target - before < shared_.all[blockIdx.x][0];
  for (int64_t tile = begin_; here && tile < end_; tile += kTileIds) {
    const int64_t first = tile + threadIdx.x * kPerThread;
    uint64_t own = 0;
    if (first < end_) ForQuad(values_, first, [&](uint32_t id, float value) { own += measure(id, value); });
    uint64_t running = own;
#pragma unroll
    for (int distance = 1; distance < row::kWarp; distance *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, running, distance);
      if (lane >= distance) running += other;
    }
    if (lane == row::kWarp - 1) warps[warp] = running;
    __syncthreads();
    uint64_t tile_sum = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i == warp) running += tile_sum;
      tile_sum += warps[i];
    }
    __syncthreads();
    if (before + tile_sum <= target) {
      before += tile_sum;
      continue;
    }
    uint64_t at = before + running - own;
    if (first < end_ && at <= target && target - at < own) {
      ForQuad(values_, first, [&](uint32_t id, float value) {
        const uint64_t next = at + measure(id, value);
        if (at <= target && target < next) found[0] = static_cast<uint64_t>(id) + 1;
        at = next;
      });
    }
    break;
  }
  Reduce(found, Max());
  return static_cast<int64_t>(found[0]) - 1;
}

__device__ int64_t Row::Draw(float* logprob) {
  const SamplerState& s = shared_.state;
  Adjust();
  uint64_t top[2] = {0, 0};  // of the logits as they came, and of the adjusted ones
  ForEach(logits_, [&](uint32_t id, float value) { top[0] = Max()(top[0], PlaceOf(value, id)); });
  top[1] = top[0];
  if (values_ != logits_) {
    top[1] = 0;
    ForEach(values_, [&](uint32_t id, float value) { top[1] = Max()(top[1], PlaceOf(value, id)); });
  }
  Reduce(top, Max());
  const float raw_max = ValueOfKey(static_cast<uint32_t>(top[0] >> 32));
  max_ = ValueOfKey(static_cast<uint32_t>(top[1] >> 32));
  if (top[0] == UINT64_MAX || !isfinite(raw_max) || !isfinite(max_)) return -1;
  int64_t id = static_cast<uint32_t>(~static_cast<uint32_t>(top[1]));

  uint64_t plain[1] = {0};  // the whole row at temperature 1
  ForEach(logits_, [&](uint32_t, float value) {
    plain[0] += WeightOf(static_cast<double>(value) - static_cast<double>(raw_max));
  });
  Reduce(plain, Sum());
  if (s.inverse_temperature > 0.0) {
    Cut cut;
    const auto weight = [&](uint32_t other, float value) {
      return cut.Keeps(OrderKey(value), other) ? WeightOf(s, value, max_) : 0;
    };
    if (s.top_k > 0 && s.top_k < vocab_) cut = FindCut<false>(static_cast<uint64_t>(s.top_k));
    if (s.top_p < 1.0) {
      uint64_t sum[1] = {0};
      ForEach(values_, [&](uint32_t other, float value) { sum[0] += weight(other, value); });
      Reduce(sum, Sum());
      cut = FindCut<true>(ShareOf(s.top_p, sum[0]));
    }
    const auto drawn = [&](uint32_t other, float value) {
      return PassesMinP(s, value, max_) ? weight(other, value) : 0;
    };
    id = IdAt(drawn, [&](uint64_t total) { return DrawTarget(s.seed, s.index, total); });
  }
  const double lse = static_cast<double>(raw_max) + log(static_cast<double>(plain[0]) * 0x1.0p-41);
  *logprob = static_cast<float>(static_cast<double>(logits_[id]) - lse);
  return id;
}

__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads) SampleKernel(SampleParams p) {
  __shared__ Shared shared;
  SamplerState* const sampler = p.samplers[blockIdx.y];
  int64_t id = -1;
  float logprob = __uint_as_float(0x7fffffffu);
  if (sampler != nullptr) {
    id = Row(p, shared).Draw(&logprob);
    cg::this_cluster().sync();  // the others may still be reading this block's memory
  }
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  p.tokens[blockIdx.y] = id;
  p.logprobs[blockIdx.y] = logprob;
  if (id < 0) return;
  ++sampler->index;
  if (sampler->counts != 0) ++reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(sampler) + sampler->counts)[id];
}

}  // namespace

int64_t SampleWorkspaceBytes(int64_t rows, int64_t vocab) { return rows * vocab * static_cast<int64_t>(sizeof(float)); }

cudaError_t Sample(const SampleParams& params, cudaStream_t stream) {
  if (params.vocab <= 0 || params.vocab > kMostIds || params.rows < 0 || params.rows > 65535) {
    return cudaErrorInvalidValue;
  }
  if (params.rows == 0) return cudaSuccess;
  SampleKernel<<<dim3(kBlocks, static_cast<unsigned>(params.rows)), kThreads, 0, stream>>>(params);
  return cudaPeekAtLastError();
}

}  // namespace refocus::kernels
