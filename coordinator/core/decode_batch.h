// Which sequences decode in the next command, and how many steps: all of them together, up to kMaxDecodeRows; of more,
// the next ones in a circle. Batches grow and shrink with every command. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace refocus {

// A command's time, so that a cancel or another job does not wait long; and its steps.
inline constexpr double kDecodeCommandSeconds = 0.05;
inline constexpr int64_t kMaxDecodeSteps = 32;

struct DecodeRow {
  uint64_t sequence = 0;    // on the ranks; later sequences have greater numbers
  int64_t tokens = 0;       // it may still take, >= 1
  double step_seconds = 0;  // of the last step it took part in; 0: none yet
  size_t owner = 0;         // the caller's
};

class DecodeBatch {
 public:
  struct Plan {
    std::vector<DecodeRow> rows;  // empty: nothing to decode
    int32_t steps = 0;
    double seconds = 0;  // predicted; 0 before anything was measured
  };
  // No more steps than any of its sequences may take. A step takes about as long as the slowest one that its sequences
  // took part in. With a newcomer nobody knows: one step.
  Plan Next(std::vector<DecodeRow> pending);

 private:
  uint64_t last_ = 0;  // the sequence behind which the next batch begins, in a circle
};

}  // namespace refocus
