#include "coordinator/core/rate_search.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace refocus {

const RateSearch::Trial& RateSearch::Best() const {
  REFOCUS_CHECK(!trials_.empty());
  return *std::min_element(trials_.begin(), trials_.end(),
                           [](const Trial& a, const Trial& b) { return a.loss < b.loss; });
}

void RateSearch::Measured(double loss) {
  REFOCUS_CHECK(next_.has_value());
  constexpr double kLowest = 1e-12, kHighest = 1.0;
  trials_.push_back({*next_, std::isfinite(loss) ? loss : std::numeric_limits<double>::infinity()});
  const bool better = &Best() == &trials_.back();
  const bool passable = better || (factor_ > 1 && &Best() == &trials_.back() - 1);
  if (passable && *next_ * factor_ <= kHighest) {
    next_ = *next_ * factor_;
  } else if (factor_ > 1 && &Best() == trials_.data()) {  // upwards is worse: downwards from the first
    factor_ = 0.25;
    next_ = Best().rate * factor_;
  } else {
    next_.reset();
  }
  const bool over = static_cast<int64_t>(trials_.size()) == most_;
  if (over || (next_ && (*next_ < kLowest || *next_ > kHighest))) next_.reset();
}

double RateSearch::best() const {
  const Trial& best = Best();
  const Trial* beside[2] = {nullptr, nullptr};
  for (const Trial& trial : trials_) {
    const double factor = trial.rate / best.rate;
    if (!std::isfinite(trial.loss)) continue;
    if (factor > 0.2 && factor < 0.3) beside[0] = &trial;
    if (factor > 3 && factor < 5) beside[1] = &trial;
  }
  if (beside[0] == nullptr || beside[1] == nullptr) return best.rate;
  const double low = beside[0]->loss - best.loss, high = beside[1]->loss - best.loss;
  if (low + high <= 0) return best.rate;
  const double shift = std::clamp((low - high) / (2 * (low + high)), -0.5, 0.5);  // in factors of 4
  return best.rate * std::pow(4.0, shift);
}

}  // namespace refocus
