#include "worker/prefill.h"

namespace refocus {

void PrefillRows(Model& model, const KvChain& prefix, KvExtent& extent, int64_t first_pos,
                 const std::vector<int32_t>& ids) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < ids.size(); ++i) positions.push_back(first_pos + static_cast<int64_t>(i));
  const RowPlan rows = RowPlan::ByOwner(positions, model.plan());
  int64_t writing = 0;
  ForwardInput input = model.MakeInput(rows, ids, &extent, &writing);
  input.extents = prefix.shares();
  input.keys_only = true;  // nothing reads the last layer's output
  model.Forward(input);
  extent.Advance(writing);
}

}  // namespace refocus
