#include "kernels/rowwise.h"
#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using SwigluTest = RowwiseTest;

struct Inputs {
  std::vector<Bits> dact, gate, up;
};

// Gates over the whole range in which the sigmoid changes, and far beyond.
Inputs MakeInputs(int64_t count) {
  Random random(static_cast<uint64_t>(count) + 7);
  Inputs in{random.Bf16s(count), random.Bf16s(count, 4.0f), random.Bf16s(count)};
  const float special[] = {0.0f, -0.0f, 1e4f, -1e4f, 88.0f, -88.0f, -87.5f, 30.0f, -30.0f, -1.28f};
  for (int64_t i = 0; i < count && i < 10; ++i) in.gate[count - 1 - i] = ToBf16(special[i]);
  return in;
}

double Sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

TEST_F(SwigluTest, ForwardAndGradient) {
  for (const int64_t count : {0, 1, 7, 8, 9, 1000, 2059, 9728, (1 << 20) + 5}) {
    const Inputs in = MakeInputs(count);
    std::vector<double> act, dgate, dup;
    for (int64_t i = 0; i < count; ++i) {
      const double d = Wide(in.dact[i]), g = Wide(in.gate[i]), u = Wide(in.up[i]), s = Sigmoid(g);
      act.push_back(g * s * u);
      dgate.push_back(d * u * s * (1.0 + g * (1.0 - s)));
      dup.push_back(d * g * s);
    }
    for (const int64_t shift : {0, 1}) {
      const std::string name = " count " + std::to_string(count) + " shift " + std::to_string(shift);
      DeviceArray<Bits> d(in.dact, shift), g(in.gate, shift), u(in.up, shift);
      DeviceArray<Bits> a(count, shift), dg(count, shift), du(count, shift);
      REFOCUS_CUDA(SiluMul(g.get(), u.get(), count, a.get(), nullptr));
      ExpectNear("silu mul" + name, a.Download(), act, kBf16, 1e-30);
      REFOCUS_CUDA(SiluMulGrad(d.get(), g.get(), u.get(), count, dg.get(), du.get(), nullptr));
      ExpectNear("silu mul dgate" + name, dg.Download(), dgate, kBf16, 1e-5);
      ExpectNear("silu mul dup" + name, du.Download(), dup, kBf16, 1e-30);
    }
  }
}

TEST_F(SwigluTest, GradientMayOverwriteItsInputs) {
  for (const int64_t count : {5, 4099}) {
    const Inputs in = MakeInputs(count);
    DeviceArray<Bits> d(in.dact), g(in.gate), u(in.up), dg(count), du(count);
    REFOCUS_CUDA(SiluMulGrad(d.get(), g.get(), u.get(), count, dg.get(), du.get(), nullptr));
    for (const bool over_gate : {true, false}) {
      DeviceArray<Bits> d2(in.dact), g2(in.gate), u2(in.up);
      Bits* to = over_gate ? g2.get() : d2.get();
      REFOCUS_CUDA(SiluMulGrad(d2.get(), g2.get(), u2.get(), count, to, u2.get(), nullptr));
      EXPECT_TRUE(SameBits(over_gate ? g2.Download() : d2.Download(), dg.Download()));
      EXPECT_TRUE(SameBits(u2.Download(), du.Download()));
    }
  }
}

TEST_F(SwigluTest, NanStaysNan) {
  std::vector<Bits> gate(9, ToBf16(1.0f)), up(9, ToBf16(1.0f));
  gate[2] = up[8] = ToBf16(std::nanf(""));
  DeviceArray<Bits> g(gate), u(up), a(9);
  REFOCUS_CUDA(SiluMul(g.get(), u.get(), 9, a.get(), nullptr));
  const std::vector<Bits> got = a.Download();
  for (int i = 0; i < 9; ++i) EXPECT_EQ(std::isnan(FromBf16(got[i])), i == 2 || i == 8) << i;
}

TEST_F(SwigluTest, RowDot) {
  Random random(8);
  for (const int head_dim : {1, 4, 7, 8, 16, 20, 40, 64, 80, 96, 128, 256, 300, 512}) {
    for (const int64_t rows : {0, 1, 5, 1003}) {
      for (const int64_t shift : {0, 1}) {
        const std::vector<Bits> dout = random.Bf16s(rows * head_dim);
        const std::vector<float> out = random.Floats(rows * head_dim);
        std::vector<double> want;
        for (int64_t row = 0; row < rows; ++row) {
          double sum = 0.0;
          for (int i = 0; i < head_dim; ++i) sum += Wide(dout[row * head_dim + i]) * out[row * head_dim + i];
          want.push_back(sum);
        }
        DeviceArray<Bits> device_dout(dout, shift);
        DeviceArray<float> device_out(out), dot(rows);
        REFOCUS_CUDA(RowDot(device_dout.get(), device_out.get(), rows, head_dim, dot.get(), nullptr));
        ExpectNear("row dot " + std::to_string(head_dim) + " rows " + std::to_string(rows), dot.Download(), want, 1e-6,
                   1e-4);
      }
    }
  }
}

}  // namespace
}  // namespace refocus::kernels
