// Text and ids from files and standard input, and cuts of them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace refocus::cli {

// The whole file, or standard input for "-". CONFIG_INVALID when it cannot be read or is larger than the service takes.
StatusOr<std::string> ReadInput(const std::string& path);

// The part of `text` from the first line that starts at or after `skip` up to the first line that starts at or after
// skip + max. Parts with adjoining numbers adjoin: [0, n) and [n, m) share no line and lose none. max
// unset: to the end.
std::string_view CutLines(std::string_view text, int64_t skip, std::optional<int64_t> max);

// Decimal ids separated by white space or commas. INVALID_ARGUMENT with the first word that is none.
StatusOr<std::vector<uint32_t>> ParseIds(std::string_view text);

}  // namespace refocus::cli
