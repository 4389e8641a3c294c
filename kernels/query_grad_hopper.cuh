// Gradient of attention with respect to the queries with Hopper's warpgroup products (key_pipeline.cuh). Per key tile
// and warpgroup: q . K^T and dout . V^T, from which ds forms in registers, then ds . K into the gradient, all in
// registers too. That last product is under way while the next tile's ds is formed.
#pragma once

#include <cuda_runtime.h>

#include "kernels/code_pipeline.cuh"
#include "kernels/hopper_paths.h"
#include "kernels/key_pipeline.cuh"
#include "kernels/launch.cuh"

namespace refocus::kernels {
namespace {

struct QueryGradArgs {
  PipelineArgs pipeline;
  const float* lse;
  const float* row_dot;
  float* dq;  // [splits, rows, heads, head_dim]
  float scale_log2;
};

// This thread's two rows. Rows without keys, and rows that do not exist: lse = +inf makes every weight 0.
struct RowTerms {
  float lse_log2[2] = {INFINITY, INFINITY};
  float row_dot[2] = {0.0f, 0.0f};

  __device__ __forceinline__ RowTerms(const QueryGradArgs& args, const RowTile& rows, int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= rows.rows) continue;
      const int64_t index = rows.Index(row + 8 * half, args.pipeline.shape.heads);
      const float lse = args.lse[index];
      if (lse == -INFINITY) continue;
      lse_log2[half] = lse * kLog2E;
      row_dot[half] = args.row_dot[index];
    }
  }
};

template <int kDim, HopperTile kTile>
struct Consumer {
  using Pipe = Pipeline<kDim, kTile, 2>;
  static constexpr int kKeys = kTile.keys;

  const QueryGradArgs& args;
  const Pipe& pipe;
  const Turns<kTile.consumers()> turns;
  const int row;  // of the tile, this thread's first
  RingPlace<kTile.k_stages> k;
  RingPlace<kTile.v_stages> v;

  // scores = q . K^T, dweights = dout . V^T: one group. The stages stay in use.
  __device__ __forceinline__ void Products(float (&scores)[kKeys / 2], float (&dweights)[kKeys / 2]) {
    const uint32_t first_row = turns.warpgroup * 64 * kPanelRowBytes;
    WaitAt(SharedAddress(&pipe.state.k_full[k.stage]), k.parity);
    turns.Await();
    Pin(scores);
    Pin(dweights);
    WarpgroupArrive();
    RowsTimesKeys<kDim, kKeys>(scores, pipe.RowsAt(0) + first_row, Pipe::kRowPanel, pipe.KAt(k.stage));
    WaitAt(SharedAddress(&pipe.state.v_full[v.stage]), v.parity);
    WarpgroupArrive();
    RowsTimesKeys<kDim, kKeys>(dweights, pipe.RowsAt(1) + first_row, Pipe::kRowPanel, pipe.VAt(v.stage));
    WarpgroupCommit();
  }

  // scores -> ds, with what the rows do not see left out.
  __device__ __forceinline__ void Differentiate(float (&scores)[kKeys / 2], float (&dweights)[kKeys / 2],
                                                const RowTerms& terms, const ItemPlan<kTile.rows>& plan,
                                                const KeyTile& at, int k_stage) {
    const int64_t first_key = int64_t{at.tile} * kKeys;
    if (first_key + kKeys > plan.least[at.extent]) {
      int limit[2];
      SeenKeys<kKeys>(limit, plan.counts, row, args.pipeline.shape.kv[at.extent], first_key);
      Mask<kKeys>(scores, limit, -INFINITY);
      Mask<kKeys>(dweights, limit, 0.0f);
      const int64_t most = plan.most[at.extent] - first_key;
      if (!Pipe::kInt8 && most < kKeys) {  // in eight bits they were widened to zeros
        ZeroRows<kDim, kKeys>(pipe.KAt(k_stage), static_cast<int>(most));
        WarpgroupSync(turns.warpgroup);
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const float weight = Exp2(fmaf(scores[i], args.scale_log2, -terms.lse_log2[i / 2 % 2]));
      scores[i] = weight * (dweights[i] - terms.row_dot[i / 2 % 2]);
    }
  }

  // tiles >= 1. The first tile of K overwrites `dq`.
  __device__ __forceinline__ void Walk(const ItemPlan<kTile.rows>& plan, int tiles, const RowTerms& terms,
                                       float (&dq)[kDim / 2]) {
    float scores[kKeys / 2];
    float dweights[kKeys / 2];
    uint32_t ds[kKeys / 4];
    KeyTile at;
    at.Seek(plan.tiles, plan.begin);
    Products(scores, dweights);
    turns.Pass();
    WarpgroupWait<0>();
    Pin(scores);
    Pin(dweights);
    ReleaseByWarp(&pipe.state.v_empty[v.stage]);
    v.Next();
    int k_stage = k.stage;  // of the tile that ds belongs to
    k.Next();
    Differentiate(scores, dweights, terms, plan, at, k_stage);
    Pack(ds, scores);

    for (int i = 1; i < tiles; ++i) {
      at.Next(plan.tiles, args.pipeline.shape.extents);
      Products(scores, dweights);
      AddKeys(dq, ds, k_stage, i > 1);
      turns.Pass();
      WarpgroupWait<1>();
      Pin(scores);
      Pin(dweights);
      ReleaseByWarp(&pipe.state.v_empty[v.stage]);
      v.Next();
      const int done = k_stage;
      k_stage = k.stage;
      k.Next();
      Differentiate(scores, dweights, terms, plan, at, k_stage);
      WarpgroupWait<0>();
      Pin(dq);
      Pin(ds);
      ReleaseByWarp(&pipe.state.k_empty[done]);
      Pack(ds, scores);
    }
    ReleaseByWarp(&pipe.state.rows_empty);
    AddKeys(dq, ds, k_stage, tiles > 1);
    WarpgroupWait<0>();
    Pin(dq);
    ReleaseByWarp(&pipe.state.k_empty[k_stage]);
  }

  static __device__ __forceinline__ void Pack(uint32_t (&packed)[kKeys / 4], const float (&ds)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) packed[i] = PackBf16(ds[2 * i], ds[2 * i + 1]);
  }

  __device__ __forceinline__ void AddKeys(float (&dq)[kDim / 2], uint32_t (&ds)[kKeys / 4], int k_stage, bool add) {
    Pin(dq);
    Pin(ds);
    WarpgroupArrive();
    AddWeightsTimesRows<kDim, kKeys>(dq, ds, pipe.KAt(k_stage), add);
    WarpgroupCommit();
  }

  __device__ __forceinline__ void Store(const RowTile& rows, int split, const float (&dq)[kDim / 2]) const {
    const AttentionShape& shape = args.pipeline.shape;
    const int64_t first_index = split * shape.rows * shape.heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= rows.rows) continue;
      const int64_t index = first_index + rows.Index(row + 8 * half, shape.heads);
      float* to = args.dq + index * kDim + threadIdx.x % 4 * 2;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        *reinterpret_cast<float2*>(to + j * 8) =
            make_float2(dq[4 * j + 2 * half] * shape.scale, dq[4 * j + 2 * half + 1] * shape.scale);
      }
    }
  }

  __device__ __forceinline__ void Run() {
    ItemWalk walk;
    RingPlace<2> slot;
    RingPlace<1> rows_place;
    turns.Begin();
    for (uint32_t item; walk.Next(args.pipeline.items, &item); slot.Next()) {
      const BlockPlace place = pipe.Place(item);
      const RowTile rows = pipe.Rows(place);
      const RowTerms terms(args, rows, row);
      WaitAt(SharedAddress(&pipe.state.plan_full[slot.stage]), slot.parity);
      const ItemPlan<kTile.rows>& plan = pipe.state.plans[slot.stage];
      const int tiles = plan.end - plan.begin;
      float dq[kDim / 2];
      if (tiles > 0) {
        pipe.AwaitRows(rows, turns.warpgroup, rows_place);
        Walk(plan, tiles, terms, dq);
      } else {
#pragma unroll
        for (float& x : dq) x = 0.0f;
      }
      ReleaseByWarp(&pipe.state.plan_empty[slot.stage]);
      Store(rows, place.split, dq);
    }
    turns.End();
  }
};

template <int kDim, bool kInt8>
__global__ void __launch_bounds__(HopperQueryGradTile(kDim, kInt8).threads(), 1)
    QueryGradHopperKernel(const __grid_constant__ QueryGradArgs args) {
  constexpr HopperTile kTile = HopperQueryGradTile(kDim, kInt8);
  extern __shared__ __align__(1024) unsigned char shared[];
  auto pipe = Pipeline<kDim, kTile, 2>::Make(args.pipeline, shared);
  pipe.Init();
  BeginInTurn();
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp < 4) {
    GiveRegisters<ProducerRegisters(kTile)>();
    if constexpr (kInt8) {
      CodeProducer<kDim, kTile, 2>{pipe}.Run(warp);
    } else if (warp == 0) {
      if (threadIdx.x == 0) pipe.template LoadItems<false>();
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

template <int kDim, bool kInt8>
cudaError_t Launch(QueryGradArgs& args, const QueryGradParams& params, int splits, int sm_count, cudaStream_t stream) {
  constexpr HopperTile kTile = HopperQueryGradTile(kDim, kInt8);
  const cudaError_t error = FillPipeline(kTile, params.shape, splits, params.q, params.dout, &args.pipeline);
  if (error != cudaSuccess) return error;
  const uint32_t items = args.pipeline.items;
  const uint32_t blocks = items < static_cast<uint32_t>(sm_count) ? items : sm_count;
  return LaunchBlocks(QueryGradHopperKernel<kDim, kInt8>, args, blocks, kTile.threads(),
                      Pipeline<kDim, kTile, 2>::kMemoryBytes, stream);
}

template <bool kInt8>
cudaError_t QueryGradOnHopper(const QueryGradParams& params, int splits, float* dq, int sm_count,
                              cudaStream_t stream) {
  QueryGradArgs args;
  args.lse = params.lse;
  args.row_dot = params.row_dot;
  args.dq = dq;
  args.scale_log2 = params.shape.scale * kLog2E;
  return params.shape.head_dim == 64 ? Launch<64, kInt8>(args, params, splits, sm_count, stream)
                                     : Launch<128, kInt8>(args, params, splits, sm_count, stream);
}

}  // namespace
}  // namespace refocus::kernels
