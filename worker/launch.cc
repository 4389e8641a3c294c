#include "worker/launch.h"

#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "base/log.h"
#include "base/status.h"
#include "worker/host.h"

namespace refocus {
namespace {

// 1 for every core that this process may run on; all 0 when unknown.
std::vector<int> OwnCores() {
  std::vector<int> mine(CPU_SETSIZE, 0);
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return mine;
  for (int core = 0; core < CPU_SETSIZE; ++core) mine[core] = CPU_ISSET(core, &set) ? 1 : 0;
  return mine;
}

// Cores are shared by the ranks whose affinity masks name them; with mpirun's binding every rank has its own.
int ShareOfCores(MPI_Comm host) {
  const std::vector<int> mine = OwnCores();
  std::vector<int> users(CPU_SETSIZE, 0);
  MPI_Allreduce(mine.data(), users.data(), CPU_SETSIZE, MPI_INT, MPI_SUM, host);
  double share = 1e-9;
  for (int core = 0; core < CPU_SETSIZE; ++core) share += mine[core] != 0 ? 1.0 / users[core] : 0.0;
  return share < 1.0 ? 1 : static_cast<int>(share);
}

std::string MakeNonce() {
  std::random_device random;
  std::array<char, 33> text;
  for (int i = 0; i < 4; ++i) std::snprintf(text.data() + 8 * i, 9, "%08x", random());
  return text.data();
}

}  // namespace

Launch StartLaunch() {
  int provided = MPI_THREAD_SINGLE;
  const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
  if (code != MPI_SUCCESS || provided < MPI_THREAD_FUNNELED) {
    LogError("FATAL MPI_Init_thread: got thread level " + std::to_string(provided) + ", need MPI_THREAD_FUNNELED");
    std::_Exit(kExitGroup);
  }
  Launch launch;
  MPI_Comm_rank(MPI_COMM_WORLD, &launch.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &launch.size);

  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
  MPI_Comm_size(host, &launch.ranks_on_host);
  MPI_Comm_rank(host, &launch.local_rank);
  launch.threads = ShareOfCores(host);
  // One rank looks before any of them allocates; later the answer would depend on how far the others are.
  launch.free_bytes = FreeMemoryBytes();
  MPI_Bcast(&launch.free_bytes, 1, MPI_INT64_T, 0, host);
  MPI_Comm_free(&host);

  launch.nonce = MakeNonce();
  MPI_Bcast(launch.nonce.data(), static_cast<int>(launch.nonce.size()), MPI_CHAR, 0, MPI_COMM_WORLD);
  return launch;
}

Launch StartByItself(int size, const std::string& nonce) {
  Launch launch;
  launch.mpi = false;
  launch.rank = size == 1 ? 0 : -1;
  launch.size = size;
  const std::vector<int> cores = OwnCores();
  launch.threads = std::max<int>(std::accumulate(cores.begin(), cores.end(), 0), 1);
  launch.free_bytes = FreeMemoryBytes();
  launch.nonce = nonce.empty() ? MakeNonce() : nonce;
  return launch;
}

void ShareFromRankZero(std::string* bytes) {
  auto size = static_cast<int64_t>(bytes->size());
  MPI_Bcast(&size, 1, MPI_INT64_T, 0, MPI_COMM_WORLD);
  bytes->resize(static_cast<size_t>(size));
  MPI_Bcast(bytes->data(), static_cast<int>(size), MPI_BYTE, 0, MPI_COMM_WORLD);
}

void FinishLaunch(const Launch& launch) {
  if (launch.mpi) MPI_Finalize();
}

}  // namespace refocus
