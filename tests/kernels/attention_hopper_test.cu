// The shapes that Hopper's warpgroup kernels take: against fp64, and beside the portable kernels.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/attention_plan.h"
#include "tests/kernels/attention_fixture.cuh"

namespace refocus::kernels {
namespace {

// Cases that would run elsewhere are errors of the test.
void CheckAllOnHopper(const std::vector<Case>& cases, int sm_count) {
  for (const Case& c : cases) {
    AttentionShape shape;
    shape.rows = c.rows;
    shape.heads = c.heads;
    shape.kv_heads = c.kv_heads;
    shape.head_dim = c.head_dim;
    shape.int8 = c.int8;
    ASSERT_TRUE(UsesHopper(shape)) << c.Describe();
  }
  CheckAll(cases, sm_count);
}

// Few and small enough for the race checker.
TEST_F(Attention, HopperSmallestOfEveryPath) {
  std::vector<Case> cases;
  for (const int head_dim : {64, 128}) {
    for (const int64_t rows : {40, 64}) {  // tall tiles, and not
      for (const bool int8 : {false, true}) {
        cases.push_back({.rows = rows,
                         .heads = 4,
                         .kv_heads = 1,
                         .head_dim = head_dim,
                         .keys = 400,
                         .seed = 78,
                         .int8 = int8});
      }
    }
  }
  CheckAllOnHopper(cases, sm_count_);
}

TEST_F(Attention, HopperEveryGroupSizeAndRest) {
  std::vector<Case> cases;
  uint64_t seed = 10000;
  for (const int head_dim : {64, 128}) {
    for (const int group : {1, 2, 3, 4, 5, 7, 8, 16, 33, 64}) {
      for (const int64_t packed : {65, 127, 128, 129, 300}) {
        const char* order = seed % 3 == 0 ? "tail" : seed % 3 == 1 ? "random" : "early";
        cases.push_back({.rows = packed / group + 1,
                         .heads = 2 * group,
                         .kv_heads = 2,
                         .head_dim = head_dim,
                         .keys = 1000,
                         .shards = 1 + static_cast<int64_t>(seed % 3),
                         .order = order,
                         .seed = ++seed});
      }
    }
  }
  CheckAllOnHopper(cases, sm_count_);
}

TEST_F(Attention, HopperEveryNumberOfKeys) {
  std::vector<Case> cases;
  uint64_t seed = 11000;
  for (const int head_dim : {64, 128}) {
    for (const int64_t keys : {0,   1,   7,   8,   79,  80,  81,  95,  96,  97,  127, 128, 129,
                               159, 160, 161, 175, 176, 177, 192, 255, 256, 257, 384, 700, 2000}) {
      for (const char* order : {"tail", "random", "early", "behind"}) {
        for (const int64_t rows : {40, 64}) {  // tiles of 192 and of 128 rows
          cases.push_back({.rows = rows,
                           .heads = 8,
                           .kv_heads = 2,
                           .head_dim = head_dim,
                           .keys = keys,
                           .order = order,
                           .seed = ++seed});
        }
      }
    }
  }
  CheckAllOnHopper(cases, sm_count_);
}

TEST_F(Attention, HopperEightBits) {
  std::vector<Case> cases;
  uint64_t seed = 21000;
  const std::vector<std::vector<double>> cuts = {{0.0, 1.0}, {0.0, 0.0, 0.4, 1.0}, {0.1, 0.33, 0.34, 1.0}};
  for (const int head_dim : {64, 128}) {
    for (const int64_t keys : {0, 1, 79, 80, 81, 95, 96, 97, 127, 128, 129, 160, 255, 256, 257, 700, 3000, 9000}) {
      for (const char* order : {"tail", "random", "early", "behind"}) {
        for (const int64_t rows : {5, 16, 22, 40, 64, 300}) {
          ++seed;
          cases.push_back({.rows = rows,
                           .heads = 8,
                           .kv_heads = 2,
                           .head_dim = head_dim,
                           .keys = keys,
                           .shards = 1 + static_cast<int64_t>(seed % 3),
                           .cuts = cuts[seed % 5 % 3],
                           .order = order,
                           .gain = seed % 7 == 0 ? 30.0f : 1.0f,
                           .expected_keys = seed % 2 == 0 ? -1 : 100000,
                           .seed = seed,
                           .int8 = true});
        }
      }
    }
  }
  CheckAllOnHopper(cases, sm_count_);
}

TEST_F(Attention, HopperExtentsAnywhereInTheShard) {
  std::vector<Case> cases;
  uint64_t seed = 12000;
  const std::vector<std::vector<double>> cuts = {
      {0.3, 1.0}, {0.0, 0.5, 1.0}, {0.0, 0.0, 1.0}, {0.0, 1.0, 1.0}, {0.1, 0.1, 0.4, 0.4, 1.0}, {0.0, 0.33, 0.34, 1.0},
      {0.0}};
  for (const std::vector<double>& cut : cuts) {
    for (const int64_t shards : {1, 2, 3}) {
      for (const char* order : {"tail", "random", "behind", "early"}) {
        for (const int head_dim : {64, 128}) {
          cases.push_back({.rows = seed % 3 == 0 ? 64 : 40,
                           .heads = 8,
                           .kv_heads = 2,
                           .head_dim = head_dim,
                           .keys = 1500,
                           .shards = shards,
                           .cuts = cut,
                           .order = order,
                           .expected_keys = seed % 2 == 0 ? -1 : 100000,
                           .seed = ++seed});
        }
      }
    }
  }
  CheckAllOnHopper(cases, sm_count_);
}

TEST_F(Attention, HopperExtremeLogitsAndRandomShapes) {
  std::mt19937_64 random(9);
  const auto pick = [&](const auto& values) { return values[random() % values.size()]; };
  std::vector<Case> cases;
  for (int i = 0; i < 100; ++i) {
    Case c;
    c.kv_heads = pick(std::vector<int>{1, 2, 3, 8});
    const int group = pick(std::vector<int>{1, 2, 3, 4, 5, 8});
    c.heads = c.kv_heads * group;
    c.rows = pick(std::vector<int64_t>{65, 66, 97, 127, 128, 129, 200, 511}) / group + 1;
    c.head_dim = pick(std::vector<int>{64, 128});
    c.keys = pick(std::vector<int64_t>{1, 64, 255, 256, 257, 511, 1000, 3000});
    c.shards = pick(std::vector<int64_t>{1, 2, 3, 8});
    c.cuts = pick(std::vector<std::vector<double>>{{0.0, 1.0}, {0.0, 0.6, 1.0}, {0.2, 0.5, 0.5, 1.0}, {0.7, 0.9}});
    c.order = pick(std::vector<const char*>{"tail", "random", "early", "behind"});
    c.gain = pick(std::vector<float>{0.0f, 1.0f, 4.0f, 30.0f});
    c.expected_keys = pick(std::vector<int64_t>{-1, 0, 100000});
    c.seed = 13000 + i;
    cases.push_back(c);
  }
  CheckAllOnHopper(cases, sm_count_);
}

// More items than multiprocessors: blocks take several, and a prefill's rows see from one key to all.
TEST_F(Attention, HopperSeveralItemsABlock) {
  std::vector<Case> cases = {
      {.rows = 64, .heads = 288, .kv_heads = 72, .head_dim = 128, .keys = 700, .seed = 14000},
      {.rows = 1500, .heads = 8, .kv_heads = 2, .head_dim = 128, .keys = 1500, .seed = 14001},
      {.rows = 3000, .heads = 6, .kv_heads = 2, .head_dim = 64, .keys = 1000, .order = "random", .seed = 14002},
      {.rows = 1100,
       .heads = 32,
       .kv_heads = 8,
       .head_dim = 128,
       .keys = 1200,
       .shards = 2,
       .cuts = {0.0, 0.4, 1.0},
       .seed = 14003}};
  const size_t plain = cases.size();
  for (size_t i = 0; i < plain; ++i) {
    cases.push_back(cases[i]);
    cases.back().int8 = true;
  }
  // Warpgroups without rows; rows that the copy engine cannot gather; splits without keys.
  for (const int head_dim : {64, 128}) {
    for (const int group : {4, 5}) {
      for (const int64_t keys : {1, 100, 900}) {
        for (const int64_t expected : {-1, 100000}) {
          cases.push_back({.rows = 5,
                           .heads = group * 144,
                           .kv_heads = 144,
                           .head_dim = head_dim,
                           .keys = keys,
                           .order = "random",
                           .expected_keys = expected,
                           .seed = 14010,
                           .int8 = true});
        }
      }
    }
  }
  CheckAllOnHopper(cases, sm_count_);
}

double Norm(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = a[i] == -INFINITY && (b.empty() || b[i] == -INFINITY) ? 0.0 : a[i] - (b.empty() ? 0.0 : b[i]);
    sum += x * x;
  }
  return std::sqrt(sum);
}

// Rounding of weights to bf16 differs between the kernels (the forward's by a power of two): 2^-9 of each at the most,
// far less of a sum of many.
TEST_F(Attention, HopperAgreesWithThePortableKernels) {
  uint64_t seed = 15000;
  for (const int head_dim : {64, 128}) {
    for (const int64_t keys : {5000, 40000}) {
      for (const int64_t rows : {128, 700}) {
        Case c{.rows = rows, .heads = 8, .kv_heads = 2, .head_dim = head_dim, .keys = keys, .seed = ++seed};
        SCOPED_TRACE(c.Describe());
        const Inputs in = MakeInputs(c);
        AttentionShape shape = in.shards[0].shape;
        PartialOut fast;
        PartialOut plain;
        std::vector<float> fast_dq;
        std::vector<float> plain_dq;
        RunAttend(shape, in.q, sm_count_, &fast);
        if (HasFatalFailure()) return;
        const DeviceBuffer<float> lse(fast.lse);
        const std::vector<double> out(fast.out.begin(), fast.out.end());
        const DeviceBuffer<float> row_dot(RowDot(in.dout, out, head_dim));
        RunQueryGrad(shape, in, lse, row_dot, sm_count_, &fast_dq);
        if (HasFatalFailure()) return;
        shape.portable_only = true;
        RunAttend(shape, in.q, sm_count_, &plain);
        RunQueryGrad(shape, in, lse, row_dot, sm_count_, &plain_dq);
        if (HasFatalFailure()) return;
        const double out_error = Norm(fast.out, plain.out) / Norm(plain.out, {});
        const double lse_error = Norm(fast.lse, plain.lse) / Norm(plain.lse, {});
        const double dq_error = Norm(fast_dq, plain_dq) / Norm(plain_dq, {});
        std::printf("  %s: out %.1e, lse %.1e, dq %.1e apart\n", c.Describe().c_str(), out_error, lse_error, dq_error);
        EXPECT_LE(out_error, 1.0 / 256);
        EXPECT_LE(lse_error, 1e-6);
        EXPECT_LE(dq_error, 1.0 / 256);
      }
    }
  }
}

}  // namespace
}  // namespace refocus::kernels
