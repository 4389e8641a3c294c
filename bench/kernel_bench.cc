// Times of the attention kernels in one layer's shapes beside cuDNN's and FlashAttention's through LibTorch in the same
// process: a table of medians, and JSON lines with --jsonl. Each sample is a replayed CUDA graph of enough calls to
// take about two milliseconds (bench/graph_timing.h). Calls, the peers' too, walk through one large K/V cache, so that
// a short context is not read from the L2 cache. Two ceilings are measured first: an 8192^3 bf16 product and a copy.
//
//   kernel_bench [--filter "qwen3-4b span"] [--int8] [--portable] [--no-peers] [--jsonl FILE]
#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/attention_peers.h"
#include "bench/graph_timing.h"
#include "bench/kernel_report.h"
#include "kernels/attention.h"

namespace refocus {
namespace {

constexpr int64_t kCacheTokens = int64_t{1} << 20;
constexpr int64_t kLongestPrefill = 131072;
constexpr int64_t kWorkspaceBytes = int64_t{512} << 20;
constexpr int64_t kProduct = 8192;
constexpr int64_t kCopyBytes = int64_t{256} << 20;
constexpr double kCeilingSampleMs = 20.0;  // long enough to be held by power as long work is

constexpr const char* kNotes =
    "ceiling: the rate over that of an 8192^3 bf16 product, or of a copy (read + written) for decode, which only "
    "reads,\n"
    "and combine. Peers: the best of n, K/V heads shared natively, and p, query heads packed as rows; *: not in a "
    "graph.\n"
    "ratio: the best peer's time over ours. Spans and decode: the peers let every row see all keys, at most rows / "
    "keys\n"
    "more than ours, and return a bf16 result without a logsumexp. Gradients: ours is of q alone; theirs are of q, k "
    "and\n"
    "v, for they have no other. span+grad: both passes. prefill-chunk has no peer, for LibTorch's causal mask begins "
    "at\n"
    "the first key; nor has combine (rows x parts).\n";

struct Options {
  std::string filter;
  std::string jsonl;
  bool int8 = false;
  bool portable = false;
  bool no_peers = false;
};

struct Model {
  const char* name;
  int heads;
  int kv_heads;
  int head_dim;
};

struct CudaFree {
  void operator()(void* data) const { cudaFree(data); }
};
template <typename T>
using Device = std::unique_ptr<T, CudaFree>;

template <typename T>
Device<T> Allocate(int64_t size) {
  void* data = nullptr;
  const size_t bytes = static_cast<size_t>(size) * sizeof(T);
  RequireCuda(cudaMalloc(&data, bytes), "cudaMalloc");
  Device<T> owned(static_cast<T*>(data));
  RequireCuda(cudaMemset(data, 0, bytes), "cudaMemset");
  return owned;
}

// Memory for the largest shapes of one model. bf16 is uint16_t.
struct Memory {
  Memory(const Model& model, AttentionPeers& torch) {
    const int64_t cache = kCacheTokens * model.kv_heads * model.head_dim;
    const int64_t rows = kLongestPrefill * model.heads;
    k = Allocate<uint16_t>(cache);
    v = Allocate<uint16_t>(cache);
    q = Allocate<uint16_t>(rows * model.head_dim);
    dout = Allocate<uint16_t>(rows * model.head_dim);
    out = Allocate<float>(rows * model.head_dim);
    lse = Allocate<float>(rows);
    row_dot = Allocate<float>(rows);
    pos = Allocate<int64_t>(kLongestPrefill);
    workspace = Allocate<unsigned char>(kWorkspaceBytes);
    scales = Allocate<uint16_t>(kCacheTokens * model.kv_heads);
    torch.FillRandom(k.get(), cache);
    torch.FillRandom(v.get(), cache);
    torch.FillRandom(q.get(), rows * model.head_dim);
    torch.FillRandom(dout.get(), rows * model.head_dim);
    torch.Fill(scales.get(), kCacheTokens * model.kv_heads, 1.0 / 64);
    RequireCuda(cudaDeviceSynchronize(), "fill");
  }

  Device<uint16_t> k, v, q, dout;
  Device<float> out, lse, row_dot;
  Device<int64_t> pos;
  Device<unsigned char> workspace;
  Device<uint16_t> scales;  // of int8, where K and V are any codes: K's are V's
};

class Bench {
 public:
  Bench(const Options& options, int sm_count, cudaStream_t stream)
      : options_(options), sm_count_(sm_count), stream_(stream), torch_(stream) {
    if (options.jsonl.empty()) return;
    jsonl_.open(options.jsonl, std::ios::app);
    if (!jsonl_) throw std::runtime_error("--jsonl: cannot write " + options.jsonl);
  }

  void Run(const Model& model) {
    model_ = model;
    if (!AnyWanted()) return;
    memory_.reset();  // before there is more
    memory_ = std::make_unique<Memory>(model, torch_);
    if (ceilings_.tflops == 0.0) Ceilings();
    std::printf("\n**%s**, %d/%d heads x %d, K and V in %s%s\n\n%s", model.name, model.heads, model.kv_heads,
                model.head_dim, options_.int8 ? "eight bits (the peers': bf16)" : "bf16",
                options_.portable ? ", portable kernels" : "", TableHead().c_str());
    refusals_ = {};
    Cases();
    const std::string refusals = refusals_.Text();
    if (!refusals.empty()) std::printf("\n%s", refusals.c_str());
    std::fflush(stdout);
  }

  bool AnyRan() const { return wanted_ > 0; }

 private:
  // Without measuring: whether the filter leaves anything of the model.
  bool AnyWanted() {
    const int before = wanted_;
    counting_ = true;
    Cases();
    counting_ = false;
    return wanted_ > before;
  }

  void Cases() {
    for (const int64_t keys : {4096, 32768, 131072, 524288}) Forward("span", 128, keys);
    for (const int64_t keys : {4096, 32768, 131072, 524288}) Gradient("span-grad", 128, keys);
    for (const int64_t keys : {4096, 32768, 131072, 524288}) Both("span+grad", 128, keys);
    Forward("span", 512, 131072);
    Gradient("span-grad", 512, 131072);
    Both("span+grad", 512, 131072);
    for (const int64_t keys : {8192, 32768, 131072}) Forward("prefill", keys, keys);
    for (const int64_t keys : {131072, 524288}) Forward("prefill-chunk", 8192, keys);
    for (const int64_t rows : {1, 2, 4, 8, 16}) {
      for (const int64_t keys : {4096, 32768, 131072, 524288, 1048576}) Forward("decode", rows, keys);
    }
    for (const int64_t parts : {2, 8, 33}) {
      for (const int64_t rows : {1, 8, 128}) CombineParts(parts, rows);
    }
  }

  void Ceilings() {
    const auto product = torch_.Product(memory_->k.get(), memory_->v.get(), memory_->out.get(), kProduct);
    const Timing multiplied = Time(
        stream_, [&](int) { product(); }, kCeilingSampleMs);
    const Timing copied = Time(
        stream_,
        [&](int) {
          RequireCuda(
              cudaMemcpyAsync(memory_->out.get(), memory_->k.get(), kCopyBytes, cudaMemcpyDeviceToDevice, stream_),
              "copy");
        },
        kCeilingSampleMs);
    ceilings_.tflops = 2.0 * std::pow(static_cast<double>(kProduct), 3) / multiplied.median_us / 1e6;
    ceilings_.tbytes = 2.0 * static_cast<double>(kCopyBytes) / copied.median_us / 1e6;
    cudaDeviceProp device;
    RequireCuda(cudaGetDeviceProperties(&device, 0), "device");
    std::printf("%s, %d multiprocessors; %s; 8192^3 product %.0f TFLOP/s, copy %.2f TB/s; medians of %d samples\n\n%s",
                device.name, sm_count_, AttentionPeers::Versions().c_str(), ceilings_.tflops, ceilings_.tbytes,
                kTimingSamples, kNotes);
    if (jsonl_.is_open()) {
      jsonl_ << "{\"device\":\"" << device.name << "\",\"multiprocessors\":" << sm_count_ << ",\"versions\":\""
             << AttentionPeers::Versions() << "\",\"product_tflops\":" << ceilings_.tflops
             << ",\"copy_tbytes_per_s\":" << ceilings_.tbytes << "}\n";
    }
  }

  // The last `rows` positions of `keys`, each seeing all before it.
  void Forward(const char* work, int64_t rows, int64_t keys) {
    KernelRow row = Row(work, rows, keys);
    if (!Wanted(row)) return;
    const kernels::AttentionShape shape = Shape(rows, keys);
    const bool decode = rows <= 16, chunk = rows > 512 && rows < keys;
    row.splits = kernels::AttendSplits(shape, sm_count_);
    row.flops = decode ? 0.0 : 4.0 * Pairs(rows, keys);
    row.time = Time(stream_, [&](int i) { RequireCuda(Attend(Window(shape, keys, i)), "Attend"); });
    if (!chunk) Peers(row, PeerWork::kForward);
    Print(row);
  }

  void Gradient(const char* work, int64_t rows, int64_t keys) {
    KernelRow row = Row(work, rows, keys);
    if (!Wanted(row)) return;
    const kernels::AttentionShape shape = Shape(rows, keys);
    // That of the first keys: weights of all others are of the same kind.
    RequireCuda(Attend(Window(shape, keys, 0)), "Attend");
    row.splits = kernels::QueryGradSplits(shape, sm_count_);
    row.flops = 6.0 * Pairs(rows, keys);
    row.time = Time(stream_, [&](int i) { RequireCuda(QueryGrad(Window(shape, keys, i)), "QueryGrad"); });
    Peers(row, PeerWork::kGradient);
    Print(row);
  }

  void Both(const char* work, int64_t rows, int64_t keys) {
    KernelRow row = Row(work, rows, keys);
    if (!Wanted(row)) return;
    const kernels::AttentionShape shape = Shape(rows, keys);
    row.splits = kernels::AttendSplits(shape, sm_count_);
    row.flops = 10.0 * Pairs(rows, keys);
    row.time = Time(stream_, [&](int i) {
      RequireCuda(Attend(Window(shape, keys, i)), "Attend");
      RequireCuda(QueryGrad(Window(shape, keys, i)), "QueryGrad");
    });
    Peers(row, PeerWork::kBoth);
    Print(row);
  }

  void CombineParts(int64_t parts, int64_t rows) {
    KernelRow row = Row("combine", rows, parts);
    if (!Wanted(row)) return;
    const int64_t row_bytes = model_.heads * (model_.head_dim + 1) * int64_t{sizeof(float)};
    kernels::CombineParams params;
    params.parts = parts;
    params.rows = rows;
    params.heads = model_.heads;
    params.head_dim = model_.head_dim;
    params.part_out = reinterpret_cast<const float*>(Workspace(parts * rows * row_bytes));
    params.part_lse = params.part_out + parts * rows * model_.heads * model_.head_dim;
    params.out = memory_->out.get();
    params.lse = memory_->lse.get();
    params.out_bf16 = memory_->dout.get();
    row.splits = 1;
    row.bytes = static_cast<double>(row_bytes * rows * (parts + 1));
    row.time = Time(stream_, [&](int) { RequireCuda(kernels::Combine(params, stream_), "Combine"); });
    Print(row);
  }

  cudaError_t Attend(const kernels::AttentionShape& shape) {
    kernels::AttendParams params;
    params.shape = shape;
    params.q = memory_->q.get();
    params.out = memory_->out.get();
    params.lse = memory_->lse.get();
    params.workspace = Workspace(kernels::AttendWorkspaceBytes(shape, sm_count_));
    return kernels::Attend(params, sm_count_, stream_);
  }

  cudaError_t QueryGrad(const kernels::AttentionShape& shape) {
    kernels::QueryGradParams params;
    params.shape = shape;
    params.q = memory_->q.get();
    params.dout = memory_->dout.get();
    params.lse = memory_->lse.get();
    params.row_dot = memory_->row_dot.get();
    params.dq = memory_->out.get();
    params.workspace = Workspace(kernels::QueryGradWorkspaceBytes(shape, sm_count_));
    return kernels::QueryGrad(params, sm_count_, stream_);
  }

  // Every way in which the libraries can do `row`'s work. One that refuses says why and costs no more.
  void Peers(KernelRow& row, PeerWork work) {
    if (options_.no_peers) return;
    const bool causal = row.rows == row.keys;
    const PeerShape shape{
        row.rows, row.keys, model_.heads, model_.kv_heads, model_.head_dim, kCacheTokens * model_.head_dim, causal};
    const PeerMemory memory{memory_->q.get(), memory_->dout.get(), memory_->k.get(), memory_->v.get()};
    for (const PeerLibrary library : {PeerLibrary::kCudnn, PeerLibrary::kFlash}) {
      for (const bool packed : {false, true}) {
        if (packed && causal) continue;  // a packed row's mask is no causal one
        PeerTime peer{library == PeerLibrary::kCudnn ? "cudnn" : "flash", packed, {}, {}};
        try {
          const AttentionPeers::Call call = torch_.Make(library, work, packed, shape, memory);
          peer.time = Time(stream_, [&](int i) {
            const int64_t from = FirstToken(row.keys, i) * model_.head_dim;
            call(memory_->k.get() + from, memory_->v.get() + from);
          });
        } catch (const std::exception& error) {
          peer.unavailable = error.what();
        }
        torch_.Release();
        row.peers.push_back(std::move(peer));
      }
    }
    refusals_.Add(row);
  }

  KernelRow Row(const char* work, int64_t rows, int64_t keys) const {
    KernelRow row;
    row.model = model_.name;
    row.heads = model_.heads;
    row.kv_heads = model_.kv_heads;
    row.head_dim = model_.head_dim;
    row.kv = options_.int8 ? "int8" : "bf16";
    row.work = work;
    row.rows = rows;
    row.keys = keys;
    row.bytes = KvBytes(keys);
    return row;
  }

  bool Wanted(const KernelRow& row) {
    const bool wanted = (row.model + " " + KernelCase(row)).find(options_.filter) != std::string::npos;
    if (counting_ && wanted) ++wanted_;
    return wanted && !counting_;
  }

  kernels::AttentionShape Shape(int64_t rows, int64_t keys) {
    std::vector<int64_t> pos(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) pos[static_cast<size_t>(i)] = keys - rows + i;
    RequireCuda(cudaMemcpy(memory_->pos.get(), pos.data(), pos.size() * sizeof(int64_t), cudaMemcpyHostToDevice),
                "positions");
    kernels::AttentionShape shape;
    shape.rows = rows;
    shape.heads = model_.heads;
    shape.kv_heads = model_.kv_heads;
    shape.head_dim = model_.head_dim;
    shape.scale = 1.0f / std::sqrt(static_cast<float>(model_.head_dim));
    shape.extents = 1;
    shape.kv[0] = {memory_->k.get(), memory_->v.get(), kCacheTokens * model_.head_dim, keys, 0};
    shape.pos = memory_->pos.get();
    shape.expected_keys = keys;
    shape.portable_only = options_.portable;
    shape.int8 = options_.int8;
    shape.kv[0].k_scale = shape.kv[0].v_scale = memory_->scales.get();
    return shape;
  }

  static int64_t FirstToken(int64_t keys, int call) { return call % (kCacheTokens / keys) * keys; }

  // The cache's next stretch of `keys` tokens.
  kernels::AttentionShape Window(kernels::AttentionShape shape, int64_t keys, int call) const {
    const int64_t first = FirstToken(keys, call);
    const int64_t bytes = first * model_.head_dim * (options_.int8 ? 1 : 2);
    shape.kv[0].k = reinterpret_cast<const char*>(memory_->k.get()) + bytes;
    shape.kv[0].v = reinterpret_cast<const char*>(memory_->v.get()) + bytes;
    shape.kv[0].k_scale = shape.kv[0].v_scale = memory_->scales.get() + first;
    return shape;
  }

  // Pairs of a row and a key that it sees, times heads and columns.
  double Pairs(int64_t rows, int64_t keys) const {
    const double pairs = static_cast<double>(rows) * (static_cast<double>(keys) - 0.5 * static_cast<double>(rows - 1));
    return pairs * model_.heads * model_.head_dim;
  }

  double KvBytes(int64_t keys) const {
    const double of_head = options_.int8 ? 2.0 * (model_.head_dim + 2) : 4.0 * model_.head_dim;
    return static_cast<double>(keys) * model_.kv_heads * of_head;
  }

  void* Workspace(int64_t bytes) const {
    if (bytes <= kWorkspaceBytes) return memory_->workspace.get();
    throw std::runtime_error("a workspace of " + std::to_string(bytes) + " bytes is wanted, there are " +
                             std::to_string(kWorkspaceBytes));
  }

  void Print(const KernelRow& row) {
    std::fputs(TableLine(row, ceilings_).c_str(), stdout);
    std::fflush(stdout);
    if (jsonl_.is_open()) jsonl_ << JsonLine(row, ceilings_) << std::flush;
  }

  const Options options_;
  const int sm_count_;
  cudaStream_t stream_;
  AttentionPeers torch_;
  std::ofstream jsonl_;
  Model model_{};
  std::unique_ptr<Memory> memory_;
  KernelCeilings ceilings_;
  Refusals refusals_;
  bool counting_ = false;
  int wanted_ = 0;
};

int Main(int argc, char** argv) {
  Options options;
  CLI::App app{"Attention on the GPU beside cuDNN and FlashAttention, one layer"};
  app.add_option("--filter", options.filter, "Only cases with this in \"model work rows x keys\"");
  app.add_flag("--int8", options.int8, "K and V in eight bits: any codes with one scale; the peers stay bf16");
  app.add_flag("--portable", options.portable, "Our kernels without Hopper's instructions");
  app.add_flag("--no-peers", options.no_peers, "Ours alone");
  app.add_option("--jsonl", options.jsonl, "Append one line per row to this file");
  CLI11_PARSE(app, argc, argv);
  try {
    cudaDeviceProp device;
    RequireCuda(cudaGetDeviceProperties(&device, 0), "no CUDA device");
    cudaStream_t stream;
    RequireCuda(cudaStreamCreate(&stream), "cudaStreamCreate");
    Bench bench(options, device.multiProcessorCount, stream);
    for (const Model& model : {Model{"qwen3-4b", 32, 8, 128}, Model{"smollm2", 9, 3, 64}}) bench.Run(model);
    if (!bench.AnyRan()) throw std::runtime_error("--filter: no case has '" + options.filter + "' in its name");
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "kernel_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace refocus

int main(int argc, char** argv) { return refocus::Main(argc, argv); }
