// The protocol is told in the header. Accesses that other GPUs see are strong operations at system scope (PTX ISA,
// "Memory Consistency Model"); what a rank reads of its own part are ordinary loads.
#include "kernels/exchange.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/in_order.cuh"
#include "kernels/overlap.cuh"

namespace refocus::kernels {
namespace {

// An item is four floats, a group what shares an lse: the items of a row and head. A sum's groups are single items.
constexpr int kBlocksPerSm = 2;  // no fewer: kExchangeBlocks are resident at once on the smallest Hopper GPU, of 78
constexpr int kPackedThreads = 128;
constexpr int kPackedItems = 256;  // of a block's round
constexpr int kPackedGroups = 128;
constexpr int kPackedBytes = (2 * kPackedItems + kPackedGroups) * 16;
constexpr int kSenders = 512;
constexpr int kFlaggedThreads = kSenders + 32;
constexpr int kStages = 4;  // a thread has an item in each
constexpr int kFlaggedItems = kStages * kSenders;
constexpr int kFlaggedGroups = kFlaggedItems / 2;
constexpr int kFlagStride = 32;
constexpr int kFlagsAt = kPackedBytes;  // in a region
constexpr int kItemsAt = kFlagsAt + kStages * kFlagStride;
constexpr int kLseAt = kItemsAt + kFlaggedItems * 16;
constexpr int64_t kRegionBytes = kLseAt + kFlaggedGroups * 4;
static_assert(kRegionBytes % 128 == 0 && kItemsAt % 128 == 0);
constexpr int64_t kPackedMostBytes = 256 << 10;  // of a message: from there on twice the bytes cost more than a flag
constexpr int64_t kLookClocks = 4'000'000;  // some milliseconds between two looks at what may end a wait

struct Job {
  PeerMemory peers;
  CombineParams own;  // of a sum: part_out and where it goes alone
  int64_t groups = 0;
  int pieces = 0;     // items of a group
  int chunk = 0;      // groups of a block's round
};

__device__ __forceinline__ char* Region(const PeerMemory& peers, int holder, int source, uint64_t round) {
  const int64_t parity = static_cast<int64_t>(round % 2);
  return static_cast<char*>(peers.memory[holder]) +
         ((parity * peers.ranks + source) * kExchangeBlocks + blockIdx.x) * kRegionBytes;
}

// Behind the regions of own memory.
__device__ __forceinline__ uint64_t* Rounds(const PeerMemory& peers) {
  char* const regions_end =
      static_cast<char*>(peers.memory[peers.rank]) + 2 * peers.ranks * kExchangeBlocks * kRegionBytes;
  return reinterpret_cast<uint64_t*>(regions_end) + blockIdx.x;
}

// Two floats and a round's number, in one piece.
struct Word {
  float a, b;
  uint64_t round;
};

__device__ __forceinline__ void StoreWord(char* at, float a, float b, uint64_t round) {
  const uint64_t floats = uint64_t{__float_as_uint(b)} << 32 | __float_as_uint(a);
  asm volatile("{.reg .b128 w; mov.b128 w, {%1, %2}; st.relaxed.sys.global.b128 [%0], w;}" ::"l"(at), "l"(floats),
               "l"(round)
               : "memory");
}

__device__ __forceinline__ Word LoadWord(const char* at) {
  uint64_t floats, round;
  asm volatile("{.reg .b128 w; ld.relaxed.sys.global.b128 w, [%2]; mov.b128 {%0, %1}, w;}"
               : "=l"(floats), "=l"(round)
               : "l"(at)
               : "memory");
  return {__uint_as_float(static_cast<uint32_t>(floats)), __uint_as_float(static_cast<uint32_t>(floats >> 32)), round};
}

__device__ __forceinline__ void ReleaseFlag(char* at, uint64_t round) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(at), "l"(round) : "memory");
}

__device__ __forceinline__ uint64_t AcquireFlag(const char* at) {
  uint64_t round;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(round) : "l"(at) : "memory");
  return round;
}

// Not from the first cache, which knows nothing of what other GPUs write.
__device__ __forceinline__ float4 LoadItem(const char* at) {
  float4 x;
  asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(at)
               : "memory");
  return x;
}

__device__ __forceinline__ float LoadLse(const char* at) {
  float x;
  asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
  return x;
}

// Of one thread's wait. It looks at host memory seldom, and not before it has waited for long: when all threads of a
// kernel do, that takes so long that the other ranks wait as long for the next exchange, and would do the same.
class Patience {
 public:
  __device__ explicit Patience(const PeerMemory& peers) : peers_(peers), looked_(Clock()) {}

  // After a look that found nothing: whether to go on without.
  __device__ bool Over() {
    const int64_t clock = Clock();
    if (clock - looked_ < kLookClocks) return false;
    looked_ = clock;
    uint32_t given_up;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(given_up) : "l"(peers_.given_up) : "memory");
    if (given_up != 0) return true;
    int64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (begin_ == 0) begin_ = now;
    if (now - begin_ < peers_.deadline_ns) return false;
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(peers_.given_up), "r"(kLate) : "memory");
    return true;
  }

 private:
  static __device__ __forceinline__ int64_t Clock() {
    int64_t clock;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(clock));
    return clock;
  }

  const PeerMemory& peers_;
  int64_t looked_;
  int64_t begin_ = 0;
};

// All ranks' items number `item` of the chunk that begins at group `first`, in rank order.
template <bool kWeighted, int kMost>
__device__ __forceinline__ void Finish(const Job& job, int64_t first, int item, const float (&lse)[kMost],
                                       const float4 (&x)[kMost]) {
  if constexpr (kWeighted) {
    const int group = item / job.pieces;
    WeightedSum sum;
    const float high = AddInOrder(lse, x, &sum);
    sum.Store(job.own, first + group, item - group * job.pieces, job.pieces, high);
  } else {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      if (r < job.peers.ranks) AddTo(total, x[r]);
    }
    if (job.own.out != nullptr) {
      reinterpret_cast<float4*>(job.own.out)[first + item] = total;
    } else {
      StoreRounded(job.own.out_bf16, first + item, total);
    }
  }
}

// ---- Packed. A region has two words an item, then one a group.

template <int kMost>
__device__ __forceinline__ void SendItem(const PeerMemory& peers, uint64_t round, int item, const float4& x) {
#pragma unroll
  for (int r = 0; r < kMost; ++r) {
    if (r >= peers.ranks || r == peers.rank) continue;
    char* const to = Region(peers, r, peers.rank, round) + item * 32;
    StoreWord(to, x.x, x.y, round);
    StoreWord(to + 16, x.z, x.w, round);
  }
}

__device__ __forceinline__ void SendLse(const PeerMemory& peers, uint64_t round, int group, float lse) {
  for (int r = 0; r < peers.ranks; ++r) {
    if (r == peers.rank) continue;
    StoreWord(Region(peers, r, peers.rank, round) + (2 * kPackedItems + group) * 16, lse, 0.0f, round);
  }
}

// The parts of all ranks, in rank order, with this rank's own; waits for the others. `kMost`: no fewer than the ranks,
// so that all loads are under way together.
template <bool kWeighted, int kMost>
__device__ __forceinline__ void ReceiveItem(const PeerMemory& peers, uint64_t round, int item, int group, float own_lse,
                                            const float4& own, Patience& patience, float (&lse)[kMost],
                                            float4 (&x)[kMost]) {
#pragma unroll
  for (int r = 0; r < kMost; ++r) {
    lse[r] = r == peers.rank ? own_lse : -INFINITY;
    x[r] = own;
  }
  bool here;
  do {
    here = true;
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      if (r >= peers.ranks || r == peers.rank) continue;
      const char* const from = Region(peers, peers.rank, r, round);
      const Word low = LoadWord(from + item * 32), high = LoadWord(from + item * 32 + 16);
      x[r] = make_float4(low.a, low.b, high.a, high.b);
      here = here && low.round == round && high.round == round;
      if constexpr (kWeighted) {
        const Word weight = LoadWord(from + (2 * kPackedItems + group) * 16);
        lse[r] = weight.a;
        here = here && weight.round == round;
      }
    }
  } while (!here && !patience.Over());
}

template <bool kWeighted, int kMost>
__global__ void __launch_bounds__(kPackedThreads) PackedKernel(const __grid_constant__ Job job) {
  BeginInTurn();
  const PeerMemory& peers = job.peers;
  uint64_t round = *Rounds(peers);
  for (int64_t first = int64_t{blockIdx.x} * job.chunk; first < job.groups; first += int64_t{gridDim.x} * job.chunk) {
    ++round;
    const int groups = static_cast<int>(min(int64_t{job.chunk}, job.groups - first));
    const int items = groups * job.pieces;
    const float4* const in = reinterpret_cast<const float4*>(job.own.part_out) + first * job.pieces;
    for (int i = threadIdx.x; i < items; i += kPackedThreads) SendItem<kMost>(peers, round, i, in[i]);
    if constexpr (kWeighted) {
      for (int g = threadIdx.x; g < groups; g += kPackedThreads) SendLse(peers, round, g, job.own.part_lse[first + g]);
    }
    __syncwarp();  // a warp has sent all before a lane waits
    Patience patience(peers);
    for (int i = threadIdx.x; i < items; i += kPackedThreads) {
      const int group = i / job.pieces;
      float lse[kMost];
      float4 x[kMost];
      const float own_lse = kWeighted ? job.own.part_lse[first + group] : 0.0f;
      ReceiveItem<kWeighted>(peers, round, i, group, own_lse, in[i], patience, lse, x);
      Finish<kWeighted>(job, first, i, lse, x);
    }
    __syncthreads();  // nothing is sent in the next round before all threads have read this one
  }
  if (threadIdx.x == 0) *Rounds(peers) = round;
}

// A rank's own parts are combined on the way: a block for a row and head and up to 128 columns. How many parts there
// are, and so how they are combined, may differ from rank to rank.
template <int kMost>
__global__ void __launch_bounds__(kManyThreads, kBlocksPerSm) PartsKernel(const __grid_constant__ Job job) {
  BeginInTurn();
  __shared__ ManyScratch scratch;
  const PeerMemory& peers = job.peers;
  const int lane = threadIdx.x % 32;
  const int width = (job.pieces + 31) / 32;
  const uint64_t round = *Rounds(peers) + 1;
  const int64_t row_head = blockIdx.x / width;
  const int piece = static_cast<int>(blockIdx.x % width) * 32 + lane;
  const bool many = job.own.parts > kPartsInOrder;
  if (!many && threadIdx.x >= 32) return;
  WeightedSum sum;
  float high = -INFINITY;
  if (many) {
    high = CombineMany(job.own, row_head, piece, scratch, &sum);
  } else if (piece < job.pieces) {
    high = CombineFew(job.own, row_head, piece, &sum);
  }
  if (threadIdx.x >= 32) return;
  const float4 own = sum.Out();
  const float own_lse = sum.Lse(high);
  if (lane == 0) SendLse(peers, round, 0, own_lse);
  if (piece < job.pieces) SendItem<kMost>(peers, round, lane, own);
  __syncwarp();  // the warp has sent all before a lane waits
  if (piece < job.pieces) {
    Patience patience(peers);
    float lse[kMost];
    float4 x[kMost];
    ReceiveItem<true>(peers, round, lane, 0, own_lse, own, patience, lse, x);
    Finish<true>(job, row_head, piece, lse, x);
  }
  __syncwarp();  // all have read the count
  if (lane == 0) *Rounds(peers) = round;
}

// ---- Flagged.

// A block's items go out in stages with a flag each, so that what has arrived is combined while the rest travels. The
// senders wait for nobody before they receive: a warp of its own waits until a stage has left the GPU, and flags it.
__device__ __forceinline__ void StageIsSent(int stage) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(1 + stage), "n"(kFlaggedThreads) : "memory");
}
__device__ __forceinline__ void AwaitStageSent(int stage) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(1 + stage), "n"(kFlaggedThreads) : "memory");
}

template <bool kWeighted, int kMost>
__device__ __forceinline__ void SendStages(const Job& job, int64_t first, int groups, int stages, uint64_t round,
                                           const float4 (&own)[kStages]) {
  const PeerMemory& peers = job.peers;
  const int thread = static_cast<int>(threadIdx.x);
  const int items = groups * job.pieces;
  if constexpr (kWeighted) {
    for (int g = thread; g < groups; g += kSenders) {
      const float lse = job.own.part_lse[first + g];
      for (int r = 0; r < peers.ranks; ++r) {
        if (r == peers.rank) continue;
        reinterpret_cast<float*>(Region(peers, r, peers.rank, round) + kLseAt)[g] = lse;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    if (s >= stages) break;
    const int i = s * kSenders + thread;
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      if (r >= peers.ranks || r == peers.rank || i >= items) continue;
      reinterpret_cast<float4*>(Region(peers, r, peers.rank, round) + kItemsAt)[i] = own[s];
    }
    StageIsSent(s);
  }
}

template <bool kWeighted, int kMost>
__device__ __forceinline__ void ReceiveStages(const Job& job, int64_t first, int groups, int stages, uint64_t round,
                                              const float4 (&own)[kStages]) {
  const PeerMemory& peers = job.peers;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int items = groups * job.pieces;
  Patience patience(peers);
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    if (s >= stages) break;
    if (lane < peers.ranks && lane != peers.rank) {
      const char* const flag = Region(peers, peers.rank, lane, round) + kFlagsAt + s * kFlagStride;
      while (AcquireFlag(flag) != round && !patience.Over()) {
      }
    }
    __syncwarp();
    const int i = s * kSenders + thread;
    if (i >= items) continue;
    const int group = i / job.pieces;
    float lse[kMost];
    float4 x[kMost];
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      lse[r] = -INFINITY;
      x[r] = own[s];
      if (r >= peers.ranks) continue;
      const char* const from = Region(peers, peers.rank, r, round);
      if (r != peers.rank) x[r] = LoadItem(from + kItemsAt + i * 16);
      if constexpr (kWeighted) {
        lse[r] = r == peers.rank ? job.own.part_lse[first + group] : LoadLse(from + kLseAt + group * 4);
      }
    }
    Finish<kWeighted>(job, first, i, lse, x);
  }
}

template <bool kWeighted, int kMost>
__global__ void __launch_bounds__(kFlaggedThreads, kBlocksPerSm) FlaggedKernel(const __grid_constant__ Job job) {
  BeginInTurn();
  const PeerMemory& peers = job.peers;
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t round = *Rounds(peers);
  for (int64_t first = int64_t{blockIdx.x} * job.chunk; first < job.groups; first += int64_t{gridDim.x} * job.chunk) {
    ++round;
    const int groups = static_cast<int>(min(int64_t{job.chunk}, job.groups - first));
    const int items = groups * job.pieces;
    const int stages = (items + kSenders - 1) / kSenders;
    if (thread < kSenders) {
      const float4* const in = reinterpret_cast<const float4*>(job.own.part_out) + first * job.pieces;
      float4 own[kStages];
#pragma unroll
      for (int s = 0; s < kStages; ++s) {
        own[s] = s * kSenders + thread < items ? in[s * kSenders + thread] : float4{};
      }
      SendStages<kWeighted, kMost>(job, first, groups, stages, round, own);
      ReceiveStages<kWeighted, kMost>(job, first, groups, stages, round, own);
    } else {
      const int to = thread - kSenders;
#pragma unroll
      for (int s = 0; s < kStages; ++s) {
        if (s >= stages) break;
        AwaitStageSent(s);
        if (to >= peers.ranks || to == peers.rank) continue;
        ReleaseFlag(Region(peers, to, peers.rank, round) + kFlagsAt + s * kFlagStride, round);
      }
    }
    __syncthreads();  // a stage's barrier is used again, and all have read the count
  }
  if (thread == 0) *Rounds(peers) = round;
}

template <bool kWeighted, int kMost>
cudaError_t Launch(const Job& job, bool packed, uint32_t blocks, cudaStream_t stream) {
  return packed ? LaunchOverlapping(PackedKernel<kWeighted, kMost>, dim3(blocks), kPackedThreads, 0, stream, job)
                : LaunchOverlapping(FlaggedKernel<kWeighted, kMost>, dim3(blocks), kFlaggedThreads, 0, stream, job);
}

bool IsShape(const CombineParams& p) {
  return p.rows >= 0 && p.heads > 0 && p.head_dim > 0 && p.head_dim % 8 == 0 && p.head_dim <= kMaxHeadDim;
}

bool ArePeers(const PeerMemory& p) {
  return p.ranks >= 2 && p.ranks <= kMostPeers && p.rank >= 0 && p.rank < p.ranks && p.blocks >= 1 &&
         p.blocks <= kExchangeBlocks && p.given_up != nullptr;
}

template <bool kWeighted>
cudaError_t Exchange(const PeerMemory& peers, const CombineParams& own, int64_t groups, int pieces, ExchangeWay way,
                     cudaStream_t stream) {
  if (!ArePeers(peers)) return cudaErrorInvalidValue;
  if (groups == 0) return cudaSuccess;
  const int64_t bytes = groups * pieces * 16;
  const bool packed = way == ExchangeWay::kPacked || (way == ExchangeWay::kBySize && bytes <= kPackedMostBytes);
  // Short messages are spread so that a thread has one item; long ones so that every block has as many.
  const int64_t least = packed ? std::max(1, kPackedThreads / pieces) : 1;
  const int64_t most = (packed ? kPackedItems : kFlaggedItems) / pieces;
  const int64_t chunk = std::clamp((groups + peers.blocks - 1) / peers.blocks, std::min(least, most), most);
  const Job job{peers, own, groups, pieces, static_cast<int>(chunk)};
  const auto blocks = static_cast<uint32_t>(std::min<int64_t>(peers.blocks, (groups + chunk - 1) / chunk));
  if (peers.ranks == 2) return Launch<kWeighted, 2>(job, packed, blocks, stream);
  if (peers.ranks <= 4) return Launch<kWeighted, 4>(job, packed, blocks, stream);
  return Launch<kWeighted, kMostPeers>(job, packed, blocks, stream);
}

}  // namespace

int64_t PeerMemoryBytes(int ranks) { return 2 * ranks * kExchangeBlocks * kRegionBytes + kExchangeBlocks * 8; }

bool ExchangePartsFits(int64_t rows, int heads, int head_dim, const PeerMemory& peers) {
  return rows * heads * ((head_dim / 4 + 31) / 32) <= peers.blocks;
}

cudaError_t ExchangeParts(const CombineParams& own, const PeerMemory& peers, cudaStream_t stream) {
  if (own.parts < 0 || !IsShape(own) || !ArePeers(peers)) return cudaErrorInvalidValue;
  if (!ExchangePartsFits(own.rows, own.heads, own.head_dim, peers)) return cudaErrorInvalidValue;
  if (own.rows == 0) return cudaSuccess;
  const Job job{peers, own, own.rows * own.heads, own.head_dim / 4};
  const dim3 blocks(static_cast<uint32_t>(job.groups * ((job.pieces + 31) / 32)));
  if (peers.ranks == 2) return LaunchOverlapping(PartsKernel<2>, blocks, kManyThreads, 0, stream, job);
  if (peers.ranks <= 4) return LaunchOverlapping(PartsKernel<4>, blocks, kManyThreads, 0, stream, job);
  return LaunchOverlapping(PartsKernel<kMostPeers>, blocks, kManyThreads, 0, stream, job);
}

cudaError_t ExchangeCombine(const CombineParams& own, const PeerMemory& peers, cudaStream_t stream, ExchangeWay way) {
  if (own.parts != 1 || !IsShape(own)) return cudaErrorInvalidValue;
  return Exchange<true>(peers, own, own.rows * own.heads, own.head_dim / 4, way, stream);
}

cudaError_t ExchangeSum(const float* x, int64_t elements, float* sum, void* rounded, const PeerMemory& peers,
                        cudaStream_t stream, ExchangeWay way) {
  if (elements < 0 || elements % 4 != 0) return cudaErrorInvalidValue;
  CombineParams own;
  own.part_out = x;
  own.out = sum;
  own.out_bf16 = rounded;
  return Exchange<false>(peers, own, elements / 4, 1, way, stream);
}

}  // namespace refocus::kernels
