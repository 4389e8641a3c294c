// One token from each row of logits, and the step from one decoded token to the next. Two launches: every tile of ids
// forms its sums relative to its own largest logit; then one block a row weighs the tiles, finds the tile and in it the
// id.
#include "base/shard_plan.h"
#include "kernels/rowwise.cuh"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / row::kWarp;
constexpr int kPerThread = 4;  // neighbouring ids
constexpr int kTileIds = kThreads * kPerThread;

struct Tile;

struct Arguments {
  SampleParams p;
  int64_t tiles;
  bool aligned;

  // Of the block's row.
  __device__ const float* logits() const { return p.logits + blockIdx.y * p.vocab; }
  __device__ Tile* row_tiles() const;
  __device__ SamplerState* sampler() const { return p.samplers[blockIdx.y]; }
};

struct Tile {
  double weight;  // sum of exp((logit - max) / temperature)
  double plain;   // the same at temperature 1
  int64_t best;   // the lowest id that has the largest logit
  float max;      // NaN when a logit is; -inf when all are
};

__device__ Tile* Arguments::row_tiles() const { return static_cast<Tile*>(p.workspace) + blockIdx.y * tiles; }

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
    const float4 raw = *reinterpret_cast<const float4*>(a.logits() + first);
    return {raw.x, raw.y, raw.z, raw.w};
  }
  Logits result;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) result.v[j] = first + j < p.vocab ? a.logits()[first + j] : -INFINITY;
  return result;
}

__device__ double Weight(float logit, float max, double inverse_temperature) {
  return exp((static_cast<double>(logit) - static_cast<double>(max)) * inverse_temperature);
}

__global__ void __launch_bounds__(kThreads) TileKernel(Arguments a) {
  const SamplerState* const sampler = a.sampler();
  if (sampler == nullptr) return;
  const double inverse_temperature = sampler->inverse_temperature;
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
    weight += Weight(logits.v[j], max, inverse_temperature);
  }
  weight = row::BlockSum(weight, weight_scratch);
  plain = row::BlockSum(plain, plain_scratch);
  if (threadIdx.x == 0) {
    a.row_tiles()[blockIdx.x] = {weight, plain, best.id,
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
__device__ void ChooseTile(const SamplerState& sampler, const Tile* tiles, TileRange own, float max, int64_t* tile,
                           double* rest) {
  const double inverse_temperature = sampler.inverse_temperature;
  __shared__ double sums[kThreads];
  double weight = 0.0;
  for (int64_t i = own.begin; i < own.end; ++i) {
    if (tiles[i].weight > 0.0) weight += tiles[i].weight * Weight(tiles[i].max, max, inverse_temperature);
  }
  const double target = static_cast<double>(UniformBits(sampler.seed, sampler.index)) * 0x1.0p-53 * BlockScan(weight, sums);
  const Place place = Choose(weight, target, sums);
  if (!place.chosen) return;
  double sum = place.before;
  for (int64_t i = own.begin; i < own.end; ++i) {
    if (!(tiles[i].weight > 0.0)) continue;
    const double scale = Weight(tiles[i].max, max, inverse_temperature);
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
  for (int j = 0; j < kPerThread; ++j) own += weights[j] = Weight(logits.v[j], max, a.sampler()->inverse_temperature);
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

__device__ void NoToken(const SampleParams& p) {
  p.tokens[blockIdx.y] = -1;
  p.logprobs[blockIdx.y] = __uint_as_float(0x7fffffffu);
}

__global__ void __launch_bounds__(kThreads) ChooseKernel(Arguments a) {
  const SampleParams& p = a.p;
  __shared__ double plain_scratch[kWarps];
  __shared__ int64_t tile, id;
  __shared__ double rest;
  SamplerState* const sampler = a.sampler();
  if (sampler == nullptr) {
    if (threadIdx.x == 0) NoToken(p);
    return;
  }
  const Tile* all = a.row_tiles();
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
    if (threadIdx.x == 0) NoToken(p);
    return;
  }
  double plain = 0.0;
  for (int64_t i = own.begin; i < own.end; ++i) {
    if (all[i].plain > 0.0) plain += all[i].plain * Weight(all[i].max, best.value, 1.0);
  }
  plain = row::BlockSum(plain, plain_scratch);
  int64_t chosen = best.id;
  if (sampler->inverse_temperature > 0.0) {
    ChooseTile(*sampler, all, own, best.value, &tile, &rest);
    __syncthreads();
    ChooseId(a, tile, all[tile].max, rest, &id);
    __syncthreads();
    chosen = id;
  }
  if (threadIdx.x == 0) {
    const double lse = static_cast<double>(best.value) + log(plain);
    p.tokens[blockIdx.y] = chosen;
    p.logprobs[blockIdx.y] = static_cast<float>(static_cast<double>(a.logits()[chosen]) - lse);
    ++sampler->index;
  }
}

}  // namespace

int64_t SampleWorkspaceBytes(int64_t rows, int64_t vocab) {
  return rows * row::CeilDiv(vocab, kTileIds) * static_cast<int64_t>(sizeof(Tile));
}

cudaError_t Sample(const SampleParams& params, cudaStream_t stream) {
  if (params.vocab <= 0 || params.rows < 0 || params.rows > 65535) return cudaErrorInvalidValue;
  if (params.rows == 0) return cudaSuccess;
  Arguments a = {};
  a.p = params;
  a.tiles = row::CeilDiv(params.vocab, kTileIds);
  a.aligned = row::Aligned(params.logits) && (params.rows == 1 || params.vocab % kPerThread == 0);
  const auto rows = static_cast<unsigned>(params.rows);
  TileKernel<<<dim3(static_cast<unsigned>(a.tiles), rows), kThreads, 0, stream>>>(a);
  const cudaError_t error = cudaPeekAtLastError();
  if (error != cudaSuccess) return error;
  ChooseKernel<<<dim3(1, rows), kThreads, 0, stream>>>(a);
  return cudaPeekAtLastError();
}

}  // namespace refocus::kernels
