#include "coordinator/core/lanes.h"

#include <algorithm>

namespace refocus {

std::array<Lane, kLanes> Lanes::Order() const {
  std::array<Lane, kLanes> order = {Lane::kPrompts, Lane::kDecode, Lane::kWork};
  std::stable_sort(order.begin(), order.end(),
                   [&](Lane a, Lane b) { return time_[static_cast<size_t>(a)] < time_[static_cast<size_t>(b)]; });
  return order;
}

void Lanes::Charge(Lane chosen, double seconds) { time(chosen) += seconds / kLaneWeights[static_cast<size_t>(chosen)]; }

void Lanes::PassOver(Lane lane, Lane chosen) { time(lane) = std::max(time(lane), time(chosen)); }

}  // namespace refocus
