#include "worker/agreement.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

namespace refocus {

bool LeaveTogether(Collective& collective, bool leave) {
  if (collective.size() == 1) return leave;
  at::Tensor word = at::tensor({static_cast<int64_t>(leave)}, at::kLong);
  collective.Broadcast(word, 0);
  return word.item<int64_t>() != 0;
}

Status AllOrNone(Collective& collective, Status status, const std::string& reason) {
  const at::Tensor own = at::tensor({static_cast<int64_t>(status.code())}, at::kLong);
  at::Tensor all = at::empty({collective.size()}, at::kLong);
  collective.AllGatherRows(own, std::vector<int64_t>(collective.size(), 1), all);
  for (int rank = 0; rank < collective.size() && status.ok(); ++rank) {
    const auto code = static_cast<StatusCode>(all.const_data_ptr<int64_t>()[rank]);
    if (code != StatusCode::kOk) {
      status = Error(code, reason,
                     "rank " + std::to_string(rank) + " refused the command; nothing was changed on any rank",
                     {{"rank", std::to_string(rank)}});
    }
  }
  return status;
}

Status Precondition(const std::string& what, const std::string& got, const std::string& allowed) {
  return Error(StatusCode::kFailedPrecondition, "COMMAND_OUT_OF_PLACE", what + ": got " + got + ", allowed " + allowed,
               {{"got", got}, {"allowed", allowed}});
}

Status Absent(const std::string& what, uint64_t uid) {
  return Error(StatusCode::kNotFound, "UNKNOWN_UID", what + " " + std::to_string(uid) + " does not exist on this rank");
}

Status CheckTokenIds(const std::vector<int32_t>& ids, int64_t vocab) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab) {
      return Error(StatusCode::kInvalidArgument, "TOKEN_ID_OUT_OF_RANGE",
                   "token id at index " + std::to_string(i) + ": got " + std::to_string(ids[i]) + ", allowed 0 to " +
                       std::to_string(vocab - 1));
    }
  }
  return {};
}

}  // namespace refocus
