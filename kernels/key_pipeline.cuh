// Hopper's way through the keys, shared by attend_hopper.cu and query_grad_hopper.cu. A block stays on its
// multiprocessor and takes work items (row tile, K/V head, key split) one after the other. Its first warpgroup brings
// tiles: one warp plans the next item, one thread asks the copy engine for rows, K and V. The others own 64 rows each
// and compute. K and V in eight bits take a way of their own to the same tiles (code_pipeline.cuh).
#pragma once

#include <cuda.h>

#include "kernels/async_tiles.cuh"
#include "kernels/key_tiles.cuh"
#include "kernels/tile_maps.h"
#include "kernels/wgmma.cuh"

namespace refocus::kernels {

// A multiprocessor's 65536 registers among one producing and two or three consuming warpgroups.
constexpr int ConsumerRegisters(HopperTile tile) {
  return (tile.consumers() == 2 ? 232 : 160) - tile.spare_registers;
}
constexpr int ProducerRegisters(HopperTile tile) {
  return (tile.consumers() == 2 ? 40 : 32) + tile.consumers() * tile.spare_registers;
}

// Items in the order of row tiles from the last to the first (in a prefill later rows see more, and long items are
// better started early), within a row tile of K/V heads, within a head of key splits.
struct PipelineArgs {
  AttentionShape shape;
  const __nv_bfloat16* q = nullptr;
  const __nv_bfloat16* dout = nullptr;
  int group = 1;  // heads / kv_heads
  int splits = 1;
  uint32_t row_tiles = 0;
  uint32_t items = 0;
  bool rows_by_box = false;  // groups divide the tile's rows, so that the copy engine can gather them
  CUtensorMap rows[2];       // q; dout
  CUtensorMap keys[kMaxExtents];
  CUtensorMap values[kMaxExtents];
};

// The block's items: forth in even rounds and back in odd ones, since in a prefill items shrink from the first to the
// last.
struct ItemWalk {
  uint32_t base = 0;
  bool back = false;

  __device__ bool Next(uint32_t items, uint32_t* item) {
    while (base < items) {
      const uint32_t at = base + (back ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      base += gridDim.x;
      back = !back;
      if (at < items) {
        *item = at;
        return true;
      }
    }
    return false;
  }
};

// dout may be null.
inline cudaError_t FillPipeline(HopperTile tile, const AttentionShape& shape, int splits, const void* q,
                                const void* dout, PipelineArgs* args) {
  args->shape = shape;
  args->q = static_cast<const __nv_bfloat16*>(q);
  args->dout = static_cast<const __nv_bfloat16*>(dout);
  args->group = shape.heads / shape.kv_heads;
  args->splits = splits;
  const int64_t row_tiles = (PackedRows(shape) + tile.rows - 1) / tile.rows;
  constexpr int64_t kMost = 0x3fffffff;
  if (row_tiles > kMost || row_tiles * shape.kv_heads > kMost / splits) return cudaErrorInvalidValue;
  args->row_tiles = static_cast<uint32_t>(row_tiles);
  args->items = static_cast<uint32_t>(row_tiles * shape.kv_heads * splits);
  args->rows_by_box = tile.rows % args->group == 0;
  cudaError_t error = cudaSuccess;
  for (int operand = 0; operand < 2 && args->rows_by_box && error == cudaSuccess; ++operand) {
    const void* data = operand == 0 ? q : dout;
    if (data != nullptr) error = MapRows(shape, data, args->group, tile.rows / args->group, &args->rows[operand]);
  }
  for (int e = 0; e < shape.extents && error == cudaSuccess; ++e) {
    const KvSlots& kv = shape.kv[e];
    if (kv.slots == 0) continue;  // no tile is taken from it
    const auto map = shape.int8 ? MapCodes : MapKeys;
    error = map(shape, kv, kv.k, tile.keys, &args->keys[e]);
    if (error == cudaSuccess) error = map(shape, kv, kv.v, tile.keys, &args->values[e]);
  }
  return error;
}

// What an item's rows see and which key tiles are its own.
template <int kRows>
struct ItemPlan {
  int64_t counts[kRows];      // owned positions at or before the row's; rows that do not exist: kAll
  int64_t most[kMaxExtents];  // slots that the row seeing most sees
  int64_t least[kMaxExtents];
  int tiles[kMaxExtents];
  int begin;
  int end;

  static constexpr int64_t kAll = int64_t{1} << 62;

  // One warp; the others see it through a barrier.
  template <int kKeys>
  __device__ void Fill(const AttentionShape& shape, const RowTile& rows, int split, int splits) {
    const int lane = threadIdx.x % 32;
    int64_t high = 0;
    int64_t low = kAll;
#pragma unroll 1
    for (int i = lane; i < kRows; i += 32) {
      int64_t count = kAll;
      if (i < rows.rows) {
        count = CountBelow(shape.pos[rows.Row(i)] + 1, shape.shards, shape.shard);
        high = count > high ? count : high;
        low = count < low ? count : low;
      }
      counts[i] = count;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const int64_t other_high = __shfl_xor_sync(0xffffffffu, high, mask);
      const int64_t other_low = __shfl_xor_sync(0xffffffffu, low, mask);
      high = other_high > high ? other_high : high;
      low = other_low < low ? other_low : low;
    }
    int total = 0;
#pragma unroll 1
    for (int e = 0; e < shape.extents; ++e) {
      const int64_t slots = ClampCount(high, shape.kv[e]);
      const int count = static_cast<int>((slots + kKeys - 1) / kKeys);
      total += count;
      if (lane == 0) {
        most[e] = slots;
        least[e] = ClampCount(low, shape.kv[e]);
        tiles[e] = count;
      }
    }
    if (lane == 0) {
      // The first splits take one more where they do not come out even.
      const int each = static_cast<uint32_t>(total) / static_cast<uint32_t>(splits);
      const int more = total - each * splits;
      begin = each * split + (split < more ? split : more);
      end = begin + each + (split < more ? 1 : 0);
    }
    __syncwarp();
  }
};

template <HopperTile kTile>
struct PipelineState {
  static_assert(kTile.rows == 64 * kTile.consumers() && kTile.keys % 16 == 0);
  static_assert(128 * (ProducerRegisters(kTile) + kTile.consumers() * ConsumerRegisters(kTile)) <= 65536);
  uint64_t rows_full;
  uint64_t rows_empty;
  uint64_t k_full[kTile.k_stages];
  uint64_t k_empty[kTile.k_stages];
  uint64_t v_full[kTile.v_stages];
  uint64_t v_empty[kTile.v_stages];
  uint64_t codes_full[kTile.code_stages > 0 ? kTile.code_stages : 1];
  uint64_t codes_empty[kTile.code_stages > 0 ? kTile.code_stages : 1];
  uint64_t plan_full[2];
  uint64_t plan_empty[2];
  ItemPlan<kTile.rows> plans[2];
};

// Waits for all 128 threads of a consuming warpgroup.
__device__ __forceinline__ void WarpgroupSync(int warpgroup) { NamedSync(5 + warpgroup, 128); }

__device__ __forceinline__ void ReleaseByWarp(uint64_t* barrier) {
  if (threadIdx.x % 32 == 0) ArriveAt(SharedAddress(barrier));
}

// Shared memory: rows, K stages, V stages, codes; and the barriers' side of both parties.
template <int kDim, HopperTile kTile, int kRowOperands>
struct Pipeline {
  static constexpr bool kInt8 = kTile.code_stages > 0;
  static constexpr int kWideners = kInt8 ? 3 : 0;  // warps
  static constexpr int kConsumerWarps = 4 * kTile.consumers();
  static constexpr uint32_t kRowPanel = kTile.rows * kPanelRowBytes;
  static constexpr uint32_t kKeyPanel = kTile.keys * kPanelRowBytes;
  static constexpr uint32_t kRowBytes = kRowPanel * (kDim / kPanelColumns);  // of an operand
  static constexpr uint32_t kKeyBytes = kKeyPanel * (kDim / kPanelColumns);
  static constexpr uint32_t kCodeBytes = kDim * kTile.keys;
  static_assert(HopperTileBytes(kDim, kTile, kRowOperands) ==
                kRowOperands * kRowBytes + (kTile.k_stages + kTile.v_stages) * kKeyBytes +
                    kTile.code_stages * kCodeBytes);

  const PipelineArgs& args;
  PipelineState<kTile>& state;
  uint32_t memory;  // 1024-byte aligned

  // All the shared memory of a block.
  static constexpr int kMemoryBytes =
      HopperTileBytes(kDim, kTile, kRowOperands) + static_cast<int>(sizeof(PipelineState<kTile>));

  static __device__ Pipeline Make(const PipelineArgs& args, unsigned char* shared) {
    const uint32_t memory = SharedAddress(shared);
    if (memory % 1024 != 0) __trap();  // dynamic shared memory begins there as long as there is no other
    auto* state = reinterpret_cast<PipelineState<kTile>*>(shared + HopperTileBytes(kDim, kTile, kRowOperands));
    return {args, *state, memory};
  }

  __device__ uint32_t RowsAt(int operand) const { return memory + operand * kRowBytes; }
  __device__ uint32_t KAt(int stage) const { return memory + kRowOperands * kRowBytes + stage * kKeyBytes; }
  __device__ uint32_t VAt(int stage) const { return KAt(kTile.k_stages) + stage * kKeyBytes; }
  __device__ uint32_t CodesAt(int stage) const { return VAt(kTile.v_stages) + stage * kCodeBytes; }

  // All threads of the block.
  __device__ void Init() {
    if (threadIdx.x == 0) {
      InitBarrier(SharedAddress(&state.rows_full), 1);
      InitBarrier(SharedAddress(&state.rows_empty), kConsumerWarps);
      for (int i = 0; i < kTile.k_stages; ++i) {
        InitBarrier(SharedAddress(&state.k_full[i]), kInt8 ? kWideners : 1);
        InitBarrier(SharedAddress(&state.k_empty[i]), kConsumerWarps);
      }
      for (int i = 0; i < kTile.v_stages; ++i) {
        InitBarrier(SharedAddress(&state.v_full[i]), kInt8 ? kWideners : 1);
        InitBarrier(SharedAddress(&state.v_empty[i]), kConsumerWarps);
      }
      for (int i = 0; i < 2; ++i) {
        InitBarrier(SharedAddress(&state.plan_full[i]), 1);
        InitBarrier(SharedAddress(&state.plan_empty[i]), kConsumerWarps + kWideners + 1);
      }
      for (int i = 0; i < kTile.code_stages; ++i) {
        InitBarrier(SharedAddress(&state.codes_full[i]), 1);
        InitBarrier(SharedAddress(&state.codes_empty[i]), kWideners);
      }
      PublishBarriers();
    }
    __syncthreads();
  }

  __device__ BlockPlace Place(uint32_t item) const {
    const uint32_t heads = args.shape.kv_heads;
    const uint32_t splits = args.splits;
    const uint32_t head = item / splits;
    const uint32_t tile = head / heads;
    return {int64_t{args.row_tiles - 1 - tile} * kTile.rows, static_cast<int>(head - tile * heads),
            static_cast<int>(item - head * splits)};
  }
  __device__ RowTile Rows(const BlockPlace& place) const { return RowTile(args.shape, args.group, place, kTile.rows); }

  // One warp of the first warpgroup.
  __device__ void PlanItems() {
    ItemWalk walk;
    RingPlace<2> slot;
    for (uint32_t item; walk.Next(args.items, &item); slot.Next()) PlanItem(Place(item), slot);
  }
  __device__ __forceinline__ void PlanItem(const BlockPlace& place, RingPlace<2> slot) {
    WaitAt(SharedAddress(&state.plan_empty[slot.stage]), slot.parity ^ 1);
    state.plans[slot.stage].template Fill<kTile.keys>(args.shape, Rows(place), place.split, args.splits);
    if (threadIdx.x % 32 == 0) ArriveAt(SharedAddress(&state.plan_full[slot.stage]));
    __syncwarp();
  }

  // One thread of the first warpgroup. kVBehind: K of the next tile is asked for before V of this one.
  template <bool kVBehind>
  __device__ void LoadItems() {
    ItemWalk walk;
    RingPlace<2> slot;
    RingPlace<1> rows_place;
    RingPlace<kTile.k_stages> k_place;
    RingPlace<kTile.v_stages> v_place;
    for (uint32_t item; walk.Next(args.items, &item); slot.Next()) {
      const BlockPlace place = Place(item);
      WaitAt(SharedAddress(&state.plan_full[slot.stage]), slot.parity);
      const ItemPlan<kTile.rows>& plan = state.plans[slot.stage];
      const int tiles = plan.end - plan.begin;
      if (tiles > 0) {
        if (args.rows_by_box) LoadRows(place, rows_place);
        KeyTile k;
        k.Seek(plan.tiles, plan.begin);
        KeyTile v = k;
        const int behind = kVBehind ? 1 : 0;
#pragma unroll 1
        for (int i = 0; i < tiles + behind; ++i) {
          if (i < tiles) {
            LoadTile(args.keys[k.extent], k.tile, place.kv_head, KAt(k_place.stage), &state.k_full[k_place.stage],
                     &state.k_empty[k_place.stage], k_place.parity);
            k_place.Next();
            k.Next(plan.tiles, args.shape.extents);
          }
          if (i >= behind) {
            LoadTile(args.values[v.extent], v.tile, place.kv_head, VAt(v_place.stage), &state.v_full[v_place.stage],
                     &state.v_empty[v_place.stage], v_place.parity);
            v_place.Next();
            v.Next(plan.tiles, args.shape.extents);
          }
        }
      }
      ArriveAt(SharedAddress(&state.plan_empty[slot.stage]));
    }
  }

  // Rows that the copy engine cannot gather: by the consuming warpgroup that owns them.
  __device__ __forceinline__ void GatherRows(int operand, const RowTile& rows, int warpgroup) const {
    const __nv_bfloat16* from = operand == 0 ? args.q : args.dout;
    constexpr int kPieces = kDim / 8;
    for (int i = threadIdx.x % 128; i < 64 * kPieces; i += 128) {
      const int row = warpgroup * 64 + i / kPieces;
      const int piece = i % kPieces;
      uint4 data = make_uint4(0, 0, 0, 0);
      if (row < rows.rows) {
        data = *reinterpret_cast<const uint4*>(from + rows.Index(row, args.shape.heads) * kDim + piece * 8);
      }
      const uint32_t to = RowsAt(operand) + piece / 8 * kRowPanel + row * kPanelRowBytes + ((piece ^ row) % 8) * 16;
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(data.x), "r"(data.y), "r"(data.z),
                   "r"(data.w)
                   : "memory");
    }
  }

  // A consuming warpgroup's rows have come.
  __device__ __forceinline__ void AwaitRows(const RowTile& rows, int warpgroup, RingPlace<1>& rows_place) const {
    if (args.rows_by_box) {
      WaitAt(SharedAddress(&state.rows_full), rows_place.parity);
      rows_place.Next();
      return;
    }
    WarpgroupSync(warpgroup);  // no product reads the last item's rows
    for (int operand = 0; operand < kRowOperands; ++operand) GatherRows(operand, rows, warpgroup);
    PublishStores();
    WarpgroupSync(warpgroup);
  }

  __device__ void LoadRows(const BlockPlace& place, RingPlace<1>& rows_place) {
    const uint32_t full = SharedAddress(&state.rows_full);
    WaitAt(SharedAddress(&state.rows_empty), rows_place.parity ^ 1);
    rows_place.Next();
    ArriveExpecting(full, kRowOperands * kRowBytes);
    const int first_row = static_cast<int>(place.first_packed / args.group);
    for (int operand = 0; operand < kRowOperands; ++operand) {
      for (int panel = 0; panel < kDim / kPanelColumns; ++panel) {
        CopyBox3(RowsAt(operand) + panel * kRowPanel, &args.rows[operand], full, panel * kPanelColumns,
                 place.kv_head * args.group, first_row);
      }
    }
  }

 private:
  __device__ __forceinline__ void LoadTile(const CUtensorMap& map, int tile, int kv_head, uint32_t to, uint64_t* full,
                                           uint64_t* empty, uint32_t parity) {
    WaitAt(SharedAddress(empty), parity ^ 1);
    ArriveExpecting(SharedAddress(full), kKeyBytes);
    CopyBox4(to, &map, SharedAddress(full), 0, tile * kTile.keys, 0, kv_head);
  }
};

// The consuming warpgroups take turns at the tensor cores, so that some compute weights while one multiplies. All take
// as many turns; after the last, End.
template <int kWarpgroups>
struct Turns {
  int warpgroup;

  static constexpr int kFirstBarrier = 1;
  __device__ __forceinline__ void Begin() const {
    if (warpgroup == kWarpgroups - 1) NamedArrive(kFirstBarrier, 256);
  }
  __device__ __forceinline__ void Await() const { NamedSync(kFirstBarrier + warpgroup, 256); }
  __device__ __forceinline__ void Pass() const {
    NamedArrive(kFirstBarrier + (warpgroup == kWarpgroups - 1 ? 0 : warpgroup + 1), 256);
  }
  __device__ __forceinline__ void End() const {
    if (warpgroup == 0) NamedSync(kFirstBarrier, 256);
  }
};

// Rows from `first` on become zero, by one warpgroup: slots that no row sees may hold NaN, which a weight of 0 keeps.
// Both warpgroups write the same zeros. A barrier of the warpgroup follows.
template <int kDim, int kKeys>
__device__ __forceinline__ void ZeroRows(uint32_t tile, int first) {
  constexpr int kPieces = kPanelRowBytes / 16;
  const int pieces = (kKeys - first) * kPieces;
  for (int i = threadIdx.x % 128; i < pieces; i += 128) {
#pragma unroll
    for (int panel = 0; panel < kDim / kPanelColumns; ++panel) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + panel * kKeys * kPanelRowBytes +
                                                                    first * kPanelRowBytes + i * 16),
                   "r"(0)
                   : "memory");
    }
  }
  PublishStores();
}

// How many keys of a tile that begins at slot first_key the rows `row` and `row + 8` see.
template <int kKeys>
__device__ __forceinline__ void SeenKeys(int (&limit)[2], const int64_t* counts, int row, const KvSlots& kv,
                                         int64_t first_key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t seen = ClampCount(counts[row + 8 * half], kv) - first_key;
    limit[half] = seen < 0 ? 0 : seen > kKeys ? kKeys : static_cast<int>(seen);
  }
}

// `value` in place of sums of keys that the row does not see.
template <int kKeys>
__device__ __forceinline__ void Mask(float (&sums)[kKeys / 2], const int (&limit)[2], float value) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (j * 8 + column + c % 2 >= limit[c / 2]) sums[4 * j + c] = value;
    }
  }
}

}  // namespace refocus::kernels
