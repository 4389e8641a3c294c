// The choice of tiles and key splits, without a GPU.
#include "kernels/attention_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace refocus::kernels {
namespace {

constexpr int kSms = 132;

AttentionShape Shape(int64_t rows, int heads, int kv_heads, int head_dim, int64_t keys) {
  AttentionShape shape;
  shape.rows = rows;
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.head_dim = head_dim;
  shape.scale = 0.1f;
  shape.expected_keys = keys;
  return shape;
}

int64_t Blocks(const AttentionShape& shape) {
  const int rows = UsesHopper(shape) ? HopperAttendTileOf(shape).rows : AttendTileRows(PackedRows(shape));
  return (PackedRows(shape) + rows - 1) / rows * shape.kv_heads * AttendSplits(shape, kSms);
}

TEST(AttentionPlan, FewRowsAgainstManyKeysFillTheGpu) {
  for (const int64_t rows : {1, 4, 16, 128}) {
    for (const int64_t keys : {int64_t{1} << 17, int64_t{1} << 20}) {
      const AttentionShape shape = Shape(rows, 32, 8, 128, keys);
      const int64_t blocks = Blocks(shape);
      const int64_t slots = UsesHopper(shape) ? kSms : 2 * kSms;
      const double rounds = static_cast<double>(blocks) / static_cast<double>(slots);
      EXPECT_GE(rounds / static_cast<double>((blocks + slots - 1) / slots), 0.9)
          << rows << " rows, " << keys << " keys";
    }
  }
}

TEST(AttentionPlan, ManyRowsOrFewKeysAreNotSplit) {
  EXPECT_EQ(AttendSplits(Shape(8192, 32, 8, 128, 1 << 17), kSms), 1);
  EXPECT_EQ(AttendWorkspaceBytes(Shape(8192, 32, 8, 128, 1 << 17), kSms), 0);
  EXPECT_EQ(AttendSplits(Shape(1, 32, 8, 128, 64), kSms), 1);
  EXPECT_EQ(AttendSplits(Shape(1, 32, 8, 128, 0), kSms), 1);
  EXPECT_EQ(QueryGradSplits(Shape(8192, 32, 8, 128, 1 << 17), kSms), 1);
  EXPECT_EQ(QueryGradWorkspaceBytes(Shape(8192, 32, 8, 128, 1 << 17), kSms), 0);
}

TEST(AttentionPlan, SplitsStayWithinTheKeysAndTheWorkspace) {
  for (const int head_dim : {8, 40, 64, 96, 128, 200, 256}) {
    for (const int64_t rows : {0, 1, 3, 17, 65, 300, 4096}) {
      for (const int64_t keys : {0, 1, 100, 5000, 1 << 20, 1 << 30}) {
        const AttentionShape shape = Shape(rows, 12, 4, head_dim, keys);
        const int splits = AttendSplits(shape, kSms);
        const TileConfig tile = AttendTile(PaddedHeadDim(head_dim), AttendTileRows(PackedRows(shape)));
        EXPECT_GE(splits, 1);
        const int tile_keys = UsesHopper(shape) ? HopperAttendTileOf(shape).keys : tile.keys;
        EXPECT_LE(splits, std::max<int64_t>(1, (keys + tile_keys - 1) / tile_keys));
        EXPECT_GE(AttendWorkspaceBytes(shape, kSms), splits == 1 ? 0 : splits * rows * 12 * (head_dim + 1) * 4);
        EXPECT_LE(AttendWorkspaceBytes(shape, kSms), int64_t{257} << 20);
        const int grad_splits = QueryGradSplits(shape, kSms);
        EXPECT_GE(grad_splits, 1);
        EXPECT_GE(QueryGradWorkspaceBytes(shape, kSms), grad_splits == 1 ? 0 : grad_splits * rows * 12 * head_dim * 4);
      }
    }
  }
}

TEST(AttentionPlan, TilesFitAMultiprocessor) {
  constexpr int kSharedPerSm = 228 * 1024;
  constexpr int kReserved = 1024;
  for (const int dim : {32, 64, 96, 128, 256}) {
    for (const int rows : {16, 64, 128}) {
      const TileConfig tile = AttendTile(dim, rows);
      const int bytes = TileBytes(dim, tile, 1) + 8 * rows + 256 + kReserved;  // + VisibleKeys
      EXPECT_LE(BlocksPerSm(dim, tile) * bytes, kSharedPerSm) << dim << " x " << rows;
      EXPECT_LE(MergeBytes(dim, tile), TileBytes(dim, tile, 1)) << dim << " x " << rows;
      EXPECT_EQ(tile.rows, 16 * tile.m_tiles * tile.warps_m);
    }
    if (WidensInRegisters(dim, 16)) {
      const TileConfig tile = AttendTile(dim, 16, true);
      const int bytes = CodeTileBytes(dim, tile) + 8 * tile.rows + 256 + kReserved;
      EXPECT_LE(BlocksPerSm(dim, tile) * bytes, kSharedPerSm) << dim;
      EXPECT_LE(MergeBytes(dim, tile), CodeTileBytes(dim, tile)) << dim;
      EXPECT_EQ(tile.keys / tile.warps_n, 32) << "a lane a key's scales";
    }
    const TileConfig tile = QueryGradTile(dim);
    EXPECT_LE(BlocksPerSm(dim, tile) * (TileBytes(dim, tile, 2) + 8 * tile.rows + 256 + kReserved), kSharedPerSm)
        << dim;
  }
}

TEST(AttentionPlan, HopperTilesFitAMultiprocessor) {
  constexpr int kSharedPerBlock = 227 * 1024;
  constexpr int kStateBytes = 320 + 2 * (8 * 192 + 128);  // barriers, two plans
  for (const int dim : {64, 128}) {
    for (const auto& [tile, operands] :
         {std::pair{HopperAttendTile(dim, true), 1}, std::pair{HopperAttendTile(dim, false), 1},
          std::pair{HopperQueryGradTile(dim), 2}, std::pair{HopperAttendTile(dim, true, true), 1},
          std::pair{HopperAttendTile(dim, false, true), 1}, std::pair{HopperQueryGradTile(dim, true), 2}}) {
      EXPECT_LE(HopperTileBytes(dim, tile, operands) + kStateBytes, kSharedPerBlock) << dim;
      EXPECT_EQ(tile.rows % 64, 0);
      EXPECT_EQ(tile.keys % 16, 0);
      EXPECT_LE(tile.keys, 256) << "a box of the copy engine";
      EXPECT_EQ(tile.threads(), 128 + 2 * tile.rows);
    }
  }
}

TEST(AttentionPlan, HopperTakesManyRowsOfWholePanels) {
  EXPECT_TRUE(UsesHopper(Shape(128, 32, 8, 128, 1 << 19)));
  EXPECT_TRUE(UsesHopper(Shape(128, 9, 3, 64, 1 << 17)));
  EXPECT_TRUE(UsesHopper(Shape(17, 32, 8, 128, 1 << 17)));
  EXPECT_TRUE(UsesHopper(Shape(5, 32, 8, 128, 1 << 17)));
  EXPECT_FALSE(UsesHopper(Shape(4, 32, 8, 128, 1 << 17)));  // 16 packed rows: bound by reading
  EXPECT_FALSE(UsesHopper(Shape(21, 9, 3, 64, 1 << 17)));
  EXPECT_FALSE(UsesHopper(Shape(128, 32, 8, 96, 1 << 17)));
  EXPECT_FALSE(UsesHopper(Shape(128, 32, 8, 256, 1 << 17)));
  EXPECT_FALSE(UsesHopper(Shape(int64_t{1} << 31, 32, 8, 128, 1 << 17)));
  EXPECT_TRUE(HopperFillsTallTiles(32768 * 4));
  EXPECT_TRUE(HopperFillsTallTiles(384));
  EXPECT_FALSE(HopperFillsTallTiles(512));  // three tall tiles would hold 576
  EXPECT_FALSE(HopperFillsTallTiles(128));
  AttentionShape shape = Shape(128, 32, 8, 128, 1 << 19);
  shape.extents = 1;
  shape.kv[0].slots = int64_t{1} << 31;
  EXPECT_FALSE(UsesHopper(shape));
  shape.kv[0].slots = 1 << 19;
  EXPECT_TRUE(UsesHopper(shape));
  shape.portable_only = true;
  EXPECT_FALSE(UsesHopper(shape));
}

// In eight bits reading takes half as long, so that products count from fewer rows on.
TEST(AttentionPlan, HopperTakesFewerRowsInEightBits) {
  const auto int8 = [](AttentionShape shape) {
    shape.int8 = true;
    return shape;
  };
  EXPECT_FALSE(UsesHopper(int8(Shape(4, 32, 8, 128, 1 << 17))));
  EXPECT_TRUE(UsesHopper(int8(Shape(5, 32, 8, 128, 1 << 17))));
  EXPECT_FALSE(UsesHopper(int8(Shape(5, 32, 8, 96, 1 << 17))));
  EXPECT_TRUE(UsesHopper(int8(Shape(6, 9, 3, 64, 1 << 17))));
  EXPECT_FALSE(UsesHopper(Shape(6, 9, 3, 64, 1 << 17)));
  EXPECT_EQ(HopperAttendTileOf(int8(Shape(16, 9, 3, 64, 1 << 17))).rows, 128);
  EXPECT_EQ(HopperAttendTileOf(int8(Shape(128, 9, 3, 64, 1 << 17))).rows, 192);
  for (const int64_t rows : {1, 4, 8, 16, 128}) {
    const AttentionShape shape = int8(Shape(rows, 32, 8, 128, 1 << 17));
    const int64_t slots = UsesHopper(shape) ? kSms : 2 * kSms;
    const int64_t blocks = Blocks(shape);
    EXPECT_GE(static_cast<double>(blocks) / static_cast<double>((blocks + slots - 1) / slots * slots), 0.9) << rows;
  }
}

TEST(AttentionPlan, RefusesWhatTheKernelsCannotRead) {
  const AttentionShape good = Shape(3, 12, 4, 40, 100);
  EXPECT_TRUE(ValidShape(good));
  const auto broken = [&](auto change) {
    AttentionShape shape = good;
    change(shape);
    return !ValidShape(shape);
  };
  EXPECT_TRUE(broken([](AttentionShape& s) { s.head_dim = 20; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.head_dim = 264; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.head_dim = 0; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.kv_heads = 5; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.kv_heads = 0; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.rows = -1; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.scale = 0.0f; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.shard = 1; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.extents = kMaxExtents + 1; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.extents = 1, s.kv[0].slots = 5; }));
  EXPECT_TRUE(broken([](AttentionShape& s) { s.extents = 1, s.kv[0].head_stride = 12; }));
  alignas(16) static char memory[64];
  EXPECT_TRUE(broken([](AttentionShape& s) { s.extents = 1, s.kv[0].k = memory + 8, s.kv[0].v = memory; }));
  EXPECT_FALSE(
      broken([](AttentionShape& s) { s.extents = 1, s.kv[0].k = memory, s.kv[0].v = memory, s.kv[0].slots = 1; }));
}

// Few rows are spread over the device, many are not cut; nothing asks for more parts than Combine likes.
TEST(AttentionPlanTest, TailSplits) {
  EXPECT_EQ(TailSplits(1, 8, 132), 8);
  EXPECT_EQ(TailSplits(8, 8, 132), 4);
  EXPECT_EQ(TailSplits(64, 8, 132), 1);
  EXPECT_EQ(TailSplits(65535, 128, 132), 1);
  EXPECT_EQ(TailSplits(0, 1, 1), 2);
}

}  // namespace
}  // namespace refocus::kernels
