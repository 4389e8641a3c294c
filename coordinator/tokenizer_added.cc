#include "coordinator/tokenizer_added.h"

namespace refocus {
namespace {

uint64_t Edge(uint32_t node, char byte) { return uint64_t{node} << 8 | static_cast<unsigned char>(byte); }

}  // namespace

void AddedTokenMatcher::Add(std::string_view text, int32_t id) {
  if (text.empty()) return;
  begins_[static_cast<unsigned char>(text[0])] = true;
  uint32_t node = 0;
  for (const char byte : text) {
    const auto [edge, inserted] = next_.try_emplace(Edge(node, byte), static_cast<uint32_t>(ids_.size()));
    if (inserted) ids_.push_back(-1);
    node = edge->second;
  }
  if (ids_[node] < 0) ids_[node] = id;
}

AddedTokenMatcher::Match AddedTokenMatcher::Find(std::string_view text, size_t from) const {
  Match match;
  if (empty()) return match;
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!begins_[static_cast<unsigned char>(text[begin])]) continue;
    uint32_t node = 0;
    for (size_t at = begin; at < text.size(); ++at) {
      const auto edge = next_.find(Edge(node, text[at]));
      if (edge == next_.end()) break;
      node = edge->second;
      if (ids_[node] >= 0) match = {begin, at + 1, ids_[node]};
    }
    if (match.id >= 0) return match;
  }
  return match;
}

}  // namespace refocus
