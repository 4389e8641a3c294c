// How the rows of one forward pass lie on the ranks. Attention always sees all of them; the linear layers see a rank's
// own.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "base/shard_plan.h"

namespace refocus {

class RowPlan {
 public:
  // Every rank computes every row: few rows, where splitting the linear layers saves nothing.
  static RowPlan Replicated(const std::vector<int64_t>& positions, const ShardPlan& plan);
  // A row is computed where its K and V will live: no K/V ever travels (prefill, long prompts). Balanced to one block.
  static RowPlan ByOwner(const std::vector<int64_t>& positions, const ShardPlan& plan);
  // Equal shares in order (adaptation: the rows write no K/V).
  static RowPlan Even(const std::vector<int64_t>& positions, const ShardPlan& plan);

  bool split() const { return split_; }
  int64_t rows() const { return static_cast<int64_t>(positions_.size()); }  // of all ranks
  int64_t own_rows() const { return split_ ? counts_[shard_] : rows(); }
  // Rows per rank, rank by rank; only when split.
  const std::vector<int64_t>& counts() const { return counts_; }
  // Position of every row in attention's order: rank 0's rows, then rank 1's, ... [rows]
  const std::vector<int64_t>& positions() const { return positions_; }
  // The same order in terms of the caller's: order()[i] is the index into the constructor's `positions`.
  const std::vector<int64_t>& order() const { return order_; }
  // This rank's part of the two.
  std::vector<int64_t> own_positions() const;
  std::vector<int64_t> own_order() const;
  // Which rank computes the caller's row `index`, and as which of its own rows (rank 0 when replicated).
  std::pair<int64_t, int64_t> Locate(int64_t index) const;

 private:
  bool split_ = false;
  int64_t shard_ = 0;
  int64_t first_ = 0;  // of this rank's rows in positions_
  std::vector<int64_t> counts_;
  std::vector<int64_t> positions_;
  std::vector<int64_t> order_;
};

}  // namespace refocus
