// Times of the attention kernels in one layer's shapes: Markdown rows with the median and the worst of several samples,
// each a replayed CUDA graph of enough calls to take about two milliseconds. Calls walk through one large K/V cache, so
// that a short context is not read from the L2 cache.
//
//   kernel_bench [part of a row's name [portable] [int8]]
// int8: K and V in eight bits, any codes with one scale.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/attention.h"

namespace refocus::kernels {
namespace {

constexpr int64_t kCacheTokens = int64_t{1} << 20;
constexpr int64_t kLongestPrefill = 32768;
constexpr double kSampleMs = 2.0;
constexpr int kSamples = 15;

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "kernel_bench: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

__global__ void FillRandom(__nv_bfloat16* to, int64_t size, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x = (i + seed) * 0x9e3779b97f4a7c15u;
    x ^= x >> 29;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 32;
    to[i] = __float2bfloat16((static_cast<float>(x & 0xffffff) / 16777216.0f - 0.5f) * 3.4641f);
  }
}

__global__ void FillScales(uint16_t* to, int64_t size) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    to[i] = 0x3c80;  // 1 / 64
  }
}

template <typename T>
T* Allocate(int64_t size) {
  T* data = nullptr;
  Require(cudaMalloc(&data, size * sizeof(T)), "cudaMalloc");
  Require(cudaMemset(data, 0, size * sizeof(T)), "cudaMemset");
  return data;
}

struct Model {
  const char* name;
  int heads;
  int kv_heads;
  int head_dim;
};

// Memory for the largest shapes of one model.
struct Memory {
  explicit Memory(const Model& model) {
    const int64_t cache = kCacheTokens * model.kv_heads * model.head_dim;
    const int64_t rows = kLongestPrefill * model.heads;
    k = Allocate<__nv_bfloat16>(cache);
    v = Allocate<__nv_bfloat16>(cache);
    q = Allocate<__nv_bfloat16>(rows * model.head_dim);
    dout = Allocate<__nv_bfloat16>(rows * model.head_dim);
    out = Allocate<float>(rows * model.head_dim);
    lse = Allocate<float>(rows);
    row_dot = Allocate<float>(rows);
    pos = Allocate<int64_t>(kLongestPrefill);
    workspace = Allocate<unsigned char>(workspace_bytes);
    scales = Allocate<uint16_t>(kCacheTokens * model.kv_heads);
    FillScales<<<4096, 256>>>(scales, kCacheTokens * model.kv_heads);
    FillRandom<<<4096, 256>>>(k, cache, 1);
    FillRandom<<<4096, 256>>>(v, cache, cache);
    FillRandom<<<4096, 256>>>(q, rows * model.head_dim, 5);
    FillRandom<<<4096, 256>>>(dout, rows * model.head_dim, 7);
    Require(cudaDeviceSynchronize(), "fill");
  }
  ~Memory() {
    for (void* data : {static_cast<void*>(k), static_cast<void*>(v), static_cast<void*>(q), static_cast<void*>(dout),
                       static_cast<void*>(out), static_cast<void*>(lse), static_cast<void*>(row_dot),
                       static_cast<void*>(pos), static_cast<void*>(workspace), static_cast<void*>(scales)}) {
      cudaFree(data);
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  static constexpr int64_t workspace_bytes = int64_t{512} << 20;
  __nv_bfloat16* k;
  __nv_bfloat16* v;
  __nv_bfloat16* q;
  __nv_bfloat16* dout;
  float* out;
  float* lse;
  float* row_dot;
  int64_t* pos;
  unsigned char* workspace;
  uint16_t* scales;  // of int8: K's are V's
};

// Milliseconds a call: median and worst of the samples. `call` gets the call's number.
std::pair<double, double> Time(cudaStream_t stream, const std::function<cudaError_t(int)>& call) {
  cudaEvent_t begin;
  cudaEvent_t end;
  Require(cudaEventCreate(&begin), "cudaEventCreate");
  Require(cudaEventCreate(&end), "cudaEventCreate");
  float ms = 0.0f;
  for (int i = 0; i < 2; ++i) {  // the second is warm
    Require(cudaEventRecord(begin, stream), "cudaEventRecord");
    Require(call(i), "call");
    Require(cudaEventRecord(end, stream), "cudaEventRecord");
    Require(cudaEventSynchronize(end), "first calls");
    Require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
  }
  const int calls = std::clamp(static_cast<int>(kSampleMs / ms), 1, 200);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  Require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < calls; ++i) Require(call(i), "captured call");
  Require(cudaStreamEndCapture(stream, &graph), "capture");
  Require(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  Require(cudaGraphLaunch(exec, stream), "warm up");
  std::vector<double> samples;
  for (int i = 0; i < kSamples; ++i) {
    Require(cudaEventRecord(begin, stream), "cudaEventRecord");
    Require(cudaGraphLaunch(exec, stream), "replay");
    Require(cudaEventRecord(end, stream), "cudaEventRecord");
    Require(cudaEventSynchronize(end), "replay");
    Require(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    samples.push_back(ms / calls);
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples.back()};
}

class Bench {
 public:
  Bench(const Model& model, const char* filter, bool portable_only, bool int8, int sm_count, cudaStream_t stream)
      : model_(model),
        memory_(model),
        filter_(filter),
        portable_only_(portable_only),
        int8_(int8),
        sm_count_(sm_count),
        stream_(stream) {}

  // The last `rows` positions of `keys`, each seeing all before it.
  void Forward(const char* what, int64_t rows, int64_t keys) {
    const std::string name = Name(what, rows, keys);
    if (name.find(filter_) == std::string::npos) return;
    const AttentionShape shape = Shape(rows, keys);
    CheckWorkspace(AttendWorkspaceBytes(shape, sm_count_));
    const auto [median, worst] = Time(stream_, [&](int i) {
      AttendParams params;
      params.shape = Window(shape, keys, i);
      params.q = memory_.q;
      params.out = memory_.out;
      params.lse = memory_.lse;
      params.workspace = memory_.workspace;
      return Attend(params, sm_count_, stream_);
    });
    Print(name, AttendSplits(shape, sm_count_), median, worst, 4.0 * Pairs(rows, keys), KvBytes(keys));
  }

  void Backward(const char* what, int64_t rows, int64_t keys) {
    const std::string name = Name(what, rows, keys);
    if (name.find(filter_) == std::string::npos) return;
    const AttentionShape shape = Shape(rows, keys);
    CheckWorkspace(QueryGradWorkspaceBytes(shape, sm_count_));
    // An lse like that of random data, so that weights are neither all 0 nor infinite.
    const std::vector<float> lse(rows * model_.heads, std::log(static_cast<float>(keys)) + 0.5f);
    Require(cudaMemcpy(memory_.lse, lse.data(), lse.size() * sizeof(float), cudaMemcpyHostToDevice), "lse");
    const auto [median, worst] = Time(stream_, [&](int i) {
      QueryGradParams params;
      params.shape = Window(shape, keys, i);
      params.q = memory_.q;
      params.dout = memory_.dout;
      params.lse = memory_.lse;
      params.row_dot = memory_.row_dot;
      params.dq = memory_.out;
      params.workspace = memory_.workspace;
      return QueryGrad(params, sm_count_, stream_);
    });
    Print(name, QueryGradSplits(shape, sm_count_), median, worst, 6.0 * Pairs(rows, keys), KvBytes(keys));
  }

  void CombineParts(int64_t parts, int64_t rows) {
    const std::string name = Name("combine", rows, parts);
    if (name.find(filter_) == std::string::npos) return;
    const int64_t row_bytes = model_.heads * (model_.head_dim + 1) * int64_t{sizeof(float)};
    CheckWorkspace(parts * rows * row_bytes);
    const auto [median, worst] = Time(stream_, [&](int) {
      CombineParams params;
      params.parts = parts;
      params.rows = rows;
      params.heads = model_.heads;
      params.head_dim = model_.head_dim;
      params.part_out = reinterpret_cast<const float*>(memory_.workspace);
      params.part_lse = params.part_out + parts * rows * model_.heads * model_.head_dim;
      params.out = memory_.out;
      params.lse = memory_.lse;
      params.out_bf16 = memory_.dout;
      return Combine(params, stream_);
    });
    Print(name, 1, median, worst, 0.0, static_cast<double>(row_bytes * rows * (parts + 1)));
  }

 private:
  std::string Name(const char* what, int64_t rows, int64_t keys) const {
    return std::string(model_.name) + " " + what + " " + std::to_string(rows) + " x " + std::to_string(keys);
  }

  AttentionShape Shape(int64_t rows, int64_t keys) {
    std::vector<int64_t> pos(rows);
    for (int64_t i = 0; i < rows; ++i) pos[i] = keys - rows + i;
    Require(cudaMemcpy(memory_.pos, pos.data(), pos.size() * sizeof(int64_t), cudaMemcpyHostToDevice), "positions");
    AttentionShape shape;
    shape.rows = rows;
    shape.heads = model_.heads;
    shape.kv_heads = model_.kv_heads;
    shape.head_dim = model_.head_dim;
    shape.scale = 1.0f / std::sqrt(static_cast<float>(model_.head_dim));
    shape.extents = 1;
    shape.kv[0] = {memory_.k, memory_.v, kCacheTokens * model_.head_dim, keys, 0};
    shape.pos = memory_.pos;
    shape.expected_keys = keys;
    shape.portable_only = portable_only_;
    shape.int8 = int8_;
    shape.kv[0].k_scale = shape.kv[0].v_scale = memory_.scales;
    return shape;
  }

  // The cache's next stretch of `keys` tokens.
  AttentionShape Window(AttentionShape shape, int64_t keys, int call) const {
    const int64_t first = call % (kCacheTokens / keys) * keys;
    const int64_t bytes = first * model_.head_dim * (int8_ ? 1 : 2);
    shape.kv[0].k = reinterpret_cast<const char*>(memory_.k) + bytes;
    shape.kv[0].v = reinterpret_cast<const char*>(memory_.v) + bytes;
    shape.kv[0].k_scale = shape.kv[0].v_scale = memory_.scales + first;
    return shape;
  }

  // Pairs of a row and a key that it sees, times heads and columns.
  double Pairs(int64_t rows, int64_t keys) const {
    const double pairs = static_cast<double>(rows) * (static_cast<double>(keys) - 0.5 * static_cast<double>(rows - 1));
    return pairs * model_.heads * model_.head_dim;
  }

  double KvBytes(int64_t keys) const {
    const double of_head = int8_ ? 2.0 * (model_.head_dim + 2) : 4.0 * model_.head_dim;
    return static_cast<double>(keys) * model_.kv_heads * of_head;
  }

  void CheckWorkspace(int64_t bytes) const {
    if (bytes <= Memory::workspace_bytes) return;
    std::fprintf(stderr, "kernel_bench: workspace of %lld bytes wanted\n", static_cast<long long>(bytes));
    std::exit(1);
  }

  static void Print(const std::string& name, int splits, double median, double worst, double flops, double bytes) {
    std::printf("| %-44s | %3d | %11.1f | %11.1f | %7.1f | %6.2f |\n", name.c_str(), splits, median * 1e3, worst * 1e3,
                flops / median / 1e9, bytes / median / 1e9);
    std::fflush(stdout);
  }

  const Model model_;
  Memory memory_;
  const std::string filter_;
  const bool portable_only_;
  const bool int8_;
  const int sm_count_;
  cudaStream_t stream_;
};

void RunModel(const Model& model, const char* filter, bool portable_only, bool int8, int sm_count,
              cudaStream_t stream) {
  Bench bench(model, filter, portable_only, int8, sm_count, stream);
  for (const int64_t keys : {4096, 32768, 131072, 524288}) bench.Forward("span", 128, keys);
  for (const int64_t keys : {4096, 32768, 131072, 524288}) bench.Backward("span-grad", 128, keys);
  bench.Forward("span", 512, 131072);
  bench.Backward("span-grad", 512, 131072);
  for (const int64_t keys : {8192, 32768}) bench.Forward("prefill", keys, keys);
  for (const int64_t keys : {131072, 524288}) bench.Forward("prefill-chunk", 8192, keys);
  for (const int64_t rows : {1, 2, 4, 8, 16}) {
    for (const int64_t keys : {4096, 32768, 131072, 524288, 1048576}) bench.Forward("decode", rows, keys);
  }
  for (const int64_t parts : {2, 8, 33}) {
    for (const int64_t rows : {1, 8, 128}) bench.CombineParts(parts, rows);
  }
}

int Main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  bool portable_only = false, int8 = false;
  for (int i = 2; i < argc; ++i) {
    portable_only = portable_only || std::strcmp(argv[i], "portable") == 0;
    int8 = int8 || std::strcmp(argv[i], "int8") == 0;
  }
  cudaDeviceProp properties;
  Require(cudaGetDeviceProperties(&properties, 0), "no CUDA device");
  cudaStream_t stream;
  Require(cudaStreamCreate(&stream), "cudaStreamCreate");
  std::printf("%s, %d multiprocessors, medians of %d samples\n\n", properties.name, properties.multiProcessorCount,
              kSamples);
  std::printf("| model, work, rows x keys (combine: x parts) | splits | median us | worst us | TFLOP/s | K/V TB/s |\n");
  std::printf("|---|---:|---:|---:|---:|---:|\n");
  for (const Model& model : {Model{"qwen3-4b", 32, 8, 128}, Model{"smollm2", 9, 3, 64}}) {
    RunModel(model, filter, portable_only, int8, properties.multiProcessorCount, stream);
  }
  return 0;
}

}  // namespace
}  // namespace refocus::kernels

int main(int argc, char** argv) { return refocus::kernels::Main(argc, argv); }
