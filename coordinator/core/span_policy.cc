#include "coordinator/core/span_policy.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace refocus {
namespace {

struct StartRange {
  int64_t first = 0;
  int64_t end = 0;  // exclusive
};

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
  UniformSpans(std::vector<StartRange> starts, int64_t rows, uint64_t seed)
      : starts_(std::move(starts)), count_(Count(starts_)), rows_(rows), random_(seed) {
    REFOCUS_CHECK_GE(count_, 1);
  }

  SpanRange Next() override {
    auto index = static_cast<int64_t>(random_.Below(static_cast<uint64_t>(count_)));
    for (const StartRange& range : starts_) {
      const int64_t size = range.end - range.first;
      if (index < size) return {range.first + index, rows_};
      index -= size;
    }
    REFOCUS_CHECK(false);
  }

 private:
  const std::vector<StartRange> starts_;
  const int64_t count_;
  const int64_t rows_;
  SplitMix64 random_;
};

class ExplicitSpans : public SpanPolicy {
 public:
  explicit ExplicitSpans(std::vector<SpanRange> spans) : spans_(std::move(spans)) { REFOCUS_CHECK(!spans_.empty()); }

  SpanRange Next() override { return spans_[next_++ % spans_.size()]; }

 private:
  const std::vector<SpanRange> spans_;
  size_t next_ = 0;
};

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
                                             uint64_t seed) {
  return std::make_unique<UniformSpans>(AllowedStarts(token_count, rows, held_out), rows, seed);
}

std::unique_ptr<SpanPolicy> MakeExplicitSpans(std::vector<SpanRange> spans) {
  return std::make_unique<ExplicitSpans>(std::move(spans));
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
