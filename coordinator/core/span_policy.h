// Which spans an adaptation step trains on. Pure: the same arguments give the same spans on every platform.
//
// A row attends to the cached K/V of its prefix and to nothing that belongs to a step: rows of a step need not be
// neighbours.
//
// A span of `rows` rows starting at `start` reads tokens [start, start + rows]: row i predicts token i + 1, so the last
// row needs one token more. Two spans therefore intersect iff their closed intervals [start, start + rows] do.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace refocus {

struct SpanRange {
  int64_t start = 0;
  int64_t rows = 0;  // >= 1; start + rows < token_count
};

class SpanPolicy {
 public:
  virtual ~SpanPolicy() = default;
  virtual std::vector<SpanRange> NextStep() = 0;  // what the next step trains on, at least one row
};

// A step has `spans` spans of `rows` rows, starts uniform over all that intersect no span of `held_out` (which must leave at least one;
// see ProbeSpans). With replacement. Seeded by SplitMix64; a draw below n takes the high bits by rejection.
std::unique_ptr<SpanPolicy> MakeUniformSpans(int64_t token_count, int64_t rows, const std::vector<SpanRange>& held_out,
                                             uint64_t seed, int64_t spans = 1);

// `spans` in order, again and again, `per_step` at a time. Not empty.
std::unique_ptr<SpanPolicy> MakeExplicitSpans(std::vector<SpanRange> spans, int64_t per_step = 1);

// A step has `per_step` of `rows` (rising positions, not empty), or all where there are fewer: drawn without
// replacement until all were used, then anew. Neighbours come as one span, spans in rising order.
std::unique_ptr<SpanPolicy> MakeScatteredRows(std::vector<int64_t> rows, int64_t per_step, uint64_t seed);

// Rows whose next token can be looked up in what stands before them: the longest run of up to 4 tokens that ends with the
// row and was there before was followed by that token each time. Rising. 2^20 tokens take 0.07 s on a core of an AMD
// EPYC (Zen 4), 2^22 take 0.4 s. `stop` is asked now and then; once it said true the result means nothing.
std::vector<int64_t> RecallRows(std::span<const int32_t> tokens, const std::function<bool()>& stop = nullptr);

// Splits `rows` by the token at the row, so that no token stands on both sides: about one in eight goes to the second, of
// which at most `most`, spread evenly, are kept. Nothing is held out where that would leave no row for training.
struct HeldOutRows {
  std::vector<int64_t> training;
  std::vector<int64_t> held_out;
};
HeldOutRows HoldOut(std::span<const int32_t> tokens, const std::vector<int64_t>& rows, int64_t most);

// At most `count` >= 1 spans of `rows` rows that intersect neither each other nor `held_out` (which must leave at least
// one), spread evenly over the text. In seeded order: the first ones are as good a sample as any.
std::vector<SpanRange> CandidateSpans(int64_t token_count, int64_t rows, const std::vector<SpanRange>& held_out,
                                      int64_t count, uint64_t seed);

// Of candidates by falling loss (equal ones as they come) the first `skip` are left out and the next `share` of all taken,
// at least one. Indices, rising. `losses` is not empty; shares are rounded to whole candidates.
std::vector<size_t> ChooseByLoss(const std::vector<double>& losses, double share, double skip);

// What `recall_rows` of an adaptation needs to know of a text, found outside of the coordinator's turn, which it would
// hold up. It keeps the text alive, whatever becomes of the context meanwhile.
struct RowSearch {
  std::shared_ptr<const std::vector<int32_t>> tokens;
  int64_t most_held_out = 0;  // rows
  int64_t first_row = 0;      // only rows from here on, where there are any
};
struct FoundRows {
  std::shared_ptr<const std::vector<int32_t>> tokens;  // that were searched; null: none were
  HeldOutRows rows;
};
FoundRows FindRows(const RowSearch& search, const std::function<bool()>& stop = nullptr);

// Neighbours as one span.
std::vector<SpanRange> AsSpans(const std::vector<int64_t>& rows);

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
