#include "kernels/few_rows.h"

#include <memory>
#include <span>

#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using FewRowsTest = RowwiseTest;
using Kind = FewRowsProduct::Kind;

struct Shape {
  int64_t rows = 0, in = 0;
  Kind kind = Kind::kFloat;
  int64_t out = 0;
  bool second = false;
  bool bias = false;
  bool add = false;
  float scale = 1.0f;
};

// A product's numbers.
struct Numbers {
  std::vector<Bits> x, w, second, bias;
  std::vector<float> before;  // y, where it is added to

  Numbers(const Shape& s, uint64_t seed) {
    Random random(seed + static_cast<uint64_t>(s.rows * 7919 + s.in));
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.in));
    x = random.Bf16s(s.rows * s.in);
    w = random.Bf16s(s.out * s.in, scale);
    if (s.second || s.kind == Kind::kGated) second = random.Bf16s(s.out * s.in, scale);
    if (s.bias) bias = random.Bf16s(s.out);
    if (s.add) before = random.Floats(s.rows * s.out);
  }
};

double Dot(const std::vector<Bits>& x, int64_t row, const std::vector<Bits>& w, int64_t column, int64_t in) {
  double sum = 0.0;
  for (int64_t k = 0; k < in; ++k) sum += Wide(x[row * in + k]) * Wide(w[column * in + k]);
  return sum;
}

std::vector<double> Expected(const Shape& s, const Numbers& n) {
  std::vector<double> y;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t column = 0; column < s.out; ++column) {
      double value = Dot(n.x, row, n.w, column, s.in);
      if (s.kind == Kind::kGated) {
        value = value / (1.0 + std::exp(-value)) * Dot(n.x, row, n.second, column, s.in);
      } else {
        if (s.second) value += Dot(n.x, row, n.second, column, s.in);
        if (s.bias) value += Wide(n.bias[column]);
      }
      if (s.kind == Kind::kFloat) value *= s.scale;
      if (s.add) value += n.before[row * s.out + column];
      y.push_back(value);
    }
  }
  return y;
}

// A product in device memory of its own.
class Placed {
 public:
  Placed(const Shape& s, const Numbers& n)
      : x_(n.x), w_(n.w), second_(n.second), bias_(n.bias), wide_(s.rows * s.out), half_(s.rows * s.out) {
    product.kind = s.kind;
    product.rows = s.rows;
    product.in = s.in;
    product.out = s.out;
    product.x = x_.get();
    product.w = w_.get();
    product.second = n.second.empty() ? nullptr : second_.get();
    product.bias = n.bias.empty() ? nullptr : bias_.get();
    product.scale = s.scale;
    product.y = s.kind == Kind::kFloat ? static_cast<void*>(wide_.get()) : half_.get();
    if (!s.add) return;
    product.add = wide_.get();
    cudaMemcpy(wide_.get(), n.before.data(), n.before.size() * sizeof(float), cudaMemcpyHostToDevice);
  }

  // bf16 outputs widened.
  std::vector<float> Result() {
    std::vector<float> wide = wide_.Download();
    const std::vector<Bits> half = half_.Download();
    if (product.kind == Kind::kFloat) return wide;
    wide.clear();
    for (const Bits bits : half) wide.push_back(FromBf16(bits));
    return wide;
  }

  FewRowsProduct product;

 private:
  DeviceArray<Bits> x_, w_, second_, bias_;
  DeviceArray<float> wide_;
  DeviceArray<Bits> half_;
};

// What one call computes.
std::vector<std::vector<float>> Products(const std::vector<Shape>& shapes, const std::vector<Numbers>& numbers) {
  std::vector<std::unique_ptr<Placed>> placed;
  std::vector<FewRowsProduct> products;
  for (size_t i = 0; i < shapes.size(); ++i) {
    placed.push_back(std::make_unique<Placed>(shapes[i], numbers[i]));
    products.push_back(placed.back()->product);
  }
  EXPECT_EQ(FewRows(products, nullptr), cudaSuccess);
  std::vector<std::vector<float>> got;
  for (const auto& one : placed) got.push_back(one->Result());
  return got;
}

void Compare(const std::vector<Shape>& shapes) {
  std::vector<Numbers> numbers;
  for (const Shape& s : shapes) numbers.emplace_back(s, numbers.size());
  const std::vector<std::vector<float>> got = Products(shapes, numbers);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Shape& s = shapes[i];
    // Of gated outputs three roundings count, and the sigmoid's slope.
    const double relative = s.kind == Kind::kFloat ? 2e-6 : s.kind == Kind::kBf16 ? kBf16 : 8 * kBf16;
    ExpectNear("product " + std::to_string(i) + ": rows " + std::to_string(s.rows) + " in " + std::to_string(s.in) +
                   " out " + std::to_string(s.out),
               got[i], Expected(s, numbers[i]), relative, s.kind == Kind::kGated ? 2e-3 : 1e-5);
    if (shapes.size() == 1) continue;
    EXPECT_TRUE(SameBits(got[i], Products({s}, {numbers[i]})[0])) << "not the bits that it has alone: " << i;
  }
}

TEST_F(FewRowsTest, EveryNumberOfRowsAndOddSizes) {
  for (int64_t rows = 0; rows <= kFewRows; ++rows) {
    for (const int64_t in : {8, 200, 576, 1032, 2560}) {
      Compare({{rows, in, Kind::kFloat, 17}, {rows, in, Kind::kBf16, 1}, {rows, in, Kind::kGated, 40}});
    }
  }
}

TEST_F(FewRowsTest, SecondMatricesAndBiases) {
  for (const int64_t rows : {1, 3, 8}) {
    Compare({{rows, 1536, Kind::kFloat, 96, true, true},
             {rows, 1536, Kind::kBf16, 33, true, false},
             {rows, 1536, Kind::kBf16, 16, false, true}});
  }
}

TEST_F(FewRowsTest, LongRowsAndManyOutputs) {
  Compare({{1, 9728, Kind::kBf16, 70}});
  Compare({{5, 64, Kind::kFloat, 3000}, {5, 64, Kind::kGated, 1111}});
}

TEST_F(FewRowsTest, AddsScaled) {
  for (const int64_t rows : {1, 2, 8}) {
    Compare({{rows, 16, Kind::kFloat, 100, false, false, true, 2.5f},
             {rows, 2560, Kind::kFloat, 33, true, true, true, -0.125f},
             {rows, 520, Kind::kFloat, 16, false, true, false, 3.0f}});
  }
}

// Of matrices whose rows lie apart, with NaN between them: the bits of dense ones.
TEST_F(FewRowsTest, PartsOfWiderMatrices) {
  const Bits nan = 0x7fff;
  for (const Shape& s :
       {Shape{1, 8, Kind::kFloat, 17}, Shape{3, 1216, Kind::kGated, 40}, Shape{8, 2560, Kind::kBf16, 33}}) {
    const Numbers dense(s, 3);
    Numbers apart = dense;
    const int64_t stride = s.in + 24;
    for (std::vector<Bits>* m : {&apart.w, &apart.second}) {
      if (m->empty()) continue;
      std::vector<Bits> wide(s.out * stride, nan);
      for (int64_t row = 0; row < s.out; ++row) {
        std::copy_n(m->begin() + row * s.in, s.in, wide.begin() + row * stride);
      }
      *m = wide;
    }
    Placed placed(s, apart);
    placed.product.stride = stride;
    ASSERT_EQ(FewRows({&placed.product, 1}, nullptr), cudaSuccess);
    EXPECT_TRUE(SameBits(placed.Result(), Products({s}, {dense})[0])) << "rows " << s.rows << " in " << s.in;
    placed.product.stride = s.in + 4;
    EXPECT_EQ(FewRows({&placed.product, 1}, nullptr), cudaErrorInvalidValue);
  }
}

// More than a launch holds, no two alike, empty ones between; each has the bits that it has alone.
TEST_F(FewRowsTest, ManyProductsOfTheirOwn) {
  for (const int64_t count : {3, 31, 32, 33, 65, 70}) {
    std::vector<Shape> shapes;
    for (int64_t i = 0; i < count; ++i) {
      Shape s{i * 5 % (kFewRows + 1), 8 * (1 + i * 7 % 41)};
      s.kind = i % 7 == 3 ? Kind::kGated : i % 3 == 1 ? Kind::kBf16 : Kind::kFloat;
      s.out = i % 11 == 5 ? 0 : 1 + i * 13 % 90;
      s.second = s.kind == Kind::kGated || i % 5 == 0;
      s.bias = s.kind != Kind::kGated && i % 4 == 0;
      s.add = s.kind == Kind::kFloat && i % 2 == 0;
      s.scale = s.kind == Kind::kFloat ? 1.0f + 0.25f * static_cast<float>(i % 6) : 1.0f;
      shapes.push_back(s);
    }
    Compare(shapes);
  }
}

TEST_F(FewRowsTest, ARowDoesNotDependOnItsNeighbours) {
  for (const Shape& s : {Shape{kFewRows, 1160, Kind::kFloat, 50, true}, Shape{kFewRows, 1160, Kind::kGated, 24}}) {
    const Numbers n(s, 3);
    const std::vector<float> all = Products({s}, {n})[0];
    for (int64_t row = 0; row < kFewRows; ++row) {
      Shape one = s;
      one.rows = 1;
      Numbers alone = n;
      alone.x = {n.x.begin() + row * s.in, n.x.begin() + (row + 1) * s.in};
      EXPECT_TRUE(SameBits(Products({one}, {alone})[0], {all.begin() + row * s.out, all.begin() + (row + 1) * s.out}))
          << row;
    }
  }
}

// Ranges of one batch's rows, each with a low-rank delta of its own, as a decode pass enqueues them: thin products, and
// behind them at once what reads those. Rows of no range keep their bits; the same once more from a graph, many times.
class Batch {
 public:
  static constexpr int64_t kRows = 60, kIn = 1032, kRank = 24, kOut = 600;

  Batch() : x_(Random(1).Bf16s(kRows * kIn)), y_(kRows * kOut), thin_(kRows * kRank) {
    const auto range = [&](int64_t first, int64_t rows) {
      Random random(static_cast<uint64_t>(100 + first));
      Range r{first, rows, random.Bf16s(kRank * kIn, 0.03f), random.Bf16s(kOut * kRank, 0.2f), {}, {}};
      r.device_a = std::make_unique<DeviceArray<Bits>>(r.a);
      r.device_b = std::make_unique<DeviceArray<Bits>>(r.b);
      ranges_.push_back(std::move(r));
    };
    range(0, 1);
    range(1, 0);
    range(1, 8);
    range(11, 2);
    range(13, 7);
    for (int64_t first = 20; first + 2 < kRows; ++first) range(first, 1);
  }

  void Reset() {
    const std::vector<float> before = Before();
    cudaMemcpy(y_.get(), before.data(), before.size() * sizeof(float), cudaMemcpyHostToDevice);
    cudaMemset(thin_.get(), 0xff, kRows * kRank * sizeof(Bits));
  }

  void Enqueue(cudaStream_t stream) {
    std::vector<FewRowsProduct> inner, outer;
    for (const Range& r : ranges_) {
      FewRowsProduct p;
      p.kind = Kind::kBf16;
      p.rows = r.rows;
      p.in = kIn;
      p.out = kRank;
      p.x = x_.get() + r.first * kIn;
      p.w = r.device_a->get();
      p.y = thin_.get() + r.first * kRank;
      inner.push_back(p);
      p.kind = Kind::kFloat;
      p.in = kRank;
      p.out = kOut;
      p.x = p.y;
      p.w = r.device_b->get();
      p.y = y_.get() + r.first * kOut;
      p.add = static_cast<float*>(p.y);
      p.scale = 1.5f;
      outer.push_back(p);
    }
    EXPECT_EQ(FewRows(inner, stream), cudaSuccess);
    EXPECT_EQ(FewRows(outer, stream), cudaSuccess);
  }

  std::vector<float> Result() { return y_.Download(); }

  static std::vector<float> Before() { return Random(2).Floats(kRows * kOut); }

  // From the thin products that the kernel rounded.
  std::vector<double> Expected() {
    const std::vector<Bits> thin = thin_.Download();
    std::vector<double> y;
    for (const float value : Before()) y.push_back(value);
    for (const Range& r : ranges_) {
      for (int64_t row = r.first; row < r.first + r.rows; ++row) {
        for (int64_t column = 0; column < kOut; ++column) {
          y[row * kOut + column] += 1.5 * Dot(thin, row, r.b, column, kRank);
        }
      }
    }
    return y;
  }

  void ExpectThinProducts() {
    const std::vector<Bits> thin = thin_.Download(), x = Random(1).Bf16s(kRows * kIn);
    for (const Range& r : ranges_) {
      for (int64_t row = r.first; row < r.first + r.rows; ++row) {
        for (int64_t k = 0; k < kRank; ++k) {
          EXPECT_NEAR(Wide(thin[row * kRank + k]), Dot(x, row, r.a, k, kIn), 0.02) << row << " " << k;
        }
      }
    }
  }

 private:
  struct Range {
    int64_t first, rows;
    std::vector<Bits> a, b;
    std::unique_ptr<DeviceArray<Bits>> device_a, device_b;
  };
  DeviceArray<Bits> x_;
  DeviceArray<float> y_;
  DeviceArray<Bits> thin_;
  std::vector<Range> ranges_;
};

TEST_F(FewRowsTest, RangesOfOneBatchEagerAndRecorded) {
  Batch batch;
  batch.Reset();
  batch.Enqueue(nullptr);
  const std::vector<float> eager = batch.Result(), before = Batch::Before();
  ExpectNear("ranges of a batch", eager, batch.Expected(), 2e-6, 1e-5);
  batch.ExpectThinProducts();
  for (const int64_t row : {9, 10, 58, 59}) {
    const auto at = row * Batch::kOut;
    EXPECT_TRUE(SameBits<float>({eager.begin() + at, eager.begin() + at + Batch::kOut},
                                {before.begin() + at, before.begin() + at + Batch::kOut}))
        << "row " << row << " is nobody's";
  }
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  REFOCUS_CUDA(cudaStreamCreate(&stream));
  REFOCUS_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  batch.Enqueue(stream);
  REFOCUS_CUDA(cudaStreamEndCapture(stream, &graph));
  REFOCUS_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (int run = 0; run < 50; ++run) {
    batch.Reset();
    REFOCUS_CUDA(cudaDeviceSynchronize());
    REFOCUS_CUDA(cudaGraphLaunch(replay, stream));
    ASSERT_TRUE(SameBits(batch.Result(), eager)) << "replay " << run;
  }
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(FewRowsTest, RefusesWhatDoesNotFit) {
  const std::vector<Bits> ones(4096, ToBf16(1.0f));
  DeviceArray<Bits> x(ones), w(ones, 1);
  DeviceArray<float> y(64);
  FewRowsProduct good;
  good.rows = 1;
  good.in = 64;
  good.x = x.get();
  good.out = 16;
  good.w = x.get();
  good.y = y.get();
  const auto refused = [&](const auto& change) {
    FewRowsProduct bad = good;
    change(bad);
    const FewRowsProduct both[] = {good, bad};  // the good one is not launched either
    EXPECT_EQ(FewRows(both, nullptr), cudaErrorInvalidValue);
  };
  refused([&](FewRowsProduct& p) { p.w = w.get(); });  // not aligned
  refused([](FewRowsProduct& p) { p.in = 60; });
  refused([](FewRowsProduct& p) { p.rows = kFewRows + 1; });
  refused([](FewRowsProduct& p) { p.rows = -1; });
  for (const float value : y.Download()) EXPECT_TRUE(std::isnan(value));
  EXPECT_EQ(FewRows({}, nullptr), cudaSuccess);
  EXPECT_EQ(FewRows({&good, 1}, nullptr), cudaSuccess);
  EXPECT_EQ(y.Download()[15], 64.0f);
}

}  // namespace
}  // namespace refocus::kernels
