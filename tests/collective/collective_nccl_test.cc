// What only ranks with GPUs can do: calls recorded as a graph and replayed, calls on a stream of the caller's, many
// calls before one look at the results. World: world_nccl.cc.
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>

#include "tests/collective/world.h"
#include "worker/backend.h"
#include "worker/device.h"

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

// ---- Through the memory of the other GPUs, where they can; else these say so and test that all agree.

class PeerTest : public NcclTest {
 protected:
  void SetUp() override {
    int device = 0;
    ASSERT_EQ(cudaGetDevice(&device), cudaSuccess);
    config_.heads = 8;
    config_.head_dim = 128;
    Gpu gpu;
    gpu.index = device;
    backend_ = MakeGpuBackend(config_, gpu);
    backend_->Bind();
  }

  // Whether `c` exchanges through peer memory, which all ranks answer alike.
  static bool Used(Collective& c) {
    const bool used = c.NextPeerExchange("question") != nullptr;
    at::Tensor answers = at::full({1}, used ? 1.0 : 0.0, at::kFloat);
    c.AllReduceSum(answers);
    const float sum = answers.data_ptr<float>()[0];
    EXPECT_TRUE(sum == 0.0f || sum == static_cast<float>(c.size()));
    if (c.rank() == 0) std::printf("peer memory: %s\n", used ? "used" : "not used");
    return used;
  }

  // This rank's partials: other numbers on every rank and in every round, some slices empty.
  Partial Own(const Collective& c, int64_t rows, int round) const {
    const at::Tensor ramp = at::arange(rows * 8 * 128, kOnGpu).view({rows, 8, 128});
    at::Tensor out = (ramp * (0.37 + c.rank()) + round).sin();
    at::Tensor lse = (at::arange(rows * 8, kOnGpu).view({rows, 8}) * (1.1 + c.rank()) + round).cos() * 5.0;
    lse.view({-1}).narrow(0, (c.rank() + round) % (rows * 8), 1).fill_(-std::numeric_limits<float>::infinity());
    return {out, lse, at::Tensor()};
  }

  Partial Gathered(Collective& c, const Partial& own) const {
    const int64_t n = own.lse.size(0);
    at::Tensor out = at::empty({c.size() * n, 8, 128}, kOnGpu), lse = at::empty({c.size() * n, 8}, kOnGpu);
    c.AllGatherRows(own.out, std::vector<int64_t>(c.size(), n), out);
    c.AllGatherRows(own.lse, std::vector<int64_t>(c.size(), n), lse);
    return backend_->Combine(out.view({c.size(), n, 8, 128}), lse.view({c.size(), n, 8}));
  }

  static bool Same(const at::Tensor& a, const at::Tensor& b) {
    const at::Tensor x = a.to(at::kCPU), y = b.to(at::kCPU);
    return x.nbytes() == y.nbytes() && std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0;
  }
  static void ExpectSame(const Partial& a, const Partial& b, const std::string& what) {
    EXPECT_TRUE(Same(a.out, b.out)) << what << ": out";
    EXPECT_TRUE(Same(a.lse, b.lse)) << what << ": lse";
    EXPECT_TRUE(Same(a.rounded, b.rounded)) << what << ": rounded";
  }

  ModelConfig config_;
  std::unique_ptr<Backend> backend_;
};
INSTANTIATE_TEST_SUITE_P(Ranks, PeerTest, testing::ValuesIn(WorldSizes()), testing::PrintToStringParamName());

TEST_P(PeerTest, SameBitsAsThroughNccl) {
  OnEveryRank(size(), kAmple, [this](Collective& c) {
    if (!Used(c)) GTEST_SKIP() << "exchanges go through NCCL";
    for (const int64_t rows : {1, 2, 63, 128, 1400}) {  // the last: more than one round
      std::vector<Partial> own, ours;
      std::vector<at::Tensor> sums, rounded;
      constexpr int kRounds = 20;
      for (int round = 0; round < kRounds; ++round) own.push_back(Own(c, rows, round));
      for (int round = 0; round < kRounds; ++round) {  // many, and no look in between
        ours.push_back(backend_->CombineOverPeers(own[round], *c.NextPeerExchange("exchange")));
        sums.push_back(backend_->SumOverPeers(own[round].out, at::kFloat, *c.NextPeerExchange("sum")));
        rounded.push_back(backend_->SumOverPeers(own[round].out, at::kBFloat16, *c.NextPeerExchange("sum")));
      }
      for (int round = 0; round < kRounds; ++round) {
        const std::string what = std::to_string(rows) + " rows, round " + std::to_string(round) + ", rank " +
                                 std::to_string(c.rank());
        const Partial theirs = Gathered(c, own[round]);
        at::Tensor parts = at::empty({c.size() * rows, 8, 128}, kOnGpu);
        c.AllGatherRows(own[round].out, std::vector<int64_t>(c.size(), rows), parts);
        at::Tensor sum = parts.narrow(0, 0, rows) + parts.narrow(0, rows, rows);
        for (int r = 2; r < c.size(); ++r) sum.add_(parts.narrow(0, r * rows, rows));
        c.Check();
        ExpectSame(ours[round], theirs, what);
        EXPECT_TRUE(Same(sums[round], sum)) << what << ": sum";
        EXPECT_TRUE(Same(rounded[round].to(at::kFloat), sum.to(at::kBFloat16).to(at::kFloat))) << what << ": rounded";
      }
    }
  });
}

TEST_P(PeerTest, GraphsReplayBesideNccl) {
  OnEveryRank(size(), kAmple, [this](Collective& c) {
    if (!Used(c)) GTEST_SKIP() << "exchanges go through NCCL";
    const Partial own = Own(c, 5, 0);
    Partial ours, theirs;
    const auto pass = [&] {
      ours = backend_->CombineOverPeers(own, *c.NextPeerExchange("exchange"));
      theirs = Gathered(c, own);
      ours = backend_->CombineOverPeers(own, *c.NextPeerExchange("exchange"));
    };
    pass();
    c.Check();
    at::cuda::CUDAGraph graph;
    graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    pass();
    graph.capture_end();
    for (int round = 1; round < 30; ++round) {
      const Partial next = Own(c, 5, round);
      own.out.copy_(next.out);
      own.lse.copy_(next.lse);
      c.BeforeReplay();
      graph.replay();
      c.Check();
      ExpectSame(ours, theirs, "replay " + std::to_string(round));
      ExpectSame(ours, Gathered(c, own), "outside " + std::to_string(round));
    }
  });
}

TEST_P(PeerTest, OneRankThatMayNotIsEnoughForNone) {
  if (size() == 1) GTEST_SKIP() << "one rank has no peers";
  OnEveryRank(size(), kAmple, [](Collective& c) {
    at::Tensor key = at::zeros({128}, at::kByte);
    if (c.rank() == 0) {
      const std::string id = MakeNcclId();
      ASSERT_EQ(id.size(), 128u);
      std::memcpy(key.data_ptr(), id.data(), id.size());
    }
    c.Broadcast(key, 0);
    const std::string id(static_cast<const char*>(key.data_ptr()), 128);
    const auto other = MakeNcclCollective(id, c.rank(), c.size(), kAmple, /*peer_memory=*/c.rank() != c.size() - 1);
    EXPECT_EQ(other->NextPeerExchange("exchange"), nullptr);
    at::Tensor word = at::full({1}, 1.0, at::kFloat);
    other->AllReduceSum(word);
    EXPECT_EQ(word.data_ptr<float>()[0], static_cast<float>(c.size()));
  });
}

// Eager or replayed, a kernel whose peer stays away lets go of the host with the deadline.
TEST_P(PeerTest, AnExchangeThatNobodyJoinsEndsWithTheDeadline) {
  if (size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  OnEveryRank(size(), WorldShortDeadline(), [this](Collective& c) {
    if (!Used(c)) GTEST_SKIP() << "exchanges go through NCCL";
    const Partial own = Own(c, 128, 0);
    const auto pass = [&] {
      for (int i = 0; i < 3; ++i) backend_->CombineOverPeers(own, *c.NextPeerExchange("exchange"));
    };
    auto& graph = *new at::cuda::CUDAGraph;  // as in a process that ends: nothing is taken apart
    pass();
    c.Check();
    graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    pass();
    graph.capture_end();
    const at::Tensor here = at::full({1}, 1.0f, at::kFloat);
    at::Tensor all = at::empty({c.size()}, at::kFloat);
    c.AllGatherRows(here, std::vector<int64_t>(c.size(), 1), all);  // nobody leaves while another one captures
    if (c.rank() == c.size() - 1) return c.Abort("stays away");
    const auto begin = std::chrono::steady_clock::now();
    const auto replay = [&] {
      c.BeforeReplay();
      graph.replay();
      c.Check();
    };
    EXPECT_THROW(replay(), CollectiveError);
    EXPECT_THROW(c.NextPeerExchange("exchange"), CollectiveError);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_GT(seconds, 0.5 * WorldShortDeadline());
    EXPECT_LT(seconds, WorldShortDeadline() + 2.0);
  });
}

}  // namespace
}  // namespace refocus
