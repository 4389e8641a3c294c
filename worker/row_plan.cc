#include "worker/row_plan.h"

#include <numeric>

#include "base/check.h"

namespace refocus {

RowPlan RowPlan::Replicated(const std::vector<int64_t>& positions, const ShardPlan& plan) {
  RowPlan rows;
  rows.shard_ = plan.shard;
  rows.positions_ = positions;
  rows.order_.resize(positions.size());
  std::iota(rows.order_.begin(), rows.order_.end(), 0);
  return rows;
}

RowPlan RowPlan::ByOwner(const std::vector<int64_t>& positions, const ShardPlan& plan) {
  RowPlan rows;
  rows.split_ = true;
  rows.shard_ = plan.shard;
  rows.counts_.assign(plan.shards, 0);
  for (int64_t shard = 0; shard < plan.shards; ++shard) {
    if (shard == plan.shard) rows.first_ = rows.rows();
    for (size_t i = 0; i < positions.size(); ++i) {
      if (ShardPlan::OwnerOf(positions[i], plan.shards) != shard) continue;
      rows.positions_.push_back(positions[i]);
      rows.order_.push_back(static_cast<int64_t>(i));
      ++rows.counts_[shard];
    }
  }
  return rows;
}

RowPlan RowPlan::Even(const std::vector<int64_t>& positions, const ShardPlan& plan) {
  RowPlan rows = Replicated(positions, plan);
  rows.split_ = true;
  const int64_t count = rows.rows();
  for (int64_t shard = 0; shard < plan.shards; ++shard) {
    rows.counts_.push_back(count * (shard + 1) / plan.shards - count * shard / plan.shards);
  }
  rows.first_ = count * plan.shard / plan.shards;
  return rows;
}

std::vector<int64_t> RowPlan::own_positions() const {
  return {positions_.begin() + first_, positions_.begin() + first_ + own_rows()};
}

std::vector<int64_t> RowPlan::own_order() const {
  return {order_.begin() + first_, order_.begin() + first_ + own_rows()};
}

std::pair<int64_t, int64_t> RowPlan::Locate(int64_t index) const {
  if (!split_) return {0, index};
  int64_t row = 0;
  for (size_t shard = 0; shard < counts_.size(); ++shard) {
    for (int64_t i = 0; i < counts_[shard]; ++i, ++row) {
      if (order_[row] == index) return {static_cast<int64_t>(shard), i};
    }
  }
  REFOCUS_CHECK(false);
  return {0, 0};
}

}  // namespace refocus
