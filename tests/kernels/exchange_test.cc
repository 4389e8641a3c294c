// Several ranks in one process on one GPU: a stream each, and grids so small that the blocks of all are resident at
// once, as those of ranks with a GPU each are. What is not filled holds NaN.
#include "kernels/exchange.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <thread>

#include "kernels/sum_parts.cuh"
#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

// A queue of its own for each stream: in one that they share, a rank's kernel would stand behind what waits for it.
[[maybe_unused]] const int kQueues = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
// And all kernels loaded before one waits: loading one by one at first use would wait for it.
[[maybe_unused]] const int kLoading = setenv("CUDA_MODULE_LOADING", "EAGER", 1);

constexpr ExchangeWay kWays[] = {ExchangeWay::kPacked, ExchangeWay::kFlagged, ExchangeWay::kBySize};
const char* const kWayNames[] = {"packed", "flagged", "by size"};
constexpr int64_t kDeadlineNs = 20'000'000'000;

class Ranks {
 public:
  Ranks(int ranks, int blocks, int64_t deadline_ns = kDeadlineNs) : streams_(ranks), words_(ranks), peers_(ranks) {
    const int64_t bytes = PeerMemoryBytes(ranks);
    for (int r = 0; r < ranks; ++r) {
      memory_.push_back(std::make_unique<DeviceArray<char>>(bytes));  // every byte 0xff
      // The counts of rounds begin with 0; what regions hold before they are filled must not matter.
      const int64_t counts = kExchangeBlocks * 8;
      EXPECT_EQ(cudaMemset(memory_[r]->get() + bytes - counts, 0, counts), cudaSuccess);
      EXPECT_EQ(cudaStreamCreateWithFlags(&streams_[r], cudaStreamNonBlocking), cudaSuccess);
      EXPECT_EQ(cudaHostAlloc(reinterpret_cast<void**>(&words_[r]), 4, cudaHostAllocMapped), cudaSuccess);
      *words_[r] = 0;
    }
    for (int r = 0; r < ranks; ++r) {
      PeerMemory& p = peers_[r];
      p.rank = r;
      p.ranks = ranks;
      for (int j = 0; j < ranks; ++j) p.memory[j] = memory_[j]->get();
      EXPECT_EQ(cudaHostGetDevicePointer(reinterpret_cast<void**>(&p.given_up), words_[r], 0), cudaSuccess);
      p.deadline_ns = deadline_ns;
      p.blocks = blocks;
    }
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  ~Ranks() {
    cudaDeviceSynchronize();
    for (const cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (uint32_t* word : words_) cudaFreeHost(word);
  }
  int size() const { return static_cast<int>(peers_.size()); }
  const PeerMemory& peers(int r) const { return peers_[r]; }
  cudaStream_t stream(int r) const { return streams_[r]; }
  std::atomic_ref<uint32_t> word(int r) { return std::atomic_ref<uint32_t>(*words_[r]); }
  bool GivenUp() {
    for (int r = 0; r < size(); ++r) {
      if (word(r) != 0) return true;
    }
    return false;
  }

 private:
  std::vector<std::unique_ptr<DeviceArray<char>>> memory_;
  std::vector<cudaStream_t> streams_;
  std::vector<uint32_t*> words_;
  std::vector<PeerMemory> peers_;
};

// The partials of all ranks for one exchange and what comes of them. Where lse is -inf, `out` is NaN.
struct Partials {
  Partials(int ranks, int64_t rows, int heads, int head_dim, uint64_t seed) {
    params.parts = ranks;
    params.rows = rows;
    params.heads = heads;
    params.head_dim = head_dim;
    Random random(seed);
    const int64_t row_heads = rows * heads;
    out_host = random.Floats(ranks * row_heads * head_dim);
    lse_host = random.Floats(ranks * row_heads, 4.0f);
    for (int64_t i = 0; i < row_heads; ++i) {
      const int64_t kind = random.Below(6);  // 0: empty everywhere, 1: on one rank, 2: on all but one
      const int64_t one = random.Below(ranks);
      for (int r = 0; r < ranks; ++r) {
        if (!(kind == 0 || (kind == 1 && r == one) || (kind == 2 && r != one))) continue;
        lse_host[r * row_heads + i] = -INFINITY;
        for (int64_t d = 0; d < head_dim; ++d) out_host[(r * row_heads + i) * head_dim + d] = NAN;
      }
    }
    out = std::make_unique<DeviceArray<float>>(out_host);
    lse = std::make_unique<DeviceArray<float>>(lse_host);
    params.part_out = out->get();
    params.part_lse = lse->get();
  }

  int64_t elements() const { return params.rows * params.heads * params.head_dim; }
  int64_t row_heads() const { return params.rows * params.heads; }
  CombineParams Of(int rank) const {
    CombineParams own = params;
    own.parts = 1;
    own.part_out = out->get() + rank * elements();
    own.part_lse = lse->get() + rank * row_heads();
    return own;
  }

  CombineParams params;
  std::vector<float> out_host, lse_host;
  std::unique_ptr<DeviceArray<float>> out, lse;
};

struct Combined {
  explicit Combined(const Partials& of) : out(of.elements()), lse(of.row_heads()), rounded(of.elements()) {}
  CombineParams Into(CombineParams params) {
    params.out = out.get();
    params.lse = lse.get();
    params.out_bf16 = rounded.get();
    return params;
  }
  DeviceArray<float> out, lse;
  DeviceArray<Bits> rounded;
};

void ExpectSame(Combined& got, Combined& want, const std::string& what) {
  EXPECT_TRUE(SameBits(got.out.Download(), want.out.Download())) << what << ": out";
  EXPECT_TRUE(SameBits(got.lse.Download(), want.lse.Download())) << what << ": lse";
  EXPECT_TRUE(SameBits(got.rounded.Download(), want.rounded.Download())) << what << ": rounded";
}

void ExpectReference(Combined& got, const Partials& in, const std::string& what) {
  const int64_t row_heads = in.row_heads(), head_dim = in.params.head_dim;
  std::vector<double> out(static_cast<size_t>(in.elements()), 0.0), lse(static_cast<size_t>(row_heads));
  for (int64_t i = 0; i < row_heads; ++i) {
    double high = -INFINITY, weight = 0.0;
    for (int r = 0; r < in.params.parts; ++r) high = std::max<double>(high, in.lse_host[r * row_heads + i]);
    for (int r = 0; r < in.params.parts && high != -INFINITY; ++r) {
      if (in.lse_host[r * row_heads + i] == -INFINITY) continue;
      const double w = std::exp(in.lse_host[r * row_heads + i] - high);
      weight += w;
      const float* const part = in.out_host.data() + (r * row_heads + i) * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) out[i * head_dim + d] += w * part[d];
    }
    for (int64_t d = 0; d < head_dim; ++d) out[i * head_dim + d] /= weight == 0.0 ? 1.0 : weight;
    lse[i] = weight == 0.0 ? -1e30 : high + std::log(weight);
  }
  std::vector<float> got_lse = got.lse.Download();
  for (float& x : got_lse) x = x == -INFINITY ? -1e30f : x;
  ExpectNear(what + ": lse", got_lse, lse, 1e-6, 1e-6);
  ExpectNear(what + ": out", got.out.Download(), out, 1e-5, 2e-6);
  ExpectNear(what + ": rounded", got.rounded.Download(), out, kBf16, 2e-6);
}

std::vector<Bits> Rounded(const std::vector<float>& wide) {
  std::vector<Bits> bits;
  for (const float x : wide) bits.push_back(ToBf16(x));
  return bits;
}

using ExchangeTest = RowwiseTest;

TEST_F(ExchangeTest, CombinesAndSumsAsOneGpuDoes) {
  for (const int count : {2, 3, 4, 8}) {
    Ranks ranks(count, count == 8 ? 4 : 8);
    uint64_t seed = 100 * count;
    for (const int64_t rows : {0, 1, 3, 63, 128}) {
      for (const int head_dim : {64, 80, 128}) {
        const Partials in(count, rows, 5, head_dim, ++seed);
        Combined want(in);
        if (rows > 0) REFOCUS_CUDA(Combine(want.Into(in.params), nullptr));
        DeviceArray<float> summed(in.elements());
        const DeviceArray<float> terms(Random(seed + 50).Floats(count * in.elements()));
        float* const terms_at = const_cast<DeviceArray<float>&>(terms).get();
        REFOCUS_CUDA(SumParts(terms_at, count, in.elements(), summed.get(), nullptr));
        const std::vector<float> want_sum = summed.Download();
        for (int way = 0; way < 3; ++way) {
          const std::string what = std::to_string(count) + " ranks, " + std::to_string(rows) + " rows, head " +
                                   std::to_string(head_dim) + ", " + kWayNames[way];
          std::vector<std::unique_ptr<Combined>> got;
          std::vector<std::unique_ptr<DeviceArray<float>>> sums;
          std::vector<std::unique_ptr<DeviceArray<Bits>>> rounded;
          for (int r = 0; r < count; ++r) {
            got.push_back(std::make_unique<Combined>(in));
            sums.push_back(std::make_unique<DeviceArray<float>>(in.elements()));
            rounded.push_back(std::make_unique<DeviceArray<Bits>>(in.elements()));
          }
          REFOCUS_CUDA(cudaDeviceSynchronize());  // allocations may not wait for kernels that wait for each other
          for (int r = 0; r < count; ++r) {
            REFOCUS_CUDA(ExchangeCombine(got[r]->Into(in.Of(r)), ranks.peers(r), ranks.stream(r), kWays[way]));
            const float* const own = terms_at + r * in.elements();
            const PeerMemory& peers = ranks.peers(r);
            const cudaStream_t stream = ranks.stream(r);
            REFOCUS_CUDA(ExchangeSum(own, in.elements(), sums[r]->get(), nullptr, peers, stream, kWays[way]));
          }
          REFOCUS_CUDA(cudaDeviceSynchronize());
          for (int r = 0; r < count; ++r) {
            REFOCUS_CUDA(ExchangeSum(terms_at + r * in.elements(), in.elements(), nullptr, rounded[r]->get(),
                                     ranks.peers(r), ranks.stream(r), kWays[way]));
          }
          REFOCUS_CUDA(cudaDeviceSynchronize());
          ASSERT_FALSE(ranks.GivenUp()) << what;
          for (int r = 0; r < count; ++r) {
            ExpectSame(*got[r], want, what + ", rank " + std::to_string(r));
            EXPECT_TRUE(SameBits(sums[r]->Download(), want_sum)) << what << ", rank " << r << ": sum";
            EXPECT_EQ(rounded[r]->Download(), Rounded(want_sum)) << what << ", rank " << r << ": rounded sum";
          }
          if (way == 0) ExpectReference(*got[0], in, what);
        }
      }
    }
  }
}

// Sizes and ways in any order, a thousand times, ranks ahead of and behind each other, with no wait of the host in
// between: what is overwritten too early would be seen.
TEST_F(ExchangeTest, AThousandInARowDoNotMix) {
  for (const int count : {2, 3, 4}) {
    constexpr int kRounds = 1000, kKinds = 10;
    Ranks ranks(count, 6);
    Random random(17 * count);
    std::vector<std::unique_ptr<Partials>> in;
    std::vector<std::unique_ptr<Combined>> want;
    std::vector<std::unique_ptr<DeviceArray<float>>> want_sum;
    for (int k = 0; k < kKinds; ++k) {
      const int64_t rows[] = {1, 1, 2, 40, 7, 3, 90, 1, 16, 5};
      in.push_back(std::make_unique<Partials>(count, rows[k], 4, k % 3 == 0 ? 128 : k % 3 == 1 ? 64 : 80, 1000 + k));
      want.push_back(std::make_unique<Combined>(*in[k]));
      REFOCUS_CUDA(Combine(want[k]->Into(in[k]->params), nullptr));
      // Sums of what holds NaN where partials are empty: equal bits are asked for all the same, NaN included.
      want_sum.push_back(std::make_unique<DeviceArray<float>>(in[k]->elements()));
      REFOCUS_CUDA(SumParts(in[k]->out->get(), count, in[k]->elements(), want_sum[k]->get(), nullptr));
    }
    struct Step {
      int kind, way;
      bool sum, apart;
    };
    std::vector<Step> steps;
    for (int i = 0; i < kRounds; ++i) {
      steps.push_back({static_cast<int>(random.Below(kKinds)), static_cast<int>(random.Below(3)), random.Below(3) == 0,
                       i % 3 == 2});
    }
    // One place for the results of each kind, way and operation; whoever writes there writes the same.
    std::vector<std::vector<std::unique_ptr<Combined>>> got(count);
    std::vector<std::vector<std::unique_ptr<DeviceArray<float>>>> sums(count);
    std::vector<std::unique_ptr<DeviceArray<char>>> junk;
    constexpr int64_t kJunk = 32 << 20;
    for (int r = 0; r < count; ++r) {
      junk.push_back(std::make_unique<DeviceArray<char>>(kJunk));
      for (int i = 0; i < kRounds; ++i) {
        const Partials& p = *in[steps[i].kind];
        got[r].push_back(steps[i].sum ? nullptr : std::make_unique<Combined>(p));
        sums[r].push_back(steps[i].sum ? std::make_unique<DeviceArray<float>>(p.elements()) : nullptr);
      }
    }
    REFOCUS_CUDA(cudaDeviceSynchronize());
    for (int i = 0; i < kRounds; ++i) {
      const Partials& p = *in[steps[i].kind];
      for (int r = 0; r < count; ++r) {
        if (steps[i].sum) {
          REFOCUS_CUDA(ExchangeSum(p.out->get() + r * p.elements(), p.elements(), sums[r][i]->get(), nullptr,
                                   ranks.peers(r), ranks.stream(r), kWays[steps[i].way]));
        } else {
          REFOCUS_CUDA(ExchangeCombine(got[r][i]->Into(p.Of(r)), ranks.peers(r), ranks.stream(r), kWays[steps[i].way]));
        }
        // Other work ends a chain of kernels that begin early: of a longer one, blocks that wait could fill the GPU
        // that these ranks share. It also lets ranks run apart.
        if (steps[i].apart) {
          const int64_t bytes = random.Below(3) == 0 ? kJunk : 64;
          REFOCUS_CUDA(cudaMemsetAsync(junk[r]->get(), 0xff, static_cast<size_t>(bytes), ranks.stream(r)));
        }
      }
    }
    REFOCUS_CUDA(cudaDeviceSynchronize());
    ASSERT_FALSE(ranks.GivenUp()) << count << " ranks";
    std::vector<std::vector<float>> expected_sums;
    for (int k = 0; k < kKinds; ++k) expected_sums.push_back(want_sum[k]->Download());
    for (int i = 0; i < kRounds && !HasFailure(); ++i) {
      for (int r = 0; r < count; ++r) {
        const std::string what = std::to_string(count) + " ranks, exchange " + std::to_string(i) + " (kind " +
                                 std::to_string(steps[i].kind) + ", " + kWayNames[steps[i].way] + "), rank " +
                                 std::to_string(r);
        if (steps[i].sum) {
          EXPECT_TRUE(SameBits(sums[r][i]->Download(), expected_sums[steps[i].kind])) << what << ": sum";
        } else {
          ExpectSame(*got[r][i], *want[steps[i].kind], what);
        }
      }
    }
  }
}

// A rank's own splits in the same kernel, another number of them on each rank, few and many.
TEST_F(ExchangeTest, CombinesPartsOnTheWay) {
  for (const int count : {2, 4, 8}) {
    Ranks ranks(count, count == 8 ? 16 : 32);
    uint64_t seed = 7000 * count;
    for (const int head_dim : {64, 80, 128, 256}) {
      for (const int64_t rows : {1, 2}) {
        for (const int64_t base : {0, 1, 6, 40}) {
          const int heads = head_dim == 256 ? 4 : 8;
          const std::string what = std::to_string(count) + " ranks, " + std::to_string(base) + " parts and more, " +
                                   std::to_string(rows) + " rows, head " + std::to_string(head_dim);
          ASSERT_TRUE(ExchangePartsFits(rows, heads, head_dim, ranks.peers(0))) << what;
          std::vector<std::unique_ptr<Partials>> in;
          std::vector<std::unique_ptr<Combined>> got;
          // What one GPU does: combine each rank's parts, then the ranks'.
          Partials whole(count, rows, heads, head_dim, ++seed);
          for (int r = 0; r < count; ++r) {
            in.push_back(std::make_unique<Partials>(static_cast<int>(base) + 1 + 2 * r, rows, heads, head_dim, ++seed));
            got.push_back(std::make_unique<Combined>(*in[r]));
            CombineParams own = in[r]->params;
            own.part_out = in[r]->out->get();
            own.part_lse = in[r]->lse->get();
            own.out = whole.out->get() + r * whole.elements();
            own.lse = whole.lse->get() + r * whole.row_heads();
            REFOCUS_CUDA(Combine(own, nullptr));
          }
          Combined want(whole);
          CombineParams all = want.Into(whole.params);
          all.part_out = whole.out->get();
          all.part_lse = whole.lse->get();
          REFOCUS_CUDA(Combine(all, nullptr));
          REFOCUS_CUDA(cudaDeviceSynchronize());
          for (int repeat = 0; repeat < 2; ++repeat) {  // both parities
            for (int r = 0; r < count; ++r) {
              CombineParams own = got[r]->Into(in[r]->params);
              own.part_out = in[r]->out->get();
              own.part_lse = in[r]->lse->get();
              REFOCUS_CUDA(ExchangeParts(own, ranks.peers(r), ranks.stream(r)));
            }
          }
          REFOCUS_CUDA(cudaDeviceSynchronize());
          ASSERT_FALSE(ranks.GivenUp()) << what;
          for (int r = 0; r < count; ++r) ExpectSame(*got[r], want, what + ", rank " + std::to_string(r));
        }
      }
    }
  }
}

// A replayed graph needs nothing from the host: it counts on where the last run stopped.
TEST_F(ExchangeTest, GraphsReplay) {
  constexpr int kRanks = 2;
  Ranks ranks(kRanks, 8);
  const Partials small(kRanks, 1, 4, 128, 5), large(kRanks, 64, 4, 128, 6);
  std::vector<cudaGraphExec_t> graphs(kRanks);
  std::vector<std::unique_ptr<Combined>> got;
  for (int r = 0; r < kRanks; ++r) {
    got.push_back(std::make_unique<Combined>(small));
    got.push_back(std::make_unique<Combined>(large));
  }
  for (int r = 0; r < kRanks; ++r) {
    cudaGraph_t graph;
    REFOCUS_CUDA(cudaStreamBeginCapture(ranks.stream(r), cudaStreamCaptureModeThreadLocal));
    REFOCUS_CUDA(ExchangeCombine(got[2 * r]->Into(small.Of(r)), ranks.peers(r), ranks.stream(r)));
    REFOCUS_CUDA(ExchangeCombine(got[2 * r + 1]->Into(large.Of(r)), ranks.peers(r), ranks.stream(r)));
    REFOCUS_CUDA(ExchangeCombine(got[2 * r]->Into(small.Of(r)), ranks.peers(r), ranks.stream(r)));
    REFOCUS_CUDA(cudaStreamEndCapture(ranks.stream(r), &graph));
    REFOCUS_CUDA(cudaGraphInstantiate(&graphs[r], graph, 0));
    REFOCUS_CUDA(cudaGraphDestroy(graph));
  }
  for (int run = 0; run < 51; ++run) {
    for (int r = 0; r < kRanks; ++r) REFOCUS_CUDA(cudaGraphLaunch(graphs[r], ranks.stream(r)));
  }
  REFOCUS_CUDA(cudaDeviceSynchronize());
  ASSERT_FALSE(ranks.GivenUp());
  Combined want_small(small), want_large(large);
  REFOCUS_CUDA(Combine(want_small.Into(small.params), nullptr));
  REFOCUS_CUDA(Combine(want_large.Into(large.params), nullptr));
  for (int r = 0; r < kRanks; ++r) {
    ExpectSame(*got[2 * r], want_small, "small, rank " + std::to_string(r));
    ExpectSame(*got[2 * r + 1], want_large, "large, rank " + std::to_string(r));
    REFOCUS_CUDA(cudaGraphExecDestroy(graphs[r]));
  }
}

// A kernel whose peer never comes ends: told by the host, or by its own deadline, which it tells the host.
TEST_F(ExchangeTest, NobodyWaitsForever) {
  for (int way = 0; way < 2; ++way) {
    for (const bool told : {true, false}) {
      const std::string what = std::string(kWayNames[way]) + (told ? ", told" : ", late");
      Ranks ranks(3, 8, told ? int64_t{60'000'000'000} : int64_t{300'000'000});
      const Partials in(3, 100, 4, 128, 9);
      Combined got(in);
      REFOCUS_CUDA(cudaDeviceSynchronize());
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < 3; ++i) {  // those behind it end, too
        REFOCUS_CUDA(ExchangeCombine(got.Into(in.Of(1)), ranks.peers(1), ranks.stream(1), kWays[way]));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      EXPECT_EQ(cudaStreamQuery(ranks.stream(1)), cudaErrorNotReady) << what;
      EXPECT_EQ(ranks.word(1), 0u) << what;
      if (told) ranks.word(1) = kAborted;
      REFOCUS_CUDA(cudaStreamSynchronize(ranks.stream(1)));
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      EXPECT_LT(seconds, 2.0) << what;
      EXPECT_EQ(ranks.word(1), told ? kAborted : kLate) << what;
      EXPECT_EQ(ranks.word(0), 0u) << what;
    }
  }
}

TEST_F(ExchangeTest, RefusesWhatItCannotDo) {
  Ranks ranks(2, 8);
  const Partials in(2, 1, 4, 64, 3);
  Combined got(in);
  CombineParams params = got.Into(in.Of(0));
  params.parts = 2;
  EXPECT_EQ(ExchangeCombine(params, ranks.peers(0), nullptr), cudaErrorInvalidValue);
  EXPECT_FALSE(ExchangePartsFits(3, 4, 64, ranks.peers(0)));
  params.rows = 3;
  EXPECT_EQ(ExchangeParts(params, ranks.peers(0), nullptr), cudaErrorInvalidValue);
  params.rows = 1;
  params.parts = 1;
  params.head_dim = 12;
  EXPECT_EQ(ExchangeCombine(params, ranks.peers(0), nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(ExchangeSum(params.part_out, 6, params.out, nullptr, ranks.peers(0), nullptr), cudaErrorInvalidValue);
  for (const int blocks : {0, kExchangeBlocks + 1}) {
    PeerMemory peers = ranks.peers(0);
    peers.blocks = blocks;
    EXPECT_EQ(ExchangeSum(params.part_out, 8, params.out, nullptr, peers, nullptr), cudaErrorInvalidValue);
  }
}

}  // namespace
}  // namespace refocus::kernels
