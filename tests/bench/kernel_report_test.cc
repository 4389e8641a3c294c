// What kernel_bench prints: rates, shares of the ceilings, which peer counts, what a peer that refuses leaves behind.
#include "bench/kernel_report.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

namespace refocus {
namespace {

constexpr KernelCeilings kCeilings{800.0, 4.0};

KernelRow Span() {
  KernelRow row;
  row.model = "m";
  row.heads = 32;
  row.kv_heads = 8;
  row.head_dim = 128;
  row.kv = "bf16";
  row.work = "span";
  row.rows = 128;
  row.keys = 131072;
  row.splits = 5;
  row.time = {500.0, 600.0, true};
  row.flops = 3e11;  // 600 TFLOP/s
  row.bytes = 1e9;
  row.peers = {{"cudnn", false, {900.0, 1000.0, true}, {}},
               {"cudnn", true, {800.0, 850.0, false}, {}},
               {"flash", false, {}, "no such kernel"},
               {"flash", true, {1200.0, 1250.0, true}, {}}};
  return row;
}

KernelRow Decode() {
  KernelRow row = Span();
  row.work = "decode";
  row.rows = 1;
  row.flops = 0.0;  // 2 TB/s
  row.peers.clear();
  return row;
}

std::vector<std::string> Cells(const std::string& line) {
  std::vector<std::string> cells;
  std::stringstream stream(line);
  std::string cell;
  std::getline(stream, cell, '|');
  while (std::getline(stream, cell, '|')) {
    const size_t begin = cell.find_first_not_of(' ');
    if (begin != std::string::npos) cells.push_back(cell.substr(begin, cell.find_last_not_of(' ') + 1 - begin));
  }
  cells.pop_back();  // the line's end
  return cells;
}

TEST(KernelReport, TableLine) {
  EXPECT_EQ(Cells(TableLine(Span(), kCeilings)),
            (std::vector<std::string>{"span 128 x 131072", "500.0", "600.0", "600.0 TFLOP/s", "75%", "800.0* p",
                                      "1200 p", "1.60"}));
  EXPECT_EQ(Cells(TableLine(Decode(), kCeilings)),
            (std::vector<std::string>{"decode 1 x 131072", "500.0", "600.0", "2.00 TB/s", "50%", "-", "-", "-"}));
}

// The longest case and long times stay in their columns.
TEST(KernelReport, ColumnsAlign) {
  KernelRow row = Span();
  row.work = "prefill-chunk";
  row.rows = 8192;
  row.keys = 524288;
  row.time = {1234567.0, 2345678.0, false};
  for (PeerTime& peer : row.peers) peer.time = {3456789.0, 4567890.0, false};
  const std::string head = TableHead();
  const size_t width = head.find('\n') + 1;
  EXPECT_LE(width, 120u + 1);
  for (const KernelRow& each : {row, Span(), Decode()}) EXPECT_EQ(TableLine(each, kCeilings).size(), width);
}

TEST(KernelReport, TheFastestPeerCounts) {
  const KernelRow row = Span();
  EXPECT_EQ(BestPeer(row), &row.peers[1]);
  EXPECT_EQ(BestPeer(row, "cudnn"), &row.peers[1]);
  EXPECT_EQ(BestPeer(row, "flash"), &row.peers[3]);  // not the one without a time
  EXPECT_EQ(BestPeer(Decode()), nullptr);
}

TEST(KernelReport, JsonLine) {
  const std::string line = JsonLine(Span(), kCeilings);
  EXPECT_EQ(line.find('\n'), line.size() - 1);
  const nlohmann::json json = nlohmann::json::parse(line);
  EXPECT_EQ(json["work"], "span");
  EXPECT_EQ(json["rows"], 128);
  EXPECT_EQ(json["keys"], 131072);
  EXPECT_EQ(json["splits"], 5);
  EXPECT_DOUBLE_EQ(json["us"], 500.0);
  EXPECT_DOUBLE_EQ(json["tflops"], 600.0);
  EXPECT_DOUBLE_EQ(json["of_ceiling"], 0.75);
  EXPECT_DOUBLE_EQ(json["best_peer_us"], 800.0);
  EXPECT_DOUBLE_EQ(json["ratio"], 1.6);
  ASSERT_EQ(json["peers"].size(), 4u);
  EXPECT_EQ(json["peers"][1]["gqa"], "packed");
  EXPECT_EQ(json["peers"][1]["graph"], false);
  EXPECT_EQ(json["peers"][2]["unavailable"], "no such kernel");
  EXPECT_FALSE(json["peers"][2].contains("us"));

  const nlohmann::json decode = nlohmann::json::parse(JsonLine(Decode(), kCeilings));
  EXPECT_DOUBLE_EQ(decode["tbytes_per_s"], 2.0);
  EXPECT_DOUBLE_EQ(decode["of_ceiling"], 0.5);
  EXPECT_TRUE(decode["ratio"].is_null());

  KernelRow odd = Span();
  odd.peers[2].unavailable = "bytes \xff \"quoted\"";
  EXPECT_NO_THROW(nlohmann::json::parse(JsonLine(odd, kCeilings)));
}

TEST(KernelReport, RefusalsAreSaidOnce) {
  Refusals refusals;
  EXPECT_EQ(refusals.Text(), "");
  KernelRow row = Span();
  refusals.Add(row);
  row.keys = 4096;
  refusals.Add(row);
  EXPECT_EQ(refusals.Text(), "- not available: flash, native, span: no such kernel (span 128 x 131072 and 1 more)\n");
}

}  // namespace
}  // namespace refocus
