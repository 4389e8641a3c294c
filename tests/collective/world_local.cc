#include <thread>

#include <gtest/gtest.h>

#include "tests/collective/world.h"

namespace refocus {

std::vector<int> WorldSizes() { return {1, 2, 3, 4}; }

void OnEveryRank(int size, double deadline_seconds, const std::function<void(Collective&)>& body) {
  std::vector<std::thread> threads;
  for (const auto& collective : MakeLocalCollectives(size, deadline_seconds)) {
    threads.emplace_back([collective, &body] {
      try {
        body(*collective);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << collective->rank() << ": " << error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

bool WorldComparesCalls() { return true; }
std::vector<std::string> WorldDevices() { return {"cpu"}; }
bool WorldReducesInRankOrder() { return true; }
bool WorldTellsOthers() { return true; }
double WorldShortDeadline() { return 0.4; }

}  // namespace refocus
