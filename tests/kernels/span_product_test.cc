#include "kernels/span_product.h"

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using SpanProductTest = RowwiseTest;

const SpanGpu kGpu = SpanGpu::Usual(132);
constexpr int kWidths[] = {64, 128, 160, 192};

struct Shape {
  int64_t rows = 0, in = 0, out = 0;
  bool backward = false;
  int terms = 1;
  bool same_x = false;  // of two terms
  bool wide = true;

  int64_t depth() const { return backward ? out : in; }
  int64_t columns() const { return backward ? in : out; }
};

std::string What(const Shape& s, const std::optional<SpanPlan>& plan) {
  std::string text = std::to_string(s.rows) + " rows, in " + std::to_string(s.in) + " out " + std::to_string(s.out);
  if (s.backward) text += " back";
  if (s.terms == 2) text += s.same_x ? " same x" : " two terms";
  if (!s.wide) text += " bf16";
  if (plan) text += ", tiles " + std::to_string(plan->columns) + "/" + std::to_string(plan->splits);
  return text;
}

struct Numbers {
  std::vector<Bits> x[2], w[2];

  Numbers() = default;
  Numbers(const Shape& s, uint64_t seed) {
    Random random(seed + static_cast<uint64_t>(s.rows * 7919 + s.in * 31 + s.out));
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.depth()));
    for (int i = 0; i < s.terms; ++i) {
      x[i] = i == 1 && s.same_x ? x[0] : random.Bf16s(s.rows * s.depth());
      w[i] = random.Bf16s(s.out * s.in, scale);
    }
  }
};

std::vector<double> Expected(const Shape& s, const Numbers& n) {
  const int64_t depth = s.depth(), columns = s.columns();
  std::vector<double> y(s.rows * columns);
  for (int t = 0; t < s.terms; ++t) {
    std::vector<double> w(s.out * s.in);  // [depth, columns]
    for (int64_t o = 0; o < s.out; ++o) {
      for (int64_t i = 0; i < s.in; ++i) w[s.backward ? o * s.in + i : i * s.out + o] = Wide(n.w[t][o * s.in + i]);
    }
    for (int64_t row = 0; row < s.rows; ++row) {
      double* const to = y.data() + row * columns;
      for (int64_t k = 0; k < depth; ++k) {
        const double x = Wide(n.x[t][row * depth + k]);
        for (int64_t c = 0; c < columns; ++c) to[c] += x * w[k * columns + c];
      }
    }
  }
  return y;
}

// A product in device memory of its own.
class Placed {
 public:
  Placed(const Shape& s, const Numbers& n) : y_(s.rows * s.columns()), half_(s.rows * s.columns()) {
    for (int i = 0; i < s.terms; ++i) {
      if (i == 0 || !s.same_x) x_[i] = std::make_unique<DeviceArray<Bits>>(n.x[i]);
      w_[i] = std::make_unique<DeviceArray<Bits>>(n.w[i]);
      product.term[i] = {(s.same_x ? x_[0] : x_[i])->get(), w_[i]->get()};
    }
    product.rows = s.rows;
    product.in = s.in;
    product.out = s.out;
    product.backward = s.backward;
    product.terms = s.terms;
    product.wide = s.wide;
    product.y = s.wide ? static_cast<void*>(y_.get()) : half_.get();
  }

  // bf16 outputs widened.
  std::vector<float> Result() {
    std::vector<float> got = y_.Download();
    const std::vector<Bits> half = half_.Download();
    for (size_t i = 0; !product.wide && i < half.size(); ++i) got[i] = FromBf16(half[i]);
    return got;
  }

  SpanProduct product;

 private:
  std::unique_ptr<DeviceArray<Bits>> x_[2], w_[2];
  DeviceArray<float> y_;
  DeviceArray<Bits> half_;
};

std::vector<float> Product(const Shape& s, const Numbers& n, const std::optional<SpanPlan>& plan = {}) {
  Placed placed(s, n);
  const cudaError_t error = plan ? SpanProducts({&placed.product, 1}, *plan, kGpu, nullptr)
                                 : SpanProducts({&placed.product, 1}, kGpu, nullptr);
  EXPECT_EQ(error, cudaSuccess) << What(s, plan) << ": " << cudaGetErrorString(error);
  return placed.Result();
}

void Compare(const Shape& s, const std::optional<SpanPlan>& plan = {}) {
  const Numbers n(s, 1);
  ExpectNear(What(s, plan), Product(s, n, plan), Expected(s, n), s.wide ? 1e-5 : kBf16, 5e-5);
}

std::vector<float> FirstRows(const std::vector<float>& y, int64_t rows, const Shape& s) {
  std::vector<float> first(static_cast<size_t>(rows * s.columns()));
  std::copy_n(y.begin(), first.size(), first.begin());
  return first;
}

// Weights that copy: column c of the result is element c of x, which says which row it came from, then which column.
// Prints what came instead.
void ExpectCopies(const Shape& s, const SpanPlan& plan) {
  Numbers n;
  n.w[0].assign(s.in * s.out, 0);
  for (int64_t i = 0; i < std::min(s.in, s.out); ++i) n.w[0][i * s.in + i] = ToBf16(1.0f);
  for (const bool by_row : {true, false}) {
    n.x[0].clear();
    for (int64_t row = 0; row < s.rows; ++row) {
      for (int64_t k = 0; k < s.depth(); ++k)
        n.x[0].push_back(ToBf16(static_cast<float>(1 + (by_row ? row : k % 250))));
    }
    const std::vector<float> got = Product(s, n, plan);
    int wrong = 0;
    for (int64_t row = 0; row < s.rows; ++row) {
      for (int64_t c = 0; c < s.columns(); ++c) {
        const float want = c >= s.depth() ? 0.0f : static_cast<float>(1 + (by_row ? row : c % 250));
        if (got[row * s.columns() + c] == want) continue;
        if (++wrong > 6) continue;
        ADD_FAILURE() << What(s, plan) << (by_row ? ": rows" : ": columns") << ": at row " << row << " column " << c
                      << " got " << got[row * s.columns() + c] << ", want " << want;
      }
    }
    EXPECT_EQ(wrong, 0) << What(s, plan) << " of " << got.size();
  }
}

TEST_F(SpanProductTest, TheGpuIsMeasured) {
  SpanGpu gpu;
  ASSERT_EQ(MeasureSpanGpu(&gpu), cudaSuccess);
  std::printf("%d multiprocessors, clusters at once: %d of 1, %d of 2, %d of 4, %d of 8\n", gpu.multiprocessors,
              gpu.clusters[0], gpu.clusters[1], gpu.clusters[2], gpu.clusters[3]);
  EXPECT_EQ(gpu.clusters[0], gpu.multiprocessors);
  for (int i = 1; i < 4; ++i) {
    EXPECT_GE(gpu.clusters[i], 1);
    EXPECT_LE(gpu.clusters[i] << i, gpu.multiprocessors);
  }
}

TEST_F(SpanProductTest, OneStageOfOneTile) {
  for (const bool backward : {false, true}) {
    for (const int width : kWidths) {
      for (const int64_t rows : {64, 128}) {
        ExpectCopies(backward ? Shape{rows, width, 64, true} : Shape{rows, 64, width}, {width, 1});
      }
    }
  }
}

TEST_F(SpanProductTest, StagesAndTiles) {
  for (const bool backward : {false, true}) {
    for (const int width : kWidths) ExpectCopies({128, 448, 448, backward}, {width, 1});
  }
}

TEST_F(SpanProductTest, ClustersAddUp) {
  for (const bool backward : {false, true}) {
    for (const int width : kWidths) {
      for (const int64_t rows : {64, 128}) {
        for (const int splits : {2, 4, 8}) ExpectCopies({rows, 576, 576, backward}, {width, splits});
      }
    }
  }
}

TEST_F(SpanProductTest, RingsGoAround) {
  for (const bool backward : {false, true}) {
    for (const int width : kWidths) {
      for (const int splits : {1, 2, 4, 8}) {
        for (const int64_t rows : {40, 100}) {
          Compare(backward ? Shape{rows, 328, 4104, true} : Shape{rows, 4104, 328}, SpanPlan{width, splits});
        }
      }
    }
  }
}

TEST_F(SpanProductTest, OddSizes) {
  for (const bool backward : {false, true}) {
    for (const int64_t rows : {9, 16, 63, 64, 65, 127, 128}) {
      for (const int64_t in : {8, 72, 200, 2560}) {
        for (const int64_t out : {8, 72, 200}) {
          Compare({rows, in, out, backward, 1, false, (rows + in + out) % 3 != 0});
          Compare({rows, out, in, backward, 1, false, (rows + in + out) % 3 == 0});
        }
      }
    }
  }
}

TEST_F(SpanProductTest, TwoTerms) {
  for (const bool backward : {false, true}) {
    for (const bool same_x : {false, true}) {
      for (const int64_t rows : {16, 128}) {
        for (const int width : kWidths) {
          Compare({rows, 1608, 264, backward, 2, same_x, true}, SpanPlan{width, 1});
          Compare({rows, 264, 1608, backward, 2, same_x, false}, SpanPlan{width, 4});
        }
        Compare({rows, 2560, 520, backward, 2, same_x, true});
      }
    }
  }
}

// Only the splits decide in which order products are added.
TEST_F(SpanProductTest, WidthsKeepTheBits) {
  for (const bool backward : {false, true}) {
    for (const int splits : {1, 4}) {
      const Shape s{100, 1288, 1032, backward, 1, false, true};
      const Numbers n(s, 5);
      const std::vector<float> want = Product(s, n, SpanPlan{64, splits});
      for (const int width : kWidths) {
        const SpanPlan plan{width, splits};
        EXPECT_TRUE(SameBits(Product(s, n, plan), want)) << What(s, plan);
      }
    }
  }
}

TEST_F(SpanProductTest, TwoProductsOfOneLaunch) {
  for (const int64_t rows : {16, 128}) {
    for (const SpanPlan plan : {SpanPlan{64, 1}, SpanPlan{160, 1}, SpanPlan{192, 2}, SpanPlan{128, 8}}) {
      Shape a{rows, 640, 1416}, b = a;
      b.wide = false;
      const Numbers na(a, 1);
      Numbers nb(b, 2);
      nb.x[0] = na.x[0];
      Placed one(a, na), other(b, nb);
      other.product.term[0].x = one.product.term[0].x;
      const SpanProduct both[] = {one.product, other.product};
      EXPECT_EQ(SpanProducts(both, plan, kGpu, nullptr), cudaSuccess);
      EXPECT_TRUE(SameBits(one.Result(), Product(a, na, plan))) << What(a, plan);
      EXPECT_TRUE(SameBits(other.Result(), Product(b, nb, plan))) << What(b, plan);
    }
  }
}

// More tiles than multiprocessors: blocks take several, and the rings go on from one to the next.
TEST_F(SpanProductTest, ManyTiles) {
  Compare({128, 136, 30008});
  Compare({16, 1032, 20000});
  Compare({33, 30008, 136, true});
  for (const int width : kWidths) {
    Compare({65, 200, 12000, false, 2, false, false}, SpanPlan{width, 1});
    Compare({16, 27000, 200, true}, SpanPlan{width, 1});
  }
}

TEST_F(SpanProductTest, ARowDependsOnItselfAlone) {
  for (const Shape& s : {Shape{128, 1160, 2000}, Shape{128, 1160, 2000, true}, Shape{128, 4096, 168, false, 2, true}}) {
    const Numbers n(s, 3);
    const std::vector<float> all = Product(s, n);
    for (const int64_t rows : {9, 17, 64, 65, 100}) {
      Shape some = s;
      some.rows = rows;
      Numbers first = n;
      for (int t = 0; t < s.terms; ++t) first.x[t].resize(rows * s.depth());
      EXPECT_TRUE(SameBits(Product(some, first), FirstRows(all, rows, s))) << What(some, {});
    }
    Numbers other = n;  // the last rows are NaN
    for (int t = 0; t < s.terms; ++t) std::fill(other.x[t].begin() + 100 * s.depth(), other.x[t].end(), Bits{0x7fff});
    EXPECT_TRUE(SameBits(FirstRows(Product(s, other), 100, s), FirstRows(all, 100, s))) << What(s, {});
  }
}

// Products that read what the ones before them wrote, as a step enqueues them: eager with a pause behind each, then
// from a graph, many times, where they overlap.
TEST_F(SpanProductTest, AChainEagerAndRecorded) {
  constexpr int64_t kRows = 128, kNarrow = 640, kWide = 2568;
  constexpr int kLinks = 24;
  DeviceArray<Bits> up(Random(1).Bf16s(kNarrow * kWide, 1.0f / std::sqrt(static_cast<float>(kNarrow))));
  DeviceArray<Bits> down(Random(2).Bf16s(kNarrow * kWide, 1.0f / std::sqrt(static_cast<float>(kWide))));
  const std::vector<Bits> start = Random(3).Bf16s(kRows * kNarrow);
  DeviceArray<Bits> x(start);
  DeviceArray<Bits> y(kRows * kWide);
  const auto enqueue = [&](cudaStream_t stream, bool pause) {
    for (int i = 0; i < kLinks; ++i) {
      const bool back = i / 2 % 2 == 1;
      SpanProduct p;
      p.rows = kRows;
      p.backward = back;
      const bool rises = i % 2 == 0;  // from x to y
      p.in = rises != back ? kNarrow : kWide;
      p.out = rises != back ? kWide : kNarrow;
      p.term[0] = {rises ? x.get() : y.get(), rises ? up.get() : down.get()};
      p.y = rises ? y.get() : x.get();
      const SpanPlan plan = i % 3 == 0 ? SpanPlan{128, 4} : PlanSpan(SpanSizeOf({&p, 1}), kGpu);
      ASSERT_EQ(SpanProducts({&p, 1}, plan, kGpu, stream), cudaSuccess);
      if (pause) REFOCUS_CUDA(cudaStreamSynchronize(stream));
    }
  };
  const auto reset = [&] {
    cudaMemcpy(x.get(), start.data(), start.size() * sizeof(Bits), cudaMemcpyHostToDevice);
    cudaDeviceSynchronize();
  };
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  REFOCUS_CUDA(cudaStreamCreate(&stream));
  enqueue(stream, true);
  const std::vector<Bits> want = x.Download();
  for (const Bits bits : want) ASSERT_FALSE(std::isnan(FromBf16(bits)));
  reset();
  enqueue(stream, false);
  EXPECT_TRUE(SameBits(x.Download(), want)) << "eager, overlapping";
  REFOCUS_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(stream, false);
  REFOCUS_CUDA(cudaStreamEndCapture(stream, &graph));
  REFOCUS_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (int run = 0; run < 50; ++run) {
    reset();
    REFOCUS_CUDA(cudaGraphLaunch(replay, stream));
    ASSERT_TRUE(SameBits(x.Download(), want)) << "replay " << run;
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// Of matrices whose rows lie apart, with NaN between them: the bits of dense ones.
TEST_F(SpanProductTest, PartsOfWiderMatrices) {
  for (const bool backward : {false, true}) {
    Shape s;
    s.rows = 65;
    s.in = 200;
    s.out = 136;
    s.terms = 2;
    s.backward = backward;
    s.wide = true;
    const Numbers dense(s, 9);
    Numbers apart = dense;
    const int64_t stride = s.in + 24;
    for (std::vector<Bits>& m : apart.w) {
      std::vector<Bits> wide(s.out * stride, Bits{0x7fff});
      for (int64_t row = 0; row < s.out; ++row) {
        std::copy_n(m.begin() + row * s.in, s.in, wide.begin() + row * stride);
      }
      m = wide;
    }
    Placed placed(s, apart);
    placed.product.stride = stride;
    ASSERT_EQ(SpanProducts({&placed.product, 1}, kGpu, nullptr), cudaSuccess);
    EXPECT_TRUE(SameBits(placed.Result(), Product(s, dense))) << (backward ? "backward" : "forward");
  }
}

TEST_F(SpanProductTest, RefusesWhatDoesNotFit) {
  const std::vector<Bits> ones(8192, ToBf16(1.0f));
  DeviceArray<Bits> x(ones), shifted(ones, 1);
  DeviceArray<float> y(16 * 64);
  SpanProduct good;
  good.rows = 16;
  good.in = good.out = 64;
  good.term[0] = good.term[1] = {x.get(), x.get()};
  good.wide = true;
  good.y = y.get();
  const auto refused = [&](const auto& change) {
    SpanProduct bad = good;
    change(bad);
    EXPECT_EQ(SpanProducts({&bad, 1}, kGpu, nullptr), cudaErrorInvalidValue);
  };
  refused([&](SpanProduct& p) { p.term[0].w = shifted.get(); });
  refused([&](SpanProduct& p) { p.term[0].x = shifted.get(); });
  refused([](SpanProduct& p) { p.in = 60; });
  refused([](SpanProduct& p) { p.out = 0; });
  refused([](SpanProduct& p) { p.rows = kMostSpanRows + 1; });
  refused([](SpanProduct& p) { p.rows = -1; });
  refused([](SpanProduct& p) { p.terms = 3; });
  refused([](SpanProduct& p) { p.stride = 56; });
  refused([](SpanProduct& p) { p.stride = 68; });
  std::array both = {good, good};
  both[0].terms = both[1].terms = 1;
  both[1].out = 32;
  EXPECT_EQ(SpanProducts(both, kGpu, nullptr), cudaErrorInvalidValue);
  both[1] = both[0];
  both[1].term[0].x = y.get();
  EXPECT_EQ(SpanProducts(both, kGpu, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SpanProducts({&good, 1}, SpanPlan{64, 16}, kGpu, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SpanProducts({&good, 1}, SpanPlan{96, 1}, kGpu, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(SpanProducts({&good, 1}, SpanPlan{64, 3}, kGpu, nullptr), cudaErrorInvalidValue);
  SpanProduct none = good;
  none.rows = 0;
  EXPECT_EQ(SpanProducts({&none, 1}, kGpu, nullptr), cudaSuccess);
  for (const float value : y.Download()) EXPECT_TRUE(std::isnan(value));
  EXPECT_EQ(SpanProducts({&good, 1}, kGpu, nullptr), cudaSuccess);
  EXPECT_EQ(y.Download()[16 * 64 - 1], 64.0f);
}

}  // namespace
}  // namespace refocus::kernels
