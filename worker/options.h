// The command line of refocus-worker.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "base/log.h"
#include "base/memory_plan.h"

namespace refocus {

struct WorkerOptions {
  std::string model;
  std::string coordinator;
  double connect_seconds = 60.0;
  DeviceKind device = DeviceKind::kCpu;
  std::string collective;      // "mpi" or "nccl": what the device speaks
  int group_size = 0;          // of a process that starts by itself; 0: mpirun (or nobody) says
  std::string group_name;      // what the processes of one such group share
  int threads = 0;             // 0: this rank's share of the cores
  int64_t kv_bytes = 0;        // 0: chosen from the free memory
  KvType kv = KvType::kDevice;
  double deadline_seconds = 120.0;
  bool peer_memory = true;     // of GPUs, where it works
  bool check_finite = false;
  std::string rope_scaling;              // as in ParseRopeScaling
  std::optional<uint64_t> random_seed;  // weights made from it instead of read
  LogLevel log_level = LogLevel::kInfo;
};

// Ends the process for --help and --version (0) and for what it cannot read (kExitConfig). Of several ranks only the
// first prints.
WorkerOptions ParseWorkerOptions(int argc, char** argv);

}  // namespace refocus
