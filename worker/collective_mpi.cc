// Ranks are processes of MPI_COMM_WORLD. Everything is built from Isend and Irecv that are polled under the deadline:
// MPI's own blocking calls never return when a peer is gone, and its reductions do not promise an order of summation.
//
// After a failed call messages may still be on their way into the tensors of that call. They are kept alive for good,
// and the process must end without MPI_Finalize (std::_Exit with a non-zero code, so that mpirun ends the other ranks).
#include <mpi.h>
#include <sched.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "worker/collective.h"
#include "worker/collective_failpoint.h"
#include "worker/collective_rows.h"

namespace refocus {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kDataTag = 0;
constexpr int kNoticeTag = 1;
constexpr int kNoticeBytes = 256;                     // one eager message: it leaves without the receiver's help
constexpr int64_t kPieceBytes = int64_t{16} << 20;    // of one message; MPI counts are int
constexpr int64_t kSegmentsElements = int64_t{6} << 20;  // of a reduction, over all ranks: 24 MiB travel at a time
static_assert(kSegmentsElements / kPageFloats / 1024 > 0, "even 1024 ranks have a page each");
constexpr int64_t kSmallReduceBytes = 32 << 10;       // gathered whole and summed by everyone: one round instead of two
constexpr int kSpins = 200;
constexpr std::chrono::milliseconds kPatience{50};    // without any message before a waiting rank starts to sleep
constexpr std::chrono::microseconds kNap{50};

// Whatever unfinished messages may still write to; never freed.
std::vector<at::Tensor>& KeptForGood() {
  static auto* kept = new std::vector<at::Tensor>;
  return *kept;
}

class MpiCollective : public Collective {
 public:
  explicit MpiCollective(double deadline_seconds)
      : deadline_seconds_(deadline_seconds), owner_(std::this_thread::get_id()) {
    int ready = 0;
    MPI_Initialized(&ready);
    REFOCUS_CHECK(ready != 0);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size_);
    if (size_ > 1) MakeCommunicator();
    failpoint_ = Failpoint(rank_);
  }

  // Before MPI_Finalize, which frees the communicator.
  ~MpiCollective() override {
    if (failed_) {
      KeptForGood().push_back(scratch_);
      KeptForGood().push_back(notices_);
    }
    if (failed_ || notice_request_ == MPI_REQUEST_NULL) return;
    MPI_Cancel(&notice_request_);
    MPI_Wait(&notice_request_, MPI_STATUS_IGNORE);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  void AllReduceSum(at::Tensor& t) override {
    CheckSummable(t);
    StartCall("all-reduce", {t});
    const int64_t count = t.numel();
    float* data = t.data_ptr<float>();
    if (size_ == 1) {
    } else if (count * 4 <= kSmallReduceBytes) {
      ReduceSmall(data, count);
    } else {
      const std::vector<int64_t> first = EqualParts(count, size_);
      ReduceParts(data, first, data + first[rank_], data);
    }
    EndCall();
  }

  void AllGatherRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) override {
    CheckGather(in, rows, out, rank_, size_);
    StartCall("all-gather", {in, out});
    const std::vector<int64_t> first = Offsets(rows, RowBytes(in));
    for (int j : Peers()) Receive(Bytes(out) + first[j], first[j + 1] - first[j], j, &requests_);
    for (int j : Peers()) Send(Bytes(in), first[rank_ + 1] - first[rank_], j, &requests_);
    CopyBytes(Bytes(out) + first[rank_], Bytes(in), first[rank_ + 1] - first[rank_]);
    Wait(requests_);
    EndCall();
  }

  void AllToAllRows(const at::Tensor& in, const std::vector<int64_t>& send_rows, at::Tensor& out,
                    const std::vector<int64_t>& recv_rows) override {
    CheckAllToAll(in, send_rows, out, recv_rows, rank_, size_);
    StartCall("all-to-all", {in, out});
    const std::vector<int64_t> from = Offsets(send_rows, RowBytes(in));
    const std::vector<int64_t> to = Offsets(recv_rows, RowBytes(in));
    for (int j : Peers()) Receive(Bytes(out) + to[j], to[j + 1] - to[j], j, &requests_);
    for (int j : Peers()) Send(Bytes(in) + from[j], from[j + 1] - from[j], j, &requests_);
    CopyBytes(Bytes(out) + to[rank_], Bytes(in) + from[rank_], to[rank_ + 1] - to[rank_]);
    Wait(requests_);
    EndCall();
  }

  void ReduceScatterRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) override {
    CheckReduceScatter(in, rows, out, rank_, size_);
    StartCall("reduce-scatter", {in, out});
    const std::vector<int64_t> first = Offsets(rows, RowBytes(in) / 4);
    if (size_ == 1) {
      CopyBytes(Bytes(out), Bytes(in), static_cast<int64_t>(in.nbytes()));
    } else {
      ReduceParts(in.data_ptr<float>(), first, out.data_ptr<float>(), nullptr);
    }
    EndCall();
  }

  void Broadcast(at::Tensor& t, int root) override {
    CheckBroadcast(t, root, size_);
    StartCall("broadcast", {t});
    const int64_t bytes = static_cast<int64_t>(t.nbytes());
    if (rank_ == root) {
      for (int j : Peers()) Send(Bytes(t), bytes, j, &requests_);
    } else {
      Receive(Bytes(t), bytes, root, &requests_);
    }
    Wait(requests_);
    EndCall();
  }

  void Check() override {
    REFOCUS_CHECK(std::this_thread::get_id() == owner_);
    if (failed_ || aborted_) Fail("");
    CheckNotice();
  }

  // The others hear of it at once when the owner calls, and with the owner's next poll otherwise.
  void Abort(const std::string& reason) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (reason_.empty()) reason_ = "aborted: " + reason;
    }
    aborted_ = true;
    if (std::this_thread::get_id() == owner_ && !failed_) {
      failed_ = true;
      TellOthers(reason_);
    }
  }

 private:
  using Requests = std::vector<MPI_Request>;

  void MakeCommunicator() {
    StartCall("set-up of the communicator", {});
    MPI_Comm comm = MPI_COMM_NULL;
    requests_.resize(1);
    MPI_Comm_idup(MPI_COMM_WORLD, &comm, &requests_[0]);
    Wait(requests_);
    comm_ = comm;
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    MPI_Irecv(Heard(), kNoticeBytes, MPI_BYTE, MPI_ANY_SOURCE, kNoticeTag, comm_, &notice_request_);
    EndCall();
    calls_ = 0;
  }

  // The other ranks, each rank beginning with its successor so that not all talk to rank 0 first.
  std::vector<int> Peers() const {
    std::vector<int> peers;
    for (int i = 1; i < size_; ++i) peers.push_back((rank_ + i) % size_);
    return peers;
  }

  void StartCall(const char* op, std::vector<at::Tensor> tensors) {
    REFOCUS_CHECK(std::this_thread::get_id() == owner_);
    if (failed_ || aborted_) Fail("");
    CheckNotice();
    op_ = op;
    failpoint_.Pass(++calls_);
    in_use_ = std::move(tensors);
    start_ = Clock::now();
    requests_.clear();
  }

  void EndCall() {
    in_use_.clear();
    requests_.clear();
  }

  void Require(int code, const char* what) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    Fail(std::string(op_) + ": " + what + ": " + std::string(text, static_cast<size_t>(length)));
  }

  void Send(const void* data, int64_t bytes, int peer, Requests* requests) {
    for (int64_t done = 0; done < bytes; done += kPieceBytes) {
      const int count = static_cast<int>(std::min(kPieceBytes, bytes - done));
      requests->push_back(MPI_REQUEST_NULL);
      const char* piece = static_cast<const char*>(data) + done;
      Require(MPI_Isend(piece, count, MPI_BYTE, peer, kDataTag, comm_, &requests->back()), "send");
    }
  }

  // Messages between two ranks keep their order, so both sides need only post the pieces alike.
  void Receive(void* data, int64_t bytes, int peer, Requests* requests) {
    for (int64_t done = 0; done < bytes; done += kPieceBytes) {
      const int count = static_cast<int>(std::min(kPieceBytes, bytes - done));
      requests->push_back(MPI_REQUEST_NULL);
      char* piece = static_cast<char*>(data) + done;
      Require(MPI_Irecv(piece, count, MPI_BYTE, peer, kDataTag, comm_, &requests->back()), "receive");
    }
  }

  // Returns when all are complete. Spins for a moment, then yields, since there may be more ranks than cores; a rank
  // that has long heard nothing naps, so that it does not take time from the one it waits for.
  void Wait(Requests& requests) {
    completed_.resize(requests.size());
    size_t open = requests.size();
    Clock::time_point heard = Clock::now();
    for (int polls = 1; open > 0; ++polls) {
      int count = 0;
      Require(MPI_Testsome(static_cast<int>(requests.size()), requests.data(), &count, completed_.data(),
                           MPI_STATUSES_IGNORE),
              "poll");
      if (count > 0) {
        open -= static_cast<size_t>(count);
        heard = Clock::now();
        continue;
      }
      if (aborted_) Fail("");
      if (polls < kSpins) continue;
      sched_yield();
      if (polls % 16 != 0) continue;
      CheckNotice();
      const Clock::time_point now = Clock::now();
      if (std::chrono::duration<double>(now - start_).count() > deadline_seconds_) {
        FailLate();
      }
      if (now - heard > kPatience) std::this_thread::sleep_for(kNap);
    }
  }

  [[noreturn]] void FailLate() {
    std::array<char, 200> text;
    std::snprintf(text.data(), text.size(), "%s (collective %lld): rank %d of %d waited beyond the deadline of %g s",
                  op_, static_cast<long long>(calls_), rank_, size_, deadline_seconds_);
    Fail(text.data());
  }

  void CheckNotice() {
    if (notice_request_ == MPI_REQUEST_NULL) return;
    int told = 0;
    MPI_Status status;
    MPI_Test(&notice_request_, &told, &status);
    if (told == 0) return;
    Heard()[kNoticeBytes - 1] = '\0';
    const std::lock_guard<std::mutex> lock(mutex_);
    if (reason_.empty()) reason_ = "rank " + std::to_string(status.MPI_SOURCE) + ": " + Heard();
    failed_ = true;
    KeepTensors();
    throw CollectiveError(reason_);
  }

  // Empty `reason`: the one that was latched before.
  [[noreturn]] void Fail(const std::string& reason) {
    std::string text;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (reason_.empty()) reason_ = reason;
      text = reason_;
    }
    KeepTensors();
    if (!failed_) TellOthers(text);
    failed_ = true;
    throw CollectiveError(text);
  }

  void KeepTensors() {
    for (at::Tensor& t : in_use_) KeptForGood().push_back(std::move(t));
    in_use_.clear();
  }

  void TellOthers(const std::string& reason) {
    if (comm_ == MPI_COMM_NULL) return;
    std::snprintf(Told(), kNoticeBytes, "%s", reason.c_str());
    for (int j : Peers()) {
      MPI_Request request;
      if (MPI_Isend(Told(), kNoticeBytes, MPI_BYTE, j, kNoticeTag, comm_, &request) == MPI_SUCCESS) {
        MPI_Request_free(&request);
      }
    }
  }

  char* Heard() { return Bytes(notices_); }
  char* Told() { return Bytes(notices_) + kNoticeBytes; }

  float* Scratch(int64_t elements) {
    if (!scratch_.defined() || scratch_.numel() < elements) scratch_ = at::empty({elements}, at::kFloat);
    return scratch_.data_ptr<float>();
  }

  void ReduceSmall(float* data, int64_t count) {
    float* all = Scratch(count * size_);
    std::vector<const float*> parts(static_cast<size_t>(size_));
    for (int j = 0; j < size_; ++j) parts[j] = j == rank_ ? data : all + j * count;
    for (int j : Peers()) Receive(all + j * count, count * 4, j, &requests_);
    for (int j : Peers()) Send(data, count * 4, j, &requests_);
    Wait(requests_);
    SumInOrder(parts, count, data);
  }

  // Part j of `in` is elements [first[j], first[j + 1]). out = the sum over ranks of this rank's part, in rank order;
  // may lie in `in`. With `gathered` (laid out like `in`, may be `in`) every rank's sums go there as well.
  //
  // Segment by segment: while one is summed, the next one's terms and the last one's sums travel. Both ranks of a pair
  // post their messages in the same order.
  void ReduceParts(const float* in, const std::vector<int64_t>& first, float* out, float* gathered) {
    int64_t longest = 0;
    for (int j = 0; j < size_; ++j) longest = std::max(longest, first[j + 1] - first[j]);
    if (longest == 0) return;
    const int64_t pages = (longest + kPageFloats - 1) / kPageFloats;
    const int64_t width = std::min(pages, kSegmentsElements / kPageFloats / size_) * kPageFloats;
    const int64_t segments = (longest + width - 1) / width;
    const auto length = [&](int j, int64_t segment) {
      return std::clamp<int64_t>(first[j + 1] - first[j] - segment * width, 0, width);
    };
    float* const scratch = Scratch(2 * size_ * width);
    const auto slot = [&](int j, int64_t segment) { return scratch + (segment % 2 * size_ + j) * width; };
    std::array<Requests, 2> terms;
    const auto post_terms = [&](int64_t s) {
      Requests& requests = terms[s % 2];
      requests.clear();
      for (int j : Peers()) Receive(slot(j, s), length(rank_, s) * 4, j, &requests);
      for (int j : Peers()) Send(in + first[j] + s * width, length(j, s) * 4, j, &requests);
    };
    post_terms(0);
    std::vector<const float*> parts(static_cast<size_t>(size_));
    for (int64_t s = 0; s < segments; ++s) {
      if (s + 1 < segments) post_terms(s + 1);
      Wait(terms[s % 2]);
      const int64_t offset = s * width;
      for (int j = 0; j < size_; ++j) parts[j] = j == rank_ ? in + first[j] + offset : slot(j, s);
      SumInOrder(parts, length(rank_, s), out + offset);
      if (gathered == nullptr) continue;
      for (int j : Peers()) Receive(gathered + first[j] + offset, length(j, s) * 4, j, &requests_);
      for (int j : Peers()) Send(out + offset, length(rank_, s) * 4, j, &requests_);
    }
    Wait(requests_);
  }

  const double deadline_seconds_;
  const std::thread::id owner_;
  int rank_ = 0;
  int size_ = 1;
  MPI_Comm comm_ = MPI_COMM_NULL;
  Failpoint failpoint_{-1};

  const char* op_ = "";
  int64_t calls_ = 0;
  Clock::time_point start_;
  std::vector<at::Tensor> in_use_;
  Requests requests_;
  std::vector<int> completed_;
  at::Tensor scratch_;

  MPI_Request notice_request_ = MPI_REQUEST_NULL;  // a peer's farewell
  at::Tensor notices_ = at::zeros({2 * kNoticeBytes}, at::kByte);  // heard, told
  bool failed_ = false;  // owner only
  std::atomic<bool> aborted_{false};
  std::mutex mutex_;
  std::string reason_;  // first cause
};

}  // namespace

std::shared_ptr<Collective> MakeMpiCollective(double deadline_seconds) {
  return std::make_shared<MpiCollective>(deadline_seconds);
}

}  // namespace refocus
