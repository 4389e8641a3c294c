// The ranks that a collective is tested on: threads (world_local.cc) or the processes of one mpirun (world_mpi.cc).
#pragma once

#include <functional>
#include <vector>

#include "worker/collective.h"

namespace refocus {

// Group sizes that this binary can form.
std::vector<int> WorldSizes();

// Runs body once per rank, on all ranks at the same time; returns when those of this process are done. An exception
// that leaves the body fails the test.
void OnEveryRank(int size, double deadline_seconds, const std::function<void(Collective&)>& body);

// Whether two ranks that call different operations are told so; else they run into the deadline.
bool WorldComparesCalls();

}  // namespace refocus
