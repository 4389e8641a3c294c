// The communicator and its watchdog against an NCCL that does what a test says: no GPU, no other rank.
#include "worker/collective_nccl_communicator.h"

#include <gtest/gtest.h>

#include <functional>

namespace {

// Guarded by the communicator's own lock, which `inside` proves.
struct Fake {
  std::atomic<int> inside{0};
  std::atomic<int> crowded{0};  // calls that met another one
  std::atomic<int> aborts{0};
  std::atomic<int> finalized{0};
  std::atomic<int> destroyed{0};
  std::atomic<int> polls_until_done{0};
  std::atomic<ncclResult_t> init{ncclSuccess};
  std::atomic<ncclResult_t> state{ncclSuccess};
  std::atomic<bool> abort_hangs{false};
};
Fake* fake = nullptr;

struct Inside {
  Inside() { fake->crowded += fake->inside++ != 0 ? 1 : 0; }
  ~Inside() { --fake->inside; }
};

}  // namespace

extern "C" {
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int, ncclUniqueId, int, ncclConfig_t* config) {
  EXPECT_EQ(config->blocking, 0);
  *comm = reinterpret_cast<ncclComm_t>(fake);
  return fake->init;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* state) {
  const Inside inside;
  *state = fake->polls_until_done > 0 ? ncclInProgress : fake->state.load();
  if (fake->polls_until_done > 0) --fake->polls_until_done;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t) {
  const Inside inside;
  ++fake->aborts;
  while (fake->abort_hangs) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t) {
  ++fake->finalized;
  return ncclInProgress;
}
ncclResult_t ncclCommDestroy(ncclComm_t) {
  ++fake->destroyed;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) { return result == ncclRemoteError ? "remote error" : "other"; }
const char* ncclGetLastError(ncclComm_t) { return "in detail"; }
}

namespace refocus {
namespace {

using nccl::Clock;
using nccl::Communicator;
using nccl::kGiveUp;

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

class CommunicatorTest : public testing::Test {
 protected:
  void SetUp() override { fake = new Fake; }  // never freed: a watchdog may outlive its test
  void TearDown() override { EXPECT_EQ(fake->crowded, 0) << "two threads were inside NCCL at once"; }

  std::shared_ptr<Communicator> Make(double deadline) {
    auto communicator = std::make_shared<Communicator>(1, 2, deadline);
    communicator->Create(std::string(NCCL_UNIQUE_ID_BYTES, 'x'), 1, 2);
    std::thread([communicator] { Communicator::Watch(communicator); }).detach();
    return communicator;
  }
  static void Enqueue(Communicator& c, ncclResult_t result = ncclInProgress) {
    c.Run([&](ncclComm_t) {
      const Inside inside;
      return result;
    });
  }
  static std::string Thrown(const std::function<void()>& call) {
    try {
      call();
    } catch (const CollectiveError& error) {
      return error.what();
    }
    return "nothing was thrown";
  }
  // As Check does, without a stream.
  static std::string ThrownWithin(Communicator& c, double seconds) {
    const auto begin = Clock::now();
    while (SecondsSince(begin) < seconds) {
      const std::string what = Thrown([&] { c.ThrowIfLost(); });
      if (what != "nothing was thrown") return what;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return "nothing was thrown";
  }
  static bool Aborted() {
    const auto begin = Clock::now();
    while (fake->aborts == 0 && SecondsSince(begin) < 5) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    return fake->aborts == 1;
  }
};

TEST_F(CommunicatorTest, WaitsUntilNcclHasEnqueued) {
  fake->init = ncclInProgress;
  fake->polls_until_done = 3;
  const auto c = Make(60);
  EXPECT_EQ(fake->polls_until_done, 0);
  for (int i = 0; i < 200; ++i) {  // long enough that the watchdog looks in between
    fake->polls_until_done = 5;
    c->Begin("all-reduce", i);
    Enqueue(*c);
    EXPECT_EQ(fake->polls_until_done, 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  c->Idle();
  EXPECT_TRUE(c->Close());
  EXPECT_EQ(fake->finalized, 1);
  EXPECT_EQ(fake->destroyed, 1);
  EXPECT_EQ(fake->aborts, 0);
}

TEST_F(CommunicatorTest, AFailedStartIsTakenApart) {
  fake->init = ncclRemoteError;
  const std::string what = Thrown([&] { Make(60); });
  EXPECT_NE(what.find("rank 1 of 2: remote error: in detail"), std::string::npos) << what;
  EXPECT_EQ(fake->aborts, 1);
}

TEST_F(CommunicatorTest, DeadlineCountsFromTheLastCallAndOnlyWhileSomethingIsUnderWay) {
  const auto c = Make(0.3);
  c->Begin("all-reduce", 1);
  Enqueue(*c, ncclSuccess);
  c->Idle();
  EXPECT_EQ(ThrownWithin(*c, 0.6), "nothing was thrown");  // idle
  for (int i = 0; i < 6; ++i) {
    c->Begin("all-to-all", 2 + i);
    Enqueue(*c, ncclSuccess);
    EXPECT_EQ(ThrownWithin(*c, 0.15), "nothing was thrown");
  }
  const auto begin = Clock::now();
  const std::string what = ThrownWithin(*c, 5);
  EXPECT_NE(what.find("all-to-all (collective 7) of rank 1 of 2: waited beyond the deadline of 0.3 s"),
            std::string::npos) << what;
  EXPECT_LT(SecondsSince(begin), 0.4);
  EXPECT_TRUE(Aborted());
  EXPECT_EQ(Thrown([&] { c->Begin("broadcast", 8); }), what);
  EXPECT_EQ(Thrown([&] { Enqueue(*c); }), what);
  EXPECT_FALSE(c->Close());
  EXPECT_EQ(fake->finalized, 0);
}

TEST_F(CommunicatorTest, ACallThatNcclNeverEnqueuesEndsWithTheDeadline) {
  const auto c = Make(0.3);
  fake->polls_until_done = 1 << 30;
  c->Begin("all-gather", 1);
  const std::string what = Thrown([&] { Enqueue(*c); });
  EXPECT_NE(what.find("all-gather (collective 1)"), std::string::npos) << what;
  EXPECT_TRUE(Aborted());
}

TEST_F(CommunicatorTest, ErrorsOfNcclAreSeenByTheWatchdogAndByTheCall) {
  auto c = Make(60);
  c->Begin("all-gather", 1);
  Enqueue(*c, ncclSuccess);
  fake->state = ncclRemoteError;
  std::string what = ThrownWithin(*c, 2);
  EXPECT_NE(what.find("remote error: in detail"), std::string::npos) << what;
  EXPECT_TRUE(Aborted());

  fake = new Fake;
  c = Make(60);
  c->Begin("broadcast", 1);
  what = Thrown([&] { Enqueue(*c, ncclRemoteError); });
  EXPECT_NE(what.find("broadcast (collective 1) of rank 1 of 2: remote error"), std::string::npos) << what;
  EXPECT_TRUE(Aborted());
}

// NCCL waits for graphs that nobody can destroy: the thread that works must be let go all the same.
TEST_F(CommunicatorTest, AnAbortThatHangsHoldsNobody) {
  fake->abort_hangs = true;
  const auto c = Make(60);
  c->Begin("all-reduce", 1);
  Enqueue(*c, ncclSuccess);
  std::thread([c] { c->Lose("aborted: told so"); }).join();
  c->Lose("later");  // the first cause counts
  const auto begin = Clock::now();
  EXPECT_EQ(ThrownWithin(*c, 2), "aborted: told so");
  EXPECT_TRUE(Aborted());
  EXPECT_EQ(Thrown([&] { Enqueue(*c); }), "aborted: told so");
  EXPECT_FALSE(c->Close());
  EXPECT_LT(SecondsSince(begin), 1.0);
  fake->abort_hangs = false;
}

// The word that kernels look at while they wait for other GPUs: set when the group is lost, heeded when they set it.
TEST_F(CommunicatorTest, KernelsAreToldAndHeard) {
  uint32_t told = 0;
  const auto c = Make(60);
  c->Guard(&told);
  c->Begin("exchange", 7);
  EXPECT_EQ(ThrownWithin(*c, 0.2), "nothing was thrown");
  EXPECT_EQ(std::atomic_ref<uint32_t>(told).load(), 0u);
  c->Lose("aborted: told so");
  EXPECT_TRUE(Aborted());
  EXPECT_EQ(std::atomic_ref<uint32_t>(told).load(), kGiveUp);
  EXPECT_EQ(Thrown([&] { c->ThrowIfLost(); }), "aborted: told so");

  fake = new Fake;
  uint32_t late = 0;
  for (const bool by_watchdog : {false, true}) {
    fake->aborts = 0;
    late = 0;
    const auto d = Make(60);
    d->Guard(&late);
    d->Begin("exchange", 8);
    std::atomic_ref<uint32_t>{late}.store(2);
    EXPECT_TRUE(!by_watchdog || Aborted());
    const std::string what = Thrown([&] { d->ThrowIfLost(); });
    EXPECT_NE(what.find("exchange (collective 8) of rank 1 of 2: waited beyond the deadline"), std::string::npos)
        << what;
    EXPECT_TRUE(Aborted());
    EXPECT_EQ(Thrown([&] { d->Begin("exchange", 9); }), what);
  }
}

// A host thread inside the driver, on a device that does not come back.
TEST_F(CommunicatorTest, AHostThatIsNeverLetGoEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        const auto c = Make(0.2);
        c->Begin("all-reduce", 1);
        Enqueue(*c, ncclSuccess);
        std::this_thread::sleep_for(std::chrono::seconds(30));
      },
      testing::ExitedWithCode(kExitGroup), "did not let go of the host");
}

}  // namespace
}  // namespace refocus
