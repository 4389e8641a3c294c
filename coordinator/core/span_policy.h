// Which spans an adaptation step trains on. Pure: the same arguments give the same spans on every platform.
//
// A span of `rows` rows starting at `start` reads tokens [start, start + rows]: row i predicts token i + 1, so the last
// row needs one token more. Two spans therefore intersect iff their closed intervals [start, start + rows] do.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace refocus {

struct SpanRange {
  int64_t start = 0;
  int64_t rows = 0;  // >= 1; start + rows < token_count
};

class SpanPolicy {
 public:
  virtual ~SpanPolicy() = default;
  virtual SpanRange Next() = 0;  // the next span of the next step; steps take spans_per_step of them
};

// Spans of `rows` rows, starts uniform over all that intersect no span of `held_out` (which must leave at least one;
// see ProbeSpans). With replacement. Seeded by SplitMix64; a draw below n takes the high bits by rejection.
std::unique_ptr<SpanPolicy> MakeUniformSpans(int64_t token_count, int64_t rows, const std::vector<SpanRange>& held_out,
                                             uint64_t seed);

// `spans` in order, again and again. Not empty.
std::unique_ptr<SpanPolicy> MakeExplicitSpans(std::vector<SpanRange> spans);

// At most `count` disjoint spans, spread evenly over the text. Fewer, or none, when holding them out would leave less
// than a quarter of the starts for training.
std::vector<SpanRange> ProbeSpans(int64_t token_count, int64_t rows, int64_t count);

// The generator behind MakeUniformSpans.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  uint64_t Below(uint64_t n);  // uniform in [0, n); n >= 1

 private:
  uint64_t state_;
};

}  // namespace refocus
