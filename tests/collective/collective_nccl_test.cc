// What only ranks with GPUs can do: calls recorded as a graph and replayed, calls on a stream of the caller's, many
// calls before one look at the results. World: world_nccl.cc.
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>

#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>

#include "tests/collective/world.h"

namespace refocus {
namespace {

constexpr double kAmple = 60.0;
const at::TensorOptions kOnGpu = at::TensorOptions(at::kCUDA).dtype(at::kFloat);

// One decode step's talk: all calls that run in a graph, in a fixed order, on tensors that stay where they are.
struct Step {
  explicit Step(Collective& c)
      : even(c.size(), 3),
        uneven(c.size(), 1),
        own(at::zeros({3, 5}, kOnGpu)),
        gathered(at::zeros({3 * c.size(), 5}, kOnGpu)),
        exchanged(at::zeros({3 * c.size(), 5}, kOnGpu)),
        sum(at::zeros({1001}, kOnGpu)),
        word(at::zeros({1}, kOnGpu)) {
    uneven.back() = 4;
    rest = at::zeros({uneven[c.rank()], 7}, kOnGpu);
    terms = at::zeros({c.size() + 3, 7}, kOnGpu);
    scattered = at::zeros({uneven[c.rank()], 7}, kOnGpu);
    all_rest = at::zeros({c.size() + 3, 7}, kOnGpu);
  }

  void Run(Collective& c) {
    c.AllGatherRows(own, even, gathered);
    c.AllToAllRows(gathered, even, exchanged, even);
    c.AllReduceSum(sum);
    c.ReduceScatterRows(terms, uneven, scattered);
    c.AllGatherRows(rest, uneven, all_rest);
    c.Broadcast(word, c.size() - 1);
  }

  // Other numbers every time.
  void Fill(const Collective& c, int round) {
    own.fill_(10.0f * static_cast<float>(c.rank()) + static_cast<float>(round));
    sum.fill_(static_cast<float>(c.rank() + round));
    terms.fill_(static_cast<float>(100 * round + c.rank()));
    rest.fill_(static_cast<float>(c.rank() * 3 + round));
    word.fill_(static_cast<float>(c.rank() * 1000 + round));
  }

  void Expect(const Collective& c, int round) const {
    const int n = c.size();
    const float ranks = static_cast<float>(n * (n - 1) / 2);
    const auto check = [&](const at::Tensor& t, int64_t row, float expected, const char* what) {
      const at::Tensor cpu = t.to(at::kCPU);
      const int64_t width = cpu.dim() == 1 ? 1 : cpu.size(1);
      for (int64_t i = 0; i < width; ++i) {
        ASSERT_EQ(cpu.data_ptr<float>()[row * width + i], expected)
            << what << ", row " << row << ", rank " << c.rank() << ", round " << round;
      }
    };
    for (int j = 0; j < n; ++j) {
      check(gathered, 3 * j + 2, 10.0f * static_cast<float>(j) + static_cast<float>(round), "all-gather");
      // Rank j sends what it gathered from this rank's number.
      check(exchanged, 3 * j, 10.0f * static_cast<float>(c.rank()) + static_cast<float>(round), "all-to-all");
      check(all_rest, j, static_cast<float>(j * 3 + round), "uneven all-gather");
    }
    check(all_rest, n + 2, static_cast<float>((n - 1) * 3 + round), "uneven all-gather");
    check(sum, 1000, ranks + static_cast<float>(n * round), "all-reduce");
    check(scattered, 0, ranks + static_cast<float>(100 * n * round), "reduce-scatter");
    check(word, 0, static_cast<float>((n - 1) * 1000 + round), "broadcast");
  }

  std::vector<int64_t> even, uneven;
  at::Tensor own, gathered, exchanged, sum, word, rest, terms, scattered, all_rest;
};

class NcclTest : public testing::TestWithParam<int> {
 protected:
  int size() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, NcclTest, testing::ValuesIn(WorldSizes()), testing::PrintToStringParamName());

TEST_P(NcclTest, OwnStreamAndOneCheckForManyCalls) {
  OnEveryRank(size(), kAmple, [](Collective& c) {
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
    Step step(c);
    for (int round = 1; round <= 50; ++round) {
      step.Fill(c, round);
      step.Run(c);
    }
    c.Check();
    step.Expect(c, 50);
  });
}

// In every mode in which a capture can watch over other calls: NCCL may enqueue from a thread of its own.
TEST_P(NcclTest, GraphsReplay) {
  for (const auto& [mode, name] : {std::pair{cudaStreamCaptureModeRelaxed, "relaxed"},
                                   std::pair{cudaStreamCaptureModeThreadLocal, "thread-local"},
                                   std::pair{cudaStreamCaptureModeGlobal, "global"}}) {
    SCOPED_TRACE(name);
    OnEveryRank(size(), kAmple, [mode = mode](Collective& c) {
      const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
      Step step(c);
      step.Fill(c, 1);
      step.Run(c);  // connects: not possible in a capture
      c.Check();
      step.Expect(c, 1);
      at::cuda::CUDAGraph graph;
      graph.capture_begin({0, 0}, mode);
      step.Run(c);
      graph.capture_end();
      for (int round = 2; round < 7; ++round) {
        step.Fill(c, round);
        c.BeforeReplay();
        graph.replay();
        // Calls outside and graphs may follow each other.
        at::Tensor word = at::full({1}, static_cast<double>(c.rank() + round), at::kFloat);
        c.Broadcast(word, 0);
        EXPECT_EQ(word.data_ptr<float>()[0], static_cast<float>(round));
        c.Check();
        step.Expect(c, round);
      }
    });
    std::fprintf(stderr, "capture mode %s: done\n", name);
  }
}

// The host is let go although a graph waits for a rank that does not come.
TEST_P(NcclTest, AReplayThatNobodyJoinsEndsWithTheDeadline) {
  if (size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  OnEveryRank(size(), WorldShortDeadline(), [](Collective& c) {
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
    auto& step = *new Step(c);                     // as in a process that ends: nothing is taken apart
    auto& graph = *new at::cuda::CUDAGraph;
    step.Run(c);
    c.Check();
    graph.capture_begin({0, 0}, cudaStreamCaptureModeRelaxed);
    step.Run(c);
    graph.capture_end();
    const at::Tensor here = at::full({1}, 1.0f, at::kFloat);
    at::Tensor all = at::empty({c.size()}, at::kFloat);
    c.AllGatherRows(here, std::vector<int64_t>(c.size(), 1), all);  // nobody leaves while another one captures
    if (c.rank() == c.size() - 1) return c.Abort("stays away");
    const auto replay = [&] {
      c.BeforeReplay();
      graph.replay();
      c.Check();
    };
    EXPECT_THROW(replay(), CollectiveError);
    EXPECT_THROW(c.BeforeReplay(), CollectiveError);
  });
}

}  // namespace
}  // namespace refocus
