// K and V in eight bits on their way through key_pipeline.cuh: the first warp plans items and has the copy engine bring
// their codes, the other three of its warpgroup widen them (int8_tiles.cuh) into the tiles that the consumers wait for.
//
// Codes lie as [head_dim / 64][keys][64], like the panels of the tile that they become. A widening warp takes blocks of
// eight keys, every third one: 16 codes a lane and panel, read in one stretch and written so that no two lanes of a
// quarter of the warp meet in a bank.
#pragma once

#include "kernels/int8_tiles.cuh"
#include "kernels/key_pipeline.cuh"

namespace refocus::kernels {

template <int kDim, HopperTile kTile, int kRowOperands>
struct CodeProducer {
  using Pipe = Pipeline<kDim, kTile, kRowOperands>;
  using CodePlace = RingPlace<kTile.code_stages>;
  static constexpr int kWideners = Pipe::kWideners;
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kBlocks = kTile.keys / 8;
  static constexpr int kSurely = kBlocks / kWideners;  // blocks of every warp
  static constexpr int kMost = (kBlocks + kWideners - 1) / kWideners;
  static constexpr int kTogether = 2;  // blocks whose codes a warp reads before it widens any
  static constexpr int kScales = (kMost + 3) / 4;

  Pipe& pipe;

  // The warps of the first warpgroup.
  __device__ __forceinline__ void Run(int warp) {
    if (warp == 0) {
      PlanAndLoadItems();
    } else {
      WidenItems(warp - 1);
    }
  }

 private:
  __device__ __forceinline__ void PlanAndLoadItems() {
    ItemWalk walk;
    RingPlace<2> slot;
    RingPlace<1> rows_place;
    CodePlace code_place;
    for (uint32_t item; walk.Next(pipe.args.items, &item); slot.Next()) {
      const BlockPlace place = pipe.Place(item);
      pipe.PlanItem(place, slot);
      if (threadIdx.x == 0) LoadItem(place, pipe.state.plans[slot.stage], rows_place, code_place);
      ReleaseByWarp(&pipe.state.plan_empty[slot.stage]);
      __syncwarp();
    }
  }

  // The first codes before the rows: rows wait until the last item's are done with, codes can be widened meanwhile. No
  // more than have room without anything of this item being used.
  __device__ __forceinline__ void LoadItem(const BlockPlace& place, const ItemPlan<kTile.rows>& plan,
                                           RingPlace<1>& rows_place, CodePlace& code_place) {
    constexpr int kAhead = kTile.code_stages / 2;
    static_assert(kAhead >= 1);
    const int tiles = plan.end - plan.begin;
    if (tiles == 0) return;
    const int ahead = tiles < kAhead ? tiles : kAhead;
    KeyTile at;
    at.Seek(plan.tiles, plan.begin);
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, at.Next(plan.tiles, pipe.args.shape.extents)) {
      if (i == ahead && pipe.args.rows_by_box) pipe.LoadRows(place, rows_place);
      LoadCodes(pipe.args.keys[at.extent], at.tile, place.kv_head, code_place);
      LoadCodes(pipe.args.values[at.extent], at.tile, place.kv_head, code_place);
    }
    if (tiles == ahead && pipe.args.rows_by_box) pipe.LoadRows(place, rows_place);
  }

  __device__ __forceinline__ void LoadCodes(const CUtensorMap& map, int tile, int kv_head, CodePlace& place) {
    const uint32_t full = SharedAddress(&pipe.state.codes_full[place.stage]);
    WaitAt(SharedAddress(&pipe.state.codes_empty[place.stage]), place.parity ^ 1);
    ArriveExpecting(full, Pipe::kCodeBytes);
    CopyBox4(pipe.CodesAt(place.stage), &map, full, 0, tile * kTile.keys, 0, kv_head);
    place.Next();
  }

  // K and V of a tile in turn. Scales are asked for one tile ahead. Where blocks do not come out even, K's last one and
  // V's are of different warps.
  __device__ __forceinline__ void WidenItems(int widener) {
    const int value_widener = (widener + 1) % kWideners;
    ItemWalk walk;
    RingPlace<2> slot;
    RingPlace<kTile.k_stages> k_place;
    RingPlace<kTile.v_stages> v_place;
    CodePlace code_place;
    for (uint32_t item; walk.Next(pipe.args.items, &item); slot.Next()) {
      const int kv_head = pipe.Place(item).kv_head;
      WaitAt(SharedAddress(&pipe.state.plan_full[slot.stage]), slot.parity);
      const ItemPlan<kTile.rows>& plan = pipe.state.plans[slot.stage];
      const int tiles = plan.end - plan.begin;
      if (tiles > 0) {
        KeyTile at;
        at.Seek(plan.tiles, plan.begin);
        uint32_t next_k[kScales], next_v[kScales];
        LoadScales(next_k, false, widener, at, kv_head, plan.most[at.extent]);
        LoadScales(next_v, true, value_widener, at, kv_head, plan.most[at.extent]);
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
          uint32_t k[kScales], v[kScales];
#pragma unroll
          for (int j = 0; j < kScales; ++j) k[j] = next_k[j], v[j] = next_v[j];
          at.Next(plan.tiles, pipe.args.shape.extents);
          if (i + 1 < tiles) {
            LoadScales(next_k, false, widener, at, kv_head, plan.most[at.extent]);
            LoadScales(next_v, true, value_widener, at, kv_head, plan.most[at.extent]);
          }
          WidenTile(pipe.KAt(k_place.stage), &pipe.state.k_full[k_place.stage], &pipe.state.k_empty[k_place.stage],
                    k_place.parity, k, widener, code_place);
          k_place.Next();
          WidenTile(pipe.VAt(v_place.stage), &pipe.state.v_full[v_place.stage], &pipe.state.v_empty[v_place.stage],
                    v_place.parity, v, value_widener, code_place);
          v_place.Next();
        }
      }
      ReleaseByWarp(&pipe.state.plan_empty[slot.stage]);
    }
  }

  // Lane l gets those of row l % 8 of the warp's blocks l / 8, l / 8 + 4, ...; 0 where nobody sees the row.
  __device__ __forceinline__ void LoadScales(uint32_t (&scales)[kScales], bool value, int widener, const KeyTile& at,
                                             int kv_head, int64_t most) const {
    const KvSlots& kv = pipe.args.shape.kv[at.extent];
    const int64_t first = int64_t{at.tile} * kTile.keys;
    const auto* from = static_cast<const uint16_t*>(value ? kv.v_scale : kv.k_scale) +
                       kv_head * (kv.head_stride / kDim) + first;
    const int lane = threadIdx.x % 32;
    const int64_t left = most - first;
    const int rows = left < kTile.keys ? static_cast<int>(left) : kTile.keys;
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      const int row = (widener + kWideners * (4 * j + lane / 8)) * 8 + lane % 8;
      scales[j] = row < rows ? from[row] : 0;
    }
  }

  __device__ __forceinline__ void WidenTile(uint32_t tile, uint64_t* full, uint64_t* empty, uint32_t parity,
                                            const uint32_t (&scales)[kScales], int widener,
                                            CodePlace& code_place) const {
    const int lane = threadIdx.x % 32;
    const int row = lane / 4;
    const uint32_t from = pipe.CodesAt(code_place.stage) + widener * 8 * kPanelColumns + lane * 16;
    const uint32_t low = tile + (widener * 8 + row) * kPanelRowBytes + (lane % 4 * 2 ^ row) * 16;
    const uint32_t high = low ^ 16;  // of the second eight columns
    const auto mine = [&](int i) { return i < kSurely || widener + i * kWideners < kBlocks; };
    WaitAt(SharedAddress(&pipe.state.codes_full[code_place.stage]), code_place.parity);
    WaitAt(SharedAddress(empty), parity ^ 1);
#pragma unroll
    for (int first = 0; first < kMost; first += kTogether) {
      uint4 codes[kTogether][kPanels];
#pragma unroll
      for (int i = first; i < first + kTogether && i < kMost; ++i) {
        if (!mine(i)) continue;
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          codes[i - first][p] = LoadShared(from + (p * kTile.keys + i * kWideners * 8) * kPanelColumns);
        }
      }
#pragma unroll
      for (int i = first; i < first + kTogether && i < kMost; ++i) {
        const auto bits = __shfl_sync(0xffffffffu, scales[i / 4], i % 4 * 8 + row);
        if (!mine(i)) continue;
        const CodeScale scale = CodeScale::Twice(static_cast<uint16_t>(bits));
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          const uint4& c = codes[i - first][p];
          const int block = (p * kTile.keys + i * kWideners * 8) * kPanelRowBytes;
          StoreShared(low + block, WidenCodes(c.x, scale), WidenCodes(c.y, scale));
          StoreShared(high + block, WidenCodes(c.z, scale), WidenCodes(c.w, scale));
        }
      }
    }
    PublishStores();
    __syncwarp();
    if (lane == 0) {
      ArriveAt(SharedAddress(full));
      ArriveAt(SharedAddress(&pipe.state.codes_empty[code_place.stage]));
    }
    code_place.Next();
  }
};

}  // namespace refocus::kernels
