// Ranks are threads of one process: a call publishes its tensors, meets the others, copies from them, and meets them
// again before anybody may touch what was published.
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <utility>

#include "worker/collective.h"
#include "worker/collective_rows.h"

namespace refocus {
namespace {

using Clock = std::chrono::steady_clock;

// One rank's part in the running call. Holds references, so that a rank that gave up cannot free what another still
// reads.
struct Post {
  std::string op;
  at::Tensor in;
  at::Tensor out;
  std::vector<int64_t> rows;
};

class Meeting {
 public:
  Meeting(int size, double deadline_seconds)
      : size_(size), deadline_seconds_(deadline_seconds), posts_(static_cast<size_t>(size)) {}

  int size() const { return size_; }
  const Post& post(int rank) const { return posts_[rank]; }  // between Begin and End

  Clock::time_point Begin(int rank, Post post) {
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::chrono::duration<double>(deadline_seconds_));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ThrowIfFailed();
      posts_[rank] = std::move(post);
    }
    Meet(rank, deadline);
    for (int j = 0; j < size_; ++j) {
      if (posts_[j].op != posts_[rank].op) {
        Fail("rank " + std::to_string(rank) + " calls " + posts_[rank].op + " while rank " + std::to_string(j) +
             " calls " + posts_[j].op);
      }
    }
    return deadline;
  }

  void Meet(int rank, Clock::time_point deadline) {
    std::unique_lock<std::mutex> lock(mutex_);
    ThrowIfFailed();
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++generation_;
      wake_.notify_all();
      return;
    }
    const uint64_t generation = generation_;
    wake_.wait_until(lock, deadline, [&] { return generation_ != generation || failed_; });
    if (generation_ != generation) return;
    if (!failed_) {
      FailLocked(posts_[rank].op + ": rank " + std::to_string(rank) + " waited for " +
                 std::to_string(size_ - arrived_) + " of " + std::to_string(size_) + " ranks beyond the deadline");
    }
    ThrowIfFailed();
  }

  void End(int rank, Clock::time_point deadline) {
    Meet(rank, deadline);
    const std::lock_guard<std::mutex> lock(mutex_);
    posts_[rank] = Post{};
  }

  [[noreturn]] void Fail(const std::string& reason) {
    const std::lock_guard<std::mutex> lock(mutex_);
    FailLocked(reason);
    throw CollectiveError(reason_);
  }

  void Abort(const std::string& reason) {
    const std::lock_guard<std::mutex> lock(mutex_);
    FailLocked("aborted: " + reason);
  }

  void Check() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ThrowIfFailed();
  }

 private:
  void FailLocked(const std::string& reason) {
    if (!failed_) reason_ = reason;
    failed_ = true;
    wake_.notify_all();
  }

  void ThrowIfFailed() const {
    if (failed_) throw CollectiveError(reason_);
  }

  const int size_;
  const double deadline_seconds_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Post> posts_;
  int arrived_ = 0;
  uint64_t generation_ = 0;
  bool failed_ = false;
  std::string reason_;
};

class LocalCollective : public Collective {
 public:
  LocalCollective(int rank, std::shared_ptr<Meeting> meeting) : rank_(rank), meeting_(std::move(meeting)) {}

  int rank() const override { return rank_; }
  int size() const override { return meeting_->size(); }

  void AllReduceSum(at::Tensor& t) override {
    CheckSummable(t);
    const auto deadline = meeting_->Begin(rank_, {"all-reduce of " + std::to_string(t.numel()), t, t, {}});
    // Nobody else reads this rank's part of anybody, so the sums can be formed where the terms are.
    const std::vector<int64_t> first = EqualParts(t.numel(), size());
    SumPart(first[rank_], first[rank_ + 1], t.data_ptr<float>() + first[rank_]);
    meeting_->Meet(rank_, deadline);
    for (int j = 0; j < size(); ++j) {
      if (j == rank_) continue;
      CopyBytes(Bytes(t) + first[j] * 4, Bytes(meeting_->post(j).out) + first[j] * 4, (first[j + 1] - first[j]) * 4);
    }
    meeting_->End(rank_, deadline);
  }

  void AllGatherRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) override {
    CheckGather(in, rows, out, rank_, size());
    const int64_t row = RowBytes(in);
    const auto deadline = meeting_->Begin(rank_, {"all-gather of " + List(rows) + RowText(row), in, out, rows});
    const std::vector<int64_t> first = Offsets(rows, row);
    for (int j = 0; j < size(); ++j) {
      CopyBytes(Bytes(out) + first[j], Bytes(meeting_->post(j).in), first[j + 1] - first[j]);
    }
    meeting_->End(rank_, deadline);
  }

  void AllToAllRows(const at::Tensor& in, const std::vector<int64_t>& send_rows, at::Tensor& out,
                    const std::vector<int64_t>& recv_rows) override {
    CheckAllToAll(in, send_rows, out, recv_rows, rank_, size());
    const int64_t row = RowBytes(in);
    const auto deadline = meeting_->Begin(rank_, {"all-to-all" + RowText(row), in, out, send_rows});
    const std::vector<int64_t> to = Offsets(recv_rows, row);
    for (int j = 0; j < size(); ++j) {
      const Post& peer = meeting_->post(j);
      if (peer.rows[rank_] != recv_rows[j]) {
        meeting_->Fail("all-to-all: rank " + std::to_string(rank_) + " expects " + std::to_string(recv_rows[j]) +
                       " rows from rank " + std::to_string(j) + ", which sends " + std::to_string(peer.rows[rank_]));
      }
      CopyBytes(Bytes(out) + to[j], Bytes(peer.in) + Offsets(peer.rows, row)[rank_], to[j + 1] - to[j]);
    }
    meeting_->End(rank_, deadline);
  }

  void ReduceScatterRows(const at::Tensor& in, const std::vector<int64_t>& rows, at::Tensor& out) override {
    CheckReduceScatter(in, rows, out, rank_, size());
    const int64_t row = RowBytes(in);
    const auto deadline = meeting_->Begin(rank_, {"reduce-scatter of " + List(rows) + RowText(row), in, out, rows});
    const std::vector<int64_t> first = Offsets(rows, row / 4);
    SumPart(first[rank_], first[rank_ + 1], out.data_ptr<float>());
    meeting_->End(rank_, deadline);
  }

  void Broadcast(at::Tensor& t, int root) override {
    CheckBroadcast(t, root, size());
    const int64_t bytes = static_cast<int64_t>(t.nbytes());
    const auto deadline = meeting_->Begin(
        rank_, {"broadcast of " + std::to_string(bytes) + " bytes from " + std::to_string(root), t, t, {}});
    if (rank_ != root) CopyBytes(Bytes(t), Bytes(meeting_->post(root).in), bytes);
    meeting_->End(rank_, deadline);
  }

  void Check() override { meeting_->Check(); }

  void Abort(const std::string& reason) override { meeting_->Abort(reason); }

 private:
  static std::string List(const std::vector<int64_t>& rows) {
    std::string text;
    for (const int64_t n : rows) text += std::to_string(n) + " ";
    return text + "rows";
  }

  static std::string RowText(int64_t row) { return " of " + std::to_string(row) + " bytes"; }

  // out [end - begin] = sum over ranks of elements [begin, end) of what they published.
  void SumPart(int64_t begin, int64_t end, float* out) {
    std::vector<const float*> parts(static_cast<size_t>(size()));
    for (int j = 0; j < size(); ++j) parts[j] = meeting_->post(j).in.data_ptr<float>() + begin;
    SumInOrder(parts, end - begin, out);
  }

  const int rank_;
  const std::shared_ptr<Meeting> meeting_;
};

}  // namespace

std::vector<std::shared_ptr<Collective>> MakeLocalCollectives(int size, double deadline_seconds) {
  REFOCUS_CHECK_GE(size, 1);
  auto meeting = std::make_shared<Meeting>(size, deadline_seconds);
  std::vector<std::shared_ptr<Collective>> ranks;
  for (int r = 0; r < size; ++r) ranks.push_back(std::make_shared<LocalCollective>(r, meeting));
  return ranks;
}

}  // namespace refocus
