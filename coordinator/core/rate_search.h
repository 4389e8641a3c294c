// Which learning rates to try, by the loss that each gives: the first, then four times as much as long as that is better,
// or else a fourth as long as that is. Pure.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

namespace refocus {

class RateSearch {
 public:
  // At most `most` >= 1 trials.
  RateSearch(double first, int64_t most) : most_(most), next_(first) {}

  std::optional<double> Next() const { return next_; }  // none: over
  void Measured(double loss);                           // of Next(); NaN is worse than anything
  double best() const { return best_; }                 // of those measured, the one with the lowest loss

 private:
  int64_t most_;
  std::optional<double> next_;
  int64_t measured_ = 0;
  double factor_ = 4.0;
  double best_ = 0.0;
  double best_loss_ = std::numeric_limits<double>::infinity();
};

}  // namespace refocus
