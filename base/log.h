// One line per event on stderr: "2026-01-31T12:00:00.000Z INFO worker[1] message". Thread-safe; never logs prompts or answers.
#pragma once

#include <string>
#include <string_view>

namespace refocus {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Process-wide; set once at start. `component` appears in every line ("coordinator", "worker[1]").
void SetLog(std::string_view component, LogLevel least);

// Control characters are escaped.
void Log(LogLevel level, std::string_view message);
inline void LogDebug(std::string_view message) { Log(LogLevel::kDebug, message); }
inline void LogInfo(std::string_view message) { Log(LogLevel::kInfo, message); }
inline void LogWarning(std::string_view message) { Log(LogLevel::kWarning, message); }
inline void LogError(std::string_view message) { Log(LogLevel::kError, message); }

// Parses "debug", "info", "warning", "error".
bool ParseLogLevel(std::string_view text, LogLevel* level);

}  // namespace refocus
