// Whose turn it is when several kinds of work want the group: each lane has a share of the group's time.
//
//   kPrompts  questions before their first token (their rows take little time) and scores     weight 2
//   kDecode   the decode batch that all answers share                                         weight 2
//   kWork     prefill chunks, adaptation steps, and prompts as long as these                   weight 1
//
// The lane that had least of its share goes first (start-time fair queueing): a short question goes before the next
// chunk of a prefill, and yet under a flood of questions prefill and adaptation keep a fifth of the time. A lane that
// wants nothing saves up nothing. Times are predicted when a command is sent and corrected when it was measured.
#pragma once

#include <array>
#include <cstddef>

namespace refocus {

enum class Lane { kPrompts, kDecode, kWork };
inline constexpr size_t kLanes = 3;
inline constexpr std::array<double, kLanes> kLaneWeights = {2, 2, 1};

class Lanes {
 public:
  // The lane to ask first, second, third.
  std::array<Lane, kLanes> Order() const;
  // `chosen` sends a command that should take `seconds`.
  void Charge(Lane chosen, double seconds);
  // `lane` was asked before `chosen` and had nothing to send.
  void PassOver(Lane lane, Lane chosen);

 private:
  double& time(Lane lane) { return time_[static_cast<size_t>(lane)]; }

  std::array<double, kLanes> time_ = {};  // seconds had / weight
};

}  // namespace refocus
