// Ranges of request fields: INVALID_ARGUMENT that names field, value and limits.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "base/status.h"

namespace refocus {

inline std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

inline Status CheckInt(const char* field, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return FieldError(field, std::to_string(value), std::to_string(least) + " to " + std::to_string(most));
}

// NaN fails every comparison and so is refused with the rest.
inline Status CheckReal(const char* field, double value, double least, double most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return FieldError(field, Number(value), Number(least) + " to " + Number(most));
}

inline Status CheckRealOrZero(const char* field, double value, double least, double most) {
  if (value == 0 || (value >= least && value <= most)) return absl::OkStatus();
  return FieldError(field, Number(value), "0, or " + Number(least) + " to " + Number(most));
}

}  // namespace refocus
