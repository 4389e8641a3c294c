// One token from one row of logits, and the step from one decoded token to the next. Two launches: every tile of ids
// forms its sums relative to its own largest logit; then one block weighs the tiles, finds the tile and in it the id.
#include "base/shard_plan.h"
#include "kernels/rowwise.cuh"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / row::kWarp;
constexpr int kPerThread = 4;  // neighbouring ids
constexpr int kTileIds = kThreads * kPerThread;

struct Arguments {
  SampleParams p;
  double inverse_temperature;  // 0 where greedy
  int64_t tiles;
  bool aligned;
};

struct Tile {
  double weight;  // sum of exp((logit - max) / temperature)
  double plain;   // the same at temperature 1
  int64_t best;   // the lowest id that has the largest logit
  float max;      // NaN when a logit is; -inf when all are
};

struct Best {
  float value;
  int64_t id;
};

__device__ Best Larger(const Best& a, const Best& b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// The same result in every thread.
__device__ Best BlockBest(Best best) {
  __shared__ Best scratch[kWarps];
#pragma unroll
  for (int mask = row::kWarp / 2; mask > 0; mask /= 2) {
    const Best other = {__shfl_xor_sync(0xffffffffu, best.value, mask), __shfl_xor_sync(0xffffffffu, best.id, mask)};
    best = Larger(best, other);
  }
  if (threadIdx.x % row::kWarp == 0) scratch[threadIdx.x / row::kWarp] = best;
  __syncthreads();
  best = scratch[0];
  for (int i = 1; i < kWarps; ++i) best = Larger(best, scratch[i]);
  return best;
}

struct Logits {
  float v[kPerThread];
};

// This thread's ids of a tile; -inf, which has no weight, behind the vocabulary.
__device__ Logits LoadLogits(const Arguments& a, int64_t first) {
  const SampleParams& p = a.p;
  if (a.aligned && first + kPerThread <= p.vocab) {
    const float4 raw = *reinterpret_cast<const float4*>(p.logits + first);
    return {raw.x, raw.y, raw.z, raw.w};
  }
  Logits result;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) result.v[j] = first + j < p.vocab ? p.logits[first + j] : -INFINITY;
  return result;
}

__device__ double Weight(float logit, float max, double inverse_temperature) {
  return exp((static_cast<double>(logit) - static_cast<double>(max)) * inverse_temperature);
}

__global__ void __launch_bounds__(kThreads) TileKernel(Arguments a) {
  const SampleParams& p = a.p;
  __shared__ double weight_scratch[kWarps], plain_scratch[kWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileIds + threadIdx.x * kPerThread;
  const Logits logits = LoadLogits(a, first);
  Best best = {-INFINITY, first};
  bool nan = false;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    nan = nan || logits.v[j] != logits.v[j];
    best = Larger(best, {logits.v[j], first + j});
  }
  nan = __syncthreads_or(nan) != 0;
  best = BlockBest(best);
  // A tile without any weight, and the greedy case, take the same path: their sums are 0, or not read.
  const float max = best.value > -INFINITY ? best.value : 0.0f;
  double weight = 0.0, plain = 0.0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    plain += Weight(logits.v[j], max, 1.0);
    weight += Weight(logits.v[j], max, a.inverse_temperature);
  }
  weight = row::BlockSum(weight, weight_scratch);
  plain = row::BlockSum(plain, plain_scratch);
  if (threadIdx.x == 0) {
    static_cast<Tile*>(p.workspace)[blockIdx.x] = {weight, plain, best.id,
                                                   nan ? __uint_as_float(0x7fffffffu) : best.value};
  }
}

// A thread's place in the running sum over the block's threads.
struct Place {
  bool chosen;    // of exactly one thread, if any thread has weight
  double before;  // the sum of the threads before this one
};

__device__ double BlockScan(double own, double* sums) {
  __shared__ double warps[kWarps];
  const int lane = threadIdx.x % row::kWarp;
  double sum = own;
#pragma unroll
  for (int distance = 1; distance < row::kWarp; distance *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == row::kWarp - 1) warps[threadIdx.x / row::kWarp] = sum;
  __syncthreads();
  double before = 0.0, total = 0.0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < static_cast<int>(threadIdx.x) / row::kWarp) before += warps[i];
    total += warps[i];
  }
  sums[threadIdx.x] = before + sum;
  __syncthreads();
  return total;
}

// The first thread whose running sum exceeds `target` and that has weight itself, else (rounding may leave a rest) the
// last that has weight.
__device__ Place Choose(double own, double target, const double* sums) {
  __shared__ int first, last;
  if (threadIdx.x == 0) {
    first = kThreads;
    last = -1;
  }
  __syncthreads();
  const int t = static_cast<int>(threadIdx.x);
  if (own > 0.0) {
    if (sums[t] > target) atomicMin(&first, t);
    atomicMax(&last, t);
  }
  __syncthreads();
  return {t == (first < kThreads ? first : last), t == 0 ? 0.0 : sums[t - 1]};
}

__device__ uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// As UniformAt of worker/sampler.h.
__device__ double UniformAt(uint64_t seed, int64_t index) {
  return static_cast<double>(Mix(Mix(seed) ^ static_cast<uint64_t>(index)) >> 11) * 0x1.0p-53;
}

// The thread's share of the tiles: neighbours, in rising order.
struct TileRange {
  int64_t begin, end;
};

__device__ TileRange OwnTiles(int64_t tiles) {
  const int64_t share = (tiles + kThreads - 1) / kThreads;
  const int64_t begin = min(share * threadIdx.x, tiles);
  return {begin, min(begin + share, tiles)};
}

// The tile in which the running sum exceeds u times the total, and how much of that, relative to the tile's own largest
// logit, is left for its ids. One thread writes both.
__device__ void ChooseTile(const Arguments& a, const Tile* tiles, TileRange own, float max, int64_t* tile,
                           double* rest) {
  __shared__ double sums[kThreads];
  double weight = 0.0;
  for (int64_t i = own.begin; i < own.end; ++i) {
    if (tiles[i].weight > 0.0) weight += tiles[i].weight * Weight(tiles[i].max, max, a.inverse_temperature);
  }
  const double target = UniformAt(a.p.seed, *a.p.index) * BlockScan(weight, sums);
  const Place place = Choose(weight, target, sums);
  if (!place.chosen) return;
  double sum = place.before;
  for (int64_t i = own.begin; i < own.end; ++i) {
    if (!(tiles[i].weight > 0.0)) continue;
    const double scale = Weight(tiles[i].max, max, a.inverse_temperature);
    const double scaled = tiles[i].weight * scale;
    if (!(scaled > 0.0)) continue;
    *tile = i;
    *rest = (target - sum) / scale;
    if ((sum += scaled) > target) break;
  }
}

// The id in the tile at which its running sum exceeds `rest`. One thread writes it.
__device__ void ChooseId(const Arguments& a, int64_t tile, float max, double rest, int64_t* id) {
  __shared__ double sums[kThreads];
  const int64_t first = tile * kTileIds + threadIdx.x * kPerThread;
  const Logits logits = LoadLogits(a, first);
  double weights[kPerThread], own = 0.0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) own += weights[j] = Weight(logits.v[j], max, a.inverse_temperature);
  BlockScan(own, sums);
  const Place place = Choose(own, rest, sums);
  if (!place.chosen) return;
  double sum = place.before;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const bool over = sum > rest;  // found before
    sum += weights[j];
    if (weights[j] > 0.0 && (!over || *id < 0)) *id = first + j;
  }
}

__global__ void __launch_bounds__(kThreads) ChooseKernel(Arguments a) {
  const SampleParams& p = a.p;
  __shared__ double plain_scratch[kWarps];
  __shared__ int64_t tile, id;
  __shared__ double rest;
  const Tile* all = static_cast<const Tile*>(p.workspace);
  const TileRange own = OwnTiles(a.tiles);
  Best best = {-INFINITY, INT64_MAX};
  bool nan = false;
  for (int64_t i = own.begin; i < own.end; ++i) {
    nan = nan || all[i].max != all[i].max;
    best = Larger(best, {all[i].max, all[i].best});
  }
  if (threadIdx.x == 0) {
    tile = id = -1;
    rest = 0.0;
  }
  nan = __syncthreads_or(nan) != 0;
  best = BlockBest(best);
  if (nan || !isfinite(best.value)) {
    if (threadIdx.x == 0) {
      *p.token = -1;
      *p.logprob = __uint_as_float(0x7fffffffu);
    }
    return;
  }
  double plain = 0.0;
  for (int64_t i = own.begin; i < own.end; ++i) {
    if (all[i].plain > 0.0) plain += all[i].plain * Weight(all[i].max, best.value, 1.0);
  }
  plain = row::BlockSum(plain, plain_scratch);
  int64_t chosen = best.id;
  if (p.temperature > 0.0f) {
    ChooseTile(a, all, own, best.value, &tile, &rest);
    __syncthreads();
    ChooseId(a, tile, all[tile].max, rest, &id);
    __syncthreads();
    chosen = id;
  }
  if (threadIdx.x == 0) {
    const double lse = static_cast<double>(best.value) + log(plain);
    *p.token = chosen;
    *p.logprob = static_cast<float>(static_cast<double>(p.logits[chosen]) - lse);
  }
}

__global__ void AdvanceKernel(AdvanceParams p) {
  const int64_t pos = *p.pos + 1;
  const int64_t block = pos / kBlockTokens;
  *p.ids = *p.token;
  *p.pos = pos;
  // Of an owned position, CountBelow is its place in the shard's own order.
  *p.slot = block % p.shards == p.shard ? block / p.shards * kBlockTokens + pos % kBlockTokens - p.first_index : -1;
  *p.index += 1;
}

}  // namespace

int64_t SampleWorkspaceBytes(int64_t vocab) {
  return row::CeilDiv(vocab, kTileIds) * static_cast<int64_t>(sizeof(Tile));
}

cudaError_t Sample(const SampleParams& params, cudaStream_t stream) {
  if (params.vocab <= 0) return cudaErrorInvalidValue;
  Arguments a = {};
  a.p = params;
  a.inverse_temperature = params.temperature > 0.0f ? 1.0 / static_cast<double>(params.temperature) : 0.0;
  a.tiles = row::CeilDiv(params.vocab, kTileIds);
  a.aligned = row::Aligned(params.logits);
  const cudaError_t error = row::Launch(TileKernel, a.tiles, kThreads, 0, stream, a);
  if (error != cudaSuccess) return error;
  return row::Launch(ChooseKernel, 1, kThreads, 0, stream, a);
}

cudaError_t Advance(const AdvanceParams& params, cudaStream_t stream) {
  if (params.shards < 1 || params.shard < 0 || params.shard >= params.shards) return cudaErrorInvalidValue;
  return row::Launch(AdvanceKernel, 1, 1, 0, stream, params);
}

}  // namespace refocus::kernels
