#include "base/log.h"

#include <algorithm>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace refocus {
namespace {

class LogTest : public ::testing::Test {
 protected:
  void TearDown() override { SetLog("refocus", LogLevel::kInfo); }
};

TEST_F(LogTest, OneLineWithTimeLevelAndComponent) {
  SetLog("worker[1]", LogLevel::kInfo);
  testing::internal::CaptureStderr();
  LogInfo("ready");
  const std::string text = testing::internal::GetCapturedStderr();
  // Every digit as 0.
  std::string form = text;
  std::replace_if(
      form.begin(), form.end(), [](char c) { return c >= '0' && c <= '9'; }, '0');
  EXPECT_EQ(form, "0000-00-00T00:00:00.000Z INFO worker[0] ready\n") << text;
}

TEST_F(LogTest, DropsWhatIsBelowTheLevel) {
  SetLog("x", LogLevel::kWarning);
  testing::internal::CaptureStderr();
  LogDebug("no");
  LogInfo("no");
  LogWarning("yes");
  LogError("yes");
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_EQ(text.find("no"), std::string::npos) << text;
  EXPECT_NE(text.find("WARN x yes"), std::string::npos) << text;
  EXPECT_NE(text.find("ERROR x yes"), std::string::npos) << text;
}

TEST_F(LogTest, EscapesControlCharacters) {
  testing::internal::CaptureStderr();
  LogError(std::string_view("a\nb\x1b[31m\0c\x7f %n", 14));
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_NE(text.find("a\\x0ab\\x1b[31m\\x00c\\x7f %n"), std::string::npos) << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
}

TEST_F(LogTest, LinesOfThreadsStayWhole) {
  testing::internal::CaptureStderr();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (int k = 0; k < 50; ++k) LogInfo(std::string(100, 'z'));
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::istringstream lines(testing::internal::GetCapturedStderr());
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    EXPECT_EQ(line.size(), std::string("2026-01-31T12:00:00.000Z INFO refocus ").size() + 100) << line;
  }
  EXPECT_EQ(count, 200);
}

TEST_F(LogTest, ParsesLevels) {
  LogLevel level = LogLevel::kInfo;
  EXPECT_TRUE(ParseLogLevel("debug", &level));
  EXPECT_EQ(level, LogLevel::kDebug);
  EXPECT_TRUE(ParseLogLevel("error", &level));
  EXPECT_EQ(level, LogLevel::kError);
  EXPECT_FALSE(ParseLogLevel("ERROR", &level));
  EXPECT_FALSE(ParseLogLevel("", &level));
  EXPECT_EQ(level, LogLevel::kError);
}

}  // namespace
}  // namespace refocus
