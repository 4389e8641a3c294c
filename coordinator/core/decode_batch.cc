#include "coordinator/core/decode_batch.h"

#include <algorithm>

#include "base/limits.h"

namespace refocus {

DecodeBatch::Plan DecodeBatch::Next(std::vector<DecodeRow> pending) {
  Plan plan;
  if (pending.empty()) return plan;
  const auto earlier = [](const DecodeRow& a, const DecodeRow& b) { return a.sequence < b.sequence; };
  std::sort(pending.begin(), pending.end(), earlier);
  const auto next = std::find_if(pending.begin(), pending.end(), [&](const auto& row) { return row.sequence > last_; });
  std::rotate(pending.begin(), next, pending.end());
  if (pending.size() > static_cast<size_t>(kMaxDecodeRows)) pending.resize(kMaxDecodeRows);
  last_ = pending.back().sequence;

  double step_seconds = 0;
  int64_t tokens = kMaxDecodeSteps;
  bool measured = true;
  for (const DecodeRow& row : pending) {
    step_seconds = std::max(step_seconds, row.step_seconds);
    tokens = std::min(tokens, row.tokens);
    measured = measured && row.step_seconds > 0;
  }
  int64_t steps = 1;
  if (measured) {
    steps = std::clamp(static_cast<int64_t>(kDecodeCommandSeconds / step_seconds), int64_t{1}, kMaxDecodeSteps);
  }
  plan.steps = static_cast<int32_t>(std::min(steps, tokens));
  plan.seconds = step_seconds * plan.steps;
  plan.rows = std::move(pending);
  return plan;
}

}  // namespace refocus
