// mpirun -np P collective_speed_nccl: of collectives of 8 KiB to 1 GiB a rank, microseconds from the call to the seen
// end (alone), and one of many in a row (eager: the host enqueues each; graph: replayed), with bus bandwidth: bytes
// that pass the busiest link of an ideal ring, per second. Then what a layer exchanges of replicated rows, through NCCL
// and through the memory of the other GPUs.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "worker/backend.h"
#include "worker/device.h"
#include "worker/launch.h"

namespace refocus {
namespace {

using Clock = std::chrono::steady_clock;

double Microseconds(Clock::time_point begin) {
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// `traffic`: of the bytes, how many pass a link.
void Report(Collective& c, const char* name, int64_t bytes, double traffic, const std::function<void()>& call) {
  constexpr int kRepeats = 11;
  const int many = bytes > (int64_t{64} << 20) ? 5 : 50;
  at::Tensor word = at::full({1}, 0.0f, at::kFloat);
  for (int i = 0; i < 3; ++i) call();
  c.Check();
  at::cuda::CUDAGraph graph;
  graph.capture_begin({0, 0}, cudaStreamCaptureModeRelaxed);
  for (int i = 0; i < many; ++i) call();
  graph.capture_end();
  std::vector<double> alone, eager, replayed;
  for (int i = 0; i < kRepeats; ++i) {
    c.Broadcast(word, 0);  // together
    auto begin = Clock::now();
    call();
    c.Check();
    alone.push_back(Microseconds(begin));
    c.Broadcast(word, 0);
    begin = Clock::now();
    for (int j = 0; j < many; ++j) call();
    c.Check();
    eager.push_back(Microseconds(begin) / many);
    c.Broadcast(word, 0);
    c.BeforeReplay();
    begin = Clock::now();
    graph.replay();
    c.Check();
    replayed.push_back(Microseconds(begin) / many);
  }
  if (c.rank() != 0) return;
  std::printf("| %-14s | %10lld | %9.1f | %9.1f | %9.1f | %7.1f |\n", name, static_cast<long long>(bytes),
              Median(alone), Median(eager), Median(replayed),
              static_cast<double>(bytes) * traffic / Median(replayed) * 1e-3);
  std::fflush(stdout);
}

void Measure(Collective& c) {
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
  const auto gpu = at::TensorOptions(at::kCUDA).dtype(at::kFloat);
  const int64_t n = c.size();
  const double part = static_cast<double>(n - 1) / static_cast<double>(n);
  if (c.rank() == 0) {
    std::printf("| collective     |      bytes | alone us  | eager us  | graph us  | bus GB/s |\n");
    std::printf("|---|---|---|---|---|---|\n");
  }
  for (int64_t bytes = 8 << 10; bytes <= int64_t{1} << 30; bytes *= bytes < (1 << 20) ? 8 : 16) {
    const int64_t count = bytes / 4 / n * n;
    const std::vector<int64_t> rows(n, count / n);
    std::vector<int64_t> uneven = rows;
    if (n > 1) {
      uneven[0] += 256;
      uneven[1] -= 256;
    }
    at::Tensor all = at::full({count}, 1e-3f, gpu);
    at::Tensor other = at::empty({count}, gpu);
    const at::Tensor own = at::full({rows[0]}, 1.0f, gpu);
    const at::Tensor own_uneven = at::full({uneven[c.rank()]}, 1.0f, gpu);
    at::Tensor mine = at::empty({rows[0]}, gpu);
    Report(c, "all-reduce", count * 4, 2 * part, [&] { c.AllReduceSum(all); });
    Report(c, "all-gather", count * 4, part, [&] { c.AllGatherRows(own, rows, other); });
    Report(c, "uneven gather", count * 4, part, [&] { c.AllGatherRows(own_uneven, uneven, other); });
    Report(c, "all-to-all", count * 4, part, [&] { c.AllToAllRows(all, rows, other, rows); });
    Report(c, "reduce-scatter", count * 4, part, [&] { c.ReduceScatterRows(all, rows, mine); });
    Report(c, "broadcast", count * 4, 1.0, [&] { c.Broadcast(all, 0); });
  }
  at::Tensor word = at::full({1}, 0, at::kLong);
  std::vector<double> times;
  for (int i = 0; i < 101; ++i) {
    const auto begin = Clock::now();
    c.Broadcast(word, 0);
    times.push_back(Microseconds(begin));
  }
  if (c.rank() == 0) std::printf("control word from rank 0's CPU to all: %.1f us\n", Median(times));
}

// What a layer exchanges of rows that all ranks compute, in the shape of a model of 4B: partials combined, dq added up.
void MeasureExchange(Collective& c, Backend& backend) {
  const auto gpu = at::TensorOptions(at::kCUDA).dtype(at::kFloat);
  constexpr int64_t kHeads = 32, kHeadDim = 128;
  const int64_t n = c.size();
  const double part = static_cast<double>(n - 1);
  for (const int64_t rows : {1, 16, 128}) {
    const at::Tensor ones = at::full({rows, kHeads}, 1.0f, gpu);
    const Partial own{at::full({rows, kHeads, kHeadDim}, 1e-3f, gpu), ones, at::Tensor()};
    at::Tensor out = at::empty({n * rows, kHeads, kHeadDim}, gpu), lse = at::empty({n * rows, kHeads}, gpu);
    const std::vector<int64_t> counts(n, rows);
    const int64_t bytes = rows * kHeads * kHeadDim * 4;
    Report(c, "combine, NCCL", bytes, part, [&] {
      c.AllGatherRows(own.out, counts, out);
      c.AllGatherRows(own.lse, counts, lse);
      backend.Combine(out.view({n, rows, kHeads, kHeadDim}), lse.view({n, rows, kHeads}));
    });
    Report(c, "sum, NCCL", bytes, part, [&] {
      c.AllGatherRows(own.out, counts, out);
      for (int64_t r = 1; r < n; ++r) own.out + out.narrow(0, r * rows, rows);
    });
    if (c.NextPeerExchange("question") == nullptr) continue;
    Report(c, "combine, peers", bytes, part,
           [&] { backend.CombineOverPeers(own, *c.NextPeerExchange("exchange of partials")); });
    Report(c, "sum, peers", bytes, part,
           [&] { backend.SumOverPeers(own.out, at::kFloat, *c.NextPeerExchange("sum of dq")); });
  }
}

int Main() {
  const Launch launch = StartLaunch();
  const auto gpu = UseGpu(launch.local_rank, launch.ranks_on_host);
  if (!gpu.ok()) {
    std::printf("skipped: %s\n", std::string(gpu.status().message()).c_str());
    return 4;
  }
  std::string id = launch.rank == 0 ? MakeNcclId() : "";
  ShareFromRankZero(&id);
  {
    const auto collective = MakeNcclCollective(id, launch.rank, launch.size, 60.0);
    ModelConfig config;
    config.heads = 32;
    config.head_dim = 128;
    const std::unique_ptr<Backend> backend = MakeGpuBackend(config, *gpu);
    backend->Bind();
    Measure(*collective);
    MeasureExchange(*collective, *backend);
  }
  FinishLaunch(launch);
  std::fflush(stdout);
  std::_Exit(0);
}

}  // namespace
}  // namespace refocus

int main() { return refocus::Main(); }
