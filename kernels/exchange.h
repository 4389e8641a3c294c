// Exchange among the GPUs of one host through each other's memory, fused with what is made of it: the combination of
// the ranks' partials and the sum of their dq, for rows that all ranks compute. Plain structs, no LibTorch.
//
// As in kernels/attention.h: all functions enqueue on `stream`, allocate nothing and may be captured into a CUDA graph;
// every pointer is 16-byte aligned. All ranks issue the same exchanges, of the same shapes and in the same order, from
// one stream each. Results are formed in rank order: the same bits on all ranks and in all runs, and those of Combine
// and SumParts over the gathered parts.
//
// How it works. Rank r pushes what it has into the memory of every other rank, where each block of the grid has a
// region of its own for each source rank and each of two parities, and then waits until the regions of its own memory
// are filled. A block waits for the same block of the other ranks and for nothing else. What a block exchanges at once
// is a round; a block counts its rounds in device memory, so that a replayed graph needs nothing from the host, and all
// ranks count alike. Round k uses the regions of parity k mod 2.
//
// Two parities are enough. A rank overwrites a region of parity p in round k + 2, after it has received all of round
// k + 1 in that block. The receiver sent that after its block had read all of round k, which stands before in the same
// thread block or in a kernel that was complete. So nothing is overwritten that is still to be read, whatever the order
// in which ranks get there.
//
// How a receiver knows that a region is filled:
//   packed   for short messages: every 16 bytes hold two floats and the round's number and are written and read in one
//            piece (PTX ISA, ld and st of .b128). Twice the bytes, one trip.
//   flagged  for long ones: data in a few stages, a flag with the round's number behind each, released and acquired at
//            system scope.
// Both share the count of rounds, so they may follow each other in any order; each has regions of its own, since data
// of one could pass for a round's number of the other.
//
// A block waits for its like on the other ranks, which therefore must get to run: grids are no larger than what is
// resident at once, and a kernel that begins early beside this one does so when all blocks of this one are there.
//
// A rank that does not come must not hold the others: a wait ends when `given_up` is not 0 or after `deadline_ns`,
// which then sets it. Results are undefined from then on, and so are later ones.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"

namespace refocus::kernels {

inline constexpr int kMostPeers = 8;  // ranks of one host
inline constexpr int kExchangeBlocks = 128;  // all of them resident at once, on any Hopper GPU

struct PeerMemory {
  int rank = 0;
  int ranks = 0;                   // 2 to kMostPeers
  // PeerMemoryBytes(ranks) of every rank, 256-byte aligned, as this rank sees them; all zeroed before the first exchange.
  // PeerMemoryBytes(ranks) of every rank, 256-byte aligned, as this rank sees them. Own memory was zeroed before any
  // rank's first exchange.
  void* memory[kMostPeers] = {};
  uint32_t* given_up = nullptr;    // host memory as the device sees it: kAborted or kLate once the group is lost
  int64_t deadline_ns = 0;         // of one wait
  int blocks = kExchangeBlocks;    // at most; the same on all ranks
};
inline constexpr uint32_t kAborted = 1;  // written by the host
inline constexpr uint32_t kLate = 2;     // written by the device: a wait was longer than the deadline

int64_t PeerMemoryBytes(int ranks);

// Chosen by the size alone unless a test or a benchmark says otherwise.
enum class ExchangeWay { kBySize, kPacked, kFlagged };

// This rank's part, as Combine takes it: part_out [rows, heads, head_dim] and part_lse [rows, heads], `parts` is 1.
// out, lse and out_bf16 are those of the combination over all ranks.
cudaError_t ExchangeCombine(const CombineParams& own, const PeerMemory& peers, cudaStream_t stream,
                            ExchangeWay way = ExchangeWay::kBySize);

// The same of this rank's parts, any number of them and on each rank another one, which are combined in the same
// kernel. The bits are those of Combine and then ExchangeCombine. For few rows: ExchangePartsFits, which all ranks
// answer alike.
bool ExchangePartsFits(int64_t rows, int heads, int head_dim, const PeerMemory& peers);
cudaError_t ExchangeParts(const CombineParams& own, const PeerMemory& peers, cudaStream_t stream);

// sum[i] = rank 0's x[i] + rank 1's x[i] + ..., in fp32, or rounded to bf16 where `sum` is null; elements a multiple of
// 4.
cudaError_t ExchangeSum(const float* x, int64_t elements, float* sum, void* rounded, const PeerMemory& peers,
                        cudaStream_t stream, ExchangeWay way = ExchangeWay::kBySize);

}  // namespace refocus::kernels
