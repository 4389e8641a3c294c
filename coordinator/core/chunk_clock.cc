#include "coordinator/core/chunk_clock.h"

#include <algorithm>

#include "base/limits.h"

namespace refocus {

void ChunkClock::Measured(int64_t first_pos, int64_t rows, double seconds) {
  if (rows <= 0 || !(seconds > 0)) return;
  constexpr double kFade = 0.97;
  for (double* sum : {&w_, &wx_, &wy_, &wxx_, &wxy_}) *sum *= kFade;
  const double w = static_cast<double>(rows);
  const double x = static_cast<double>(first_pos) + 0.5 * w;
  const double y = seconds / w;
  w_ += w;
  wx_ += w * x;
  wy_ += w * y;
  wxx_ += w * x * x;
  wxy_ += w * x * y;
  largest_ = std::max(largest_, rows);
}

void ChunkClock::Fit(double* a, double* b) const {
  *a = w_ > 0 ? wy_ / w_ : 0;
  *b = 0;
  const double spread = w_ * wxx_ - wx_ * wx_;
  if (w_ <= 0 || spread <= 1e-9 * w_ * wxx_) return;
  const double slope = (w_ * wxy_ - wx_ * wy_) / spread;
  const double start = (wy_ - slope * wx_) / w_;
  if (slope < 0 || start < 0) return;  // noise: a constant predicts better
  *a = start;
  *b = slope;
}

int64_t ChunkClock::NextRows(int64_t first_pos, int64_t left, int64_t unit) const {
  const int64_t most_units = std::max<int64_t>(1, kMaxChunkRows / unit);
  int64_t units = 1;
  if (w_ > 0) {
    const int64_t doubled = std::max<int64_t>(1, 2 * largest_ / unit);
    units = std::min(most_units, doubled);
    while (units > 1 && Seconds(first_pos, first_pos + units * unit) > kChunkSeconds) --units;
  }
  return std::min({left, units * unit, kMaxChunkRows});
}

double ChunkClock::Seconds(int64_t first_pos, int64_t end_pos) const {
  double a = 0, b = 0;
  Fit(&a, &b);
  const double from = static_cast<double>(first_pos), to = static_cast<double>(end_pos);
  return a * (to - from) + 0.5 * b * (to * to - from * from);
}

}  // namespace refocus
