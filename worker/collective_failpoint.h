// Test only, REFOCUS_FAILPOINT="rank=1,at=5,do=kill": this rank's 5th collective ends (kill) or freezes (stop) the
// process.
#pragma once

#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace refocus {

class Failpoint {
 public:
  // Of this rank; a negative one has none.
  explicit Failpoint(int rank) {
    const char* text = std::getenv("REFOCUS_FAILPOINT");
    int at_rank = -1;
    long long at = 0;
    char action[5] = "";
    if (rank < 0 || text == nullptr || std::sscanf(text, "rank=%d,at=%lld,do=%4s", &at_rank, &at, action) != 3) return;
    if (at_rank != rank) return;
    at_ = at;
    signal_ = std::string(action) == "stop" ? SIGSTOP : SIGKILL;
  }

  void Pass(int64_t call) const {
    if (call == at_) std::raise(signal_);
  }

 private:
  int64_t at_ = 0;  // 0: none
  int signal_ = 0;
};

}  // namespace refocus
