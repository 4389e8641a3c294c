// How this process was started: alone, or as one rank of `mpirun -np P`. Nothing but this and collective_mpi.cc sees
// MPI.
#pragma once

#include <cstdint>
#include <string>

namespace refocus {

struct Launch {
  int rank = 0;
  int size = 1;
  int ranks_on_host = 1;
  int threads = 1;        // this rank's share of the cores that it and the host's other ranks may run on; at least 1
  int64_t free_bytes = 0;  // of the host's memory, measured once for all its ranks; -1: unknown
  std::string nonce;      // 32 hex digits, the same on all ranks of this launch and on no other
};

// MPI_Init_thread and what the ranks must agree on. Blocks until all ranks of the launch are there. Ends the process
// (kExitGroup) when MPI cannot be started.
Launch StartLaunch();

// MPI_Finalize: waits for the other ranks. Only for a planned end, with no collective failed and all of them destroyed.
void FinishLaunch();

}  // namespace refocus
