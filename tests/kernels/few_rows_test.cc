#include "kernels/few_rows.h"

#include <memory>

#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using FewRowsTest = RowwiseTest;
using Kind = FewRowsOutput::Kind;

// Matrices of one launch, with their fp64 products.
struct Matrix {
  Kind kind = Kind::kFloat;
  int64_t out = 0;
  bool second = false;
  bool bias = false;
};

struct Problem {
  std::vector<Bits> x;
  std::vector<std::vector<Bits>> w, second, bias;

  Problem(int64_t rows, int64_t in, const std::vector<Matrix>& matrices) {
    Random random(static_cast<uint64_t>(rows * 7919 + in));
    const float scale = 1.0f / std::sqrt(static_cast<float>(in));
    x = random.Bf16s(rows * in);
    for (const Matrix& m : matrices) {
      w.push_back(random.Bf16s(m.out * in, scale));
      second.push_back(m.second || m.kind == Kind::kGated ? random.Bf16s(m.out * in, scale) : std::vector<Bits>());
      bias.push_back(m.bias ? random.Bf16s(m.out) : std::vector<Bits>());
    }
  }
};

double Dot(const std::vector<Bits>& x, int64_t row, const std::vector<Bits>& w, int64_t column, int64_t in) {
  double sum = 0.0;
  for (int64_t k = 0; k < in; ++k) sum += Wide(x[row * in + k]) * Wide(w[column * in + k]);
  return sum;
}

std::vector<double> Expected(const Problem& p, size_t i, const Matrix& m, int64_t rows, int64_t in) {
  std::vector<double> y;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < m.out; ++column) {
      double value = Dot(p.x, row, p.w[i], column, in);
      if (m.kind == Kind::kGated) {
        value = value / (1.0 + std::exp(-value)) * Dot(p.x, row, p.second[i], column, in);
      } else {
        if (m.second) value += Dot(p.x, row, p.second[i], column, in);
        if (m.bias) value += Wide(p.bias[i][column]);
      }
      y.push_back(value);
    }
  }
  return y;
}

// What the launch wrote, [matrix][rows * out]; bf16 outputs widened.
std::vector<std::vector<float>> Products(const Problem& p, const std::vector<Matrix>& matrices, int64_t rows, int64_t in,
                                    int64_t first_row = 0) {
  std::vector<Bits> x(p.x.begin() + first_row * in, p.x.begin() + (first_row + rows) * in);
  DeviceArray<Bits> device_x(x);
  std::vector<std::unique_ptr<DeviceArray<Bits>>> held;
  std::vector<std::unique_ptr<DeviceArray<float>>> floats;
  std::vector<std::unique_ptr<DeviceArray<Bits>>> halves;
  FewRowsParams params;
  params.rows = rows;
  params.in = in;
  params.x = device_x.get();
  const auto upload = [&](const std::vector<Bits>& values) -> const void* {
    if (values.empty()) return nullptr;
    held.push_back(std::make_unique<DeviceArray<Bits>>(values));
    return held.back()->get();
  };
  for (size_t i = 0; i < matrices.size(); ++i) {
    FewRowsOutput& o = params.output[params.outputs++];
    floats.push_back(std::make_unique<DeviceArray<float>>(rows * matrices[i].out));
    halves.push_back(std::make_unique<DeviceArray<Bits>>(rows * matrices[i].out));
    o.kind = matrices[i].kind;
    o.out = matrices[i].out;
    o.w = upload(p.w[i]);
    o.second = upload(p.second[i]);
    o.bias = upload(p.bias[i]);
    o.y = o.kind == Kind::kFloat ? static_cast<void*>(floats[i]->get()) : halves[i]->get();
  }
  EXPECT_EQ(FewRows(params, nullptr), cudaSuccess);
  std::vector<std::vector<float>> got;
  for (size_t i = 0; i < matrices.size(); ++i) {
    got.push_back(floats[i]->Download());
    const std::vector<Bits> rounded = halves[i]->Download();
    if (matrices[i].kind == Kind::kFloat) continue;
    got[i].clear();
    for (const Bits bits : rounded) got[i].push_back(FromBf16(bits));
  }
  return got;
}

void Compare(int64_t rows, int64_t in, const std::vector<Matrix>& matrices) {
  const Problem p(rows, in, matrices);
  const std::vector<std::vector<float>> got = Products(p, matrices, rows, in);
  for (size_t i = 0; i < matrices.size(); ++i) {
    // Of gated outputs three roundings count, and the sigmoid's slope.
    const double relative = matrices[i].kind == Kind::kFloat ? 2e-6 : matrices[i].kind == Kind::kBf16 ? kBf16 : 8 * kBf16;
    ExpectNear("rows " + std::to_string(rows) + " in " + std::to_string(in) + " matrix " + std::to_string(i) + " out " +
                   std::to_string(matrices[i].out),
               got[i], Expected(p, i, matrices[i], rows, in), relative, matrices[i].kind == Kind::kGated ? 2e-3 : 1e-5);
  }
}

TEST_F(FewRowsTest, EveryNumberOfRowsAndOddSizes) {
  for (int64_t rows = 0; rows <= kFewRows; ++rows) {
    for (const int64_t in : {8, 200, 576, 1032, 2560}) {
      Compare(rows, in, {{Kind::kFloat, 17}, {Kind::kBf16, 1}, {Kind::kGated, 40}});
    }
  }
}

TEST_F(FewRowsTest, SecondMatricesAndBiases) {
  for (const int64_t rows : {1, 3, 8}) {
    Compare(rows, 1536, {{Kind::kFloat, 96, true, true}, {Kind::kBf16, 33, true, false}, {Kind::kBf16, 16, false, true}});
  }
}

TEST_F(FewRowsTest, LongRowsAndManyOutputs) {
  Compare(1, 9728, {{Kind::kBf16, 70}});
  Compare(5, 64, {{Kind::kFloat, 3000}, {Kind::kGated, 1111}});
}

TEST_F(FewRowsTest, ARowDoesNotDependOnItsNeighbours) {
  const std::vector<Matrix> matrices = {{Kind::kFloat, 50, true}, {Kind::kGated, 24}};
  const Problem p(kFewRows, 1160, matrices);
  const auto all = Products(p, matrices, kFewRows, 1160);
  for (int64_t row = 0; row < kFewRows; ++row) {
    const auto alone = Products(p, matrices, 1, 1160, row);
    for (size_t i = 0; i < matrices.size(); ++i) {
      const auto begin = all[i].begin() + row * matrices[i].out;
      EXPECT_TRUE(SameBits(alone[i], {begin, begin + matrices[i].out})) << row;
    }
  }
}

TEST_F(FewRowsTest, RefusesWhatDoesNotFit) {
  DeviceArray<Bits> x(4096), w(4096, 1);
  DeviceArray<float> y(64);
  FewRowsParams params;
  params.rows = 1;
  params.in = 64;
  params.x = x.get();
  params.outputs = 1;
  params.output[0].out = 16;
  params.output[0].w = w.get();  // not aligned
  params.output[0].y = y.get();
  EXPECT_EQ(FewRows(params, nullptr), cudaErrorInvalidValue);
  params.output[0].w = x.get();
  params.in = 60;
  EXPECT_EQ(FewRows(params, nullptr), cudaErrorInvalidValue);
  params.in = 64;
  params.rows = kFewRows + 1;
  EXPECT_EQ(FewRows(params, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace refocus::kernels
