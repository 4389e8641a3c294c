// A block makes some columns of the result for all rows: one warp asks the copy engine for tiles of weights and of
// rows, one or two warpgroups of 64 rows each multiply them (kernels/span_tiles.cuh). The depth of the sum is split
// over a cluster where there are too few columns for all multiprocessors; its blocks then add up their sums through
// each other's shared memory, in the order of their ranks.
//
// What counts is that weights are always under way. The ring for them takes most of the shared memory, so that there is
// one block to a multiprocessor: where one ends, the next launch's begins to fill its ring, while the rest of its
// kernel and the small ones behind it still run (kernels/overlap.cuh). Registers and some shared memory are left to
// those. Weights leave the L2 cache first, since they are read once; the rows are read by every block.
#include "kernels/span_product.h"

#include <algorithm>

#include "kernels/span_tiles.cuh"
#include "kernels/tile_maps.h"

namespace refocus::kernels {
namespace {

template <int kGroups, int kColumns, bool kBackward>
__global__ void __launch_bounds__(SpanTile<kGroups, kColumns, kBackward>::kThreads, 1)
    SpanKernel(const __grid_constant__ SpanArgs args) {
  using Tile = SpanTile<kGroups, kColumns, kBackward>;
  extern __shared__ __align__(1024) unsigned char memory[];
  LetNextBegin();
  const Shared<Tile> shared{SharedAddress(memory)};
  shared.Init();
  const int splits = args.path.splits;
  const int first_tile = Walk::FirstTile(args.path, blockIdx.x);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp == Tile::kConsumers / 32) {
    Producer<kColumns, kBackward, Tile> producer{args, shared, LeaveFirst(), {}, {}};
    Walk w(args.path, blockIdx.x, true);
    if (threadIdx.x % 32 == 0) {
      producer.Begin(w);
      producer.Run(w);
    }
    __syncwarp();
    AwaitPrevious();
  } else {
    AwaitPrevious();
    Consumer<kBackward, Tile> consumer{args, shared, {}, {}};
    Sums<Tile> sums;
    const Share share(args.path, blockIdx.x);
    for (int tile = first_tile; tile < args.path.tiles; tile += args.path.blocks / splits) {
      consumer.Run(share, sums);
      if (splits == 1) StoreTile<kColumns>(args, tile, sums);
    }
    if (splits > 1) {
      NamedSync(1, Tile::kConsumers);  // no product reads the rings any more
      sums.Each([&](int half, int column, float low, float high) {
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared.base + RowOfTile(half) * Tile::kSumPitch +
                                                              column * static_cast<uint32_t>(sizeof(float))),
                     "f"(low), "f"(high)
                     : "memory");
      });
    }
  }
  if (splits > 1) {
    ClusterSync();
    const TilePlace place(args.path, first_tile, kColumns);
    const int split = static_cast<int>(ClusterRank());
    switch (splits) {
      case 2:
        AddUp<2, kColumns, Tile>(args, place, shared.base, split);
        break;
      case 4:
        AddUp<4, kColumns, Tile>(args, place, shared.base, split);
        break;
      default:
        AddUp<8, kColumns, Tile>(args, place, shared.base, split);
        break;
    }
    ClusterSync();  // until then the others read this block's memory
  }
}

// Products that fit together, with rows.
cudaError_t FillPath(std::span<const SpanProduct> products, const SpanPlan& plan, const SpanGpu& gpu, SpanPath* path) {
  const SpanProduct& p = products[0];
  const SpanSize size = SpanSizeOf(products);
  const int64_t stride = p.stride == 0 ? p.in : p.stride;
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < size.products * size.terms && error == cudaSuccess; ++i) {
    const void* const w = size.products == 2 ? products[i].term[0].w : p.term[i].w;
    const int box_rows = p.backward ? kSpanDepth : plan.columns;
    error = MapMatrix(w, p.out, p.in, stride, box_rows, kPanelColumns, &path->weights[i]);
    if (error != cudaSuccess || !p.backward || plan.columns % kPanelColumns == 0) continue;
    error = MapMatrix(w, p.out, p.in, stride, kSpanDepth, kNarrowPanel, &path->rests[i]);
  }
  path->backward = p.backward;
  path->width = plan.columns;
  path->stages = static_cast<int>(row::CeilDiv(size.depth, kSpanDepth));
  path->terms = size.terms;
  path->splits = plan.splits;
  path->products = size.products;
  path->product_tiles = static_cast<int>(SpanTiles(size, plan));
  path->tiles = path->product_tiles * size.products;
  path->blocks = static_cast<int>(SpanBlocks(size, plan, gpu));
  return error;
}

// The rest of what a launch is told.
cudaError_t FillResults(std::span<const SpanProduct> products, SpanArgs* args) {
  const SpanProduct& p = products[0];
  const SpanSize size = SpanSizeOf(products);
  const int row_box = p.rows <= kGroupRows ? kGroupRows : 2 * kGroupRows;
  for (int i = 0; i < p.terms; ++i) {
    const cudaError_t error =
        MapMatrix(p.term[i].x, p.rows, size.depth, size.depth, row_box, kPanelColumns, &args->rows[i]);
    if (error != cudaSuccess) return error;
  }
  for (int i = 0; i < size.products; ++i) {
    args->y[i] = products[i].y;
    args->wide[i] = products[i].wide;
  }
  args->row_count = static_cast<int>(p.rows);
  args->columns = static_cast<int>(size.columns);
  args->shared_rows = size.shared_rows;
  return cudaSuccess;
}

template <int kGroups, int kColumns, bool kBackward>
cudaError_t Start(const SpanArgs& args, cudaStream_t stream) {
  using Tile = SpanTile<kGroups, kColumns, kBackward>;
  const auto kernel = SpanKernel<kGroups, kColumns, kBackward>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Tile::kSharedBytes));
  if (error != cudaSuccess) return error;
  return LaunchOverlappingClusters(kernel, dim3(static_cast<unsigned>(args.path.blocks)), args.path.splits,
                                   Tile::kThreads, Tile::kSharedBytes, stream, args);
}

template <int kGroups, int kColumns>
cudaError_t StartWay(const SpanArgs& args, cudaStream_t stream) {
  return args.path.backward ? Start<kGroups, kColumns, true>(args, stream)
                            : Start<kGroups, kColumns, false>(args, stream);
}

template <int kGroups>
cudaError_t StartWidth(const SpanArgs& args, cudaStream_t stream) {
  switch (args.path.width) {
    case 64:
      return StartWay<kGroups, 64>(args, stream);
    case 128:
      return StartWay<kGroups, 128>(args, stream);
    case 160:
      return StartWay<kGroups, 160>(args, stream);
    default:
      return StartWay<kGroups, 192>(args, stream);
  }
}

bool Fits(const SpanProduct& p) {
  constexpr int64_t kMost = INT32_MAX / 2;
  if (p.rows < 0 || p.rows > kMostSpanRows || p.terms < 1 || p.terms > 2) return false;
  if (p.stride != 0 && (p.stride < p.in || p.stride % 8 != 0 || p.stride > kMost)) return false;
  if (p.in < 8 || p.out < 8 || p.in % 8 != 0 || p.out % 8 != 0 || p.in > kMost || p.out > kMost) return false;
  for (int i = 0; i < p.terms; ++i) {
    if (!row::Aligned(p.term[i].x, p.term[i].w)) return false;
  }
  return row::Aligned(p.y);
}

bool FitTogether(std::span<const SpanProduct> products) {
  if (products.size() > 2 || !std::all_of(products.begin(), products.end(), Fits)) return false;
  if (products.size() < 2) return true;
  const SpanProduct &a = products[0], &b = products[1];
  if (a.term[0].x != b.term[0].x) return false;
  return a.terms == 1 && b.terms == 1 && a.rows == b.rows && a.in == b.in && a.out == b.out && a.stride == b.stride &&
         a.backward == b.backward;
}

bool Possible(const SpanPlan& plan) {
  const bool width = plan.columns == 64 || plan.columns == 128 || plan.columns == 160 || plan.columns == 192;
  const bool splits = plan.splits == 1 || plan.splits == 2 || plan.splits == 4 || plan.splits == 8;
  return width && splits;
}

}  // namespace

SpanSize SpanSizeOf(std::span<const SpanProduct> products) {
  const SpanProduct& p = products.front();
  SpanSize size;
  size.columns = p.backward ? p.in : p.out;
  size.depth = p.backward ? p.out : p.in;
  size.products = static_cast<int>(products.size());
  size.terms = p.terms;
  size.shared_rows = p.terms == 2 && p.term[0].x == p.term[1].x;
  return size;
}

cudaError_t SpanProducts(std::span<const SpanProduct> products, SpanPlan plan, const SpanGpu& gpu,
                         cudaStream_t stream) {
  if (!FitTogether(products) || gpu.multiprocessors < 1 || !Possible(plan)) return cudaErrorInvalidValue;
  if (products.empty() || products[0].rows == 0) return cudaSuccess;
  SpanArgs args = {};
  cudaError_t error = FillPath(products, plan, gpu, &args.path);
  if (error == cudaSuccess) error = FillResults(products, &args);
  if (error != cudaSuccess) return error;
  return args.row_count <= kGroupRows ? StartWidth<1>(args, stream) : StartWidth<2>(args, stream);
}

cudaError_t SpanProducts(std::span<const SpanProduct> products, const SpanGpu& gpu, cudaStream_t stream) {
  if (products.empty() || !FitTogether(products)) return products.empty() ? cudaSuccess : cudaErrorInvalidValue;
  return SpanProducts(products, PlanSpan(SpanSizeOf(products), gpu), gpu, stream);
}

cudaError_t MeasureSpanGpu(SpanGpu* gpu) {
  using Tile = SpanTile<2, 128, false>;
  const auto kernel = SpanKernel<2, 128, false>;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(Tile::kSharedBytes));
  for (int i = 0; i < 4 && error == cudaSuccess; ++i) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 1u << i;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(gpu->multiprocessors) << i);
    config.blockDim = dim3(Tile::kThreads);
    config.dynamicSmemBytes = Tile::kSharedBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaOccupancyMaxActiveClusters(&gpu->clusters[i], kernel, &config);
  }
  return error;
}

}  // namespace refocus::kernels
