// The memory through which the GPUs of one host exchange partials and dq (kernels/exchange.h): allocated, opened by all
// ranks and tried once. All of a group's ranks use it or none does. Part of collective_nccl.cc.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "kernels/exchange.h"

namespace refocus::nccl {

class Peers {
 public:
  // `mine` of all ranks, one after the other; equal sizes. Every rank calls it in its turn; throws CollectiveError.
  using Gather = std::function<std::string(const std::string& mine)>;

  // All ranks call it, with the GPU of this one current, and then end their group in any order: own memory is not
  // freed, since others may still have it open, but kept for this process' next group. `wanted`: whether this rank may
  // use it.
  Peers(int rank, int size, double deadline_seconds, bool wanted, cudaStream_t stream, const Gather& gather);
  // No exchange of this rank is under way: what others wrote for it has arrived, and they write no more.
  ~Peers() { GiveBack(); }
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  // nullptr: not used, on no rank; why_not() says in one line why, the same line everywhere.
  const kernels::PeerMemory* memory() const { return used_ ? &memory_ : nullptr; }
  const std::string& why_not() const { return why_not_; }

  // The host's side of PeerMemory::given_up; nullptr where memory() is.
  uint32_t* given_up() const { return used_ ? given_up_ : nullptr; }

 private:
  struct Offer;
  std::string Take(bool wanted, Offer* offer);
  std::string Open(const std::string& offers);
  std::string Try(cudaStream_t stream);
  bool Agreed(const std::string& trouble, const Gather& gather);
  void GiveBack();

  kernels::PeerMemory memory_;
  int device_ = 0;
  uint32_t* given_up_ = nullptr;  // page-locked
  bool opened_[kernels::kMostPeers] = {};  // through a handle
  bool used_ = false;
  std::string why_not_;
};

}  // namespace refocus::nccl
