// The ranks that a collective is tested on: threads (world_local.cc) or the processes of one mpirun, with CPUs
// (world_mpi.cc) or a GPU each (world_nccl.cc).
#pragma once

#include <functional>
#include <string>
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

// Where tensors may lie: "cpu", "cuda".
std::vector<std::string> WorldDevices();

// Whether all-reduce adds up in rank order; else only the same bits everywhere are promised.
bool WorldReducesInRankOrder();

// Whether a rank that gives up is heard by the others before their deadline.
bool WorldTellsOthers();

// Seconds; short, but enough for a few calls on this world, the first ones included.
double WorldShortDeadline();

}  // namespace refocus
