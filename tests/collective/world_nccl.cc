// Every rank is a process of one mpirun with a GPU of its own and runs the same tests in the same order; any rank's
// failure makes mpirun fail. Without enough GPUs nothing runs and the reason is printed.
#include <cstdio>
#include <cstdlib>

#include <gtest/gtest.h>

#include "tests/collective/world.h"
#include "worker/device.h"
#include "worker/launch.h"

namespace refocus {
namespace {

Launch launch;

// A lost collective's graphs and kernels may not be taken apart, so it stays until the process ends.
std::vector<std::shared_ptr<Collective>>& Collectives() {
  static auto* collectives = new std::vector<std::shared_ptr<Collective>>;
  return *collectives;
}

}  // namespace

std::vector<int> WorldSizes() { return {launch.size}; }

void OnEveryRank(int size, double deadline_seconds, const std::function<void(Collective&)>& body) {
  ASSERT_EQ(size, launch.size);
  std::shared_ptr<Collective> collective;
  try {
    std::string id = launch.rank == 0 ? MakeNcclId() : "";
    ShareFromRankZero(&id);
    collective = MakeNcclCollective(id, launch.rank, launch.size, deadline_seconds);
    Collectives().push_back(collective);
    body(*collective);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "rank " << launch.rank << ": " << error.what();
    return;
  }
  try {
    collective->Check();
  } catch (const CollectiveError&) {
    return;  // the test lost it on purpose
  }
  Collectives().pop_back();  // healthy: ends here, so that a planned end is tested as well
}

bool WorldComparesCalls() { return false; }
std::vector<std::string> WorldDevices() { return {"cpu", "cuda"}; }
bool WorldReducesInRankOrder() { return false; }
bool WorldTellsOthers() { return false; }
double WorldShortDeadline() { return 4.0; }

}  // namespace refocus

int main(int argc, char** argv) {
  using refocus::launch;
  launch = refocus::StartLaunch();
  const auto gpu = refocus::UseGpu(launch.local_rank, launch.ranks_on_host);
  int missing = gpu.ok() ? 0 : 1;
  if (missing != 0) std::printf("rank %d skipped: %s\n", launch.rank, std::string(gpu.status().message()).c_str());
  // One rank without a GPU skips the tests of all.
  std::string verdicts = launch.rank == 0 ? std::string(1, missing != 0 ? 's' : 'r') : "";
  refocus::ShareFromRankZero(&verdicts);
  if (missing != 0 || verdicts == "s") {
    std::fflush(stdout);
    if (verdicts != "s") std::_Exit(1);  // rank 0 has one: the hosts differ
    refocus::FinishLaunch(launch);
    return 0;
  }
  std::printf("rank %d of %d on GPU %d: %s\n", launch.rank, launch.size, gpu->index, gpu->name.c_str());
  std::fflush(stdout);
  testing::InitGoogleTest(&argc, argv);
  const int code = RUN_ALL_TESTS();
  std::fflush(stdout);
  if (code != 0) std::_Exit(code);
  refocus::FinishLaunch(launch);
  std::_Exit(0);  // lost communicators stay as they are
}
