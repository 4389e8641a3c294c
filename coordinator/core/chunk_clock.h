// How long rows take, learned from the chunks that ran: time of a row ~ a + b * position (linear layers, and attention
// over what came before). Chunk sizes and ETAs come from it.
#pragma once

#include <cstdint>

namespace refocus {

class ChunkClock {
 public:
  void Measured(int64_t first_pos, int64_t rows, double seconds);

  // Rows of the next chunk at first_pos, at most `left`: a multiple of `unit` (except when fewer are left) that should
  // take at most kChunkSeconds, at least one unit, never above kMaxChunkRows.
  int64_t NextRows(int64_t first_pos, int64_t left, int64_t unit) const;

  // Predicted seconds of the rows [first_pos, end_pos); 0 before anything was measured.
  double Seconds(int64_t first_pos, int64_t end_pos) const;

 private:
  void Fit(double* a, double* b) const;

  // Sums of a least-squares line through (mid position, seconds per row), weighted by rows; old ones fade.
  double w_ = 0, wx_ = 0, wy_ = 0, wxx_ = 0, wxy_ = 0;
  int64_t largest_ = 0;  // rows; sizes at most double, so that one odd measurement cannot make a huge chunk
};

}  // namespace refocus
