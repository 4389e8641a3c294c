#include "cli/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ostream>

#include "cli/table.h"

namespace refocus::cli {
namespace {

constexpr double kRedrawSeconds = 0.05;
constexpr double kPlainSeconds = 10;
constexpr int kBarColumns = 16;

double MonotonicSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

ProgressStyle StderrStyle(bool quiet) {
  ProgressStyle style;
  style.quiet = quiet;
  const char* term = std::getenv("TERM");
  style.terminal = isatty(STDERR_FILENO) && term != nullptr && std::strcmp(term, "dumb") != 0;
  const char* no_color = std::getenv("NO_COLOR");
  style.color = style.terminal && (no_color == nullptr || *no_color == '\0');
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) style.width = size.ws_col;
  return style;
}

Progress::Progress(std::ostream& out, const ProgressStyle& style, std::string label, std::string unit)
    : Progress(out, style, std::move(label), std::move(unit), MonotonicSeconds) {}

Progress::Progress(std::ostream& out, const ProgressStyle& style, std::string label, std::string unit, Seconds clock)
    : out_(out), style_(style), label_(std::move(label)), unit_(std::move(unit)), clock_(std::move(clock)) {}

Progress::~Progress() { Finish(); }

std::string Progress::Text(int64_t done, int64_t total, double rate, double eta, std::string_view extra) const {
  std::string text = FormatCount(done) + "/" + FormatCount(total) + " " + unit_;
  if (rate > 0) text += ", " + FormatRate(rate) + " " + unit_ + "/s";
  if (eta >= 0 && done < total) text += ", " + FormatSeconds(eta) + " left";
  if (!extra.empty()) text.append(", ").append(extra);
  return text;
}

void Progress::Update(int64_t done, int64_t total, double rate, double eta, std::string_view extra) {
  if (style_.quiet) return;
  const double now = clock_();
  const bool complete = done >= total;
  if (!style_.terminal) {
    const int64_t tenth = total > 0 ? done * 10 / total : 10;
    if (!complete && tenth == last_tenth_ && now - last_time_ < kPlainSeconds) return;
    last_tenth_ = tenth;
    last_time_ = now;
    out_ << label_ << ": " << Text(done, total, rate, eta, extra) << std::endl;
    return;
  }
  if (!complete && now - last_time_ < kRedrawSeconds) return;
  last_time_ = now;
  const double share = total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 1.0;
  const int filled = static_cast<int>(share * kBarColumns);
  std::string bar = label_ + " [" + std::string(filled, '#') + std::string(kBarColumns - filled, '.') + "] ";
  bar += Text(done, total, rate, eta, extra);
  if (static_cast<int>(bar.size()) > style_.width - 1) bar.resize(std::max(style_.width - 1, 1));
  Clear();
  if (style_.color) {
    out_ << "\x1b[36m" << bar << "\x1b[0m" << std::flush;
  } else {
    out_ << bar << std::flush;
  }
  drawn_ = bar;
}

void Progress::Line(std::string_view text) {
  if (style_.quiet) return;
  const std::string bar = drawn_;
  Clear();
  out_ << text << '\n' << bar << std::flush;
  drawn_ = bar;
}

void Progress::Clear() {
  if (drawn_.empty()) return;
  out_ << '\r' << std::string(drawn_.size(), ' ') << '\r';
  drawn_.clear();
}

void Progress::Finish() {
  Clear();
  out_ << std::flush;
}

}  // namespace refocus::cli
