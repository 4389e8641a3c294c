#include "base/log.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <mutex>

namespace refocus {
namespace {

std::mutex mutex;
std::string component = "refocus";
std::atomic<LogLevel> least_level{LogLevel::kInfo};
constexpr const char* kNames[] = {"DEBUG", "INFO", "WARN", "ERROR"};

std::string Escaped(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const unsigned char c : text) {
    if (c < 0x20 || c == 0x7f) {
      char code[8];
      std::snprintf(code, sizeof(code), "\\x%02x", c);
      out += code;
    } else {
      out.push_back(static_cast<char>(c));
    }
  }
  return out;
}

}  // namespace

void SetLog(std::string_view name, LogLevel least) {
  const std::lock_guard<std::mutex> lock(mutex);
  component = name;
  least_level = least;
}

void Log(LogLevel level, std::string_view message) {
  if (level < least_level) return;
  using std::chrono::duration_cast, std::chrono::milliseconds, std::chrono::system_clock;
  const int64_t now_ms = duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count();
  const std::time_t seconds = static_cast<std::time_t>(now_ms / 1000);
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  char stamp[32];
  std::strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
  const std::string text = Escaped(message);
  const std::lock_guard<std::mutex> lock(mutex);
  std::fprintf(stderr, "%s.%03dZ %s %s %s\n", stamp, static_cast<int>(now_ms % 1000),
               kNames[static_cast<int>(level)], component.c_str(), text.c_str());
}

bool ParseLogLevel(std::string_view text, LogLevel* level) {
  constexpr std::string_view kTexts[] = {"debug", "info", "warning", "error"};
  for (int i = 0; i < 4; ++i) {
    if (text == kTexts[i]) {
      *level = static_cast<LogLevel>(i);
      return true;
    }
  }
  return false;
}

}  // namespace refocus
