// Times the products of an adaptation step of Qwen3-4B (kernels/span_product.h) beside cuBLAS and prints Markdown rows:
// the median time of one call inside a replayed CUDA graph, and the rate of the weights' bytes. Calls go through more
// weights than the L2 cache holds. The last row of a table is a whole step's products, one after the other.
//   span_bench          spans of 16, 64 and 128 rows
//   span_bench plans    128 rows, cut in every way
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bench/graph_timing.h"
#include "kernels/span_product.h"

namespace refocus::kernels {
namespace {

constexpr int64_t kHidden = 2560;
constexpr int64_t kQueries = 4096;
constexpr int64_t kMlp = 9728;
constexpr int64_t kVocab = 151936;
constexpr int kLayers = 36;
constexpr int64_t kFreshBytes = int64_t{400} << 20;

struct Product {
  const char* name;
  int64_t in, out;
  bool backward = false;
  int products = 1;
  int terms = 1;
  bool same_x = false;
  bool wide = false;

  int matrices() const { return products * terms; }
  int64_t numbers() const { return in * out * matrices(); }
  double bytes() const { return 2.0 * static_cast<double>(numbers()); }
};

// Of a layer, forward and then backward.
const std::vector<Product> kLayer = {{"q + delta", kHidden, kQueries, false, 1, 2, true, true},
                                     {"o", kQueries, kHidden},
                                     {"gate, up", kHidden, kMlp, false, 2},
                                     {"down", kMlp, kHidden},
                                     {"down, back", kMlp, kHidden, true},
                                     {"gate + up, back", kHidden, kMlp, true, 1, 2},
                                     {"o, back", kQueries, kHidden, true},
                                     {"q + delta, back", kHidden, kQueries, true, 1, 2, true}};
const std::vector<Product> kHead = {{"logits", kHidden, kVocab, false, 1, 1, false, true},
                                    {"logits, back", kHidden, kVocab, true}};

// Device memory, bytes 0x3c: small positive numbers in fp32 and bf16.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
    RequireCuda(cudaMalloc(&data_, static_cast<size_t>(bytes)), "cudaMalloc");
    RequireCuda(cudaMemset(data_, 0x3c, static_cast<size_t>(bytes)), "cudaMemset");
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint16_t* Bf16(int64_t at = 0) const { return static_cast<uint16_t*>(data_) + at; }

 private:
  void* data_ = nullptr;
};

// What a call reads and writes: two left factors, two results.
struct Room {
  explicit Room(int64_t rows) : x(2 * rows * kVocab * 2), y(2 * rows * kVocab * 4) {}
  Memory x, y;
};

class Bench {
 public:
  Bench() {
    RequireCuda(cudaStreamCreate(&stream_), "stream");
    cudaDeviceProp properties;
    RequireCuda(cudaGetDeviceProperties(&properties, 0), "properties");
    RequireCuda(MeasureSpanGpu(&gpu_), "clusters");
    std::printf("%s, %d multiprocessors; clusters at once: %d of 2, %d of 4, %d of 8\n", properties.name,
                gpu_.multiprocessors, gpu_.clusters[1], gpu_.clusters[2], gpu_.clusters[3]);
    Require(cublasCreate(&cublas_));
    RequireCuda(cudaMalloc(&workspace_, kWorkspace), "workspace");
    Require(cublasSetStream(cublas_, stream_));
    Require(cublasSetWorkspace(cublas_, workspace_, kWorkspace));
  }

  void Table(int64_t rows) {
    std::printf(
        "\n| %lld rows | tiles | us | TB/s | cuBLAS us | TB/s |\n"
        "|---|---|---:|---:|---:|---:|\n",
        static_cast<long long>(rows));
    const Room room(rows);
    for (const auto* products : {&kLayer, &kHead}) {
      for (const Product& p : *products) Compare(p, rows, room);
    }
    Step(rows, room);
  }

  void Plans(int64_t rows) {
    std::printf("\n| %lld rows | tiles | blocks | us | TB/s |\n|---|---|---:|---:|---:|\n",
                static_cast<long long>(rows));
    const Room room(rows);
    for (const auto* products : {&kLayer, &kHead}) {
      for (const Product& p : *products) {
        const Weights weights(p);
        for (const int columns : {64, 128, 160, 192}) {
          for (const int splits : {1, 2, 4, 8}) TimePlan(p, rows, {columns, splits}, weights, room);
        }
      }
    }
  }

 private:
  static constexpr size_t kWorkspace = size_t{32} << 20;

  // Of one product, as many copies as the L2 cache cannot hold.
  struct Weights {
    explicit Weights(const Product& p)
        : numbers(p.numbers()),
          copies(std::max<int64_t>(1, kFreshBytes / (2 * numbers))),
          memory(2 * numbers * copies) {}
    const uint16_t* At(int call) const { return memory.Bf16(call % copies * numbers); }

    int64_t numbers, copies;
    Memory memory;
  };

  static void Require(cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) throw std::runtime_error("cuBLAS: " + std::to_string(status));
  }

  static std::vector<SpanProduct> Of(const Product& p, int64_t rows, const uint16_t* w, const Room& room) {
    std::vector<SpanProduct> products(p.products);
    for (int i = 0; i < p.matrices(); ++i) {
      SpanProduct& product = products[p.products == 2 ? i : 0];
      product.rows = rows;
      product.in = p.in;
      product.out = p.out;
      product.backward = p.backward;
      product.terms = p.terms;
      product.wide = p.wide;
      product.y = room.y.Bf16(p.products == 2 ? i * rows * kVocab : 0);
      const bool other = p.terms == 2 && !p.same_x && i == 1;
      product.term[p.terms == 2 ? i : 0] = {room.x.Bf16(other ? rows * kVocab : 0), w + i * p.in * p.out};
    }
    return products;
  }

  void Ours(const Product& p, int64_t rows, const uint16_t* w, const Room& room, const SpanPlan* plan = nullptr) {
    const std::vector<SpanProduct> products = Of(p, rows, w, room);
    const SpanPlan cut = plan == nullptr ? PlanSpan(SpanSizeOf(products), gpu_) : *plan;
    RequireCuda(SpanProducts(products, cut, gpu_, stream_), p.name);
  }

  void Theirs(const Product& p, int64_t rows, const uint16_t* w, const Room& room) {
    const float one = 1.0f, zero = 0.0f;
    const int in = static_cast<int>(p.in), out = static_cast<int>(p.out);
    const int columns = p.backward ? in : out, depth = p.backward ? out : in;
    for (const SpanProduct& product : Of(p, rows, w, room)) {
      for (int t = 0; t < p.terms; ++t) {
        const SpanTerm& term = product.term[t];
        Require(cublasGemmEx(cublas_, p.backward ? CUBLAS_OP_N : CUBLAS_OP_T, CUBLAS_OP_N, columns,
                             static_cast<int>(rows), depth, &one, term.w, CUDA_R_16BF, in, term.x, CUDA_R_16BF, depth,
                             t > 0 ? &one : &zero, product.y, p.wide ? CUDA_R_32F : CUDA_R_16BF, columns,
                             CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
      }
    }
  }

  double Run(const std::function<void(int)>& call) { return Time(stream_, call).median_us; }

  // Where it does not leave most of the GPU idle.
  void TimePlan(const Product& p, int64_t rows, const SpanPlan& plan, const Weights& weights, const Room& room) {
    const SpanSize size = SpanSizeOf(Of(p, rows, weights.At(0), room));
    const int64_t blocks = SpanBlocks(size, plan, gpu_);
    if (blocks < gpu_.multiprocessors / 2 || (plan.splits > 1 && blocks > 2 * gpu_.multiprocessors)) return;
    const double us = Run([&](int i) { Ours(p, rows, weights.At(i), room, &plan); });
    const SpanPlan chosen = PlanSpan(size, gpu_);
    const bool own = Name(chosen) == Name(plan);
    std::printf("| %-16s | %-12s%s | %6lld | %8.2f | %5.3f |\n", p.name, Name(plan).c_str(), own ? " *" : "  ",
                static_cast<long long>(blocks), us, p.bytes() / us * 1e-6);
    std::fflush(stdout);
  }

  static std::string Name(const SpanPlan& plan) {
    return std::to_string(plan.columns) + " / " + std::to_string(plan.splits);
  }

  void Compare(const Product& p, int64_t rows, const Room& room) {
    const Weights weights(p);
    const SpanPlan plan = PlanSpan(SpanSizeOf(Of(p, rows, weights.At(0), room)), gpu_);
    const double us = Run([&](int i) { Ours(p, rows, weights.At(i), room); });
    const double theirs = Run([&](int i) { Theirs(p, rows, weights.At(i), room); });
    Print(p.name, Name(plan), p.bytes(), {us, theirs});
  }

  static void Print(const char* name, const std::string& tiles, double bytes, const std::vector<double>& times) {
    std::printf("| %-16s | %-14s |", name, tiles.c_str());
    for (const double us : times) std::printf(" %8.2f | %5.3f |", us, bytes / us * 1e-6);
    std::printf("\n");
    std::fflush(stdout);
  }

  // Layers forth, the head both ways, layers back.
  void Step(int64_t rows, const Room& room) {
    int64_t layer = 0;
    for (const Product& p : kLayer) {
      if (!p.backward) layer += p.numbers();
    }
    const Memory weights(2 * (kLayers * layer + kVocab * kHidden));
    std::vector<std::pair<const Product*, const uint16_t*>> calls;
    const auto pass = [&](int i, bool backward) {
      const uint16_t* w = weights.Bf16(i * layer);
      for (const Product& p : kLayer) {
        if (p.backward != backward) continue;
        calls.emplace_back(&p, w);
        w += p.numbers();
      }
    };
    for (int i = 0; i < kLayers; ++i) pass(i, false);
    for (const Product& p : kHead) calls.emplace_back(&p, weights.Bf16(kLayers * layer));
    for (int i = kLayers - 1; i >= 0; --i) pass(i, true);
    const double bytes = 2.0 * 2.0 * static_cast<double>(kLayers * layer + kVocab * kHidden);
    const double us = Run([&](int) {
      for (const auto& [p, w] : calls) Ours(*p, rows, w, room);
    });
    const double theirs = Run([&](int) {
      for (const auto& [p, w] : calls) Theirs(*p, rows, w, room);
    });
    Print("all of a step", "", bytes, {us, theirs});
  }

  cudaStream_t stream_ = nullptr;
  cublasHandle_t cublas_ = nullptr;
  void* workspace_ = nullptr;
  SpanGpu gpu_;
};

}  // namespace
}  // namespace refocus::kernels

int main(int argc, char** argv) {
  try {
    refocus::kernels::Bench bench;
    if (argc > 1 && std::strcmp(argv[1], "plans") == 0) {
      bench.Plans(128);
    } else {
      for (const int64_t rows : {16, 64, 128}) bench.Table(rows);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
