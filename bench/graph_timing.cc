#include "bench/graph_timing.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace refocus {
namespace {

constexpr int kMostCalls = 200;

class Stopwatch {
 public:
  explicit Stopwatch(cudaStream_t stream) : stream_(stream) {
    RequireCuda(cudaEventCreate(&begin_), "cudaEventCreate");
    RequireCuda(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  double Milliseconds(const std::function<void()>& work) {
    float ms = 0.0f;
    RequireCuda(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    work();
    RequireCuda(cudaEventRecord(end_, stream_), "cudaEventRecord");
    RequireCuda(cudaEventSynchronize(end_), "the timed calls");
    RequireCuda(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return ms;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

class Graph {
 public:
  // Relaxed, so that a library may take memory. Nothing recorded where a call throws or CUDA refuses.
  Graph(cudaStream_t stream, int calls, const std::function<void(int)>& call) : stream_(stream) {
    RequireCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capture");
    bool refused = false;
    try {
      for (int i = 0; i < calls; ++i) call(i);
    } catch (const std::exception&) {
      refused = true;
    }
    cudaGraph_t graph = nullptr;
    refused = cudaStreamEndCapture(stream, &graph) != cudaSuccess || refused;
    if (!refused && cudaGraphInstantiate(&exec_, graph, 0) != cudaSuccess) exec_ = nullptr;
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();  // a refusal is no error of what follows
  }
  ~Graph() {
    if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  bool recorded() const { return exec_ != nullptr; }
  void Replay() { RequireCuda(cudaGraphLaunch(exec_, stream_), "replay"); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace

void RequireCuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

Timing Time(cudaStream_t stream, const std::function<void(int)>& call, double sample_ms) {
  Stopwatch watch(stream);
  watch.Milliseconds([&] { call(0); });
  const double warm_ms = watch.Milliseconds([&] { call(1); });
  const int calls = static_cast<int>(std::clamp(sample_ms / std::max(warm_ms, 1e-3), 1.0, double{kMostCalls}));
  Graph graph(stream, calls, call);
  const auto sample = [&] {
    if (graph.recorded()) return graph.Replay();
    for (int i = 0; i < calls; ++i) call(i);
  };
  watch.Milliseconds(sample);
  std::vector<double> samples;
  for (int i = 0; i < kTimingSamples; ++i) samples.push_back(watch.Milliseconds(sample) * 1e3 / calls);
  std::sort(samples.begin(), samples.end());
  return {samples[samples.size() / 2], samples.back(), graph.recorded()};
}

}  // namespace refocus
