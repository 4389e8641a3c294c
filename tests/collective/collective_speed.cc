// mpirun -np 2 collective_speed: minimum and median milliseconds per collective, beside MPI's own all-reduce.
#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <functional>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include "worker/collective.h"
#include "worker/launch.h"

namespace refocus {
namespace {

void Report(const char* name, int64_t bytes, int rank, const std::function<void()>& call) {
  std::vector<double> times;
  for (int i = 0; i < 3; ++i) call();
  for (int i = 0; i < 21; ++i) {
    MPI_Barrier(MPI_COMM_WORLD);
    const double begin = MPI_Wtime();
    call();
    times.push_back((MPI_Wtime() - begin) * 1e3);
  }
  std::sort(times.begin(), times.end());
  if (rank == 0) {
    std::printf("| %-16s | %10ld | %8.3f | %8.3f |\n", name, static_cast<long>(bytes), times[0],
                times[times.size() / 2]);
  }
}

void Measure(const Launch& launch) {
  const auto collective = MakeMpiCollective(60.0);
  const int size = launch.size;
  const int rank = launch.rank;
  if (rank == 0) std::printf("| collective       |      bytes | min ms   | p50 ms   |\n|---|---|---|---|\n");
  for (const int64_t count : {2, 600'000, 10'000'000}) {
    at::Tensor t = at::full({count}, 1e-3f, at::kFloat);
    at::Tensor sum = at::empty({count}, at::kFloat);
    Report("all-reduce", count * 4, rank, [&] { collective->AllReduceSum(t); });
    Report("MPI_Allreduce", count * 4, rank, [&] {
      MPI_Allreduce(t.data_ptr<float>(), sum.data_ptr<float>(), static_cast<int>(count), MPI_FLOAT, MPI_SUM,
                    MPI_COMM_WORLD);
    });
  }
  const std::vector<int64_t> rows(size, 600'000 / size);
  const at::Tensor own = at::full({rows[0]}, 1.0f, at::kFloat);
  at::Tensor all = at::full({rows[0] * size}, 2.0f, at::kFloat);
  at::Tensor other = at::full({rows[0] * size}, 2.0f, at::kFloat);
  Report("all-gather", all.nbytes(), rank, [&] { collective->AllGatherRows(own, rows, all); });
  Report("all-to-all", all.nbytes(), rank, [&] { collective->AllToAllRows(all, rows, other, rows); });
  at::Tensor word = at::full({1}, 2.0f, at::kFloat);
  Report("broadcast", 4, rank, [&] { collective->Broadcast(word, 0); });
}

}  // namespace
}  // namespace refocus

int main() {
  const refocus::Launch launch = refocus::StartLaunch();
  refocus::Measure(launch);
  refocus::FinishLaunch(launch);
}
