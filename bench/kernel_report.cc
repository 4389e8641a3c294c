#include "bench/kernel_report.h"

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace refocus {
namespace {

constexpr int kCaseWidth = 27;
constexpr int kPeerWidth = 12;

std::string Padded(const std::string& text, int width, bool left = false) {
  const std::string fill(std::max(0, width - static_cast<int>(text.size())), ' ');
  return left ? text + fill : fill + text;
}

std::string Fixed(double value, int digits) {
  std::array<char, 48> text;
  std::snprintf(text.data(), text.size(), "%.*f", digits, value);
  return text.data();
}

// Four significant digits at least: times reach from microseconds to a second.
std::string Microseconds(double us) { return Fixed(us, us < 1000.0 ? 1 : 0); }

std::string Layout(const PeerTime& peer) { return peer.packed ? "packed" : "native"; }

std::string PeerCell(const KernelRow& row, const std::string& name) {
  const PeerTime* best = BestPeer(row, name);
  if (best == nullptr) return "-";
  return Microseconds(best->time.median_us) + (best->time.replayed ? "" : "*") + (best->packed ? " p" : " n");
}

}  // namespace

double OfCeiling(const KernelRow& row, const KernelCeilings& ceilings) {
  return row.rate() / (row.reads() ? ceilings.tbytes : ceilings.tflops);
}

const PeerTime* BestPeer(const KernelRow& row, const std::string& name) {
  const PeerTime* best = nullptr;
  for (const PeerTime& peer : row.peers) {
    if (!peer.unavailable.empty() || (!name.empty() && peer.name != name)) continue;
    if (best == nullptr || peer.time.median_us < best->time.median_us) best = &peer;
  }
  return best;
}

std::string KernelCase(const KernelRow& row) {
  return row.work + " " + std::to_string(row.rows) + " x " + std::to_string(row.keys);
}

std::string TableHead() {
  return "| work, rows x keys           |       us | worst us |          rate | ceiling |     cuDNN us |     flash us |"
         " ratio |\n|---|---:|---:|---:|---:|---:|---:|---:|\n";
}

std::string TableLine(const KernelRow& row, const KernelCeilings& ceilings) {
  const PeerTime* best = BestPeer(row);
  const std::string rate = Fixed(row.rate(), row.reads() ? 2 : 1) + (row.reads() ? " TB/s" : " TFLOP/s");
  std::string line = "| " + Padded(KernelCase(row), kCaseWidth, true);
  line += " | " + Padded(Microseconds(row.time.median_us) + (row.time.replayed ? "" : "*"), 8);
  line += " | " + Padded(Microseconds(row.time.worst_us), 8) + " | " + Padded(rate, 13);
  line += " | " + Padded(Fixed(100.0 * OfCeiling(row, ceilings), 0) + "%", 7);
  line += " | " + Padded(PeerCell(row, "cudnn"), kPeerWidth) + " | " + Padded(PeerCell(row, "flash"), kPeerWidth);
  return line + " | " + Padded(best == nullptr ? "-" : Fixed(best->time.median_us / row.time.median_us, 2), 5) + " |\n";
}

std::string JsonLine(const KernelRow& row, const KernelCeilings& ceilings) {
  nlohmann::ordered_json json = {{"model", row.model},       {"heads", row.heads}, {"kv_heads", row.kv_heads},
                                 {"head_dim", row.head_dim}, {"kv", row.kv},       {"work", row.work},
                                 {"rows", row.rows},         {"keys", row.keys},   {"splits", row.splits}};
  json["us"] = row.time.median_us;
  json["worst_us"] = row.time.worst_us;
  json["graph"] = row.time.replayed;
  json[row.reads() ? "tbytes_per_s" : "tflops"] = row.rate();
  json["of_ceiling"] = OfCeiling(row, ceilings);
  json["peers"] = nlohmann::ordered_json::array();
  for (const PeerTime& peer : row.peers) {
    nlohmann::ordered_json one = {{"library", peer.name}, {"gqa", Layout(peer)}};
    if (peer.unavailable.empty()) {
      one["us"] = peer.time.median_us;
      one["worst_us"] = peer.time.worst_us;
      one["graph"] = peer.time.replayed;
    } else {
      one["unavailable"] = peer.unavailable;
    }
    json["peers"].push_back(std::move(one));
  }
  const PeerTime* best = BestPeer(row);
  json["best_peer_us"] = best == nullptr ? nlohmann::ordered_json() : nlohmann::ordered_json(best->time.median_us);
  json["ratio"] =
      best == nullptr ? nlohmann::ordered_json() : nlohmann::ordered_json(best->time.median_us / row.time.median_us);
  // Reasons are a library's words: bytes that are no UTF-8 are replaced.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

void Refusals::Add(const KernelRow& row) {
  for (const PeerTime& peer : row.peers) {
    if (peer.unavailable.empty()) continue;
    cases_[peer.name + ", " + Layout(peer) + ", " + row.work + ": " + peer.unavailable].push_back(KernelCase(row));
  }
}

std::string Refusals::Text() const {
  std::string text;
  for (const auto& [what, cases] : cases_) {
    text += "- not available: " + what + " (" + cases.front();
    if (cases.size() > 1) text += " and " + std::to_string(cases.size() - 1) + " more";
    text += ")\n";
  }
  return text;
}

}  // namespace refocus
