// Partial attention with Hopper's warpgroup products, for many rows (key_pipeline.cuh). A warpgroup keeps scores,
// weights and sums of its 64 rows in registers. While its product with V is under way it forms the next tile's weights,
// and the other warpgroups have the tensor cores while this one does neither.
#pragma once

#include <cuda_runtime.h>

#include "kernels/code_pipeline.cuh"
#include "kernels/hopper_paths.h"
#include "kernels/key_pipeline.cuh"
#include "kernels/launch.cuh"

namespace refocus::kernels {
namespace {

struct AttendArgs {
  PipelineArgs pipeline;
  float* out;  // [splits, rows, heads, head_dim]
  float* lse;  // [splits, rows, heads]
  float scale_log2;
};

// The maximum follows the scores only where weights would exceed 2^8: below that the sums and bf16's relative precision
// are as good, and what is summed so far need not be rescaled.
constexpr float kSlackLog2 = 8.0f;

// This thread's two rows: base of the weights' exponents (base-2 units), sum of the weights of this thread's columns.
struct RunningRows {
  float base[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Scores -> weights. Returns whether any row of the warp moved its base; `rescale` is then the factor for what was
  // summed before.
  template <int kSize>
  __device__ __forceinline__ bool Weigh(float (&scores)[kSize], float scale_log2, float (&rescale)[2]) {
    bool moved = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = fmaxf(scores[2 * half], scores[2 * half + 1]);
#pragma unroll
      for (int j = 4; j < kSize; j += 4) {
        high = fmaxf(high, fmaxf(scores[j + 2 * half], scores[j + 2 * half + 1]));
      }
      high = RowMax(high) * scale_log2;
      const bool move = high > base[half] + kSlackLog2;
      const float new_base = move ? high : base[half];
      // A row that has seen no key keeps -inf; 0 in its place makes every weight below exp2(-inf) = 0.
      const float safe = new_base == -INFINITY ? 0.0f : new_base;
      rescale[half] = Exp2(base[half] - safe);
      moved |= move;
      base[half] = new_base;
      float added[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[j + 2 * half + c];
          score = Exp2(fmaf(score, scale_log2, -safe));
          added[c] += score;
        }
      }
      sum[half] = sum[half] * rescale[half] + (added[0] + added[1]);
    }
    return __any_sync(0xffffffffu, moved);
  }
};

template <int kSize>
__device__ __forceinline__ void PackWeights(uint32_t (&packed)[kSize / 2], const float (&weights)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) packed[i] = PackBf16(weights[2 * i], weights[2 * i + 1]);
}

template <int kSize>
__device__ __forceinline__ void Rescale(float (&sums)[kSize], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) sums[i] *= by[i / 2 % 2];
}

template <int kDim>
__device__ __forceinline__ void Store(const AttendArgs& args, const RowTile& rows, int split, int row,
                                      const float (&out)[kDim / 2], RunningRows& run) {
  const AttentionShape& shape = args.pipeline.shape;
  const int lane = threadIdx.x % 32;
  const int64_t first_index = split * shape.rows * shape.heads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = RowSum(run.sum[half]);
    if (row + 8 * half >= rows.rows) continue;
    const int64_t index = first_index + rows.Index(row + 8 * half, shape.heads);
    // A sum of weights is 0 only where no key was visible; NaN stays NaN.
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    float* to = args.out + index * kDim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      *reinterpret_cast<float2*>(to + j * 8) =
          make_float2(out[4 * j + 2 * half] * inverse, out[4 * j + 2 * half + 1] * inverse);
    }
    if (lane % 4 == 0) args.lse[index] = sum == 0.0f ? -INFINITY : (run.base[half] + log2f(sum)) * kLn2;
  }
}

// A consuming warpgroup's walk over the keys of one item after the other.
template <int kDim, HopperTile kTile>
struct Consumer {
  using Pipe = Pipeline<kDim, kTile, 1>;
  static constexpr int kKeys = kTile.keys;

  const AttendArgs& args;
  const Pipe& pipe;
  const Turns<kTile.consumers()> turns;
  const int row;  // of the tile, this thread's first
  RingPlace<kTile.k_stages> k;
  RingPlace<kTile.v_stages> v;

  // Hides what the rows do not see of a tile at the end of their keys.
  __device__ __forceinline__ void MaskTile(float (&scores)[kKeys / 2], const ItemPlan<kTile.rows>& plan,
                                           const KeyTile& at) {
    const int64_t first_key = int64_t{at.tile} * kKeys;
    if (first_key + kKeys <= plan.least[at.extent]) return;
    int limit[2];
    SeenKeys<kKeys>(limit, plan.counts, row, args.pipeline.shape.kv[at.extent], first_key);
    Mask<kKeys>(scores, limit, -INFINITY);
    if constexpr (Pipe::kInt8) return;  // widened to zeros
    const int64_t most = plan.most[at.extent] - first_key;
    if (most >= kKeys) return;
    WaitAt(SharedAddress(&pipe.state.v_full[v.stage]), v.parity);
    ZeroRows<kDim, kKeys>(pipe.VAt(v.stage), static_cast<int>(most));
    WarpgroupSync(turns.warpgroup);
  }

  __device__ __forceinline__ void Scores(float (&scores)[kKeys / 2]) {
    WaitAt(SharedAddress(&pipe.state.k_full[k.stage]), k.parity);
    turns.Await();
    Pin(scores);
    WarpgroupArrive();
    RowsTimesKeys<kDim, kKeys>(scores, pipe.RowsAt(0) + turns.warpgroup * 64 * kPanelRowBytes, Pipe::kRowPanel,
                               pipe.KAt(k.stage));
    WarpgroupCommit();
  }
  __device__ __forceinline__ void ReleaseK() {
    ReleaseByWarp(&pipe.state.k_empty[k.stage]);
    k.Next();
  }
  __device__ __forceinline__ void AddValues(float (&out)[kDim / 2], uint32_t (&weights)[kKeys / 4], bool add) {
    WaitAt(SharedAddress(&pipe.state.v_full[v.stage]), v.parity);
    Pin(out);
    Pin(weights);
    WarpgroupArrive();
    AddWeightsTimesRows<kDim, kKeys>(out, weights, pipe.VAt(v.stage), add);
    WarpgroupCommit();
  }
  __device__ __forceinline__ void ReleaseV() {
    ReleaseByWarp(&pipe.state.v_empty[v.stage]);
    v.Next();
  }

  // tiles >= 1. The first tile of V overwrites `out`.
  __device__ __forceinline__ void Walk(const ItemPlan<kTile.rows>& plan, int tiles, float (&out)[kDim / 2],
                                       RunningRows& run) {
    float scores[kKeys / 2];
    uint32_t weights[kKeys / 4];
    float rescale[2];
    KeyTile at;
    at.Seek(plan.tiles, plan.begin);
    Scores(scores);
    turns.Pass();
    WarpgroupWait<0>();
    Pin(scores);
    ReleaseK();
    MaskTile(scores, plan, at);
    run.Weigh(scores, args.scale_log2, rescale);
    PackWeights(weights, scores);

    for (int i = 1; i < tiles; ++i) {
      at.Next(plan.tiles, args.pipeline.shape.extents);
      Scores(scores);
      AddValues(out, weights, i > 1);
      turns.Pass();
      WarpgroupWait<1>();
      Pin(scores);
      ReleaseK();
      // The stage of V that the product under way reads is released behind it; the mask looks at the next one.
      const RingPlace<kTile.v_stages> in_use = v;
      v.Next();
      MaskTile(scores, plan, at);
      const bool moved = run.Weigh(scores, args.scale_log2, rescale);
      WarpgroupWait<0>();
      Pin(out);
      Pin(weights);
      ReleaseByWarp(&pipe.state.v_empty[in_use.stage]);
      PackWeights(weights, scores);
      if (moved) Rescale(out, rescale);
    }
    ReleaseByWarp(&pipe.state.rows_empty);
    AddValues(out, weights, tiles > 1);
    WarpgroupWait<0>();
    Pin(out);
    ReleaseV();
  }

  // A warpgroup without rows lets the others have its turns, the stages go on.
  __device__ __forceinline__ void Skip(int tiles) {
    ReleaseByWarp(&pipe.state.rows_empty);
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      WaitAt(SharedAddress(&pipe.state.k_full[k.stage]), k.parity);
      turns.Await();
      turns.Pass();
      ReleaseK();
      WaitAt(SharedAddress(&pipe.state.v_full[v.stage]), v.parity);
      ReleaseV();
    }
  }

  __device__ __forceinline__ void Run() {
    ItemWalk walk;
    RingPlace<2> slot;
    RingPlace<1> rows_place;
    turns.Begin();
    for (uint32_t item; walk.Next(args.pipeline.items, &item); slot.Next()) {
      const BlockPlace place = pipe.Place(item);
      WaitAt(SharedAddress(&pipe.state.plan_full[slot.stage]), slot.parity);
      const ItemPlan<kTile.rows>& plan = pipe.state.plans[slot.stage];
      const int tiles = plan.end - plan.begin;
      float out[kDim / 2];
      RunningRows run;
      // In eight bits rows may be few: half of the products would be of none.
      const bool skip = Pipe::kInt8 && pipe.Rows(place).rows <= 64 * turns.warpgroup;
      if (tiles > 0) pipe.AwaitRows(pipe.Rows(place), turns.warpgroup, rows_place);
      if (tiles > 0 && !skip) {
        Walk(plan, tiles, out, run);
      } else {
        if (tiles > 0) Skip(tiles);
#pragma unroll
        for (float& x : out) x = 0.0f;
      }
      ReleaseByWarp(&pipe.state.plan_empty[slot.stage]);
      Store<kDim>(args, pipe.Rows(place), place.split, row, out, run);
    }
    turns.End();
  }
};

template <int kDim, bool kTall, bool kInt8>
__global__ void __launch_bounds__(HopperAttendTile(kDim, kTall, kInt8).threads(), 1)
    AttendHopperKernel(const __grid_constant__ AttendArgs args) {
  constexpr HopperTile kTile = HopperAttendTile(kDim, kTall, kInt8);
  extern __shared__ __align__(1024) unsigned char shared[];
  auto pipe = Pipeline<kDim, kTile, 1>::Make(args.pipeline, shared);
  pipe.Init();
  BeginInTurn();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    GiveRegisters<ProducerRegisters(kTile)>();
    if constexpr (kInt8) {
      CodeProducer<kDim, kTile, 1>{pipe}.Run(warp);
    } else if (warp == 0) {
      if (threadIdx.x == 0) pipe.template LoadItems<true>();
    } else if (warp == 1) {
      pipe.PlanItems();
    }
  } else {
    TakeRegisters<ConsumerRegisters(kTile)>();
    const int row = (warp - 4) * 16 + static_cast<int>(threadIdx.x % 32) / 4;
    Consumer<kDim, kTile> consumer{args, pipe, {warp / 4 - 1}, row, {}, {}};
    consumer.Run();
  }
}

template <int kDim, bool kTall, bool kInt8>
cudaError_t Launch(AttendArgs& args, const AttendParams& params, int splits, int sm_count, cudaStream_t stream) {
  constexpr HopperTile kTile = HopperAttendTile(kDim, kTall, kInt8);
  const cudaError_t error = FillPipeline(kTile, params.shape, splits, params.q, nullptr, &args.pipeline);
  if (error != cudaSuccess) return error;
  const uint32_t items = args.pipeline.items;
  const uint32_t blocks = items < static_cast<uint32_t>(sm_count) ? items : sm_count;
  return LaunchBlocks(AttendHopperKernel<kDim, kTall, kInt8>, args, blocks, kTile.threads(),
                      Pipeline<kDim, kTile, 1>::kMemoryBytes, stream);
}

template <bool kInt8>
cudaError_t AttendOnHopper(const AttendParams& params, int splits, float* out, float* lse, int sm_count,
                           cudaStream_t stream) {
  AttendArgs args;
  args.out = out;
  args.lse = lse;
  args.scale_log2 = params.shape.scale * kLog2E;
  const bool tall = HopperFillsTallTiles(PackedRows(params.shape));
  if (params.shape.head_dim == 64) {
    if constexpr (kInt8) {
      if (!tall) return Launch<64, false, true>(args, params, splits, sm_count, stream);
    }
    return Launch<64, true, kInt8>(args, params, splits, sm_count, stream);
  }
  return tall ? Launch<128, true, kInt8>(args, params, splits, sm_count, stream)
              : Launch<128, false, kInt8>(args, params, splits, sm_count, stream);
}

}  // namespace
}  // namespace refocus::kernels
