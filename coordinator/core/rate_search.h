// Which learning rates to try, by the loss that each gives: the first, then four times as much until two were worse than the
// best, as few steps may stumble at a rate between two good ones; where the first is the best, then a fourth as long as
// that is better. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace refocus {

class RateSearch {
 public:
  // At most `most` >= 1 trials.
  RateSearch(double first, int64_t most) : most_(most), next_(first) {}

  std::optional<double> Next() const { return next_; }  // none: over
  void Measured(double loss);                           // of Next(); what is not finite is worse than anything

  // The lowest point of the parabola through the best of those measured and its neighbours, loss over the rate's logarithm,
  // at most a factor of 2 away; the best itself where a neighbour was not measured or not finite. After the first Measured.
  double best() const;

 private:
  struct Trial {
    double rate = 0;
    double loss = 0;
  };
  const Trial& Best() const;

  int64_t most_;
  std::optional<double> next_;
  double factor_ = 4.0;
  std::vector<Trial> trials_;
};

}  // namespace refocus
