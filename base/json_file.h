// JSON files written by others, read strictly: no byte order mark, no duplicate keys, nesting at most 64, UTF-8.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "base/status.h"

namespace refocus {

inline constexpr int kMaxJsonDepth = 64;

// Errors carry `reason` and begin with the path, then line and column where there is one.
StatusOr<nlohmann::json> ReadJsonFile(const std::string& path, std::string_view reason, int64_t max_bytes);

// "line 3, column 7: what", from nlohmann's exception and the text that it was thrown for.
std::string JsonErrorText(std::string_view text, const nlohmann::json::exception& error);

}  // namespace refocus
