// Rows of kernel_bench as a table that a person reads and as JSON lines. Text alone, no CUDA calls.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace refocus {

struct Timing {
  double median_us = 0.0;  // of one call, over the samples
  double worst_us = 0.0;
  bool replayed = true;  // false: the calls refused to be captured and were enqueued one by one, launches included
};

struct PeerTime {
  std::string name;  // cudnn, flash
  bool packed = false;  // how query heads share a K/V head: by packed rows, or natively
  Timing time;
  std::string unavailable;  // why there is no time; else empty
};

struct KernelRow {
  std::string model;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  std::string kv;    // bf16, int8
  std::string work;  // span, decode, ...
  int64_t rows = 0;
  int64_t keys = 0;  // of combine: parts
  int splits = 0;    // of ours
  Timing time;
  double flops = 0.0;  // that the work needs; 0: bound by reading
  double bytes = 0.0;  // that must be read; of combine also written
  std::vector<PeerTime> peers;

  bool reads() const { return flops == 0.0; }
  double rate() const { return (reads() ? bytes : flops) / time.median_us / 1e6; }  // T/s
};

// Measured in the same run.
struct KernelCeilings {
  double tflops = 0.0;  // of a matrix product
  double tbytes = 0.0;  // read and written by a copy
};

double OfCeiling(const KernelRow& row, const KernelCeilings& ceilings);

// The fastest of those with this name, or of all where it is empty; null where none has a time.
const PeerTime* BestPeer(const KernelRow& row, const std::string& name = {});

// "work rows x keys"
std::string KernelCase(const KernelRow& row);

// Markdown. 117 columns; a p behind a peer's time: packed, an n: native, a *: not from a graph.
std::string TableHead();
std::string TableLine(const KernelRow& row, const KernelCeilings& ceilings);
std::string JsonLine(const KernelRow& row, const KernelCeilings& ceilings);

// What some peer refused, once a reason: "library, layout, work: reason", with the cases it holds for.
class Refusals {
 public:
  void Add(const KernelRow& row);
  std::string Text() const;  // Markdown list, empty where nothing was refused

 private:
  std::map<std::string, std::vector<std::string>> cases_;
};

}  // namespace refocus
