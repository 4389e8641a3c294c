// How the ranks of a group do a command all or none, and how they refuse it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "worker/collective.h"

namespace refocus {

// Rank 0's word, on all ranks.
bool LeaveTogether(Collective& collective, bool leave);

// OK only when every rank's `status` is: what one rank cannot do, none does. `reason` is that of a refusal by another
// rank.
Status AllOrNone(Collective& collective, Status status, const std::string& reason);

// COMMAND_OUT_OF_PLACE: not now.
Status Precondition(const std::string& what, const std::string& got, const std::string& allowed);
// UNKNOWN_UID.
Status Absent(const std::string& what, uint64_t uid);
// Every id is in [0, vocab).
Status CheckTokenIds(const std::vector<int32_t>& ids, int64_t vocab);

}  // namespace refocus
