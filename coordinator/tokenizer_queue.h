// Positions of mergeable pairs, by rank and then by position: one list per rank, because a long piece has few ranks and
// finds most of its pairs from left to right. A heap of all pairs is an order of magnitude slower at tens of millions.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace refocus {

class PairQueue {
 public:
  void Push(uint32_t rank, int32_t position) {
    List& list = lists_[rank];
    if (list.empty()) {
      ranks_.push(rank);
      list.in_order.clear();
      list.head = 0;
    }
    if (list.in_order.empty() || list.in_order.back() <= position) {
      list.in_order.push_back(position);
    } else {
      list.late.push(position);
    }
  }

  // The lowest rank and its leftmost position; false when nothing is left.
  bool Pop(uint32_t* rank, int32_t* position) {
    if (ranks_.empty()) return false;
    *rank = ranks_.top();
    List& list = lists_[*rank];
    const bool has_ordered = list.head < list.in_order.size();
    if (has_ordered && (list.late.empty() || list.in_order[list.head] <= list.late.top())) {
      *position = list.in_order[list.head++];
    } else {
      *position = list.late.top();
      list.late.pop();
    }
    if (list.empty()) ranks_.pop();
    return true;
  }

 private:
  struct List {
    bool empty() const { return head == in_order.size() && late.empty(); }
    std::vector<int32_t> in_order;  // from head on
    size_t head = 0;
    std::priority_queue<int32_t, std::vector<int32_t>, std::greater<>> late;
  };

  absl::flat_hash_map<uint32_t, List> lists_;
  std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> ranks_;  // of lists with positions
};

}  // namespace refocus
