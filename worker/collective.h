// Talk among the ranks of one group. All ranks issue the same calls in the same order from one thread each. Every call
// has the deadline given at construction. A failed call (peer gone, deadline, Abort) throws CollectiveError on every
// rank within that deadline, and every later call throws at once: the group is lost (one lost rank loses the
// communicator).
//
// Three implementations: local (ranks are threads of one process: tests, sanitizers), mpi (CPU ranks) and nccl (one GPU
// a rank). Rows are dimension 0 of contiguous tensors; counts are per rank and may be 0. Sums are formed in rank order,
// so results are the same bits on every rank and in every run; but for AllReduceSum of nccl, whose order is NCCL's: the
// same bits on every rank, and in every run on the same machine.
//
// nccl enqueues tensors of the GPU on the current stream and returns: what fails later is thrown by the next call or by
// Check. It may run while that stream is captured into a graph, once the same call has run outside a capture. Tensors
// on the CPU (control words, losses) are taken as well, waited for, and not allowed in a capture. A rank that gives up
// tells no other: they find out by their own deadline or through the coordinator, and a call whose data had arrived
// before still ends well.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace refocus {

namespace kernels {
struct PeerMemory;
}  // namespace kernels

class CollectiveError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Collective {
 public:
  virtual ~Collective() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // t fp32, contiguous; in place.
  virtual void AllReduceSum(at::Tensor& t) = 0;
  // in [rows[rank()], ...] -> out [sum(rows), ...], rank 0's rows first. Any dtype.
  virtual void AllGatherRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) = 0;
  // in: send_rows[j] rows for rank j, one after the other; out: recv_rows[j] rows from rank j likewise. recv_rows[j]
  // here equals send_rows[rank()] on rank j.
  virtual void AllToAllRows(const at::Tensor& in, const std::vector<int64_t>& send_rows, at::Tensor& out,
                            const std::vector<int64_t>& recv_rows) = 0;
  // in [sum(rows), ...] fp32 -> out [rows[rank()], ...]: the sum over ranks of this rank's rows.
  virtual void ReduceScatterRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) = 0;
  // t contiguous, any dtype; root's bytes everywhere.
  virtual void Broadcast(at::Tensor& t, int root) = 0;

  // Before results are read on the host: waits until the current stream has done what was enqueued, and throws when the
  // group is lost. Never waits longer than the deadline after the last call. Not in a capture. Local and mpi have
  // nothing to wait for.
  virtual void Check() = 0;
  // Before a captured graph that holds collectives is launched: they do not pass through the calls above. Throws when
  // the group is lost; the deadline counts from here.
  virtual void BeforeReplay() { Check(); }

  // Where GPUs exchange through each other's memory, on all ranks of the group or on none (nullptr): what one exchange
  // needs (kernels/exchange.h), which the caller enqueues on the current stream before its next call. It counts as a
  // call of this class.
  virtual const kernels::PeerMemory* NextPeerExchange(const char* /*what*/) { return nullptr; }
  virtual bool has_peer_exchange() const { return false; }

  // From any thread: running and later calls throw on all ranks that can still be told.
  virtual void Abort(const std::string& reason) = 0;
};

// `size` collectives that share memory; entry r belongs to the thread that plays rank r.
std::vector<std::shared_ptr<Collective>> MakeLocalCollectives(int size, double deadline_seconds);

// MPI_COMM_WORLD. MPI_Init_thread(MPI_THREAD_FUNNELED at least) was called by this thread. Non-blocking calls polled
// under the deadline.
std::shared_ptr<Collective> MakeMpiCollective(double deadline_seconds);

// What the ranks of one NCCL group must share; made by one of them and sent to the others. Throws CollectiveError.
std::string MakeNcclId();

// Ranks are processes with a GPU each; the calling thread's current device is this rank's, and the same thread makes
// all calls. Waits for the other ranks, a minute or the deadline, whichever is longer. One rank with an empty id needs
// no NCCL. With `peer_memory` on all ranks, and GPUs of one host that reach each other, NextPeerExchange has something
// to give. After a failure the process must end without destroying captured graphs (std::_Exit): NCCL was told to give
// up, and graphs with its kernels cannot be taken apart any more.
std::shared_ptr<Collective> MakeNcclCollective(const std::string& id, int rank, int size, double deadline_seconds,
                                               bool peer_memory = true);

}  // namespace refocus
