#include "kernels/rowwise.h"
#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using NormTest = RowwiseTest;

constexpr float kEps = 1e-6f;
// Vector and scalar paths, every number of chunks a thread can hold, and one row too long for registers.
constexpr int64_t kHidden[] = {1, 3, 4, 7, 40, 576, 1000, 1028, 2050, 2560, 4096, 4100, 8192, 12288, 16384, 16388};

double InverseRms(const float* x, int64_t hidden) {
  double squares = 0.0;
  for (int64_t i = 0; i < hidden; ++i) squares += static_cast<double>(x[i]) * x[i];
  return 1.0 / std::sqrt(squares / static_cast<double>(hidden) + kEps);
}

std::vector<double> NormReference(const std::vector<float>& x, const std::vector<Bits>& weight) {
  const int64_t hidden = static_cast<int64_t>(weight.size());
  std::vector<double> h;
  for (size_t row = 0; row < x.size(); row += weight.size()) {
    const double r = InverseRms(&x[row], hidden);
    for (int64_t i = 0; i < hidden; ++i) h.push_back(x[row + i] * r * Wide(weight[i]));
  }
  return h;
}

std::vector<double> GradReference(const std::vector<float>& x, const std::vector<Bits>& weight,
                                  const std::vector<Bits>& dh, const std::vector<float>& residual) {
  const int64_t hidden = static_cast<int64_t>(weight.size());
  std::vector<double> dx;
  for (size_t row = 0; row < x.size(); row += weight.size()) {
    const double r = InverseRms(&x[row], hidden);
    double mean = 0.0;
    for (int64_t i = 0; i < hidden; ++i) mean += Wide(dh[row + i]) * Wide(weight[i]) * x[row + i];
    mean /= static_cast<double>(hidden);
    for (int64_t i = 0; i < hidden; ++i) {
      const double g = Wide(dh[row + i]) * Wide(weight[i]);
      dx.push_back(r * (g - x[row + i] * r * r * mean) + (residual.empty() ? 0.0 : residual[row + i]));
    }
  }
  return dx;
}

TEST_F(NormTest, EmbedCopiesRowsAndSpreadsNoToken) {
  Random random(1);
  for (const int64_t hidden : {1, 7, 40, 576, 2560, 9999}) {
    for (const int64_t shift : {0, 1}) {
      const std::vector<Bits> table = random.Bf16s(11 * hidden);
      const std::vector<int64_t> ids = {10, 0, 3, 3, -1};
      DeviceArray<Bits> device_table(table, shift);
      DeviceArray<int64_t> device_ids(ids);
      DeviceArray<float> x(5 * hidden);
      REFOCUS_CUDA(Embed(device_table.get(), device_ids.get(), 0, hidden, x.get(), nullptr));
      REFOCUS_CUDA(Embed(device_table.get(), device_ids.get(), 5, hidden, x.get(), nullptr));
      const std::vector<float> got = x.Download();
      for (int64_t row = 0; row < 5; ++row) {
        for (int64_t i = 0; i < hidden; ++i) {
          const float value = got[row * hidden + i];
          if (ids[row] < 0) {
            ASSERT_TRUE(std::isnan(value));
          } else {
            ASSERT_EQ(value, FromBf16(table[ids[row] * hidden + i])) << "row " << row << " element " << i;
          }
        }
      }
    }
  }
}

TEST_F(NormTest, NormAddsAndNormalizes) {
  Random random(2);
  for (const int64_t hidden : kHidden) {
    for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{5}}) {
      for (const bool with_y : {false, true}) {
        const std::vector<float> x = random.Floats(rows * hidden, 3.0f);
        const std::vector<Bits> y = random.Bf16s(rows * hidden), weight = random.Bf16s(hidden);
        std::vector<float> sum = x;
        for (size_t i = 0; with_y && i < sum.size(); ++i) sum[i] += FromBf16(y[i]);
        const std::vector<double> want = NormReference(sum, weight);
        DeviceArray<Bits> device_y(y), device_weight(weight);
        std::vector<Bits> first;
        for (const int mode : {0, 1, 2, 3}) {  // apart; sum is x; again; no sum
          if (mode == 3 && with_y) continue;
          DeviceArray<float> device_x(x), device_sum(rows * hidden);
          DeviceArray<Bits> h(rows * hidden);
          float* to = mode == 3 ? nullptr : mode == 1 ? device_x.get() : device_sum.get();
          REFOCUS_CUDA(Norm(
              {rows, hidden, kEps, device_x.get(), with_y ? device_y.get() : nullptr, device_weight.get(), to, h.get()},
              nullptr));
          const std::vector<Bits> got = h.Download();
          if (mode == 0) {
            ExpectNear("norm hidden " + std::to_string(hidden) + " rows " + std::to_string(rows), got, want, kBf16,
                       1e-6);
            first = got;
          }
          EXPECT_TRUE(SameBits(got, first)) << "mode " << mode << " hidden " << hidden;
          if (mode < 3) {
            EXPECT_TRUE(SameBits(mode == 1 ? device_x.Download() : device_sum.Download(), sum)) << "mode " << mode;
          }
          if (mode != 1) {
            EXPECT_TRUE(SameBits(device_x.Download(), x)) << "the input has changed";
          }
        }
      }
    }
  }
}

TEST_F(NormTest, UnalignedPointersTakeTheScalarPath) {
  Random random(3);
  const int64_t rows = 3, hidden = 576;
  const std::vector<float> x = random.Floats(rows * hidden);
  const std::vector<Bits> weight = random.Bf16s(hidden), dh = random.Bf16s(rows * hidden);
  DeviceArray<float> device_x(x, 1), dx(rows * hidden, 3);
  DeviceArray<Bits> device_weight(weight, 1), h(rows * hidden, 5), device_dh(dh, 3);
  REFOCUS_CUDA(Norm({rows, hidden, kEps, device_x.get(), nullptr, device_weight.get(), nullptr, h.get()}, nullptr));
  ExpectNear("norm unaligned", h.Download(), NormReference(x, weight), kBf16, 1e-6);
  REFOCUS_CUDA(NormGrad(
      {rows, hidden, kEps, device_x.get(), device_weight.get(), device_dh.get(), nullptr, dx.get(), nullptr}, nullptr));
  ExpectNear("norm grad unaligned", dx.Download(), GradReference(x, weight, dh, {}), 1e-5, 1e-5);
}

TEST_F(NormTest, ZeroAndNanRows) {
  const int64_t hidden = 40;
  std::vector<float> x(3 * hidden, 0.0f);
  for (int64_t i = 0; i < hidden; ++i) x[2 * hidden + i] = 1.0f;
  x[hidden + 7] = std::nanf("");
  DeviceArray<float> device_x(x);
  DeviceArray<Bits> weight(std::vector<Bits>(hidden, ToBf16(1.0f))), h(3 * hidden);
  REFOCUS_CUDA(Norm({3, hidden, kEps, device_x.get(), nullptr, weight.get(), nullptr, h.get()}, nullptr));
  const std::vector<Bits> got = h.Download();
  for (int64_t i = 0; i < hidden; ++i) {
    EXPECT_EQ(FromBf16(got[i]), 0.0f);
    EXPECT_TRUE(std::isnan(FromBf16(got[hidden + i])));
    EXPECT_EQ(FromBf16(got[2 * hidden + i]), 1.0f);
  }
}

// The formula itself against central differences of the norm in fp64; needs no device.
TEST(NormReferenceTest, GradientIsTheDifferenceQuotient) {
  Random random(4);
  const int64_t hidden = 12;
  const std::vector<Bits> weight = random.Bf16s(hidden), dh = random.Bf16s(hidden);
  std::vector<float> x = random.Floats(hidden);
  const std::vector<double> grad = GradReference(x, weight, dh, {});
  const auto loss = [&](int64_t changed, double step) {
    std::vector<double> moved(x.begin(), x.end());
    moved[changed] += step;
    double squares = 0.0, sum = 0.0;
    for (const double value : moved) squares += value * value;
    const double r = 1.0 / std::sqrt(squares / hidden + kEps);
    for (int64_t i = 0; i < hidden; ++i) sum += moved[i] * r * Wide(weight[i]) * Wide(dh[i]);
    return sum;
  };
  for (int64_t i = 0; i < hidden; ++i)
    EXPECT_NEAR(grad[i], (loss(i, 1e-5) - loss(i, -1e-5)) / 2e-5, 1e-7) << "element " << i;
}

TEST_F(NormTest, NormGradAddsTheResidual) {
  Random random(5);
  for (const int64_t hidden : kHidden) {
    for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{5}}) {
      const std::vector<float> x = random.Floats(rows * hidden, 2.0f), residual = random.Floats(rows * hidden);
      const std::vector<Bits> weight = random.Bf16s(hidden), dh = random.Bf16s(rows * hidden);
      DeviceArray<float> device_x(x);
      DeviceArray<Bits> device_weight(weight), device_dh(dh);
      for (const int mode : {0, 1, 2}) {  // no residual; apart; residual is dx
        DeviceArray<float> device_residual(residual), apart(rows * hidden);
        DeviceArray<Bits> dx_bf16(rows * hidden);
        float* dx = mode == 2 ? device_residual.get() : apart.get();
        REFOCUS_CUDA(NormGrad({rows, hidden, kEps, device_x.get(), device_weight.get(), device_dh.get(),
                               mode == 0 ? nullptr : device_residual.get(), dx, mode == 1 ? nullptr : dx_bf16.get()},
                              nullptr));
        const std::vector<float> got = mode == 2 ? device_residual.Download() : apart.Download();
        ExpectNear("norm grad hidden " + std::to_string(hidden) + " rows " + std::to_string(rows) + " mode " +
                       std::to_string(mode),
                   got, GradReference(x, weight, dh, mode == 0 ? std::vector<float>() : residual), 1e-5, 2e-5);
        if (mode == 1) continue;
        const std::vector<Bits> rounded = dx_bf16.Download();
        for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(rounded[i], ToBf16(got[i])) << "element " << i;
      }
    }
  }
}

}  // namespace
}  // namespace refocus::kernels
