// What a block of kernels/span_product.cu does: its way through tiles and depth, the warp that asks for tiles, the
// warpgroups that multiply them, and where the sums go.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/async_tiles.cuh"
#include "kernels/overlap.cuh"
#include "kernels/rowwise.cuh"
#include "kernels/span_plan.h"
#include "kernels/wgmma.cuh"

namespace refocus::kernels {

static_assert(kSpanDepth == kPanelColumns);

inline constexpr int kGroupRows = 64;  // of a warpgroup
inline constexpr int kNarrowPanel = 32;
inline constexpr uint32_t kWeightRing = 160 << 10;
inline constexpr uint32_t kRowRing = 48 << 10;

// Which tiles of weights the blocks of a launch read. Maps by term, or by product where there are two.
struct SpanPath {
  CUtensorMap weights[2];
  CUtensorMap rests[2];  // backward: the tile's last 32 columns, where it is not whole panels of 64
  bool backward;
  int width;   // columns of a tile
  int stages;  // of the depth
  int terms;
  int splits;
  int products;
  int tiles;  // of all products
  int product_tiles;
  int blocks;
};

struct SpanArgs {
  SpanPath path;
  CUtensorMap rows[2];  // by term
  void* y[2];
  bool wide[2];
  int row_count;
  int columns;  // of a result
  bool shared_rows;
};

template <int kGroups, int kColumns, bool kBackward>
struct SpanTile {
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kConsumers = kGroups * 128;
  static constexpr int kThreads = kConsumers + 32;
  // Of a backward tile 32 columns may be behind the panels of 64.
  static constexpr int kWide = kBackward ? kColumns / kPanelColumns * kPanelColumns : kColumns;
  static constexpr int kRest = kColumns - kWide;
  static_assert(kRest == 0 || kRest == kNarrowPanel);
  static constexpr uint32_t kPanel = kSpanDepth * kPanelRowBytes;
  static constexpr uint32_t kWeightBytes = kColumns * kSpanDepth * 2;
  static constexpr uint32_t kRowBytes = kRows * kSpanDepth * 2;
  static constexpr int kWeightStages = kWeightRing / kWeightBytes;
  static constexpr int kRowStages = kRowRing / kRowBytes;
  static constexpr uint32_t kRowsAt = kWeightStages * kWeightBytes;
  static constexpr uint32_t kBarriersAt = kRowsAt + kRowStages * kRowBytes;
  static constexpr uint32_t kSharedBytes = kBarriersAt + 8 * (2 * kWeightStages + kRowStages);
  // Sums on their way to the others of the cluster, in place of the rings; padded so that neighbouring rows lie in
  // different banks.
  static constexpr uint32_t kSumPitch = (kColumns + 8) * sizeof(float);
  static_assert(kRows * kSumPitch <= kBarriersAt && kWeightBytes % 1024 == 0);
  static_assert(kSharedBytes > (227 << 10) / 2 && kSharedBytes < (216 << 10));  // one block, and room beside it
};

// Barriers of the two rings. A tile of rows is free when the last tile of weights that it meets is.
template <class Tile>
struct Shared {
  uint32_t base;

  __device__ uint32_t Weights(int stage) const { return base + stage * Tile::kWeightBytes; }
  __device__ uint32_t Rows(int stage) const { return base + Tile::kRowsAt + stage * Tile::kRowBytes; }
  __device__ uint32_t WeightsFull(int stage) const { return base + Tile::kBarriersAt + 8 * stage; }
  __device__ uint32_t WeightsEmpty(int stage) const { return WeightsFull(Tile::kWeightStages + stage); }
  __device__ uint32_t RowsFull(int stage) const { return WeightsFull(2 * Tile::kWeightStages + stage); }

  __device__ void Init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Tile::kWeightStages; ++i) {
        InitBarrier(WeightsFull(i), 1);
        InitBarrier(WeightsEmpty(i), Tile::kConsumers / 32);
      }
      for (int i = 0; i < Tile::kRowStages; ++i) InitBarrier(RowsFull(i), 1);
      PublishBarriers();
    }
    __syncthreads();
  }
};

// A block's share of the depth: the same stages of every tile and term.
struct Share {
  int begin;
  int end;

  __device__ Share(const SpanPath& path, int block) {
    const int split = block % path.splits;
    begin = path.stages * split / path.splits;
    end = path.stages * (split + 1) / path.splits;
  }
};

// Where a block is on its way: through tiles, of a tile through stages of depth, of a stage through terms.
struct Walk {
  const SpanPath& path;
  const Share share;
  const bool each_term;  // or each stage once
  int tile;
  int stage;
  int term = 0;

  __device__ Walk(const SpanPath& path, int block, bool each_term)
      : path(path), share(path, block), each_term(each_term), tile(FirstTile(path, block)), stage(share.begin) {
    if (share.begin == share.end) tile = path.tiles;
  }
  static __device__ int FirstTile(const SpanPath& path, int block) { return block / path.splits; }
  __device__ bool Ended() const { return tile >= path.tiles; }
  __device__ void Next() {
    if (each_term && ++term < path.terms) return;
    term = 0;
    if (++stage < share.end) return;
    stage = share.begin;
    tile += path.blocks / path.splits;
  }
};

// Which product a tile is of, and where in it.
struct TilePlace {
  int product;
  int column;

  __device__ TilePlace(const SpanPath& path, int tile, int width)
      : product(path.products == 2 && tile >= path.product_tiles),
        column((tile - product * path.product_tiles) * width) {}
};

// One thread.
template <int kColumns, bool kBackward, class Tile>
struct Producer {
  const SpanArgs& args;
  const Shared<Tile> shared;
  const uint64_t policy;
  RingPlace<Tile::kWeightStages> weights;
  RingPlace<Tile::kRowStages> rows;

  __device__ void LoadWeights(const Walk& at) {
    const SpanPath& path = args.path;
    const TilePlace place(path, at.tile, kColumns);
    const int operand = place.product + at.term;
    const uint32_t to = shared.Weights(weights.stage), full = shared.WeightsFull(weights.stage);
    const int depth = at.stage * kSpanDepth;
    ArriveExpecting(full, Tile::kWeightBytes);
    if constexpr (kBackward) {
#pragma unroll
      for (int i = 0; i < Tile::kWide / kPanelColumns; ++i) {
        CopyBox2(to + i * Tile::kPanel, &path.weights[operand], full, place.column + i * kPanelColumns, depth, policy);
      }
      if constexpr (Tile::kRest > 0) {
        CopyBox2(to + Tile::kWide / kPanelColumns * Tile::kPanel, &path.rests[operand], full,
                 place.column + Tile::kWide, depth, policy);
      }
    } else {
      CopyBox2(to, &path.weights[operand], full, depth, place.column, policy);
    }
    weights.Next();
  }

  __device__ void LoadRows(const Walk& at) {
    const uint32_t full = shared.RowsFull(rows.stage);
    ArriveExpecting(full, Tile::kRowBytes);
    CopyBox2(shared.Rows(rows.stage), &args.rows[at.term], full, at.stage * kSpanDepth, 0);
    rows.Next();
  }

  // What may run beside the kernel that makes x.
  __device__ void Begin(Walk& w) {
    FetchMap(&args.rows[0]);
    for (int i = 0; i < Tile::kWeightStages && !w.Ended(); ++i, w.Next()) LoadWeights(w);
  }

  __device__ void Run(Walk& w) {
    Walk x(args.path, blockIdx.x, !args.shared_rows);
    AwaitPrevious();
    for (int i = 0; i < Tile::kRowStages && !x.Ended(); ++i, x.Next()) LoadRows(x);
    const int meets = args.shared_rows ? args.path.terms : 1;  // tiles of weights that a tile of rows meets
    RingPlace<Tile::kWeightStages> used;
    int met = 0;
    while (!w.Ended() || !x.Ended()) {
      WaitAt(shared.WeightsEmpty(used.stage), used.parity);
      used.Next();
      if (++met == meets) {
        met = 0;
        if (!x.Ended()) {
          LoadRows(x);
          x.Next();
        }
      }
      if (!w.Ended()) {
        LoadWeights(w);
        w.Next();
      }
    }
  }
};

template <class Tile>
struct Sums {
  float wide[Tile::kWide / 2];
  float rest[Tile::kRest > 0 ? Tile::kRest / 2 : 1];

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (float& v : wide) v = 0.0f;
#pragma unroll
    for (float& v : rest) v = 0.0f;
  }
  __device__ __forceinline__ void PinAll() {
    Pin(wide);
    if constexpr (Tile::kRest > 0) Pin(rest);
  }
  // take(half, column, low, high): this thread's pairs; row 8 * half + lane / 4 of the warp's 16.
  template <class Take>
  __device__ __forceinline__ void Each(const Take& take) const {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < Tile::kWide / 8; ++j) {
        take(half, j * 8 + column, wide[4 * j + 2 * half], wide[4 * j + 2 * half + 1]);
      }
#pragma unroll
      for (int j = 0; j < Tile::kRest / 8; ++j) {
        take(half, Tile::kWide + j * 8 + column, rest[4 * j + 2 * half], rest[4 * j + 2 * half + 1]);
      }
    }
  }
};

// sums += 64 rows . a stage of weights.
template <bool kBackward, class Tile>
__device__ __forceinline__ void Multiply(Sums<Tile>& sums, uint32_t rows, uint32_t weights) {
  const uint64_t a = FactorByColumns(rows);
  const uint64_t b = kBackward ? FactorByRows(weights, Tile::kPanel) : FactorByColumns(weights);
#pragma unroll
  for (int step = 0; step < kSpanDepth / 16; ++step) {
    const uint64_t a_step = a + (step * 32 >> 4);
    if constexpr (kBackward) {
      WarpgroupMma<Tile::kWide>::SharedByRows(sums.wide, a_step, b + (step * 16 * kPanelRowBytes >> 4), 1);
    } else {
      WarpgroupMma<Tile::kWide>::Shared(sums.wide, a_step, b + (step * 32 >> 4), 1);
    }
    if constexpr (Tile::kRest > 0) {
      constexpr uint32_t kRestAt = Tile::kWide / kPanelColumns * Tile::kPanel;
      const uint64_t rest = NarrowFactorByRows(weights + kRestAt);
      WarpgroupMma<Tile::kRest>::SharedByRows(sums.rest, a_step, rest + (step * 16 * kNarrowPanel * 2 >> 4), 1);
    }
  }
}

template <bool kBackward, class Tile>
struct Consumer {
  const SpanArgs& args;
  const Shared<Tile> shared;
  RingPlace<Tile::kWeightStages> weights;
  RingPlace<Tile::kRowStages> rows;

  __device__ __forceinline__ void Release(int stage) const {
    if (threadIdx.x % 32 == 0) ArriveAt(shared.WeightsEmpty(stage));
  }

  // The sums of one tile.
  __device__ __forceinline__ void Run(Share share, Sums<Tile>& sums) {
    sums.Clear();
    const uint32_t first_row = threadIdx.x / 128 * kGroupRows * kPanelRowBytes;
    int used = -1;
#pragma unroll 1
    for (int stage = share.begin; stage < share.end; ++stage) {
#pragma unroll 1
      for (int term = 0; term < args.path.terms; ++term) {
        WaitAt(shared.WeightsFull(weights.stage), weights.parity);
        WaitAt(shared.RowsFull(rows.stage), rows.parity);
        sums.PinAll();
        WarpgroupArrive();
        Multiply<kBackward>(sums, shared.Rows(rows.stage) + first_row, shared.Weights(weights.stage));
        WarpgroupCommit();
        WarpgroupWait<1>();
        if (used >= 0) Release(used);
        used = weights.stage;
        weights.Next();
        if (!args.shared_rows || term + 1 == args.path.terms) rows.Next();
      }
    }
    WarpgroupWait<0>();
    sums.PinAll();
    if (used >= 0) Release(used);
  }
};

__device__ __forceinline__ int RowOfTile(int half) {
  return static_cast<int>(threadIdx.x) / 32 * 16 + half * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
}

template <int kColumns, class Tile>
__device__ __forceinline__ void StoreTile(const SpanArgs& args, int tile, const Sums<Tile>& sums) {
  const TilePlace place(args.path, tile, kColumns);
  void* const y = args.y[place.product];
  const int columns = args.columns - place.column;  // that there are
  const auto each = [&](auto store) {
    sums.Each([&](int half, int column, float low, float high) {
      const int row = RowOfTile(half);
      if (row < args.row_count && column < columns)
        store(int64_t{row} * args.columns + place.column + column, low, high);
    });
  };
  if (args.wide[place.product]) {
    each([&](int64_t at, float low, float high) {
      *reinterpret_cast<float2*>(static_cast<float*>(y) + at) = make_float2(low, high);
    });
  } else {
    each([&](int64_t at, float low, float high) {
      *reinterpret_cast<uint32_t*>(static_cast<row::Bf16*>(y) + at) = PackBf16(low, high);
    });
  }
}

// The cluster's sums of a tile, added up and written: every block takes each kSplits-th row.
template <int kSplits, int kColumns, class Tile>
__device__ __forceinline__ void AddUp(const SpanArgs& args, const TilePlace& place, uint32_t sums, int split) {
  constexpr int kFours = kColumns / 4;
  const bool wide = args.wide[place.product];
  void* const y = args.y[place.product];
  for (int i = threadIdx.x; i < Tile::kRows / kSplits * kFours; i += Tile::kThreads) {
    const int row = i / kFours * kSplits + split;
    const int column = i % kFours * 4;
    if (row >= args.row_count || place.column + column >= args.columns) continue;
    float4 parts[kSplits];
#pragma unroll
    for (int k = 0; k < kSplits; ++k) {
      parts[k] = LoadFromCluster(sums + row * Tile::kSumPitch + column * sizeof(float), k);
    }
    float4 sum = parts[0];
#pragma unroll
    for (int k = 1; k < kSplits; ++k) {
      sum.x += parts[k].x;
      sum.y += parts[k].y;
      sum.z += parts[k].z;
      sum.w += parts[k].w;
    }
    const int64_t at = int64_t{row} * args.columns + place.column + column;
    const row::Four four{{sum.x, sum.y, sum.z, sum.w}};
    wide ? row::Store(static_cast<float*>(y) + at, four) : row::Store(static_cast<row::Bf16*>(y) + at, four);
  }
}

}  // namespace refocus::kernels
