// What the command line is made of, without a server: text cuts, ids, formats, tables, progress, back-off, error lines.
#include <gtest/gtest.h>
#include <grpcpp/support/status.h>

#include <sstream>

#include "cli/input.h"
#include "cli/progress.h"
#include "cli/rpc_error.h"
#include "cli/supervisor.h"
#include "cli/table.h"
#include "google/rpc/error_details.pb.h"

namespace refocus::cli {
namespace {

TEST(CutLines, PartsAdjoinAtLineStarts) {
  const std::string text = "one\ntwo three\n\nfour\nno end";
  for (int64_t cut = 0; cut <= static_cast<int64_t>(text.size()) + 2; ++cut) {
    const std::string first(CutLines(text, 0, cut));
    const std::string second(CutLines(text, cut, std::nullopt));
    EXPECT_EQ(text, first + second) << cut;
    EXPECT_TRUE(first.empty() || first.back() == '\n' || second.empty()) << cut;
    for (int64_t next = 0; next <= 12; ++next) {
      EXPECT_EQ(second, std::string(CutLines(text, cut, next)) + std::string(CutLines(text, cut + next, std::nullopt)));
    }
  }
  EXPECT_EQ("two three\n", CutLines(text, 1, 5));
  EXPECT_EQ("two three\n", CutLines(text, 4, 10));  // cuts that are line starts already stay
  EXPECT_EQ("", CutLines("", 0, 5));
  EXPECT_EQ("", CutLines(text, 1000, 5));
  EXPECT_EQ(text, CutLines(text, 0, INT64_MAX));
  EXPECT_EQ("", CutLines(text, INT64_MAX, INT64_MAX));
}

TEST(ParseIds, TakesSpacesLinesCommasAndNamesTheBadOne) {
  EXPECT_EQ((std::vector<uint32_t>{1, 22, 4294967295}), *ParseIds(" 1,22\n\t4294967295\r\n"));
  EXPECT_TRUE(ParseIds("")->empty());
  for (const char* bad : {"1 -2", "1 4294967296", "1 2x", "1 0x2", "1 2.0"}) {
    const auto ids = ParseIds(bad);
    ASSERT_FALSE(ids.ok()) << bad;
    EXPECT_EQ("FIELD_OUT_OF_RANGE", DetailOf(ids.status()).reason);
    EXPECT_NE(std::string::npos, std::string(ids.status().message()).find("id number 2")) << ids.status();
  }
}

TEST(Format, NumbersForPeople) {
  EXPECT_EQ("0", FormatCount(0));
  EXPECT_EQ("999", FormatCount(999));
  EXPECT_EQ("1,000", FormatCount(1000));
  EXPECT_EQ("-12,345,678", FormatCount(-12345678));
  EXPECT_EQ("-123", FormatCount(-123));
  EXPECT_EQ("0.25 s", FormatSeconds(0.25));
  EXPECT_EQ("59.4 s", FormatSeconds(59.4));
  EXPECT_EQ("1 min 00 s", FormatSeconds(59.6));
  EXPECT_EQ("2 min 05 s", FormatSeconds(125));
  EXPECT_EQ("1 h 02 min", FormatSeconds(3725));
  EXPECT_EQ("-", FormatSeconds(std::nan("")));
  EXPECT_EQ("512 B", FormatBytes(512));
  EXPECT_EQ("1.50 KiB", FormatBytes(1536));
  EXPECT_EQ("93.8 MiB", FormatBytes(98362432));
  EXPECT_EQ("12.3", FormatRate(12.345));
  EXPECT_EQ("1,235", FormatRate(1234.5));
  EXPECT_EQ("0.123", FormatRate(0.1234));
  EXPECT_EQ("-", FormatRate(1.0 / 0.0));
}

TEST(Table, AlignsNumbersRightAndCountsCharactersNotBytes) {
  Table table({"phase", "tokens", "note"});
  EXPECT_TRUE(table.empty());
  table.Add({"prefill", "4,000", "x"});
  table.Add({"ädapt", "12", "-"});
  std::ostringstream out;
  table.Print(out);
  EXPECT_EQ("phase    tokens  note\n"
            "-------  ------  ----\n"
            "prefill   4,000  x\n"
            "ädapt        12  -\n",
            out.str());
  EXPECT_FALSE(table.empty());
}

TEST(Progress, PlainLinesAreFew) {
  std::ostringstream out;
  double now = 0;
  {
    Progress progress(out, {.terminal = false}, "prefill", "tokens", [&] { return now; });
    for (int64_t done = 0; done <= 1000; ++done) progress.Update(done, 1000, 100, 1.5);
    progress.Line("a line");
  }
  const std::string text = out.str();
  EXPECT_EQ(12, std::count(text.begin(), text.end(), '\n'));  // 0, each tenth, and the line
  EXPECT_NE(std::string::npos, text.find("prefill: 100/1,000 tokens, 100 tokens/s, 1.50 s left\n"));
  EXPECT_NE(std::string::npos, text.find("prefill: 1,000/1,000 tokens, 100 tokens/s\n"));
  EXPECT_EQ(std::string::npos, text.find('\r'));
  EXPECT_EQ(std::string::npos, text.find('\x1b'));
}

TEST(Progress, PlainLinesComeEveryTenSecondsWhenSlow) {
  std::ostringstream out;
  double now = 0;
  Progress progress(out, {.terminal = false}, "prefill", "tokens", [&] { return now; });
  for (; now < 60; now += 1) progress.Update(1, 1000, 0, -1);
  const std::string text = out.str();
  EXPECT_EQ(6, std::count(text.begin(), text.end(), '\n'));
  EXPECT_EQ(std::string::npos, text.find("left"));
}

TEST(Progress, BarIsRedrawnFitsTheScreenAndIsRemoved) {
  std::ostringstream out;
  double now = 0;
  {
    Progress progress(out, {.terminal = true, .color = false, .width = 60}, "prefill", "tokens", [&] { return now; });
    progress.Update(500, 1000, 100, 5, "a remark that is far too long for a screen of sixty columns");
    progress.Update(501, 1000, 100, 5);  // too soon
    progress.Line("kept");
    now += 1;
    progress.Update(1000, 1000, 100, 0);
  }
  const std::string text = out.str();
  EXPECT_NE(std::string::npos, text.find("prefill [########........] 500/1,000"));
  EXPECT_EQ(std::string::npos, text.find("501/"));
  EXPECT_NE(std::string::npos, text.find("kept\nprefill ["));
  EXPECT_EQ(std::string::npos, text.find('\x1b'));
  EXPECT_EQ('\r', text.back());
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find_first_of("\r\n", begin), text.size());
    EXPECT_LT(end - begin, 60u);
    begin = end + 1;
  }
}

TEST(Progress, QuietPrintsNothing) {
  std::ostringstream out;
  {
    Progress progress(out, {.terminal = true, .quiet = true}, "prefill", "tokens");
    progress.Update(1, 2, 1, 1);
    progress.Line("line");
  }
  EXPECT_EQ("", out.str());
}

TEST(Backoff, DoublesToALimitAndStartsAnewAfterALongLife) {
  Backoff backoff;
  std::vector<double> waits;
  for (int i = 0; i < 7; ++i) waits.push_back(backoff.After(1));
  EXPECT_EQ((std::vector<double>{0.5, 1, 2, 4, 8, 10, 10}), waits);
  EXPECT_EQ(7, backoff.failures());
  EXPECT_EQ(0.5, backoff.After(kSettledSeconds));
  EXPECT_EQ(1, backoff.failures());
}

TEST(ReadyLine, IsReadOrRefused) {
  std::string address, worker;
  EXPECT_TRUE(ParseReadyLine("refocus-coordinator ready public=127.0.0.1:7070 worker=[::1]:41", &address, &worker));
  EXPECT_EQ("127.0.0.1:7070", address);
  EXPECT_EQ("[::1]:41", worker);
  EXPECT_FALSE(ParseReadyLine("refocus-coordinator ready public=127.0.0.1:7070", &address, &worker));
  EXPECT_FALSE(ParseReadyLine("ready public=a worker=b", &address, &worker));
  EXPECT_FALSE(ParseReadyLine("", &address, &worker));
}

grpc::Status WithDetails(const google::protobuf::Message& detail) {
  google::rpc::Status details;
  details.add_details()->PackFrom(detail);
  return {grpc::StatusCode::UNAVAILABLE, "the group is being rebuilt", details.SerializeAsString()};
}

TEST(RpcError, KeepsReasonAndMetadata) {
  google::rpc::ErrorInfo info;
  info.set_reason("WORKER_LOST");
  (*info.mutable_metadata())["rank"] = "1";
  (*info.mutable_metadata())["cause"] = "killed by signal 9";
  const Status status = FromGrpc(WithDetails(info));
  EXPECT_EQ(StatusCode::kUnavailable, status.code());
  EXPECT_EQ("WORKER_LOST", DetailOf(status).reason);
  EXPECT_EQ("the group is being rebuilt [WORKER_LOST, UNAVAILABLE]\n  cause: killed by signal 9\n  rank: 1",
            Describe(status));
}

TEST(RpcError, BareStatusesAndGarbage) {
  EXPECT_TRUE(FromGrpc(grpc::Status::OK).ok());
  EXPECT_EQ("no message [CANCELLED]", Describe(FromGrpc({grpc::StatusCode::CANCELLED, ""})));
  EXPECT_EQ("m [INTERNAL]", Describe(FromGrpc({grpc::StatusCode::INTERNAL, "m", "\xff\xff garbage"})));
  EXPECT_FALSE(RetryDelay({grpc::StatusCode::INTERNAL, "m", "\xff\xff garbage"}));
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(2);
  retry.mutable_retry_delay()->set_nanos(500'000'000);
  EXPECT_EQ(2.5, RetryDelay(WithDetails(retry)));
}

}  // namespace
}  // namespace refocus::cli
