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
constexpr int kLooks = 64;  // between two looks at what may end a wait

struct Job {
  PeerMemory peers;
  CombineParams own;  // of a sum: part_out and out alone
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

// Of one thread's wait.
class Patience {
 public:
  __device__ explicit Patience(const PeerMemory& peers) : peers_(peers) {}

  // After a look that found nothing: whether to go on without.
  __device__ bool Over() {
    if (++looks_ % kLooks != 0) return false;
    uint32_t given_up;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(given_up) : "l"(peers_.given_up) : "memory");
    if (given_up != 0) return true;
    int64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (looks_ == kLooks) begin_ = now;
    if (now - begin_ < peers_.deadline_ns) return false;
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(peers_.given_up), "r"(kLate) : "memory");
    return true;
  }

 private:
  const PeerMemory& peers_;
  uint32_t looks_ = 0;
  int64_t begin_ = 0;
};

// All ranks' items number `item` of the chunk that begins at group `first`, in rank order.
template <bool kWeighted, int kMost>
__device__ __forceinline__ void Finish(const Job& job, int64_t first, int item, const float (&lse)[kMost],
                                       const float4 (&x)[kMost]) {
  if constexpr (kWeighted) {
    const int group = item / job.pieces;
    CombineInOrder(lse, x, job.own, first + group, item - group * job.pieces, job.pieces);
  } else {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < kMost; ++r) {
      if (r < job.peers.ranks) AddTo(total, x[r]);
    }
    reinterpret_cast<float4*>(job.own.out)[first + item] = total;
  }
}

// `kMost`: no fewer than the ranks, so that all loads of an item are under way together.
template <bool kWeighted, int kMost>
__global__ void __launch_bounds__(kPackedThreads) PackedKernel(const __grid_constant__ Job job) {
  BeginInTurn();
  const PeerMemory& peers = job.peers;
  const int rank = peers.rank, ranks = peers.ranks;
  const float4* const in = reinterpret_cast<const float4*>(job.own.part_out);
  uint64_t round = *Rounds(peers);
  for (int64_t first = int64_t{blockIdx.x} * job.chunk; first < job.groups; first += int64_t{gridDim.x} * job.chunk) {
    ++round;
    const int groups = static_cast<int>(min(int64_t{job.chunk}, job.groups - first));
    const int items = groups * job.pieces;
    for (int i = threadIdx.x; i < items; i += kPackedThreads) {
      const float4 x = in[first * job.pieces + i];
#pragma unroll
      for (int r = 0; r < kMost; ++r) {
        if (r >= ranks || r == rank) continue;
        char* const to = Region(peers, r, rank, round) + i * 32;
        StoreWord(to, x.x, x.y, round);
        StoreWord(to + 16, x.z, x.w, round);
      }
    }
    if constexpr (kWeighted) {
      for (int g = threadIdx.x; g < groups; g += kPackedThreads) {
        const float lse = job.own.part_lse[first + g];
        for (int r = 0; r < ranks; ++r) {
          if (r != rank) StoreWord(Region(peers, r, rank, round) + (2 * kPackedItems + g) * 16, lse, 0.0f, round);
        }
      }
    }
    Patience patience(peers);
    for (int i = threadIdx.x; i < items; i += kPackedThreads) {
      const int group = i / job.pieces;
      float lse[kMost];
      float4 x[kMost];
#pragma unroll
      for (int r = 0; r < kMost; ++r) {
        lse[r] = -INFINITY;
        x[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (r != rank) continue;
        x[r] = in[first * job.pieces + i];
        if constexpr (kWeighted) lse[r] = job.own.part_lse[first + group];
      }
      bool here;
      do {
        here = true;
#pragma unroll
        for (int r = 0; r < kMost; ++r) {
          if (r >= ranks || r == rank) continue;
          const char* const from = Region(peers, rank, r, round);
          const Word low = LoadWord(from + i * 32), high = LoadWord(from + i * 32 + 16);
          x[r] = make_float4(low.a, low.b, high.a, high.b);
          here = here && low.round == round && high.round == round;
          if constexpr (kWeighted) {
            const Word weight = LoadWord(from + (2 * kPackedItems + group) * 16);
            lse[r] = weight.a;
            here = here && weight.round == round;
          }
        }
      } while (!here && !patience.Over());
      Finish<kWeighted>(job, first, i, lse, x);
    }
    __syncthreads();  // nothing is sent in the next round before all threads have read this one
  }
  if (threadIdx.x == 0) *Rounds(peers) = round;
}

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
__global__ void __launch_bounds__(kFlaggedThreads) FlaggedKernel(const __grid_constant__ Job job) {
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

// `own` without `pieces` and what follows from them.
template <bool kWeighted>
cudaError_t Exchange(const PeerMemory& peers, const CombineParams& own, int64_t groups, int pieces, ExchangeWay way,
                     cudaStream_t stream) {
  if (peers.ranks < 2 || peers.ranks > kMostPeers || peers.rank < 0 || peers.rank >= peers.ranks) {
    return cudaErrorInvalidValue;
  }
  if (peers.blocks < 1 || peers.blocks > kExchangeBlocks || peers.given_up == nullptr) return cudaErrorInvalidValue;
  if (groups == 0) return cudaSuccess;
  const int64_t bytes = groups * pieces * 16;
  const bool packed = way == ExchangeWay::kPacked || (way == ExchangeWay::kBySize && bytes <= kPackedMostBytes);
  // Short messages are spread so that a thread has one item; long ones so that every block has as many.
  const int64_t least = packed ? std::max(1, kPackedThreads / pieces) : 1;
  const int64_t most = (packed ? kPackedItems : kFlaggedItems) / pieces;
  const int64_t chunk = std::clamp((groups + peers.blocks - 1) / peers.blocks, std::min(least, most), most);
  Job job;
  job.peers = peers;
  job.own = own;
  job.groups = groups;
  job.pieces = pieces;
  job.chunk = static_cast<int>(chunk);
  const auto blocks = static_cast<uint32_t>(std::min<int64_t>(peers.blocks, (groups + chunk - 1) / chunk));
  if (peers.ranks == 2) return Launch<kWeighted, 2>(job, packed, blocks, stream);
  if (peers.ranks <= 4) return Launch<kWeighted, 4>(job, packed, blocks, stream);
  return Launch<kWeighted, kMostPeers>(job, packed, blocks, stream);
}

}  // namespace

int64_t PeerMemoryBytes(int ranks) { return 2 * ranks * kExchangeBlocks * kRegionBytes + kExchangeBlocks * 8; }

cudaError_t ExchangeCombine(const CombineParams& own, const PeerMemory& peers, cudaStream_t stream, ExchangeWay way) {
  if (own.parts != 1 || own.rows < 0 || own.heads <= 0) return cudaErrorInvalidValue;
  if (own.head_dim <= 0 || own.head_dim % 8 != 0 || own.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  return Exchange<true>(peers, own, own.rows * own.heads, own.head_dim / 4, way, stream);
}

cudaError_t ExchangeSum(const float* x, int64_t elements, float* sum, const PeerMemory& peers, cudaStream_t stream,
                        ExchangeWay way) {
  if (elements < 0 || elements % 4 != 0) return cudaErrorInvalidValue;
  CombineParams own;
  own.part_out = x;
  own.out = sum;
  return Exchange<false>(peers, own, elements / 4, 1, way, stream);
}

}  // namespace refocus::kernels
