#include "coordinator/core/kv_ledger.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/shard_plan.h"

namespace refocus {
namespace {

int64_t Sum(const std::vector<int64_t>& values) { return std::accumulate(values.begin(), values.end(), int64_t{0}); }

}  // namespace

void KvLedger::Reset(std::vector<int64_t> capacity_bytes, int64_t bytes_per_token) {
  book_ = std::make_shared<Book>();
  book_->used.assign(capacity_bytes.size(), 0);
  book_->capacity = std::move(capacity_bytes);
  book_->bytes_per_token = bytes_per_token;
}

std::vector<int64_t> KvLedger::Need(int64_t first_pos, int64_t tokens) const {
  REFOCUS_CHECK_GE(first_pos, 0);
  REFOCUS_CHECK_GE(tokens, 0);
  const auto ranks = static_cast<int64_t>(book_->capacity.size());
  std::vector<int64_t> need;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const ShardPlan plan{ranks, rank};
    need.push_back((plan.CountBelow(first_pos + tokens) - plan.CountBelow(first_pos)) * book_->bytes_per_token);
  }
  return need;
}

Status KvLedger::Fits(const std::vector<int64_t>& need, const char* reason, const std::string& what) const {
  for (size_t rank = 0; rank < need.size(); ++rank) {
    const int64_t free_here = book_->capacity[rank] - book_->used[rank];
    if (need[rank] <= free_here) continue;
    const std::string need_bytes = std::to_string(Sum(need));
    const std::string free_bytes = std::to_string(capacity_bytes() - used_bytes());
    return Error(StatusCode::kResourceExhausted, reason,
                 what + " of " + need_bytes + " bytes, free " + free_bytes +
                     " bytes; delete or shorten a context, or start more ranks",
                 {{"need_bytes", need_bytes},
                  {"free_bytes", free_bytes},
                  {"rank", std::to_string(rank)},
                  {"rank_need_bytes", std::to_string(need[rank])},
                  {"rank_free_bytes", std::to_string(free_here)}});
  }
  return absl::OkStatus();
}

Status KvLedger::Check(int64_t first_pos, int64_t tokens) const {
  return Fits(Need(first_pos, tokens), "KV_CAPACITY", "K/V memory: got " + std::to_string(tokens) + " tokens");
}

Status KvLedger::CheckEach(int64_t bytes) const {
  const std::vector<int64_t> need(book_->capacity.size(), bytes);
  return Fits(need, "ADAPT_OUT_OF_MEMORY", "adapter memory: got an adaptation");
}

std::shared_ptr<KvReservation> KvLedger::TakeEach(int64_t bytes) {
  return std::make_shared<KvReservation>(book_, std::vector<int64_t>(book_->capacity.size(), bytes));
}

StatusOr<std::shared_ptr<KvReservation>> KvLedger::Reserve(int64_t first_pos, int64_t tokens) {
  REFOCUS_RETURN_IF_ERROR(Check(first_pos, tokens));
  return std::make_shared<KvReservation>(book_, Need(first_pos, tokens));
}

int64_t KvLedger::capacity_bytes() const { return Sum(book_->capacity); }
int64_t KvLedger::used_bytes() const { return Sum(book_->used); }
int64_t KvLedger::least_free_bytes() const {
  int64_t least = INT64_MAX;
  for (size_t rank = 0; rank < book_->capacity.size(); ++rank) {
    least = std::min(least, book_->capacity[rank] - book_->used[rank]);
  }
  return least;
}
int64_t KvLedger::bytes_per_token() const { return book_->bytes_per_token; }

KvReservation::KvReservation(std::shared_ptr<KvLedger::Book> book, std::vector<int64_t> bytes)
    : book_(std::move(book)), bytes_(std::move(bytes)) {
  for (size_t rank = 0; rank < bytes_.size(); ++rank) book_->used[rank] += bytes_[rank];
}

KvReservation::~KvReservation() {
  for (size_t rank = 0; rank < bytes_.size(); ++rank) book_->used[rank] -= bytes_[rank];
}

int64_t KvReservation::bytes() const { return Sum(bytes_); }

}  // namespace refocus
