// How this process was started: as one rank of `mpirun -np P`, or by itself, to get its rank from the coordinator.
// Nothing but this and collective_mpi.cc sees MPI.
#pragma once

#include <cstdint>
#include <string>

namespace refocus {

struct Launch {
  bool mpi = true;
  int rank = 0;   // -1: the coordinator will say
  int size = 1;
  int ranks_on_host = 1;
  int local_rank = 0;     // among them
  int threads = 1;        // this rank's share of the cores that it and the host's other ranks may run on; at least 1
  int64_t free_bytes = 0;  // of the host's memory, measured once for all its ranks; -1: unknown
  std::string nonce;      // 32 hex digits, the same on all ranks of this launch and on no other
};

// MPI_Init_thread and what the ranks must agree on. Blocks until all ranks of the launch are there. Ends the process
// (kExitGroup) when MPI cannot be started.
Launch StartLaunch();

// A process of a group of `size` that started by itself: does not touch MPI and waits for nobody. `nonce` is what the
// group's processes share; empty for a group of one, which makes its own. It knows of no other rank on its host.
Launch StartByItself(int size, const std::string& nonce);

// For mpirun's ranks: rank 0's bytes on all of them.
void ShareFromRankZero(std::string* bytes);

// MPI_Finalize: waits for the other ranks. Only for a planned end, with no collective failed and all of them destroyed.
// Nothing to do for a process that started by itself.
void FinishLaunch(const Launch& launch);

}  // namespace refocus
