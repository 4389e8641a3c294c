#include "base/status.h"

#include <memory>

#include <gtest/gtest.h>

namespace refocus {
namespace {

TEST(StatusTest, CarriesReasonAndMetadata) {
  const Status status =
      Error(StatusCode::kNotFound, "CONTEXT_NOT_FOUND", "context: got 'a'", {{"context", "a"}, {"empty", ""}});
  EXPECT_EQ(status.code(), StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "context: got 'a'");
  const ErrorDetail detail = DetailOf(status);
  EXPECT_EQ(detail.reason, "CONTEXT_NOT_FOUND");
  EXPECT_EQ(detail.metadata, (ErrorMetadata{{"context", "a"}, {"empty", ""}}));
}

TEST(StatusTest, NoDetailWithoutPayload) {
  EXPECT_EQ(DetailOf(absl::OkStatus()).reason, "");
  EXPECT_EQ(DetailOf(absl::InternalError("x")).reason, "");
  EXPECT_TRUE(DetailOf(absl::InternalError("x")).metadata.empty());
}

TEST(StatusTest, NulInValueCannotForgeFields) {
  const std::string value("a\0reason\0", 9);
  const ErrorDetail detail = DetailOf(Error(StatusCode::kInternal, "R", "m", {{"k", value}}));
  EXPECT_EQ(detail.reason, "R");
  EXPECT_EQ(detail.metadata, (ErrorMetadata{{"k", "a?reason?"}}));
}

TEST(StatusTest, FieldErrorNamesAllThree) {
  const Status status = FieldError("steps", "-1", "0 to 10000");
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "steps: got -1, allowed 0 to 10000");
  EXPECT_EQ(DetailOf(status).reason, "FIELD_OUT_OF_RANGE");
  EXPECT_EQ(DetailOf(status).metadata, (ErrorMetadata{{"field", "steps"}, {"got", "-1"}, {"allowed", "0 to 10000"}}));
}

TEST(StatusTest, ExitCodes) {
  const auto code = [](const char* reason) { return ExitCodeOf(Error(StatusCode::kInvalidArgument, reason, "m")); };
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(code("CONFIG_INVALID"), 2);
  EXPECT_EQ(code("WEIGHTS_INVALID"), 3);
  EXPECT_EQ(code("HARDWARE"), 4);
  EXPECT_EQ(code("ANYTHING"), 1);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("x")), 1);
}

TEST(StatusDeathTest, AnErrorIsNeverOk) { EXPECT_DEATH(Error(StatusCode::kOk, "R", "m"), "check failed"); }

Status Twice(StatusOr<std::unique_ptr<int>> in, int* out) {
  REFOCUS_ASSIGN_OR_RETURN(const std::unique_ptr<int> value, std::move(in));
  *out = 2 * *value;
  REFOCUS_RETURN_IF_ERROR(*value == 0 ? absl::AbortedError("zero") : absl::OkStatus());
  *out += 1;
  return absl::OkStatus();
}

TEST(StatusTest, MacrosReturnEarlyAndMove) {
  int out = 0;
  EXPECT_TRUE(Twice(std::make_unique<int>(4), &out).ok());
  EXPECT_EQ(out, 9);
  EXPECT_EQ(Twice(std::make_unique<int>(0), &out).message(), "zero");
  EXPECT_EQ(out, 0);
  EXPECT_EQ(Twice(absl::NotFoundError("gone"), &out).message(), "gone");
  EXPECT_EQ(out, 0);
}

}  // namespace
}  // namespace refocus
