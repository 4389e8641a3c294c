// One chunk of a context's prefill.
#pragma once

#include <cstdint>
#include <vector>

#include "worker/model.h"

namespace refocus {

// Computes K and V of positions [first_pos, first_pos + ids.size()) with the base weights and keeps those that this
// rank owns in `extent`, which begins behind the tokens of `prefix`. Every rank computes the rows whose K/V it will hold;
// queries travel, K and V never do. first_pos tokens are prefilled already.
void PrefillRows(Model& model, const KvChain& prefix, KvExtent& extent, int64_t first_pos, const std::vector<int32_t>& ids);

}  // namespace refocus
