// What Linux says about this machine and this process.
#pragma once

#include <cstdint>
#include <string>

namespace refocus {

std::string HostName();

// Resident memory of this process; 0 when unknown. Cheap.
int64_t ResidentBytes();

// What can still be allocated without swapping: MemAvailable, or what the control group leaves if that is less (cached
// files count as free: they are dropped on demand). -1: unknown. Reads ROOT/proc/meminfo and ROOT/sys/fs/cgroup/memory.*.
int64_t FreeMemoryBytes(const std::string& root = "");

}  // namespace refocus
