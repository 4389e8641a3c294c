#include "cli/table.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <ostream>

#include "base/check.h"

namespace refocus::cli {
namespace {

bool LooksNumeric(const std::string& cell) {
  if (cell.empty() || cell == "-") return true;
  const char first = cell[0] == '-' || cell[0] == '+' ? cell[1] : cell[0];
  return std::isdigit(static_cast<unsigned char>(first)) != 0;
}

// Columns on the screen: bytes that start a UTF-8 character.
size_t Width(const std::string& cell) {
  return static_cast<size_t>(std::count_if(cell.begin(), cell.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

}  // namespace

std::string FormatFixed(double value, int digits) {
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), "%.*f", digits, value);
  return buffer;
}

std::string FormatCount(int64_t count) {
  std::string digits = std::to_string(count);
  const int first = count < 0 ? 1 : 0;
  for (int at = static_cast<int>(digits.size()) - 3; at > first; at -= 3)
    digits.insert(static_cast<size_t>(at), 1, ',');
  return digits;
}

std::string FormatRate(double per_second) {
  if (!std::isfinite(per_second)) return "-";
  if (per_second >= 100) return FormatCount(std::llround(per_second));
  if (per_second >= 10) return FormatFixed(per_second, 1);
  return FormatFixed(per_second, per_second >= 1 ? 2 : 3);
}

std::string FormatSeconds(double seconds) {
  if (!std::isfinite(seconds)) return "-";
  char buffer[64];
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (seconds < 10) {
    std::snprintf(buffer, sizeof(buffer), "%.2f s", seconds);
  } else if (whole < 60) {
    std::snprintf(buffer, sizeof(buffer), "%.1f s", seconds);
  } else if (whole < 3600) {
    std::snprintf(buffer, sizeof(buffer), "%d min %02d s", static_cast<int>(whole / 60), static_cast<int>(whole % 60));
  } else {
    std::snprintf(buffer, sizeof(buffer), "%lld h %02d min", static_cast<long long>(whole / 3600),
                  static_cast<int>(whole / 60 % 60));
  }
  return buffer;
}

std::string FormatBytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  return FormatFixed(value, unit == 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2) + " " + kUnits[unit];
}

Table::Table(std::vector<std::string> header) { rows_.push_back(std::move(header)); }

void Table::Add(std::vector<std::string> row) {
  REFOCUS_CHECK_EQ(row.size(), rows_[0].size());
  rows_.push_back(std::move(row));
}

void Table::Print(std::ostream& out) const {
  const size_t columns = rows_[0].size();
  std::vector<size_t> width(columns, 0);
  std::vector<bool> right(columns, false);
  for (size_t c = 0; c < columns; ++c) {
    for (const auto& row : rows_) width[c] = std::max(width[c], Width(row[c]));
    right[c] =
        c > 0 && std::all_of(rows_.begin() + 1, rows_.end(), [&](const auto& row) { return LooksNumeric(row[c]); });
  }
  for (size_t r = 0; r < rows_.size(); ++r) {
    std::string line;
    for (size_t c = 0; c < columns; ++c) {
      const std::string pad(width[c] - Width(rows_[r][c]), ' ');
      line += right[c] ? pad + rows_[r][c] : rows_[r][c] + pad;
      if (c + 1 < columns) line += "  ";
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out << line << '\n';
    if (r == 0) {
      std::string rule;
      for (size_t c = 0; c < columns; ++c) rule += std::string(width[c], '-') + (c + 1 < columns ? "  " : "");
      out << rule << '\n';
    }
  }
  out << std::flush;
}

}  // namespace refocus::cli
