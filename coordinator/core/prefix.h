// Contexts that begin with the same tokens share the K/V of that beginning, whoever uploaded them: plain equality of
// tokens, whatever made them (text, ids, a prologue).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/core/session.h"

namespace refocus {

// Another context's K/V that a prefill may begin with.
struct SharedPrefix {
  std::weak_ptr<Session> parent;
  uint64_t parent_uid = 0;  // its cache; 0: nothing is shared
  int64_t tokens = 0;
  std::vector<ContextExtent> extents;  // that hold them

  bool none() const { return parent_uid == 0; }
  // The parent still has them. Another prefill of it has another uid.
  bool there() const;
};

// The longest beginning of `tokens` that is computed in some session: a multiple of `unit` tokens (a block on every
// rank), at least kMinSharedTokens, less than all of them (a prefill computes something), and in no more extents than
// the ranks chain. O(tokens) for each session that begins alike, O(1) for the others.
SharedPrefix FindPrefix(const std::map<std::string, std::shared_ptr<Session>>& sessions,
                        const std::vector<int32_t>& tokens, int64_t unit);

}  // namespace refocus
