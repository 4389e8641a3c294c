// Times the row-wise kernels in the shapes of Qwen3-4B and prints Markdown rows: the median time of one launch inside a
// replayed CUDA graph, and the rate of the bytes that it must move (a gradient's second read of the logits is not
// counted). Few rows stay in the L2 cache from launch to launch; 16384 and weights do not.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/few_rows.h"
#include "kernels/query_update.h"
#include "kernels/rowwise.h"

namespace refocus::kernels {
namespace {

constexpr int64_t kHidden = 2560;
constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kHeadDim = 128;
constexpr int64_t kMlp = 9728;
constexpr int64_t kVocab = 151936;
constexpr float kEps = 1e-6f;

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Device memory that lives as long as one kernel's measurement; bytes 0x3c: small positive numbers in fp32 and bf16.
class Memory {
 public:
  ~Memory() {
    for (void* p : blocks_) cudaFree(p);
  }
  template <typename T>
  T* Get(int64_t count) {
    void* p = nullptr;
    Check(cudaMalloc(&p, static_cast<size_t>(count) * sizeof(T)), "cudaMalloc");
    Check(cudaMemset(p, 0x3c, static_cast<size_t>(count) * sizeof(T)), "cudaMemset");
    blocks_.push_back(p);
    return static_cast<T*>(p);
  }
  uint16_t* Bf16(int64_t count) { return Get<uint16_t>(count); }
  float* Float(int64_t count) { return Get<float>(count); }
  int64_t* Rising(int64_t count, int64_t first) {
    std::vector<int64_t> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(first + i);
    int64_t* p = Get<int64_t>(count);
    Check(cudaMemcpy(p, values.data(), values.size() * sizeof(int64_t), cudaMemcpyHostToDevice), "cudaMemcpy");
    return p;
  }

 private:
  std::vector<void*> blocks_;
};

void Measure(const char* name, int64_t rows, double bytes, const std::function<cudaError_t(cudaStream_t)>& launch) {
  const int launches = bytes > 1e8 ? 4 : 100;
  constexpr int kReplays = 15;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  Check(cudaStreamCreate(&stream), "stream");
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < launches; ++i) Check(launch(stream), name);
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
  std::vector<float> times;
  for (int i = 0; i < kReplays + 2; ++i) {
    Check(cudaEventRecord(begin, stream), "record");
    Check(cudaGraphLaunch(replay, stream), "launch");
    Check(cudaEventRecord(end, stream), "record");
    Check(cudaEventSynchronize(end), name);
    float milliseconds = 0.0f;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "elapsed");
    if (i >= 2) times.push_back(milliseconds * 1e3f / static_cast<float>(launches));
  }
  std::sort(times.begin(), times.end());
  const double microseconds = times[times.size() / 2];
  std::printf("| %-22s | %6lld | %10.2f | %7.3f |\n", name, static_cast<long long>(rows), microseconds,
              bytes / microseconds * 1e-6);
  std::fflush(stdout);
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
}

void BenchNorm(int64_t rows) {
  Memory m;
  const int64_t n = rows * kHidden;
  const double elements = static_cast<double>(n);
  float* x = m.Float(n);
  float* sum = m.Float(n);
  uint16_t* y = m.Bf16(n);
  uint16_t* h = m.Bf16(n);
  uint16_t* weight = m.Bf16(kHidden);
  uint16_t* table = m.Bf16(kVocab * kHidden);
  const int64_t* ids = m.Rising(rows, 1000);
  Measure("Embed", rows, 6 * elements, [&](cudaStream_t s) { return Embed(table, ids, rows, kHidden, x, s); });
  const NormParams plain{rows, kHidden, kEps, x, nullptr, weight, nullptr, h};
  Measure("Norm", rows, 6 * elements, [&](cudaStream_t s) { return Norm(plain, s); });
  const NormParams add{rows, kHidden, kEps, x, y, weight, sum, h};
  Measure("Norm + add", rows, 12 * elements, [&](cudaStream_t s) { return Norm(add, s); });
  const NormGradParams grad{rows, kHidden, kEps, x, weight, y, sum, sum, h};
  Measure("NormGrad + residual", rows, 16 * elements, [&](cudaStream_t s) { return NormGrad(grad, s); });
}

void BenchRotate(int64_t rows) {
  Memory m;
  const int64_t q = rows * kHeads * kHeadDim, kv = rows * kKvHeads * kHeadDim;
  float* raw = m.Float(q);
  float* dq = m.Float(q);
  uint16_t* out = m.Bf16(q);
  uint16_t* norm = m.Bf16(kHeadDim);
  const int64_t* pos = m.Rising(rows, 1'000'000);
  float* frequencies = m.Float(kHeadDim / 2);
  const RotateParams queries{rows, kHeads, kHeadDim, kEps, raw, norm, pos, frequencies, out};
  Measure("Rotate (queries)", rows, 6.0 * static_cast<double>(q), [&](cudaStream_t s) { return Rotate(queries, s); });
  const RotateGradParams grad{queries, dq, out};
  Measure("RotateGrad (queries)", rows, 10.0 * static_cast<double>(q),
          [&](cudaStream_t s) { return RotateGrad(grad, s); });
  RotateParams keys = queries;
  keys.heads = kKvHeads;
  const int64_t stride = rows * kHeadDim;
  const AppendParams append{keys,  m.Bf16(kv), m.Rising(rows, 0), m.Bf16(kKvHeads * stride), m.Bf16(kKvHeads * stride),
                            stride};
  Measure("Append", rows, 10.0 * static_cast<double>(kv), [&](cudaStream_t s) { return Append(append, s); });
  float* dot = m.Float(rows * kHeads);
  Measure("RowDot", rows, 6.0 * static_cast<double>(q),
          [&](cudaStream_t s) { return RowDot(out, raw, rows * kHeads, kHeadDim, dot, s); });
}

void BenchSwiglu(int64_t rows) {
  Memory m;
  const int64_t n = rows * kMlp;
  uint16_t* gate = m.Bf16(n);
  uint16_t* up = m.Bf16(n);
  uint16_t* act = m.Bf16(n);
  Measure("SiluMul", rows, 6.0 * static_cast<double>(n), [&](cudaStream_t s) { return SiluMul(gate, up, n, act, s); });
  uint16_t* dgate = m.Bf16(n);
  uint16_t* dup = m.Bf16(n);
  Measure("SiluMulGrad", rows, 10.0 * static_cast<double>(n),
          [&](cudaStream_t s) { return SiluMulGrad(act, gate, up, n, dgate, dup, s); });
}

void BenchLoss(int64_t rows) {
  Memory m;
  const double elements = static_cast<double>(rows * kVocab);
  CrossEntropyParams params{rows,    kVocab, m.Float(rows * kVocab), m.Rising(rows, 5), m.Float(rows), m.Float(rows),
                            nullptr, 1.0f};
  Measure("CrossEntropy", rows, 4 * elements, [&](cudaStream_t s) { return CrossEntropy(params, s); });
  params.dlogits = m.Bf16(rows * kVocab);
  Measure("CrossEntropy + dlogits", rows, 6 * elements, [&](cudaStream_t s) { return CrossEntropy(params, s); });
}

void BenchSample(int64_t rows) {
  Memory m;
  int64_t* tokens = m.Rising(rows, 0);
  SamplerState* states = m.Get<SamplerState>(rows);
  std::vector<SamplerState*> addresses;
  for (int64_t row = 0; row < rows; ++row) addresses.push_back(states + row);
  SamplerState** samplers = m.Get<SamplerState*>(rows);
  Check(cudaMemcpy(samplers, addresses.data(), addresses.size() * sizeof(SamplerState*), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  std::mt19937_64 engine(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> values(rows * kVocab);
  for (float& value : values) value = normal(engine);
  float* logits = m.Float(rows * kVocab);
  Check(cudaMemcpy(logits, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  uint32_t* counts = m.Get<uint32_t>(rows * kVocab);
  const SampleParams params{rows,   kVocab,        logits, samplers,
                            tokens, m.Float(rows), m.Get<char>(SampleWorkspaceBytes(rows, kVocab))};
  // The rate is that of reading the row once, whatever is read again.
  const auto measure = [&](const char* name, SamplerState state, bool counting) {
    std::vector<SamplerState> all(rows, state);
    for (int64_t row = 0; counting && row < rows; ++row) {
      all[row].counts = reinterpret_cast<char*>(counts + row * kVocab) - reinterpret_cast<char*>(states + row);
    }
    Check(cudaMemcpy(states, all.data(), all.size() * sizeof(SamplerState), cudaMemcpyHostToDevice), "cudaMemcpy");
    Measure(name, rows, 4.0 * static_cast<double>(rows * kVocab), [&](cudaStream_t s) { return Sample(params, s); });
  };
  SamplerState plain;
  plain.min_p_margin = -std::numeric_limits<double>::infinity();
  measure("Sample greedy", plain, false);
  plain.inverse_temperature = 1 / 0.7;
  measure("Sample", plain, false);
  SamplerState state = plain;
  state.min_p_margin = 0.7 * std::log(0.05);
  measure("Sample min-p", state, false);
  state = plain;
  state.top_k = 50;
  measure("Sample top-k", state, false);
  state = plain;
  state.top_p = 0.95;
  measure("Sample top-p", state, false);
  state.top_k = 50;
  state.min_p_margin = 0.7 * std::log(0.05);
  measure("Sample all filters", state, false);
  state.repetition = 1.1f;
  measure("Sample all + penalties", state, true);
}

// Weights of one layer, and the output matrix; as many copies in turn as the L2 cache cannot hold.
void BenchFewRows(int64_t rows) {
  struct Product {
    const char* name;
    int64_t in, out;
    int matrices;
    FewRowsProduct::Kind kind;
    bool second;
  };
  constexpr auto kFloat = FewRowsProduct::Kind::kFloat;
  const Product products[] = {{"FewRows queries", kHidden, kHeads * kHeadDim, 1, kFloat, false},
                              {"FewRows queries + delta", kHidden, kHeads * kHeadDim, 1, kFloat, true},
                              {"FewRows keys, values", kHidden, kKvHeads * kHeadDim, 2, kFloat, false},
                              {"FewRows output", kHeads * kHeadDim, kHidden, 1, FewRowsProduct::Kind::kBf16, false},
                              {"FewRows gated", kHidden, kMlp, 1, FewRowsProduct::Kind::kGated, true},
                              {"FewRows down", kMlp, kHidden, 1, FewRowsProduct::Kind::kBf16, false},
                              {"FewRows logits", kHidden, kVocab, 1, kFloat, false}};
  for (const Product& p : products) {
    Memory m;
    const int64_t matrix = p.in * p.out, count = p.matrices * (p.second ? 2 : 1);
    const int64_t copies = std::max<int64_t>(1, (int64_t{400} << 20) / (matrix * count * 2));
    const uint16_t* weights = m.Bf16(matrix * count * copies);
    const uint16_t* x = m.Bf16(rows * p.in);
    std::vector<FewRowsProduct> launch(p.matrices);
    for (FewRowsProduct& product : launch) {
      product.kind = p.kind;
      product.rows = rows;
      product.in = p.in;
      product.out = p.out;
      product.x = x;
      product.y = m.Float(rows * p.out);
    }
    int64_t copy = 0;
    Measure(p.name, rows, 2.0 * static_cast<double>(matrix * count), [&](cudaStream_t s) {
      const uint16_t* w = weights + copy++ % copies * matrix * count;
      for (FewRowsProduct& product : launch) {
        product.w = std::exchange(w, w + matrix);
        if (p.second) product.second = std::exchange(w, w + matrix);
      }
      return FewRows(launch, s);
    });
  }
}

// What `adapters` of two rows each add to the queries of a layer, together and one after the other: full deltas, then
// low-rank ones. Rows: of the whole batch.
void BenchDeltas(int64_t adapters) {
  constexpr int64_t kRows = 2, kOut = kHeads * kHeadDim;
  const auto run = [](std::span<const FewRowsProduct> products, bool together, cudaStream_t s) {
    if (together) return FewRows(products, s);
    for (const FewRowsProduct& product : products) {
      if (const cudaError_t error = FewRows({&product, 1}, s); error != cudaSuccess) return error;
    }
    return cudaSuccess;
  };
  for (const int64_t rank : {0, 16, 64}) {
    Memory m;
    const int64_t size = rank == 0 ? kOut * kHidden : rank * (kHidden + kOut);
    const int64_t copies = std::max<int64_t>(1, (int64_t{400} << 20) / (adapters * size * 2));
    const uint16_t* weights = m.Bf16(adapters * size * copies);
    std::vector<FewRowsProduct> inner(adapters), outer(adapters);
    for (int64_t i = 0; i < adapters; ++i) {
      FewRowsProduct& a = inner[i];
      a.kind = FewRowsProduct::Kind::kBf16;
      a.rows = kRows;
      a.in = kHidden;
      a.out = rank;
      a.x = m.Bf16(kRows * kHidden);
      a.y = m.Bf16(std::max<int64_t>(1, kRows * rank));
      FewRowsProduct& b = outer[i];
      b.rows = kRows;
      b.in = rank == 0 ? kHidden : rank;
      b.out = kOut;
      b.x = rank == 0 ? a.x : a.y;
      float* y = m.Float(kRows * kOut);
      b.add = y;
      b.y = y;
    }
    int64_t copy = 0;
    const auto measure = [&](const std::string& name, bool together) {
      Measure(name.c_str(), kRows * adapters, 2.0 * static_cast<double>(adapters * size), [&](cudaStream_t s) {
        const uint16_t* w = weights + copy++ % copies * adapters * size;
        for (int64_t i = 0; i < adapters; ++i, w += size) {
          inner[i].w = w;
          outer[i].w = w + rank * kHidden;
        }
        const cudaError_t error = run(inner, together, s);  // nothing of full deltas
        return error != cudaSuccess ? error : run(outer, together, s);
      });
    };
    const std::string what = std::to_string(adapters) + (rank == 0 ? " deltas" : " LoRAs of " + std::to_string(rank));
    measure(what, true);
    measure(what + ", each", false);
  }
}

// A step of AdamW on the deltas of all layers, its gradient in factors of `rows` rows.
void BenchQueryUpdate(int64_t rows) {
  constexpr int64_t kLayers = 36, kOut = kHeads * kHeadDim, kNumbers = kLayers * kOut * kHidden;
  Memory m;
  std::vector<const void*> dq, h;
  for (int64_t layer = 0; layer < kLayers; ++layer) {
    dq.push_back(m.Bf16(rows * kOut));
    h.push_back(m.Bf16(rows * kHidden));
  }
  const QueryFactors factors{kLayers, rows, kOut, kHidden, dq.data(), h.data()};
  const double bytes = 2.0 * static_cast<double>(kLayers * rows * (kOut + kHidden));
  void* workspace = m.Get<char>(QueryNormWorkspaceBytes(factors));
  double* norm = m.Get<double>(1);
  Measure("QueryNorm", rows, bytes, [&](cudaStream_t s) { return QueryNorm(factors, workspace, norm, s); });
  float* none = m.Float(1);
  Check(cudaMemset(none, 0, sizeof(float)), "cudaMemset");
  const QueryUpdateParams update{factors,    m.Float(kNumbers), m.Float(kNumbers), m.Float(kNumbers), m.Bf16(kNumbers),
                                 m.Float(1), m.Float(1),        m.Float(1),        none,
                                 m.Float(kQueryUpdateWords), 0.9, 0.999, 1e-8, 0.01};
  Measure("QueryUpdate", rows, bytes + 26.0 * kNumbers, [&](cudaStream_t s) { return QueryUpdate(update, s); });
}

int Main() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "no CUDA device: %s\n", cudaGetErrorString(error));
    return 1;
  }
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0), "properties");
  std::printf("%s\n\n| kernel                 |   rows | us, median |    TB/s |\n|---|---:|---:|---:|\n",
              properties.name);
  for (const int64_t rows : {1, 4, 8}) BenchFewRows(rows);
  for (const int64_t adapters : {1, 8}) BenchDeltas(adapters);
  for (const int64_t rows : {16, 128}) BenchQueryUpdate(rows);
  for (const int64_t rows : {1, 128, 16384}) {
    BenchNorm(rows);
    BenchRotate(rows);
    BenchSwiglu(rows);
    BenchLoss(rows);
  }
  for (const int64_t rows : {1, 16, 64}) BenchSample(rows);
  return 0;
}

}  // namespace
}  // namespace refocus::kernels

int main() { return refocus::kernels::Main(); }
