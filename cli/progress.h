// Progress on stderr: one bar that is redrawn on a terminal, plain lines elsewhere. Colour only on a terminal and never
// when NO_COLOR is set.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>
#include <string_view>

namespace refocus::cli {

struct ProgressStyle {
  bool terminal = false;
  bool color = false;
  bool quiet = false;  // prints nothing at all
  int width = 80;      // columns
};

// From stderr, TERM, COLUMNS and NO_COLOR.
ProgressStyle StderrStyle(bool quiet);

class Progress {
 public:
  using Seconds = std::function<double()>;  // a monotonic clock

  Progress(std::ostream& out, const ProgressStyle& style, std::string label, std::string unit);
  Progress(std::ostream& out, const ProgressStyle& style, std::string label, std::string unit, Seconds clock);
  ~Progress();  // leaves no half-drawn bar behind
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // rate: units per second; eta: seconds, negative when unknown. `extra` goes behind them. On a terminal at most 20
  // times a second; elsewhere a line a tenth of the way, or every ten seconds.
  void Update(int64_t done, int64_t total, double rate, double eta, std::string_view extra = {});
  // A line that stays.
  void Line(std::string_view text);
  // Removes the bar.
  void Finish();

 private:
  std::string Text(int64_t done, int64_t total, double rate, double eta, std::string_view extra) const;
  void Clear();

  std::ostream& out_;
  ProgressStyle style_;
  std::string label_;
  std::string unit_;
  Seconds clock_;
  std::string drawn_;
  double last_time_ = -1e9;
  int64_t last_tenth_ = -1;
};

}  // namespace refocus::cli
