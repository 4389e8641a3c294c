#include "coordinator/core/prefix.h"

#include <algorithm>

#include "base/limits.h"

namespace refocus {
namespace {

// Extents of `session` that hold tokens below `end`.
int64_t ExtentsBelow(const Session& session, int64_t end) {
  const auto& extents = session.extents();
  return std::count_if(extents.begin(), extents.end(), [&](const ContextExtent& e) { return e.first_pos < end; });
}

// What `session` could give at most.
int64_t MostShared(const Session& session, int64_t tokens, int64_t unit) {
  int64_t most = std::min(session.shareable_tokens(), tokens - 1);
  const auto& extents = session.extents();
  constexpr size_t kShared = kMaxContextExtents - 1;  // and one of its own
  if (extents.size() > kShared) most = std::min(most, extents[kShared].first_pos);
  return most / unit * unit;
}

}  // namespace

bool SharedPrefix::there() const {
  const std::shared_ptr<Session> session = parent.lock();
  return session != nullptr && session->cache_uid() == parent_uid && session->shareable_tokens() >= tokens;
}

SharedPrefix FindPrefix(const std::map<std::string, std::shared_ptr<Session>>& sessions,
                        const std::vector<int32_t>& tokens, int64_t unit) {
  SharedPrefix best;
  for (const auto& [name, session] : sessions) {
    const int64_t most = MostShared(*session, static_cast<int64_t>(tokens.size()), unit);
    if (most < kMinSharedTokens || most <= best.tokens) continue;
    const auto [here, there] = std::mismatch(tokens.begin(), tokens.begin() + most, session->tokens().begin());
    const int64_t equal = (here - tokens.begin()) / unit * unit;
    if (equal < kMinSharedTokens || equal <= best.tokens) continue;
    best.parent = session;
    best.parent_uid = session->cache_uid();
    best.tokens = equal;
  }
  if (best.none()) return best;
  const auto& extents = best.parent.lock()->extents();
  best.extents.assign(extents.begin(), extents.begin() + ExtentsBelow(*best.parent.lock(), best.tokens));
  return best;
}

}  // namespace refocus
