// Ranks are processes with a GPU each. Calls are enqueued on the caller's stream; nothing here waits for the device but
// Check and calls with tensors on the CPU, and those poll, so that a lost peer cannot hold the host.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>

#include "base/log.h"
#include "worker/collective.h"
#include "worker/collective_failpoint.h"
#include "worker/collective_nccl_communicator.h"
#include "worker/collective_nccl_peers.h"
#include "worker/collective_rows.h"

namespace refocus {
namespace {

using nccl::Communicator;
using nccl::Pause;

constexpr int kOldestVersion = 21800;  // communicators that do not block as they are used here

class NcclCollective : public Collective {
 public:
  NcclCollective(const std::string& id, int rank, int size, double deadline_seconds, bool peer_memory)
      : rank_(rank),
        size_(size),
        owner_(std::this_thread::get_id()),
        failpoint_(rank),
        communicator_(std::make_shared<Communicator>(rank, size, deadline_seconds)) {
    REFOCUS_CHECK(rank >= 0 && rank < size);
    REFOCUS_CHECK(size == 1 || !id.empty());
    const cudaError_t error = cudaGetDevice(&device_);
    if (error != cudaSuccess) throw CollectiveError(std::string("cudaGetDevice: ") + cudaGetErrorString(error));
    talks_ = !id.empty();
    if (!talks_) return;
    int version = 0;
    ncclGetVersion(&version);
    if (version < kOldestVersion) {
      throw CollectiveError("libnccl.so.2: got version " + std::to_string(version) + ", need " +
                            std::to_string(kOldestVersion) + " or later");
    }
    communicator_->Create(id, rank, size);
    if (rank == 0) LogInfo("NCCL " + std::to_string(version) + " connects " + std::to_string(size) + " ranks");
    watchdog_ = std::thread([shared = communicator_] { Communicator::Watch(shared); });
    try {
      if (size > 1) ConnectPeers(deadline_seconds, peer_memory);
    } catch (...) {  // no destructor follows
      communicator_->Close();
      watchdog_.detach();
      throw;
    }
    calls_ = 0;
  }

  ~NcclCollective() override {
    const bool planned = communicator_->Close();
    if (!watchdog_.joinable()) return;
    planned ? watchdog_.join() : watchdog_.detach();
    if (!planned) static_cast<void>(peers_.release());  // kernels and the watchdog may still use what it has
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  void AllReduceSum(at::Tensor& t) override {
    CheckSummable(t);
    Begin("all-reduce");
    at::Tensor sum = Sent(t);
    if (talks_ && t.numel() > 0) {
      communicator_->Run([&](ncclComm_t comm) {
        float* data = sum.data_ptr<float>();
        return ncclAllReduce(data, data, static_cast<size_t>(t.numel()), ncclFloat, ncclSum, comm, Stream());
      });
    }
    Fetch(sum, t);
  }

  void AllGatherRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) override {
    CheckCounts(rows);
    CheckRows(in, rows[rank_]);
    CheckRows(out, SumOfRows(rows));
    CheckSameRow(in, out);
    Begin("all-gather");
    const at::Tensor own = Sent(in);
    at::Tensor all = Space(out);
    const std::vector<int64_t> first = Offsets(rows, RowBytes(in));
    const bool even = std::all_of(rows.begin(), rows.end(), [&](int64_t n) { return n == rows[0]; });
    if (first.back() == 0) {
    } else if (even && talks_) {
      communicator_->Run([&](ncclComm_t comm) {
        return ncclAllGather(Bytes(own), Bytes(all), static_cast<size_t>(first[1]), ncclInt8, comm, Stream());
      });
    } else {
      Copy(Bytes(all) + first[rank_], Bytes(own), first[rank_ + 1] - first[rank_]);
      Exchange([&](int) { return Piece{Bytes(own), first[rank_ + 1] - first[rank_]}; },
               [&](int j) { return Piece{Bytes(all) + first[j], first[j + 1] - first[j]}; });
    }
    Fetch(all, out);
    Settle(in);
  }

  void AllToAllRows(const at::Tensor& in, const std::vector<int64_t>& send_rows, at::Tensor& out,
                    const std::vector<int64_t>& recv_rows) override {
    CheckCounts(send_rows);
    CheckCounts(recv_rows);
    CheckRows(in, SumOfRows(send_rows));
    CheckRows(out, SumOfRows(recv_rows));
    CheckSameRow(in, out);
    REFOCUS_CHECK_EQ(send_rows[rank_], recv_rows[rank_]);
    Begin("all-to-all");
    const at::Tensor sent = Sent(in);
    at::Tensor received = Space(out);
    const std::vector<int64_t> from = Offsets(send_rows, RowBytes(in));
    const std::vector<int64_t> to = Offsets(recv_rows, RowBytes(in));
    Copy(Bytes(received) + to[rank_], Bytes(sent) + from[rank_], to[rank_ + 1] - to[rank_]);
    Exchange([&](int j) { return Piece{Bytes(sent) + from[j], from[j + 1] - from[j]}; },
             [&](int j) { return Piece{Bytes(received) + to[j], to[j + 1] - to[j]}; });
    Fetch(received, out);
    Settle(in);
  }

  // NCCL's own adds up in an order of its own: the terms are exchanged and added here, in rank order.
  void ReduceScatterRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) override {
    CheckCounts(rows);
    CheckSummable(in);
    CheckSummable(out);
    CheckRows(in, SumOfRows(rows));
    CheckRows(out, rows[rank_]);
    CheckSameRow(in, out);
    Begin("reduce-scatter");
    const at::Tensor terms = Sent(in).view({-1});
    at::Tensor sum = Space(out);
    const std::vector<int64_t> first = Offsets(rows, RowBytes(in) / 4);
    const int64_t mine = first[rank_ + 1] - first[rank_];
    at::Tensor others = at::empty({size_ - 1, mine}, terms.options());
    const auto slot = [&](int j) { return j < rank_ ? j : j - 1; };
    Exchange([&](int j) { return Piece{Bytes(terms) + first[j] * 4, (first[j + 1] - first[j]) * 4}; },
             [&](int j) { return Piece{Bytes(others) + slot(j) * mine * 4, mine * 4}; });
    const auto part = [&](int j) {
      return j == rank_ ? terms.narrow(0, first[rank_], mine) : others.select(0, slot(j));
    };
    if (mine > 0) {
      at::Tensor flat = sum.view({-1});
      if (size_ == 1) {
        flat.copy_(part(0), /*non_blocking=*/true);
      } else {
        at::add_out(flat, part(0), part(1));
      }
      for (int j = 2; j < size_; ++j) flat.add_(part(j));
    }
    Fetch(sum, out);
    Settle(in);
  }

  void Broadcast(at::Tensor& t, int root) override {
    REFOCUS_CHECK(t.is_contiguous());
    REFOCUS_CHECK(root >= 0 && root < size_);
    Begin("broadcast");
    at::Tensor data = rank_ == root ? Sent(t) : Space(t);
    if (talks_ && t.nbytes() > 0) {
      communicator_->Run([&](ncclComm_t comm) {
        return ncclBroadcast(Bytes(data), Bytes(data), t.nbytes(), ncclInt8, root, comm, Stream());
      });
    }
    if (rank_ == root) return Settle(t);
    Fetch(data, t);
  }

  void Check() override {
    REFOCUS_CHECK(std::this_thread::get_id() == owner_);
    REFOCUS_CHECK(!Capturing());
    communicator_->ThrowIfLost();
    WaitForStream();
  }

  void BeforeReplay() override { Begin("collectives of a graph"); }

  bool has_peer_exchange() const override { return peers_ != nullptr && peers_->memory() != nullptr; }

  const kernels::PeerMemory* NextPeerExchange(const char* what) override {
    if (!has_peer_exchange()) return nullptr;
    Begin(what);
    return peers_->memory();
  }

  // Nobody else is told: the other ranks learn it from the coordinator, or wait until the deadline.
  void Abort(const std::string& reason) override { communicator_->Lose("aborted: " + reason); }

 private:
  struct Piece {
    char* data;
    int64_t bytes;
  };

  cudaStream_t Stream() const { return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device_)); }

  bool Capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    Require(cudaStreamIsCapturing(Stream(), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }

  void CheckCounts(const std::vector<int64_t>& rows) const {
    REFOCUS_CHECK_EQ(static_cast<int>(rows.size()), size_);
  }

  // ---- The memory of the other GPUs.

  // Equal bytes of every rank, in rank order; not a call that anybody counts.
  std::string Gather(const std::string& mine) {
    const int64_t bytes = static_cast<int64_t>(mine.size());
    const at::Tensor in = at::empty({bytes}, at::kByte);
    at::Tensor out = at::empty({bytes * size_}, at::kByte);
    std::memcpy(in.data_ptr(), mine.data(), mine.size());
    AllGatherRows(in, std::vector<int64_t>(size_, bytes), out);
    return std::string(Bytes(out), out.nbytes());
  }

  void ConnectPeers(double deadline_seconds, bool wanted) {
    connecting_ = true;
    peers_ = std::make_unique<nccl::Peers>(rank_, size_, deadline_seconds, wanted, Stream(),
                                           [this](const std::string& mine) { return Gather(mine); });
    connecting_ = false;
    communicator_->Guard(peers_->given_up());
    if (rank_ != 0) return;
    LogInfo(peers_->memory() != nullptr ? "GPUs exchange rows that all compute through each other's memory"
                                        : "GPUs exchange through NCCL alone: " + peers_->why_not());
  }

  void Begin(const char* op) {
    REFOCUS_CHECK(std::this_thread::get_id() == owner_);
    if (connecting_) return communicator_->Begin("a start through peer memory", 0);
    failpoint_.Pass(++calls_);
    communicator_->Begin(op, calls_);
  }

  void Require(cudaError_t error, const char* what) const {
    if (error != cudaSuccess) communicator_->Fail(std::string(what) + ": " + cudaGetErrorString(error));
  }

  void WaitForStream() {
    const cudaStream_t stream = Stream();
    for (Pause pause;; pause.Once()) {
      const cudaError_t state = cudaStreamQuery(stream);
      communicator_->ThrowIfLost();  // a kernel that was told to give up ends as if all were well
      if (state == cudaSuccess) break;
      if (state != cudaErrorNotReady) Require(state, "the stream of the collectives");
    }
    communicator_->Idle();
  }

  // ---- Tensors on the CPU go through page-locked memory: copies from elsewhere would hold the host.

  bool OnDevice(const at::Tensor& t) const {
    if (t.is_cuda()) {
      REFOCUS_CHECK_EQ(static_cast<int>(t.get_device()), device_);
      return true;
    }
    REFOCUS_CHECK(t.is_cpu());
    REFOCUS_CHECK(!Capturing());
    return false;
  }

  at::Tensor Pinned(const at::Tensor& t) const {
    return at::empty(t.sizes(), at::TensorOptions().dtype(t.scalar_type()).pinned_memory(true));
  }

  at::Tensor Space(const at::Tensor& t) const {
    if (OnDevice(t)) return t;
    const at::Device device(at::kCUDA, static_cast<c10::DeviceIndex>(device_));
    return at::empty(t.sizes(), at::TensorOptions().dtype(t.scalar_type()).device(device));
  }

  at::Tensor Sent(const at::Tensor& t) const {
    if (OnDevice(t)) return t;
    at::Tensor pinned = Pinned(t);
    if (t.nbytes() > 0) std::memcpy(pinned.data_ptr(), t.data_ptr(), t.nbytes());
    return Space(t).copy_(pinned, /*non_blocking=*/true);
  }

  void Fetch(const at::Tensor& device, at::Tensor& t) {
    if (OnDevice(t)) return;
    at::Tensor pinned = Pinned(t);
    pinned.copy_(device, /*non_blocking=*/true);
    WaitForStream();
    if (t.nbytes() > 0) std::memcpy(t.data_ptr(), pinned.data_ptr(), t.nbytes());
  }

  // Calls with a tensor on the CPU return when they are done, also where only the input lies there.
  void Settle(const at::Tensor& in) {
    if (!OnDevice(in)) WaitForStream();
  }

  void Copy(void* to, const void* from, int64_t bytes) {
    if (bytes == 0 || to == from) return;
    Require(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, Stream()), "copy");
  }

  // send(j) to and receive(j) from every other rank j, all at once; both sides agree on the sizes.
  template <typename Send, typename Receive>
  void Exchange(const Send& send, const Receive& receive) {
    bool any = false;
    for (int j = 0; j < size_; ++j) any = any || (j != rank_ && (send(j).bytes > 0 || receive(j).bytes > 0));
    if (!any) return;
    const cudaStream_t stream = Stream();
    communicator_->Run([&](ncclComm_t comm) {
      ncclResult_t result = ncclGroupStart();
      if (result != ncclSuccess) return result;
      const auto keep = [&](ncclResult_t next) {
        if (result == ncclSuccess && next != ncclInProgress) result = next;
      };
      for (int step = 1; step < size_; ++step) {
        const int to = (rank_ + step) % size_;
        const int from = (rank_ + size_ - step) % size_;
        const Piece out = send(to);
        const Piece in = receive(from);
        if (out.bytes > 0) keep(ncclSend(out.data, static_cast<size_t>(out.bytes), ncclInt8, to, comm, stream));
        if (in.bytes > 0) keep(ncclRecv(in.data, static_cast<size_t>(in.bytes), ncclInt8, from, comm, stream));
      }
      const ncclResult_t end = ncclGroupEnd();  // also after a failure: it closes the group
      return result == ncclSuccess ? end : result;
    });
  }

  const int rank_;
  const int size_;
  const std::thread::id owner_;
  const Failpoint failpoint_;
  const std::shared_ptr<Communicator> communicator_;
  int device_ = 0;
  bool talks_ = false;  // there is an NCCL communicator
  bool connecting_ = false;
  std::unique_ptr<nccl::Peers> peers_;  // of several ranks
  int64_t calls_ = 0;
  std::thread watchdog_;
};

}  // namespace

std::string MakeNcclId() {
  ncclUniqueId id;
  const ncclResult_t result = ncclGetUniqueId(&id);
  if (result != ncclSuccess) throw CollectiveError(std::string("ncclGetUniqueId: ") + ncclGetErrorString(result));
  return std::string(id.internal, sizeof(id.internal));
}

std::shared_ptr<Collective> MakeNcclCollective(const std::string& id, int rank, int size, double deadline_seconds,
                                               bool peer_memory) {
  return std::make_shared<NcclCollective>(id, rank, size, deadline_seconds, peer_memory);
}

}  // namespace refocus
