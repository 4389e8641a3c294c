// Every rank runs the same tests in the same order; any rank's failure makes mpirun fail.
#include <cstdio>
#include <cstdlib>

#include <gtest/gtest.h>

#include "tests/collective/world.h"
#include "worker/launch.h"

namespace refocus {
namespace {

Launch launch;

// A failed collective may have unfinished messages, so it stays until the process ends.
std::vector<std::shared_ptr<Collective>>& Collectives() {
  static auto* collectives = new std::vector<std::shared_ptr<Collective>>;
  return *collectives;
}

}  // namespace

std::vector<int> WorldSizes() { return {launch.size}; }

void OnEveryRank(int size, double deadline_seconds, const std::function<void(Collective&)>& body) {
  ASSERT_EQ(size, launch.size);
  Collectives().push_back(MakeMpiCollective(deadline_seconds));
  try {
    body(*Collectives().back());
  } catch (const std::exception& error) {
    ADD_FAILURE() << "rank " << launch.rank << ": " << error.what();
  }
}

bool WorldComparesCalls() { return false; }
std::vector<std::string> WorldDevices() { return {"cpu"}; }
bool WorldReducesInRankOrder() { return true; }
bool WorldTellsOthers() { return true; }
double WorldShortDeadline() { return 0.4; }

}  // namespace refocus

int main(int argc, char** argv) {
  refocus::launch = refocus::StartLaunch();
  testing::InitGoogleTest(&argc, argv);
  const int code = RUN_ALL_TESTS();
  if (code != 0) std::_Exit(code);
  refocus::Collectives().clear();
  refocus::FinishLaunch(refocus::launch);
  return 0;
}
