#include "cli/input.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>

#include "base/limits.h"

namespace refocus::cli {
namespace {

Status BadInput(const std::string& message) { return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", message); }

size_t LineStart(std::string_view text, int64_t from) {
  if (from <= 0) return 0;
  if (from >= static_cast<int64_t>(text.size())) return text.size();
  const size_t line_end = text.find('\n', static_cast<size_t>(from) - 1);
  return line_end == std::string_view::npos ? text.size() : line_end + 1;
}

}  // namespace

StatusOr<std::string> ReadInput(const std::string& path) {
  const bool is_stdin = path == "-";
  const std::unique_ptr<FILE, int (*)(FILE*)> file(is_stdin ? stdin : std::fopen(path.c_str(), "rb"),
                                                   is_stdin ? [](FILE*) { return 0; } : std::fclose);
  if (!file) return BadInput(path + ": cannot open: " + std::strerror(errno));
  std::string text;
  std::vector<char> buffer(1 << 20);
  while (true) {
    const size_t count = std::fread(buffer.data(), 1, buffer.size(), file.get());
    text.append(buffer.data(), count);
    if (std::ferror(file.get())) return BadInput(path + ": cannot read: " + std::strerror(errno));
    if (static_cast<int64_t>(text.size()) > kMaxTextBytes) {
      return BadInput(path + ": got more than " + std::to_string(kMaxTextBytes) +
                      " bytes, which is the limit of a context");
    }
    if (count < buffer.size() && std::feof(file.get())) return text;
  }
}

std::string_view CutLines(std::string_view text, int64_t skip, std::optional<int64_t> max) {
  const size_t begin = LineStart(text, skip);
  if (!max) return text.substr(begin);
  const auto size = static_cast<int64_t>(text.size());
  // Saturates: skip + max may be past any size.
  const size_t end = *max >= size - std::min(skip, size) ? text.size() : LineStart(text, skip + *max);
  return text.substr(begin, std::max(begin, end) - begin);
}

StatusOr<std::vector<uint32_t>> ParseIds(std::string_view text) {
  const auto is_gap = [](char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == ','; };
  std::vector<uint32_t> ids;
  for (size_t begin = 0; begin < text.size();) {
    if (is_gap(text[begin])) {
      ++begin;
      continue;
    }
    size_t end = begin;
    while (end < text.size() && !is_gap(text[end])) ++end;
    uint32_t id = 0;
    const auto [last, error] = std::from_chars(text.data() + begin, text.data() + end, id);
    if (error != std::errc() || last != text.data() + end) {
      std::string got(text.substr(begin, std::min<size_t>(end - begin, 32)));
      got += " as id number " + std::to_string(ids.size() + 1);
      return FieldError("ids", got, "decimal numbers below 2^32, separated by spaces, lines or commas");
    }
    ids.push_back(id);
    begin = end;
  }
  return ids;
}

}  // namespace refocus::cli
