// Talk among the ranks of one group. All ranks issue the same calls in the same order from one thread each. Every call
// has the deadline given at construction. A failed call (peer gone, deadline, Abort) throws CollectiveError on every
// rank within that deadline, and every later call throws at once: the group is lost (one lost rank loses the
// communicator).
//
// Two implementations: local (ranks are threads of one process: tests, sanitizers) and mpi (CPU ranks). Rows are
// dimension 0 of contiguous tensors; counts are per rank and may be 0. Sums are formed in rank order, so results are the
// same bits on every rank and in every run.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace refocus {

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

  // From any thread: running and later calls throw on all ranks that can still be told.
  virtual void Abort(const std::string& reason) = 0;
};

// `size` collectives that share memory; entry r belongs to the thread that plays rank r.
std::vector<std::shared_ptr<Collective>> MakeLocalCollectives(int size, double deadline_seconds);

// MPI_COMM_WORLD. MPI_Init_thread(MPI_THREAD_FUNNELED at least) was called by this thread. Non-blocking calls polled
// under the deadline.
std::shared_ptr<Collective> MakeMpiCollective(double deadline_seconds);

}  // namespace refocus
