// Which rank owns which token. Block-cyclic: position p belongs to shard (p / kBlockTokens) mod shards, so that every prefix
// [0, p) is spread evenly (docs/architecture.md). Pure arithmetic, 64-bit throughout.
#pragma once

#include <cstdint>

namespace refocus {

inline constexpr int64_t kBlockTokens = 256;

// The owned positions of one shard in rising order are its local indices 0, 1, 2, ...
struct ShardPlan {
  int64_t shards = 1;  // >= 1
  int64_t shard = 0;   // this rank's, [0, shards)

  static int64_t OwnerOf(int64_t position, int64_t shards) { return (position / kBlockTokens) % shards; }

  bool Owns(int64_t position) const { return OwnerOf(position, shards) == shard; }

  // Owned positions below `position`.
  int64_t CountBelow(int64_t position) const {
    const int64_t cycle = kBlockTokens * shards;
    const int64_t rest = position % cycle - shard * kBlockTokens;
    const int64_t in_cycle = rest < 0 ? 0 : (rest > kBlockTokens ? kBlockTokens : rest);
    return position / cycle * kBlockTokens + in_cycle;
  }

  // Inverse: the position with local index `index`.
  int64_t PositionAt(int64_t index) const {
    return (index / kBlockTokens * shards + shard) * kBlockTokens + index % kBlockTokens;
  }
};

}  // namespace refocus
