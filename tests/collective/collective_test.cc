// One test for every implementation of Collective. Inputs are small integers, so that sums are exact and the check is
// equality; where the order of summation matters it is checked bit by bit.
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <tuple>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include "tests/collective/world.h"

namespace refocus {
namespace {

using Clock = std::chrono::steady_clock;
using Rows = std::vector<int64_t>;
constexpr double kAmple = 60.0;

double SecondsSince(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

void Nap(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

template <typename T>
T Value(int rank, int64_t index) {
  return static_cast<T>((rank + 1) * 7 + index % 101);
}

// Not representable sums: any other order of summation gives other bits.
float Rough(int rank, int64_t index) {
  const float sign = rank % 2 == 0 ? 1.0f : -37.7f;
  return static_cast<float>(index % 1009 + 1) * 0.1f * sign + 1e-3f / static_cast<float>(rank + 1);
}

template <typename T>
at::Tensor Make(at::IntArrayRef shape, at::ScalarType type, const std::function<T(int64_t)>& value) {
  at::Tensor t = at::empty(shape, type);
  T* data = static_cast<T*>(t.data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) data[i] = value(i);
  return t;
}

at::Tensor Poisoned(at::IntArrayRef shape, at::ScalarType type) {
  at::Tensor t = at::empty(shape, type);
  if (t.nbytes() > 0) std::memset(t.data_ptr(), 0xee, t.nbytes());
  return t;
}

// Where the tensors of the running test lie; the checks fill and read copies on the CPU.
std::string device = "cpu";

at::Tensor Placed(const at::Tensor& t) { return t.to(at::TensorOptions().device(at::Device(device))); }

void Return(const at::Tensor& placed, at::Tensor& t) {
  if (!placed.is_cpu()) t.copy_(placed);
}

void AllReduce(Collective& c, at::Tensor& t) {
  at::Tensor placed = Placed(t);
  c.AllReduceSum(placed);
  c.Check();
  Return(placed, t);
}

void AllGather(Collective& c, const at::Tensor& in, const Rows& rows, at::Tensor& out) {
  const at::Tensor own = Placed(in);
  at::Tensor all = Placed(out);
  c.AllGatherRows(own, rows, all);
  c.Check();
  Return(all, out);
}

void Broadcast(Collective& c, at::Tensor& t, int root) {
  at::Tensor placed = Placed(t);
  c.Broadcast(placed, root);
  c.Check();
  Return(placed, t);
}

int64_t Sum(const Rows& rows) {
  int64_t sum = 0;
  for (const int64_t n : rows) sum += n;
  return sum;
}

// Even, uneven, with empty ranks, all on one rank, and nothing at all.
std::vector<Rows> RowPatterns(int size) {
  std::vector<Rows> patterns{Rows(size, 5), Rows(size, 0), Rows(size, 0), Rows(size, 0), Rows(size, 0)};
  for (int r = 0; r < size; ++r) {
    patterns[1][r] = 7 * r + 1;
    patterns[2][r] = r % 2 == 0 ? 0 : 63;
    patterns[3][r] = r == size - 1 ? 129 : 0;
  }
  return patterns;
}

// The ranks' parts are told apart by their values; out must hold them in rank order.
template <typename T>
void CheckGather(Collective& c, at::ScalarType type, const Rows& rows, const std::vector<int64_t>& row_shape) {
  std::vector<int64_t> shape = row_shape;
  shape.insert(shape.begin(), rows[c.rank()]);
  const at::Tensor in = Make<T>(shape, type, [&](int64_t i) { return Value<T>(c.rank(), i); });
  shape[0] = Sum(rows);
  at::Tensor out = Poisoned(shape, type);
  AllGather(c, in, rows, out);
  const T* got = static_cast<const T*>(out.data_ptr());
  int64_t width = 1;
  for (const int64_t n : row_shape) width *= n;
  int64_t at = 0;
  int64_t wrong = 0;
  for (int r = 0; r < c.size(); ++r) {
    for (int64_t i = 0; i < rows[r] * width; ++i) wrong += got[at++] != Value<T>(r, i);
  }
  EXPECT_EQ(wrong, 0) << "rank " << c.rank() << " of " << c.size() << ", " << at << " elements of " << sizeof(T)
                      << " bytes";
}

// For sums whose order is not known: near enough, and the same bits on every rank and in the next run.
void CheckReduceInAnyOrder(Collective& c, int64_t count, float (*value)(int, int64_t)) {
  const auto make = [&] { return Make<float>({1, count}, at::kFloat, [&](int64_t i) { return value(c.rank(), i); }); };
  at::Tensor t = make();
  at::Tensor again = make();
  AllReduce(c, t);
  AllReduce(c, again);
  at::Tensor all = Poisoned({c.size(), count}, at::kFloat);
  AllGather(c, t, Rows(c.size(), 1), all);
  const float* got = t.data_ptr<float>();
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    double expected = 0.0, scale = 0.0;
    for (int r = 0; r < c.size(); ++r) {
      expected += value(r, i);
      scale += std::abs(value(r, i));
    }
    wrong += std::abs(got[i] - expected) > 1e-6 * scale;
  }
  EXPECT_EQ(wrong, 0) << "rank " << c.rank() << " of " << c.size() << ", count " << count;
  EXPECT_EQ(std::memcmp(got, again.data_ptr(), t.nbytes()), 0) << "another run, other bits; count " << count;
  for (int r = 0; r < c.size(); ++r) {
    EXPECT_EQ(std::memcmp(got, all.data_ptr<float>() + r * count, t.nbytes()), 0) << "ranks " << c.rank() << ", " << r;
  }
}

void CheckReduce(Collective& c, int64_t count, float (*value)(int, int64_t)) {
  const bool exact = value == static_cast<float (*)(int, int64_t)>(Value<float>) || c.size() <= 2;
  if (!exact && !WorldReducesInRankOrder()) return CheckReduceInAnyOrder(c, count, value);
  at::Tensor t = Make<float>({count}, at::kFloat, [&](int64_t i) { return value(c.rank(), i); });
  AllReduce(c, t);
  const float* got = t.data_ptr<float>();
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    float expected = value(0, i);
    for (int r = 1; r < c.size(); ++r) expected += value(r, i);
    wrong += std::memcmp(&expected, got + i, sizeof(float)) != 0;
  }
  EXPECT_EQ(wrong, 0) << "rank " << c.rank() << " of " << c.size() << ", count " << count;
}

// Rows that rank `from` sends to rank `to` in round `round`; some are 0.
int64_t SentRows(int round, int from, int to) { return (from * 3 + to * 5 + round) % 4 * (round == 3 ? 0 : 1); }

void CheckAllToAll(Collective& c, int round, int64_t width) {
  Rows send, receive;
  for (int j = 0; j < c.size(); ++j) {
    send.push_back(SentRows(round, c.rank(), j));
    receive.push_back(SentRows(round, j, c.rank()));
  }
  at::Tensor in = at::empty({Sum(send), width}, at::kLong);
  int64_t* data = in.data_ptr<int64_t>();
  for (int j = 0; j < c.size(); ++j) {
    for (int64_t i = 0; i < send[j] * width; ++i) *data++ = (c.rank() * 100 + j) * 1'000'000 + i;
  }
  at::Tensor out = Poisoned({Sum(receive), width}, at::kLong);
  const at::Tensor sent = Placed(in);
  at::Tensor received = Placed(out);
  c.AllToAllRows(sent, send, received, receive);
  c.Check();
  Return(received, out);
  const int64_t* got = out.data_ptr<int64_t>();
  int64_t wrong = 0;
  for (int j = 0; j < c.size(); ++j) {
    for (int64_t i = 0; i < receive[j] * width; ++i) wrong += *got++ != (j * 100 + c.rank()) * 1'000'000 + i;
  }
  EXPECT_EQ(wrong, 0) << "rank " << c.rank() << " of " << c.size() << ", round " << round << ", width " << width;
}

void CheckReduceScatter(Collective& c, const Rows& rows, int64_t width, float (*value)(int, int64_t)) {
  at::Tensor in = Make<float>({Sum(rows), width}, at::kFloat, [&](int64_t i) { return value(c.rank(), i); });
  at::Tensor out = Poisoned({rows[c.rank()], width}, at::kFloat);
  const at::Tensor terms = Placed(in);
  at::Tensor sums = Placed(out);
  c.ReduceScatterRows(terms, rows, sums);
  c.Check();
  Return(terms, in);
  Return(sums, out);
  int64_t first = 0;
  for (int r = 0; r < c.rank(); ++r) first += rows[r] * width;
  const float* got = out.data_ptr<float>();
  int64_t wrong = 0;
  for (int64_t i = 0; i < out.numel(); ++i) {
    float expected = value(0, first + i);
    for (int r = 1; r < c.size(); ++r) expected += value(r, first + i);
    wrong += std::memcmp(&expected, got + i, sizeof(float)) != 0;
    wrong += in.data_ptr<float>()[first + i] != value(c.rank(), first + i);  // the input is left alone
  }
  EXPECT_EQ(wrong, 0) << "rank " << c.rank() << " of " << c.size() << ", width " << width;
}

class CollectiveTest : public testing::TestWithParam<std::tuple<int, std::string>> {
 protected:
  void SetUp() override { device = std::get<1>(GetParam()); }
  int size() const { return std::get<0>(GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, CollectiveTest,
                         testing::Combine(testing::ValuesIn(WorldSizes()), testing::ValuesIn(WorldDevices())),
                         [](const auto& info) {
                           return std::to_string(std::get<0>(info.param)) + "_" + std::get<1>(info.param);
                         });

TEST_P(CollectiveTest, KnowsItsRank) {
  OnEveryRank(size(), kAmple, [&](Collective& c) {
    EXPECT_EQ(c.size(), size());
    EXPECT_GE(c.rank(), 0);
    EXPECT_LT(c.rank(), size());
  });
}

TEST_P(CollectiveTest, AllReduceAddsExactly) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    for (const int64_t count : {0, 1, 3, 127, 8192, 8193, 100'003, 1'100'001}) CheckReduce(c, count, Value<float>);
  });
}

TEST_P(CollectiveTest, AllReduceAddsInRankOrder) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    for (const int64_t count : {5, 8192, 8193, 600'011}) CheckReduce(c, count, Rough);
  });
}

// Long enough that every implementation cuts its parts more than twice, with a rest.
TEST_P(CollectiveTest, LongReductionsAddInRankOrder) {
  if (WorldComparesCalls()) GTEST_SKIP() << "threads copy without cutting";
  OnEveryRank(size(), kAmple, [](Collective& c) {
    CheckReduce(c, 13'000'003, Rough);
    Rows rows(c.size(), 3);
    rows[0] = 8'000'009;
    CheckReduceScatter(c, rows, 1, Rough);
  });
}

TEST_P(CollectiveTest, AllGatherKeepsRankOrder) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    for (const Rows& rows : RowPatterns(c.size())) {
      CheckGather<float>(c, at::kFloat, rows, {577});
      CheckGather<float>(c, at::kFloat, rows, {3, 5});
      CheckGather<int64_t>(c, at::kLong, rows, {});
      CheckGather<uint8_t>(c, at::kByte, rows, {13});
    }
  });
}

TEST_P(CollectiveTest, AllGatherOfLargeUnevenRows) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    Rows rows(c.size(), 3);
    rows.back() = (int64_t{33} << 20) + 1;  // more than two pieces of a message
    CheckGather<uint8_t>(c, at::kByte, rows, {});
  });
}

TEST_P(CollectiveTest, AllToAllDeliversEveryPair) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    for (int round = 0; round < 5; ++round) {
      for (const int64_t width : {1, 65, 30'011}) CheckAllToAll(c, round, width);
    }
  });
}

TEST_P(CollectiveTest, ReduceScatterGivesOwnRows) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    for (const Rows& rows : RowPatterns(c.size())) {
      CheckReduceScatter(c, rows, 1, Value<float>);
      CheckReduceScatter(c, rows, 577, Rough);
    }
    Rows uneven(c.size(), 1);
    uneven[0] = 9001;
    CheckReduceScatter(c, uneven, 67, Rough);
  });
}

TEST_P(CollectiveTest, BroadcastFromEveryRoot) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    for (int root = 0; root < c.size(); ++root) {
      for (const int64_t count : {0, 1, 3, 10'007}) {
        at::Tensor t = Make<int64_t>({count}, at::kLong, [&](int64_t i) { return Value<int64_t>(c.rank(), i); });
        Broadcast(c, t, root);
        for (int64_t i = 0; i < count; ++i) ASSERT_EQ(t.data_ptr<int64_t>()[i], Value<int64_t>(root, i));
      }
    }
  });
}

// Calls follow each other without a pause and with ranks at different speeds: no message may reach the wrong call.
TEST_P(CollectiveTest, CallsDoNotMix) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    for (int round = 0; round < 60; ++round) {
      if (round % 20 == c.rank()) Nap(3);
      CheckReduce(c, round % 7 == 0 ? 9000 + round : round, Value<float>);
      CheckAllToAll(c, round % 5, round % 11 + 1);
      CheckGather<int64_t>(c, at::kLong, RowPatterns(c.size())[round % 5], {});
      at::Tensor t = at::full({1}, c.rank() * 1000 + round, at::kLong);
      Broadcast(c, t, round % c.size());
      ASSERT_EQ(t.data_ptr<int64_t>()[0], round % c.size() * 1000 + round);
    }
  });
}

void ExpectFailsAtOnce(Collective& c) {
  const auto begin = Clock::now();
  at::Tensor t = at::full({3}, 1.0, at::kFloat);
  EXPECT_THROW(c.AllReduceSum(t), CollectiveError);
  EXPECT_THROW(c.Broadcast(t, 0), CollectiveError);
  EXPECT_THROW(c.Check(), CollectiveError);
  EXPECT_THROW(c.BeforeReplay(), CollectiveError);
  EXPECT_LT(SecondsSince(begin), 0.1);
}

// What the other rank had sent before it gave up may still arrive, so that this rank's call ends well; the next does not.
// Its error, or nothing.
std::string ErrorOfLateCalls(Collective& c, at::Tensor& t) {
  for (int call = 0; call < (WorldTellsOthers() ? 1 : 2); ++call) {
    try {
      AllReduce(c, t);
    } catch (const CollectiveError& error) {
      return error.what();
    }
  }
  return "";
}

TEST_P(CollectiveTest, MissingRankEndsTheCallWithinTheDeadline) {
  if (size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  const double deadline = WorldShortDeadline();
  OnEveryRank(size(), deadline, [deadline](Collective& c) {
    at::Tensor t = at::full({500'000}, 1.0, at::kFloat);
    AllReduce(c, t);
    const auto begin = Clock::now();
    const bool late = c.rank() == c.size() - 1;
    if (late) Nap(static_cast<int>(deadline * 1000) + 500);
    EXPECT_NE(ErrorOfLateCalls(c, t), "") << "rank " << c.rank();
    // A rank that comes late is told so, or waits in its turn.
    EXPECT_LT(SecondsSince(begin), deadline + 1.0 + (late && !WorldTellsOthers() ? deadline + 0.5 : 0.0));
    if (!late) {
      EXPECT_GE(SecondsSince(begin), deadline * 0.9);
    }
    ExpectFailsAtOnce(c);
  });
}

TEST_P(CollectiveTest, AbortWakesEveryone) {
  if (size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  const double deadline = WorldTellsOthers() ? kAmple : WorldShortDeadline();
  OnEveryRank(size(), deadline, [deadline](Collective& c) {
    at::Tensor t = at::full({500'000}, 1.0, at::kFloat);
    AllReduce(c, t);
    const auto begin = Clock::now();
    std::thread other;
    if (c.rank() == 0) {
      other = std::thread([&c] {
        Nap(100);
        c.Abort("told so");
      });
    }
    if (c.rank() == c.size() - 1) Nap(300);
    const bool told = c.rank() == 0 || WorldTellsOthers();
    const std::string error = ErrorOfLateCalls(c, t);
    EXPECT_NE(error, "") << "rank " << c.rank();
    EXPECT_EQ(error.find("told so") != std::string::npos, told) << error;
    EXPECT_LT(SecondsSince(begin), told ? 2.0 : deadline + 2.0);
    if (other.joinable()) other.join();
    ExpectFailsAtOnce(c);
  });
}

TEST_P(CollectiveTest, AbortBetweenCallsHoldsForTheNext) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    c.Abort("no more");
    ExpectFailsAtOnce(c);
  });
}

TEST_P(CollectiveTest, DifferentCallsAreRefused) {
  if (size() == 1 || !WorldComparesCalls()) GTEST_SKIP() << "this implementation does not compare the ranks' calls";
  OnEveryRank(size(), kAmple, [](Collective& c) {
    at::Tensor t = at::full({c.rank() == 0 ? 3 : 4}, 1.0, at::kFloat);
    EXPECT_THROW(c.AllReduceSum(t), CollectiveError);
  });
  OnEveryRank(size(), kAmple, [](Collective& c) {  // rank 0 sends more than rank 1 expects
    std::vector<int64_t> send(c.size(), 1);
    const std::vector<int64_t> receive(c.size(), 1);
    if (c.rank() == 0) send[1] = 2;
    const at::Tensor in = at::full({c.size() + (c.rank() == 0 ? 1 : 0)}, 1.0, at::kFloat);
    at::Tensor out = at::full({c.size()}, 0.0, at::kFloat);
    EXPECT_THROW(c.AllToAllRows(in, send, out, receive), CollectiveError);
  });
}

// Run with REFOCUS_FAILPOINT by a ctest entry of its own: rank 1 freezes, the others are released.
TEST_P(CollectiveTest, DISABLED_FrozenRank) {
  const double deadline = std::max(1.0, WorldShortDeadline());
  OnEveryRank(size(), deadline, [deadline](Collective& c) {
    at::Tensor t = at::full({500'000}, 1.0, at::kFloat);
    const auto begin = Clock::now();
    try {
      for (int i = 0; i < 100; ++i) AllReduce(c, t);
      ADD_FAILURE() << "rank " << c.rank() << ": nobody froze";
    } catch (const CollectiveError& error) {
      std::fprintf(stderr, "rank %d released after %.1f s: %s\n", c.rank(), SecondsSince(begin), error.what());
      EXPECT_LT(SecondsSince(begin), deadline + 1.0);
      std::_Exit(testing::Test::HasFailure() ? 1 : 5);
    }
  });
}

}  // namespace
}  // namespace refocus
