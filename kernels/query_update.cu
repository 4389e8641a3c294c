// The update is bound by memory: a block owns a square tile of one layer, brings the two strips of factors that make
// its gradient to shared memory, and streams p, m and v through registers. Each warp computes 16 x 64 of the gradient
// at a time on tensor cores and hands it to itself through shared memory, so that every access to memory is a stretch
// of 256 bytes of a row. Loads of p, m and v are always ahead: those of the first rows are under way before the factors
// are asked for, and a row that is done makes room for the next one's.
#include "kernels/query_update.h"

#include <cmath>

#include <algorithm>

#include "kernels/mma.cuh"
#include "kernels/rowwise.cuh"

namespace refocus::kernels {
namespace {

using row::Bf16;

constexpr int kMaxRows = static_cast<int>(kFactorRows);
constexpr int kLayersPerLaunch = 128;  // whose addresses are parameters

struct LayerFactors {
  const Bf16* dq[kLayersPerLaunch];
  const Bf16* h[kLayersPerLaunch];
};

LayerFactors LayersFrom(const QueryFactors& factors, int64_t first, int64_t count) {
  LayerFactors layers = {};
  for (int64_t i = 0; i < count; ++i) {
    layers.dq[i] = static_cast<const Bf16*>(factors.dq[first + i]);
    layers.h[i] = static_cast<const Bf16*>(factors.h[first + i]);
  }
  return layers;
}

// Rows [0, rows) x columns [first, first + kColumns) of a factor to a tile of `tile_rows` rows; zeros beyond both ends.
template <int kColumns, int kThreads>
__device__ __forceinline__ void CopyStrip(uint32_t tile, const Bf16* from, int64_t first, int64_t columns, int rows,
                                          int tile_rows) {
  constexpr int kPieces = kColumns / 8;
  for (int i = threadIdx.x; i < tile_rows * kPieces; i += kThreads) {
    const int r = i / kPieces, piece = i % kPieces;
    const int64_t column = first + piece * 8;
    const bool valid = r < rows && column < columns;
    CopyAsync(tile + TileOffset<kColumns>(r, piece), valid ? from + r * columns + column : from, valid);
  }
}

// ---- The norm.

constexpr int kGramThreads = 256;
constexpr int kGramColumns = 64;  // of a tile
constexpr int kGramTiles = 8;     // of a slice, one after the other
constexpr int64_t kSlice = kGramColumns * kGramTiles;
constexpr int kDotRows = 16;      // of a block of the second kernel
constexpr int kDotBlocks = kMaxRows / kDotRows;

struct GramShape {
  int rows;
  int64_t out, in;
  int out_slices, in_slices;
  __device__ __host__ int slices() const { return out_slices + in_slices; }
};

// Rows x rows products of one factor over one slice of its columns: grid slices (of h, then of dq), layers; to
// gram [layers, slices, 128, 128]. Warp w computes rows 16 w to 16 w + 15.
__global__ void __launch_bounds__(kGramThreads)
    GramKernel(const __grid_constant__ LayerFactors layers, GramShape shape, float* gram) {
  constexpr int kTileBytes = kMaxRows * kGramColumns * 2;
  __shared__ alignas(128) unsigned char tiles[2 * kTileBytes];
  const bool of_h = static_cast<int>(blockIdx.x) < shape.in_slices;
  const Bf16* const from = of_h ? layers.h[blockIdx.y] : layers.dq[blockIdx.y];
  const int64_t columns = of_h ? shape.in : shape.out;
  const int64_t first = kSlice * (of_h ? blockIdx.x : blockIdx.x - shape.in_slices);
  const int count = static_cast<int>(min(int64_t{kGramTiles}, (columns - first + kGramColumns - 1) / kGramColumns));
  const int lane = threadIdx.x % row::kWarp, warp = threadIdx.x / row::kWarp;
  const auto left = LaneOffset<kGramColumns>::RowsFirst(lane), right = LaneOffset<kGramColumns>::ColumnsFirst(lane);
  const uint32_t base = SharedAddress(tiles);
  const auto load = [&](int tile) {
    if (tile < count) {
      CopyStrip<kGramColumns, kGramThreads>(base + tile % 2 * kTileBytes, from, first + tile * kGramColumns, columns,
                                            shape.rows, kMaxRows);
    }
    CommitCopies();
  };

  float sums[1][kMaxRows / 8][4] = {};
  load(0);
  for (int tile = 0; tile < count; ++tile) {
    load(tile + 1);
    WaitForCopies<1>();
    __syncthreads();
    const uint32_t keys = base + tile % 2 * kTileBytes;
#pragma unroll
    for (int step = 0; step < kGramColumns / 16; ++step) {
      uint32_t a[1][4];
      LoadMatrices(a[0], keys + warp * 16 * kGramColumns * 2 + left.At(step));
      ScoreStep<kGramColumns>(sums, a, keys, right, step);
    }
    __syncthreads();  // the tile is free
  }
  float* const to = gram + (static_cast<int64_t>(blockIdx.y) * shape.slices() + blockIdx.x) * kMaxRows * kMaxRows;
  const int r = warp * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kMaxRows / 8; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to + r * kMaxRows + column) = make_float2(sums[0][n][0], sums[0][n][1]);
    *reinterpret_cast<float2*>(to + (r + 8) * kMaxRows + column) = make_float2(sums[0][n][2], sums[0][n][3]);
  }
}

// Slices are added up and both factors' products multiplied: grid kDotBlocks, layers; to parts [layers, kDotBlocks].
__global__ void __launch_bounds__(kGramThreads) DotKernel(GramShape shape, const float* gram, double* parts) {
  __shared__ double scratch[kGramThreads / row::kWarp];
  const float* const from = gram + static_cast<int64_t>(blockIdx.y) * shape.slices() * kMaxRows * kMaxRows;
  double sum = 0.0;
  for (int i = threadIdx.x; i < kDotRows * kMaxRows; i += kGramThreads) {
    const int at = static_cast<int>(blockIdx.x) * kDotRows * kMaxRows + i;
    if (at / kMaxRows >= shape.rows || at % kMaxRows >= shape.rows) continue;
    double h = 0.0, dq = 0.0;
    for (int slice = 0; slice < shape.in_slices; ++slice) h += from[slice * kMaxRows * kMaxRows + at];
    for (int slice = shape.in_slices; slice < shape.slices(); ++slice) dq += from[slice * kMaxRows * kMaxRows + at];
    sum += h * dq;
  }
  sum = row::BlockSum(sum, scratch);
  if (threadIdx.x == 0) parts[blockIdx.y * kDotBlocks + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kGramThreads) RootKernel(const double* parts, int64_t count, double* norm) {
  BeginInTurn();
  __shared__ double scratch[kGramThreads / row::kWarp];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kGramThreads) sum += parts[i];
  sum = row::BlockSum(sum, scratch);
  // Roundings may leave less than nothing of rows that cancel.
  if (threadIdx.x == 0) *norm = sum < 0.0 ? 0.0 : sqrt(sum);
}

constexpr int kTile = 128;  // outputs and inputs of a block of the update

bool Valid(const QueryFactors& f) {
  if (f.layers < 0 || f.rows < 0 || f.out <= 0 || f.in <= 0 || f.out > INT32_MAX / kTile || f.in > INT32_MAX / kTile) {
    return false;
  }
  if (!FactorsFit(f.rows, f.out, f.in)) return false;
  for (int64_t i = 0; i < f.layers; ++i) {
    if (!row::Aligned(f.dq[i], f.h[i])) return false;
  }
  return true;
}

GramShape ShapeOf(const QueryFactors& f) {
  return {static_cast<int>(f.rows), f.out, f.in, static_cast<int>(row::CeilDiv(f.out, kSlice)),
          static_cast<int>(row::CeilDiv(f.in, kSlice))};
}

int64_t GramFloats(const QueryFactors& f) { return f.layers * ShapeOf(f).slices() * kMaxRows * kMaxRows; }

// ---- The update.

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * row::kWarp;
constexpr int kWarpOut = 16;  // of the gradient, of a warp at once
constexpr int kWarpIn = 64;
constexpr int kWarpsAcross = kTile / kWarpIn;
constexpr int kSteps = kTile * kTile / (kWarps * kWarpOut * kWarpIn);
constexpr int kStepOut = kTile / kSteps;     // outputs of all warps of a step
constexpr int kStageRow = kWarpIn + 8;       // floats: rows of a quarter of a warp lie in different banks
constexpr int kRowsAtOnce = 2;               // 16 lanes take a row of kWarpIn
constexpr int kHeld = 4;                     // accesses of each of p, m and v that a lane has under way
constexpr int kTurns = kWarpOut / kRowsAtOnce / kHeld;  // until all rows of a step are done
static_assert(kSteps * kStepOut == kTile && kTurns * kHeld * kRowsAtOnce == kWarpOut);

constexpr int64_t StageBytes() { return int64_t{kWarps} * kWarpOut * kStageRow * 4; }
constexpr int64_t StripBytes(int64_t padded_rows) { return padded_rows * kTile * 2; }

// What all numbers of a step share.
struct Scalars {
  float skip;
  float inverse_divisor;  // of the gradient
  float keep;             // 1 - rate * weight_decay
  float step_size;        // rate / (1 - beta1^t)
  float inverse_root;     // 1 / sqrt(1 - beta2^t)
};
static_assert(sizeof(Scalars) <= kQueryUpdateWords * sizeof(float));

struct Update {
  int rows = 0;
  int out = 0;
  int in = 0;
  int64_t first_layer = 0;  // of the launch
  float* p = nullptr;
  float* m = nullptr;
  float* v = nullptr;
  Bf16* rounded = nullptr;
  const Scalars* scalars = nullptr;
  float beta1 = 0.0f, rest1 = 0.0f;  // rest: 1 - beta
  float beta2 = 0.0f, rest2 = 0.0f;
  float epsilon = 0.0f;
};

__global__ void ScalarsKernel(const float* rate, const float* steps, const float* divisor, const float* skip,
                              double beta1, double beta2, double weight_decay, Scalars* to) {
  BeginInTurn();
  const double r = *rate, t = *steps;
  *to = {*skip, static_cast<float>(1.0 / *divisor), static_cast<float>(1.0 - r * weight_decay),
         static_cast<float>(r / (1.0 - pow(beta1, t))), static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, t)))};
}

// Four neighbouring numbers of each. Read and written once: not to be kept.
struct Numbers {
  float4 p, m, v;
};

__device__ __forceinline__ float4 Stream(const float* from) { return __ldcs(reinterpret_cast<const float4*>(from)); }
__device__ __forceinline__ void Stream(float* to, float4 value) { __stcs(reinterpret_cast<float4*>(to), value); }

// Within two units of the last place, as the division is: without the branches of the exact ones, which would put four
// numbers after one another.
__device__ __forceinline__ float Root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void Step(const Update& u, const Scalars& s, float gradient, float& p, float& m, float& v) {
  const float g = gradient * s.inverse_divisor;
  m = u.beta1 * m + u.rest1 * g;
  v = u.beta2 * v + u.rest2 * g * g;
  p = s.keep * p - s.step_size * __fdividef(m, Root(v) * s.inverse_root + u.epsilon);
}

// 16 x 64 of dq^T . h to `stage`, from strips [16 * depth, kTile] of dq and h: columns from 16 * out_block and from
// 64 * in_block on.
__device__ __forceinline__ void Product(uint32_t dq, uint32_t h, int out_block, int in_block, int depth, float* stage) {
  const int lane = threadIdx.x % row::kWarp;
  // Both factors lie by rows, which are the inner dimension: transposed on the way.
  const auto left = LaneOffset<kTile>::ColumnsFirst(lane), right = LaneOffset<kTile>::RowsFirst(lane);
  dq += left.At(out_block);
  float sums[kWarpIn / 8][4] = {};
#pragma unroll 2
  for (int k = 0; k < depth; ++k) {
    const uint32_t offset = k * 16 * kTile * 2;
    uint32_t a[4];
    LoadMatricesTransposed(a, dq + offset);
#pragma unroll
    for (int pair = 0; pair < kWarpIn / 16; ++pair) {
      uint32_t b[4];
      LoadMatricesTransposed(b, h + offset + right.At(in_block * (kWarpIn / 16) + pair));
      Mma(sums[2 * pair], a, b[0], b[1]);
      Mma(sums[2 * pair + 1], a, b[2], b[3]);
    }
  }
  float* const to = stage + lane / 4 * kStageRow + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kWarpIn / 8; ++n) {
    *reinterpret_cast<float2*>(to + n * 8) = make_float2(sums[n][0], sums[n][1]);
    *reinterpret_cast<float2*>(to + 8 * kStageRow + n * 8) = make_float2(sums[n][2], sums[n][3]);
  }
}

// Grid: tiles of a layer, those of the same rows next to each other, and layers.
__global__ void __launch_bounds__(kThreads, 2)
    UpdateKernel(const __grid_constant__ LayerFactors layers, const __grid_constant__ Update u) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % row::kWarp, warp = threadIdx.x / row::kWarp;
  const int across = (u.in + kTile - 1) / kTile;
  const int first_out = static_cast<int>(blockIdx.x) / across * kTile;
  const int first_in = static_cast<int>(blockIdx.x) % across * kTile;
  const int column = first_in + warp % kWarpsAcross * kWarpIn + lane % 16 * 4;
  const int first_row = first_out + warp / kWarpsAcross * kWarpOut + lane / 16;
  // A lane's rows from the first one on, of which some do not exist.
  const int rows = column < u.in ? u.out - first_row : 0;
  const int64_t base = ((u.first_layer + blockIdx.y) * u.out + first_row) * u.in + column;
  float* const p = u.p + base;
  float* const m = u.m + base;
  float* const v = u.v + base;
  Bf16* const rounded = u.rounded + base;
  const auto row_of = [](int step, int turn, int i) { return step * kStepOut + (turn * kHeld + i) * kRowsAtOnce; };
  const auto load = [&](int r, Numbers& numbers) {
    if (r >= rows) return;
    const int at = r * u.in;
    numbers = {Stream(p + at), Stream(m + at), Stream(v + at)};
  };
  Numbers held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) load(row_of(0, 0, i), held[i]);

  const int depth = (u.rows + 15) / 16;
  const uint32_t dq = SharedAddress(shared), h = dq + depth * 16 * kTile * 2;
  CopyStrip<kTile, kThreads>(dq, layers.dq[blockIdx.y], first_out, u.out, u.rows, depth * 16);
  CopyStrip<kTile, kThreads>(h, layers.h[blockIdx.y], first_in, u.in, u.rows, depth * 16);
  CommitCopies();
  const Scalars scalars = *u.scalars;
  WaitForCopies<0>();
  if (scalars.skip != 0.0f) return;  // of the whole grid
  __syncthreads();

  float* const stage =
      reinterpret_cast<float*>(shared + 2 * depth * 16 * kTile * 2) + warp * kWarpOut * kStageRow;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    Product(dq, h, step * (kStepOut / 16) + warp / kWarpsAcross, warp % kWarpsAcross, depth, stage);
    __syncwarp();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        Numbers n = held[i];
        const bool last_turn = turn + 1 == kTurns;
        if (!last_turn || step + 1 < kSteps) load(row_of(last_turn ? step + 1 : step, (turn + 1) % kTurns, i), held[i]);
        const int r = row_of(step, turn, i);
        const float4 g = *reinterpret_cast<const float4*>(
            stage + ((turn * kHeld + i) * kRowsAtOnce + lane / 16) * kStageRow + lane % 16 * 4);
        Step(u, scalars, g.x, n.p.x, n.m.x, n.v.x);
        Step(u, scalars, g.y, n.p.y, n.m.y, n.v.y);
        Step(u, scalars, g.z, n.p.z, n.m.z, n.v.z);
        Step(u, scalars, g.w, n.p.w, n.m.w, n.v.w);
        if (r >= rows) continue;
        const int at = r * u.in;
        Stream(p + at, n.p);
        Stream(m + at, n.m);
        Stream(v + at, n.v);
        __stcs(reinterpret_cast<uint2*>(rounded + at),
               make_uint2(row::Pack(n.p.x, n.p.y), row::Pack(n.p.z, n.p.w)));
      }
    }
    __syncwarp();  // the stage is free
  }
}

}  // namespace

int64_t QueryNormWorkspaceBytes(const QueryFactors& factors) {
  return GramFloats(factors) * 4 + std::max<int64_t>(factors.layers, 1) * kDotBlocks * 8;
}

cudaError_t QueryNorm(const QueryFactors& factors, void* workspace, double* norm, cudaStream_t stream) {
  if (!Valid(factors) || !row::Aligned(workspace)) return cudaErrorInvalidValue;
  const GramShape shape = ShapeOf(factors);
  float* const gram = static_cast<float*>(workspace);
  double* const parts = reinterpret_cast<double*>(gram + GramFloats(factors));
  for (int64_t first = 0; first < factors.layers && factors.rows > 0; first += kLayersPerLaunch) {
    const int64_t count = std::min<int64_t>(kLayersPerLaunch, factors.layers - first);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.slices()), static_cast<unsigned>(count));
    config.blockDim = dim3(kGramThreads);
    config.stream = stream;
    float* const to = gram + first * shape.slices() * kMaxRows * kMaxRows;
    cudaError_t error = cudaLaunchKernelEx(&config, GramKernel, LayersFrom(factors, first, count), shape, to);
    if (error != cudaSuccess) return error;
    config.gridDim.x = kDotBlocks;
    error = cudaLaunchKernelEx(&config, DotKernel, shape, static_cast<const float*>(to), parts + first * kDotBlocks);
    if (error != cudaSuccess) return error;
  }
  return row::Launch(RootKernel, 1, kGramThreads, 0, stream, static_cast<const double*>(parts),
                     factors.rows > 0 ? factors.layers * kDotBlocks : 0, norm);
}

cudaError_t QueryUpdate(const QueryUpdateParams& params, cudaStream_t stream) {
  const QueryFactors& f = params.factors;
  if (!Valid(f) || !row::Aligned(params.p, params.m, params.v, params.rounded, params.workspace)) {
    return cudaErrorInvalidValue;
  }
  Scalars* const scalars = reinterpret_cast<Scalars*>(params.workspace);
  cudaError_t error =
      row::Launch(ScalarsKernel, 1, 1, 0, stream, params.rate, params.steps, params.divisor, params.skip, params.beta1,
                  params.beta2, params.weight_decay, scalars);
  if (error != cudaSuccess) return error;
  const int64_t shared = StageBytes() + 2 * StripBytes(row::CeilDiv(f.rows, 16) * 16);
  error = cudaFuncSetAttribute(UpdateKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(StageBytes() + 2 * StripBytes(kFactorRows)));
  if (error != cudaSuccess) return error;
  const int64_t blocks = row::CeilDiv(f.out, kTile) * row::CeilDiv(f.in, kTile);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  Update update;
  update.rows = static_cast<int>(f.rows);
  update.out = static_cast<int>(f.out);
  update.in = static_cast<int>(f.in);
  update.p = params.p;
  update.m = params.m;
  update.v = params.v;
  update.rounded = static_cast<Bf16*>(params.rounded);
  update.scalars = scalars;
  update.beta1 = static_cast<float>(params.beta1);
  update.rest1 = static_cast<float>(1.0 - params.beta1);
  update.beta2 = static_cast<float>(params.beta2);
  update.rest2 = static_cast<float>(1.0 - params.beta2);
  update.epsilon = static_cast<float>(params.epsilon);
  for (int64_t first = 0; first < f.layers; first += kLayersPerLaunch) {
    const int64_t count = std::min<int64_t>(kLayersPerLaunch, f.layers - first);
    update.first_layer = first;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, UpdateKernel, LayersFrom(f, first, count), update);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace refocus::kernels
