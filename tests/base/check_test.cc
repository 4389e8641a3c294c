#include "base/check.h"

#include <gtest/gtest.h>

namespace refocus {
namespace {

TEST(CheckTest, HoldsSilently) {
  REFOCUS_CHECK(1 + 1 == 2);
  REFOCUS_CHECK_EQ(3, 3);
  REFOCUS_CHECK_LE(3, 3);
  REFOCUS_CHECK_LT(2, 3);
  REFOCUS_CHECK_GE(3, 3);
  REFOCUS_CHECK_GT(4, 3);
}

TEST(CheckDeathTest, PrintsExpressionAndPlace) {
  const bool never = false;
  EXPECT_DEATH(REFOCUS_CHECK(never), "check_test.cc:[0-9]+: check failed: never");
}

TEST(CheckDeathTest, PrintsBothValues) {
  const int64_t rows = 7;
  EXPECT_DEATH(REFOCUS_CHECK_EQ(rows, 8), "check failed: rows == 8: 7 vs 8");
  EXPECT_DEATH(REFOCUS_CHECK_LT(rows, 7), "rows < 7: 7 vs 7");
  EXPECT_DEATH(REFOCUS_CHECK_GT(rows, 7), "rows > 7: 7 vs 7");
}

TEST(CheckTest, EvaluatesOnce) {
  int calls = 0;
  const auto next = [&calls] { return ++calls; };
  REFOCUS_CHECK_EQ(next(), 1);
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace refocus
