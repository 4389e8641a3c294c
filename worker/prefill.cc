#include "worker/prefill.h"

#include <ATen/ops/tensor.h>

namespace refocus {

void PrefillRows(Model& model, KvExtent& extent, int64_t first_pos, const std::vector<int32_t>& ids) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < ids.size(); ++i) positions.push_back(first_pos + static_cast<int64_t>(i));
  const RowPlan rows = RowPlan::ByOwner(positions, model.plan());
  std::vector<int64_t> own_ids;
  for (const int64_t index : rows.own_order()) own_ids.push_back(ids[index]);
  ForwardInput input;
  input.rows = &rows;
  input.ids = at::tensor(own_ids, at::kLong);
  input.append = &extent;
  input.keys_only = true;  // nothing reads the last layer's output
  model.Forward(input);
}

}  // namespace refocus
