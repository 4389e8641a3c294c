// The command line of refocus-worker.
#pragma once

#include <cstdint>
#include <string>

#include "base/log.h"

namespace refocus {

struct WorkerOptions {
  std::string model;
  std::string coordinator;
  double connect_seconds = 60.0;
  std::string device = "cpu";
  std::string collective = "mpi";
  int threads = 0;             // 0: this rank's share of the cores
  int64_t kv_bytes = 0;        // 0: half of what is free after the weights, shared by the host's ranks
  double deadline_seconds = 120.0;
  bool check_finite = false;
  LogLevel log_level = LogLevel::kInfo;
};

// Ends the process for --help and --version (0) and for what it cannot read (kExitConfig). Of several ranks only the
// first prints.
WorkerOptions ParseWorkerOptions(int argc, char** argv);

}  // namespace refocus
