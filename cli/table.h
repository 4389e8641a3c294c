// Numbers for people: units in the text, thousands apart, columns that line up.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

namespace refocus::cli {

std::string FormatCount(int64_t count);      // 12,345
std::string FormatRate(double per_second);   // three significant digits: 0.123, 12.3, 1,230
std::string FormatSeconds(double seconds);   // 0.12 s, 12.3 s, 2 min 05 s, 1 h 02 min
std::string FormatBytes(int64_t bytes);      // 1.5 GiB
std::string FormatFixed(double value, int digits);

// Left-aligned first column, the others aligned right when every cell in them begins like a number.
class Table {
 public:
  explicit Table(std::vector<std::string> header);
  void Add(std::vector<std::string> row);  // as many cells as the header
  void Print(std::ostream& out) const;
  bool empty() const { return rows_.size() == 1; }

 private:
  std::vector<std::vector<std::string>> rows_;  // the header first
};

}  // namespace refocus::cli
