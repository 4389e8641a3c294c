#include "base/shard_plan.h"

#include <vector>

#include <gtest/gtest.h>

namespace refocus {
namespace {

TEST(ShardPlanTest, AgreesWithCountingOneByOne) {
  for (const int64_t shards : {1, 2, 3, 5}) {
    std::vector<std::vector<int64_t>> owned(static_cast<size_t>(shards));
    for (int64_t position = 0; position < 3 * kBlockTokens * shards + 7; ++position) {
      int owners = 0;
      for (int64_t shard = 0; shard < shards; ++shard) {
        const ShardPlan plan{shards, shard};
        auto& mine = owned[static_cast<size_t>(shard)];
        ASSERT_EQ(plan.CountBelow(position), static_cast<int64_t>(mine.size()))
            << shards << " " << shard << " " << position;
        if (!plan.Owns(position)) continue;
        ++owners;
        ASSERT_EQ(plan.PositionAt(static_cast<int64_t>(mine.size())), position);
        mine.push_back(position);
      }
      ASSERT_EQ(owners, 1) << position;
    }
  }
}

TEST(ShardPlanTest, EveryPrefixIsSpreadEvenly) {
  for (const int64_t shards : {2, 3, 8}) {
    for (const int64_t length : {0, 1, 255, 256, 257, 1000, 100'003}) {
      int64_t most = 0, least = INT64_MAX, sum = 0;
      for (int64_t shard = 0; shard < shards; ++shard) {
        const int64_t count = ShardPlan{shards, shard}.CountBelow(length);
        most = std::max(most, count);
        least = std::min(least, count);
        sum += count;
      }
      EXPECT_EQ(sum, length);
      EXPECT_LE(most - least, kBlockTokens);
    }
  }
}

TEST(ShardPlanTest, PositionsBeyond32Bits) {
  const ShardPlan plan{3, 2};
  for (const int64_t position : {(int64_t{1} << 31) - 1, int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 45}) {
    const int64_t index = plan.CountBelow(position);
    EXPECT_GE(plan.PositionAt(index), position);                // the first owned one that is not below
    EXPECT_LT(plan.PositionAt(index - 1), position);            // the last owned one below
    EXPECT_EQ(plan.CountBelow(plan.PositionAt(index)), index);  // inverse
    EXPECT_TRUE(plan.Owns(plan.PositionAt(index)));
  }
}

}  // namespace
}  // namespace refocus
