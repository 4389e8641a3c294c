// Linking largest_allocation.cc replaces operator new with one that remembers the largest request.
#pragma once

#include <cstddef>

namespace refocus {

// Bytes of the largest single allocation on any thread since the last call; starts again from 0.
std::size_t TakeLargestAllocation();

}  // namespace refocus
