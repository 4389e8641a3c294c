#include "coordinator/core/span_policy.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "base/limits.h"

namespace refocus {
namespace {

constexpr size_t kLongestRun = 4;    // tokens
constexpr size_t kRowsAhead = 32;    // look-ups under way at a time
constexpr size_t kAskEvery = 2048;   // times that many rows
constexpr uint64_t kHeldOutOf = 8;

struct StartRange {
  int64_t first = 0;
  int64_t end = 0;  // exclusive
};

// In place, seeded.
template <typename T>
void Shuffle(std::vector<T>* values, uint64_t seed) {
  SplitMix64 random(seed);
  for (size_t i = values->size(); i > 1; --i) std::swap((*values)[i - 1], (*values)[random.Below(i)]);
}

// The starts of spans of `rows` rows that intersect no held-out span, as disjoint rising ranges.
std::vector<StartRange> AllowedStarts(int64_t token_count, int64_t rows, std::vector<SpanRange> held_out) {
  std::sort(held_out.begin(), held_out.end(), [](const SpanRange& a, const SpanRange& b) { return a.start < b.start; });
  std::vector<StartRange> allowed;
  int64_t next = 0;
  for (const SpanRange& probe : held_out) {
    const int64_t last_before = probe.start - rows - 1;  // its interval ends just before the probe's
    if (last_before >= next) allowed.push_back({next, last_before + 1});
    next = std::max(next, probe.start + probe.rows + 1);
  }
  if (next < token_count - rows) allowed.push_back({next, token_count - rows});
  return allowed;
}

int64_t Count(const std::vector<StartRange>& ranges) {
  int64_t count = 0;
  for (const StartRange& range : ranges) count += range.end - range.first;
  return count;
}

class UniformSpans : public SpanPolicy {
 public:
  UniformSpans(std::vector<StartRange> starts, int64_t rows, int64_t spans, uint64_t seed)
      : starts_(std::move(starts)), count_(Count(starts_)), rows_(rows), spans_(spans), random_(seed) {
    REFOCUS_CHECK_GE(count_, 1);
  }

  std::vector<SpanRange> NextStep() override {
    std::vector<SpanRange> step;
    for (int64_t i = 0; i < spans_; ++i) step.push_back(Next());
    return step;
  }

 private:
  SpanRange Next() {
    auto index = static_cast<int64_t>(random_.Below(static_cast<uint64_t>(count_)));
    for (const StartRange& range : starts_) {
      const int64_t size = range.end - range.first;
      if (index < size) return {range.first + index, rows_};
      index -= size;
    }
    REFOCUS_CHECK(false);
  }

  const std::vector<StartRange> starts_;
  const int64_t count_;
  const int64_t rows_;
  const int64_t spans_;
  SplitMix64 random_;
};

class ExplicitSpans : public SpanPolicy {
 public:
  ExplicitSpans(std::vector<SpanRange> spans, int64_t per_step) : spans_(std::move(spans)), per_step_(per_step) {
    REFOCUS_CHECK(!spans_.empty());
  }

  std::vector<SpanRange> NextStep() override {
    std::vector<SpanRange> step;
    for (int64_t i = 0; i < per_step_; ++i) step.push_back(spans_[next_++ % spans_.size()]);
    return step;
  }

 private:
  const std::vector<SpanRange> spans_;
  const int64_t per_step_;
  size_t next_ = 0;
};

class ScatteredRows : public SpanPolicy {
 public:
  ScatteredRows(std::vector<int64_t> rows, int64_t per_step, uint64_t seed)
      : rows_(std::move(rows)), per_step_(std::min(per_step, static_cast<int64_t>(rows_.size()))), random_(seed) {
    REFOCUS_CHECK_GE(per_step_, 1);
  }

  std::vector<SpanRange> NextStep() override {
    const size_t count = rows_.size(), wanted = static_cast<size_t>(per_step_);
    // The rest of a round that is shorter than a step is left for the next round: steps are of one size.
    if (count - used_ < wanted) used_ = 0;
    for (size_t i = used_; i < used_ + wanted; ++i) std::swap(rows_[i], rows_[i + random_.Below(count - i)]);
    std::vector<int64_t> step(rows_.begin() + static_cast<std::ptrdiff_t>(used_),
                              rows_.begin() + static_cast<std::ptrdiff_t>(used_ + wanted));
    used_ += wanted;
    std::sort(step.begin(), step.end());
    return AsSpans(step);
  }

 private:
  std::vector<int64_t> rows_;  // the first `used_` were drawn in this round
  const int64_t per_step_;
  size_t used_ = 0;
  SplitMix64 random_;
};

uint64_t Mixed(uint64_t value) { return SplitMix64(value).Next(); }

// What followed the runs of one length so far: one flat table, open addressing, never more than two thirds full. What
// another length has left in it counts as free.
class RunTable {
 public:
  explicit RunTable(size_t runs) : slots_(std::bit_ceil(runs + runs / 2 + 1)) {}

  struct Run {
    uint64_t key = 0;
    int32_t followed_by = 0;
    bool always = true;
    uint8_t length = 0;  // 0: free
  };
  void Prefetch(uint64_t key) const { __builtin_prefetch(&slots_[key & (slots_.size() - 1)], 1); }
  // The run, or where it goes: then its length is another.
  Run& Find(uint64_t key, uint8_t length) {
    size_t slot = key & (slots_.size() - 1);
    while (slots_[slot].length == length && slots_[slot].key != key) slot = (slot + 1) & (slots_.size() - 1);
    return slots_[slot];
  }

 private:
  std::vector<Run> slots_;
};

uint64_t KeyOf(std::span<const int32_t> run) {
  uint64_t key = 0;
  for (const int32_t token : run) key = Mixed(key + static_cast<uint32_t>(token) + 1);
  return key;
}

}  // namespace

uint64_t SplitMix64::Next() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

uint64_t SplitMix64::Below(uint64_t n) {
  REFOCUS_CHECK_GE(n, uint64_t{1});
  const uint64_t rest = (0 - n) % n;  // 2^64 mod n: draws below it would favour small values
  while (true) {
    const uint64_t draw = Next();
    if (draw >= rest) return draw % n;
  }
}

std::unique_ptr<SpanPolicy> MakeUniformSpans(int64_t token_count, int64_t rows, const std::vector<SpanRange>& held_out,
                                             uint64_t seed, int64_t spans) {
  return std::make_unique<UniformSpans>(AllowedStarts(token_count, rows, held_out), rows, spans, seed);
}

std::unique_ptr<SpanPolicy> MakeExplicitSpans(std::vector<SpanRange> spans, int64_t per_step) {
  return std::make_unique<ExplicitSpans>(std::move(spans), per_step);
}

std::unique_ptr<SpanPolicy> MakeScatteredRows(std::vector<int64_t> rows, int64_t per_step, uint64_t seed) {
  return std::make_unique<ScatteredRows>(std::move(rows), per_step, seed);
}

std::vector<int64_t> RecallRows(std::span<const int32_t> tokens, const std::function<bool()>& stop) {
  const size_t rows = tokens.empty() ? 0 : tokens.size() - 1;
  enum : char { kOpen, kKnown, kNotKnown };
  std::vector<char> found(rows, kOpen);
  RunTable runs(rows);
  std::array<uint64_t, kRowsAhead> keys;
  // One length after the other, the longest first. A look-up is a cache miss: many are under way at a time.
  for (size_t length = kLongestRun; length >= 1; --length) {
    for (size_t first = length - 1; first < rows; first += kRowsAhead) {
      if (stop && first / kRowsAhead % kAskEvery == 0 && stop()) return {};
      const size_t end = std::min(rows, first + kRowsAhead);
      for (size_t row = first; row < end; ++row) {
        keys[row - first] = KeyOf(tokens.subspan(row + 1 - length, length));
        runs.Prefetch(keys[row - first]);
      }
      for (size_t row = first; row < end; ++row) {
        const int32_t next = tokens[row + 1];
        RunTable::Run& run = runs.Find(keys[row - first], static_cast<uint8_t>(length));
        if (run.length != length) {
          run = {keys[row - first], next, true, static_cast<uint8_t>(length)};
          continue;
        }
        const bool same = run.followed_by == next;
        if (found[row] == kOpen) found[row] = run.always && same ? kKnown : kNotKnown;
        run.always &= same;
      }
    }
  }
  std::vector<int64_t> known;
  for (size_t row = 0; row < rows; ++row) {
    if (found[row] == kKnown) known.push_back(static_cast<int64_t>(row));
  }
  return known;
}

HeldOutRows HoldOut(std::span<const int32_t> tokens, const std::vector<int64_t>& rows, int64_t most) {
  HeldOutRows split;
  for (const int64_t row : rows) {
    const uint64_t mixed = Mixed(static_cast<uint32_t>(tokens[static_cast<size_t>(row)]));
    (mixed % kHeldOutOf == 0 && most > 0 ? split.held_out : split.training).push_back(row);
  }
  if (split.training.empty()) return {rows, {}};
  const auto all = static_cast<int64_t>(split.held_out.size());
  if (all <= most) return split;
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < most; ++i) kept.push_back(split.held_out[static_cast<size_t>(i * all / most)]);
  split.held_out = std::move(kept);
  return split;
}

FoundRows FindRows(const RowSearch& search, const std::function<bool()>& stop) {
  std::vector<int64_t> rows = RecallRows(*search.tokens, stop);
  const auto late = std::lower_bound(rows.begin(), rows.end(), search.first_row);
  if (late != rows.end()) rows.erase(rows.begin(), late);
  return {search.tokens, HoldOut(*search.tokens, rows, search.most_held_out)};
}

std::vector<SpanRange> AsSpans(const std::vector<int64_t>& rows) {
  std::vector<SpanRange> spans;
  for (const int64_t row : rows) {
    if (!spans.empty() && spans.back().start + spans.back().rows == row && spans.back().rows < kMaxSpanTokens) {
      ++spans.back().rows;
    } else {
      spans.push_back({row, 1});
    }
  }
  return spans;
}

std::vector<SpanRange> CandidateSpans(int64_t token_count, int64_t rows, const std::vector<SpanRange>& held_out,
                                      int64_t count, uint64_t seed) {
  const std::vector<StartRange> allowed = AllowedStarts(token_count, rows, held_out);
  std::vector<int64_t> starts;
  for (const StartRange& range : allowed) {
    for (int64_t start = range.first; start < range.end; start += rows + 1) starts.push_back(start);
  }
  REFOCUS_CHECK(!starts.empty());
  const auto fit = static_cast<int64_t>(starts.size());
  count = std::min(count, fit);
  std::vector<SpanRange> spans;
  for (int64_t i = 0; i < count; ++i) {
    spans.push_back({starts[static_cast<size_t>((2 * i + 1) * fit / (2 * count))], rows});
  }
  Shuffle(&spans, seed);
  return spans;
}

std::vector<size_t> ChooseByLoss(const std::vector<double>& losses, double share, double skip) {
  REFOCUS_CHECK(!losses.empty());
  const auto of_all = [&](double part) {
    return static_cast<size_t>(std::lround(part * static_cast<double>(losses.size())));
  };
  std::vector<size_t> order(losses.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return losses[a] > losses[b]; });
  const size_t first = std::min(of_all(skip), losses.size() - 1);
  const size_t count = std::clamp<size_t>(of_all(share), 1, losses.size() - first);
  std::vector<size_t> chosen(order.begin() + static_cast<std::ptrdiff_t>(first),
                             order.begin() + static_cast<std::ptrdiff_t>(first + count));
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

std::vector<SpanRange> ProbeSpans(int64_t token_count, int64_t rows, int64_t count) {
  const int64_t starts = token_count - rows;
  for (; count > 0 && starts > 0; --count) {
    std::vector<SpanRange> probes;
    bool disjoint = true;
    for (int64_t i = 0; i < count; ++i) {
      const SpanRange probe{(2 * i + 1) * starts / (2 * count), rows};
      if (!probes.empty() && probe.start <= probes.back().start + rows) disjoint = false;
      probes.push_back(probe);
    }
    if (disjoint && Count(AllowedStarts(token_count, rows, probes)) * 4 >= starts) return probes;
  }
  return {};
}

}  // namespace refocus
