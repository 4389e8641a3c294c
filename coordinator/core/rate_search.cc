#include "coordinator/core/rate_search.h"

#include "base/check.h"

namespace refocus {

void RateSearch::Measured(double loss) {
  REFOCUS_CHECK(next_.has_value());
  constexpr double kLowest = 1e-12, kHighest = 1.0;
  const bool better = measured_ == 0 || loss < best_loss_;
  if (better) {
    best_ = *next_;
    if (loss < best_loss_) best_loss_ = loss;
  } else if (measured_ == 1 && factor_ > 1.0) {
    factor_ = 0.25;  // upwards is worse at once: try downwards from the first
  }
  ++measured_;
  const bool turned = !better && measured_ == 2 && factor_ < 1.0;
  next_ = better || turned ? std::optional(best_ * factor_) : std::nullopt;
  if (measured_ == most_ || (next_ && (*next_ < kLowest || *next_ > kHighest))) next_.reset();
}

}  // namespace refocus
