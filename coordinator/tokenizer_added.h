// Finds added tokens in text: leftmost first, the longest of those that begin at one place.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace refocus {

class AddedTokenMatcher {
 public:
  void Add(std::string_view text, int32_t id);  // the first one of equal texts stays
  bool empty() const { return next_.empty(); }

  struct Match {
    size_t begin = 0;
    size_t end = 0;
    int32_t id = -1;  // -1: none
  };
  // The next match at or behind `from`. Time: bytes passed times the length of the longest text that begins there.
  Match Find(std::string_view text, size_t from) const;

 private:
  std::vector<int32_t> ids_ = {-1};               // by node of the tree of all texts; node 0 is the root
  absl::flat_hash_map<uint64_t, uint32_t> next_;  // (node << 8 | byte) -> node
  std::array<bool, 256> begins_ = {};             // first bytes
};

}  // namespace refocus
