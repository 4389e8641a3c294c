#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>

#include "base/kv_int8.h"
#include "kernels/rowwise.h"
#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using RotateTest = RowwiseTest;

constexpr float kEps = 1e-6f;
constexpr float kAttentionFactor = 1.25f;  // exact in fp32
constexpr int64_t kMaxPosition = int64_t{1} << 24;

struct Case {
  int64_t rows;
  int heads;
  int head_dim;
  bool norm;
  bool bias = false;  // and sine and cosine are stretched
};

// Vector and scalar paths, groups of 1 to 32 lanes with and without idle ones, one and many rows a block.
const Case kCases[] = {{0, 3, 64, true},    {1, 1, 2, true},      {5, 3, 6, true},      {7, 5, 8, true},
                       {5, 1, 10, false},   {9, 16, 16, true},    {300, 3, 40, true},   {3, 9, 64, false},
                       {300, 9, 64, false}, {5, 5, 80, true},     {2, 6, 96, true},     {1, 32, 128, true},
                       {33, 8, 128, true},  {700, 32, 128, true}, {515, 8, 128, false}, {257, 1, 128, true},
                       {300, 7, 256, true}, {1, 40, 256, true},   {3, 2, 258, true},    {4, 2, 512, true},
                       {9, 16, 16, true, true},    {300, 9, 64, false, true}, {33, 8, 128, true, true},
                       {5, 3, 6, true, true},      {7, 5, 10, false, true},   {257, 4, 128, false, true}};

std::string Name(const char* what, const Case& c) {
  return std::string(what) + " rows " + std::to_string(c.rows) + " heads " + std::to_string(c.heads) + " dim " +
         std::to_string(c.head_dim) + (c.norm ? " norm" : "") + (c.bias ? " bias" : "");
}

struct Inputs {
  std::vector<float> raw, dq, frequencies;
  std::vector<Bits> norm, value, bias;
  std::vector<int64_t> pos;
};

Inputs MakeInputs(const Case& c, uint64_t seed) {
  Random random(seed);
  const int64_t count = c.rows * c.heads * c.head_dim;
  Inputs in{random.Floats(count, 2.0f), random.Floats(count), {}, random.Bf16s(c.head_dim), random.Bf16s(count),
            random.Bf16s(c.heads * c.head_dim), {}};
  for (int i = 0; i < c.head_dim / 2; ++i)
    in.frequencies.push_back(static_cast<float>(std::pow(5e6, -2.0 * i / c.head_dim)));
  for (int64_t row = 0; row < c.rows; ++row)
    in.pos.push_back(row % 5 == 0 ? kMaxPosition - row : random.Below(kMaxPosition));
  if (c.rows > 1) in.pos[1] = 0;
  return in;
}

double Stretch(const Case& c) { return c.bias ? kAttentionFactor : 1.0; }

double Scale(const Case& c, const double* x) {
  if (!c.norm) return 1.0;
  double squares = 0.0;
  for (int i = 0; i < c.head_dim; ++i) squares += x[i] * x[i];
  return 1.0 / std::sqrt(squares / c.head_dim + kEps);
}

// One head at one position.
std::vector<double> Forward(const Inputs& in, const Case& c, int64_t position, const std::vector<double>& x) {
  const double r = Scale(c, x.data());
  std::vector<double> y, out(c.head_dim);
  for (int i = 0; i < c.head_dim; ++i) y.push_back(x[i] * r * (c.norm ? Wide(in.norm[i]) : 1.0));
  const int half = c.head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(in.frequencies[i]);
    const double cos = Stretch(c) * std::cos(angle), sin = Stretch(c) * std::sin(angle);
    out[i] = y[i] * cos - y[half + i] * sin;
    out[half + i] = y[half + i] * cos + y[i] * sin;
  }
  return out;
}

std::vector<double> Backward(const Inputs& in, const Case& c, int64_t position, const std::vector<double>& x,
                             const std::vector<double>& dq) {
  const int half = c.head_dim / 2;
  std::vector<double> g(c.head_dim);
  for (int i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(in.frequencies[i]);
    const double cos = Stretch(c) * std::cos(angle), sin = Stretch(c) * std::sin(angle);
    g[i] = dq[i] * cos + dq[half + i] * sin;
    g[half + i] = dq[half + i] * cos - dq[i] * sin;
  }
  if (!c.norm) return g;
  const double r = Scale(c, x.data());
  double mean = 0.0;
  for (int i = 0; i < c.head_dim; ++i) {
    g[i] *= Wide(in.norm[i]);
    mean += g[i] * x[i] / c.head_dim;
  }
  for (int i = 0; i < c.head_dim; ++i) g[i] = r * (g[i] - x[i] * r * r * mean);
  return g;
}

std::vector<double> Head(const std::vector<float>& all, int64_t head, int head_dim) {
  return std::vector<double>(all.begin() + head * head_dim, all.begin() + (head + 1) * head_dim);
}

// The head with its bias, as norm and rotation see it.
std::vector<double> Biased(const Inputs& in, const Case& c, int64_t head) {
  std::vector<double> x = Head(in.raw, head, c.head_dim);
  for (int i = 0; i < c.head_dim && c.bias; ++i) x[i] += Wide(in.bias[head % c.heads * c.head_dim + i]);
  return x;
}

std::vector<double> ForwardAll(const Inputs& in, const Case& c) {
  std::vector<double> out;
  for (int64_t head = 0; head < c.rows * c.heads; ++head) {
    const std::vector<double> one = Forward(in, c, in.pos[head / c.heads], Biased(in, c, head));
    out.insert(out.end(), one.begin(), one.end());
  }
  return out;
}

// Device copies of what every kernel reads.
struct Device {
  Device(const Inputs& in, const Case& c, int64_t shift)
      : raw(in.raw, shift),
        norm(in.norm, shift),
        bias(in.bias, shift),
        pos(in.pos),
        frequencies(in.frequencies),
        c(c) {}
  RotateParams Params(void* out) {
    return {c.rows,    c.heads,           c.head_dim, kEps, raw.get(), c.norm ? norm.get() : nullptr,
            pos.get(), frequencies.get(), out,        c.bias ? bias.get() : nullptr,
            static_cast<float>(Stretch(c))};
  }
  DeviceArray<float> raw;
  DeviceArray<Bits> norm, bias;
  DeviceArray<int64_t> pos;
  DeviceArray<float> frequencies;
  Case c;
};

TEST_F(RotateTest, NormAndRotation) {
  for (const Case& c : kCases) {
    const Inputs in = MakeInputs(c, 11);
    const std::vector<double> want = ForwardAll(in, c);
    for (const int64_t shift : {0, 1}) {
      Device device(in, c, shift);
      DeviceArray<Bits> out(c.rows * c.heads * c.head_dim);
      REFOCUS_CUDA(Rotate(device.Params(out.get()), nullptr));
      ExpectNear(Name("rotate", c), out.Download(), want, kBf16, 1e-5);
    }
  }
}

TEST_F(RotateTest, ARowDoesNotDependOnItsNeighbours) {
  const Case many{700, 32, 128, true}, one{1, 32, 128, true};
  const Inputs in = MakeInputs(many, 12);
  Device device(in, many, 0);
  const int64_t width = many.heads * many.head_dim;
  DeviceArray<Bits> all(many.rows * width), single(width);
  REFOCUS_CUDA(Rotate(device.Params(all.get()), nullptr));
  const std::vector<Bits> want = all.Download();
  for (const int64_t row : {0, 1, 431, 699}) {
    RotateParams params = device.Params(single.get());
    params.rows = one.rows;
    params.raw += row * width;
    params.pos += row;
    REFOCUS_CUDA(Rotate(params, nullptr));
    EXPECT_TRUE(
        SameBits(single.Download(), std::vector<Bits>(want.begin() + row * width, want.begin() + (row + 1) * width)))
        << "row " << row;
  }
}

// The formula itself against central differences in fp64; needs no device.
TEST(RotateReferenceTest, GradientIsTheDifferenceQuotient) {
  for (const bool norm : {false, true}) {
    const Case c{1, 1, 12, norm};
    const Inputs in = MakeInputs(c, 13);
    const std::vector<double> x = Head(in.raw, 0, c.head_dim), dq = Head(in.dq, 0, c.head_dim);
    const std::vector<double> grad = Backward(in, c, 12345, x, dq);
    for (int i = 0; i < c.head_dim; ++i) {
      double quotient = 0.0;
      for (const double step : {1e-5, -1e-5}) {
        std::vector<double> moved = x;
        moved[i] += step;
        const std::vector<double> out = Forward(in, c, 12345, moved);
        for (int j = 0; j < c.head_dim; ++j) quotient += out[j] * dq[j] / (2.0 * step);
      }
      EXPECT_NEAR(grad[i], quotient, 1e-7) << "element " << i;
    }
  }
}

TEST_F(RotateTest, Gradient) {
  for (const Case& c : kCases) {
    const Inputs in = MakeInputs(c, 14);
    std::vector<double> want;
    for (int64_t head = 0; head < c.rows * c.heads; ++head) {
      const std::vector<double> one =
          Backward(in, c, in.pos[head / c.heads], Biased(in, c, head), Head(in.dq, head, c.head_dim));
      want.insert(want.end(), one.begin(), one.end());
    }
    for (const int64_t shift : {0, 1}) {
      Device device(in, c, shift);
      DeviceArray<float> dq(in.dq);
      DeviceArray<Bits> draw(c.rows * c.heads * c.head_dim, shift);
      RotateGradParams params{device.Params(nullptr), dq.get(), draw.get()};
      if (!c.norm) params.forward.raw = nullptr;  // needed for the norm alone
      REFOCUS_CUDA(RotateGrad(params, nullptr));
      ExpectNear(Name("rotate grad", c), draw.Download(), want, kBf16, c.head_dim < 8 ? 1e-4 : 2e-5);
    }
  }
}

TEST_F(RotateTest, AppendWritesItsSlotsAndNothingElse) {
  for (const Case& c : kCases) {
    const Inputs in = MakeInputs(c, 15);
    const std::vector<double> want = ForwardAll(in, c);
    const int64_t capacity = c.rows + 5, stride = capacity * c.head_dim, d = c.head_dim;
    std::vector<int64_t> slots;  // every third row is another GPU's; the rest in falling order
    for (int64_t row = 0; row < c.rows; ++row) slots.push_back(row % 3 == 1 ? -1 : capacity - 1 - row);
    for (const int64_t shift : {0, 1}) {
      Device device(in, c, shift);
      DeviceArray<Bits> value(in.value), k(c.heads * stride), v(c.heads * stride);
      DeviceArray<int64_t> device_slots(slots);
      REFOCUS_CUDA(
          Append({device.Params(nullptr), value.get(), device_slots.get(), k.get(), v.get(), stride}, nullptr));
      const std::vector<Bits> got_k = k.Download(), got_v = v.Download();
      std::vector<Bits> keys, expected_v(got_v.size(), 0xffff);
      std::vector<double> expected_keys;
      std::vector<bool> written(got_k.size(), false);
      for (int64_t row = 0; row < c.rows; ++row) {
        for (int64_t i = 0; slots[row] >= 0 && i < c.heads * d; ++i) {
          const int64_t to = i / d * stride + slots[row] * d + i % d;
          written[to] = true;
          keys.push_back(got_k[to]);
          expected_keys.push_back(want[row * c.heads * d + i]);
          expected_v[to] = in.value[row * c.heads * d + i];
        }
      }
      ExpectNear(Name("append", c), keys, expected_keys, kBf16, 1e-5);
      EXPECT_TRUE(SameBits(got_v, expected_v)) << Name("values", c);
      for (size_t i = 0; i < got_k.size(); ++i) ASSERT_TRUE(written[i] || got_k[i] == 0xffff) << "key element " << i;
    }
  }
}

// As a decode step calls it, beside queries of three heads for each of K: those as Rotate makes them.
void CheckRotateAndAppend(const Case& c, const AppendParams& append) {
  Case queries = c;
  queries.heads = 3 * c.heads;
  const Inputs in = MakeInputs(queries, 18);
  Device device(in, queries, 0);
  DeviceArray<Bits> alone(c.rows * queries.heads * c.head_dim), together(c.rows * queries.heads * c.head_dim);
  REFOCUS_CUDA(Rotate(device.Params(alone.get()), nullptr));
  REFOCUS_CUDA(RotateAndAppend(device.Params(together.get()), append, nullptr));
  EXPECT_TRUE(SameBits(together.Download(), alone.Download())) << Name("queries beside keys", c);
}

// Every row to an extent of its own, in its second layer: the same bits as side by side in one.
TEST_F(RotateTest, AppendToTailsEqualsAppend) {
  for (const Case& c : kCases) {
    const Inputs in = MakeInputs(c, 17);
    const int64_t d = c.head_dim, stride = c.rows * d, layer = c.heads * 2 * d;
    Device device(in, c, 0);
    DeviceArray<Bits> value(in.value), k(c.heads * stride), v(c.heads * stride);
    DeviceArray<Bits> tail_k(c.rows * 2 * layer), tail_v(c.rows * 2 * layer);
    std::vector<int64_t> slots, tail_slots;
    std::vector<TailExtent> extents(c.rows * kTailExtents);
    for (int64_t row = 0; row < c.rows; ++row) {
      slots.push_back(row % 3 == 1 ? -1 : row);
      tail_slots.push_back(row % 3 == 1 ? -1 : row % 2);
      const int64_t at = row * 2 * layer;
      extents[row * kTailExtents] = {tail_k.get() + at, tail_v.get() + at, layer, 2 * d, 2, 0};
    }
    DeviceArray<int64_t> device_slots(slots), device_tail_slots(tail_slots);
    DeviceArray<TailExtent> tails(extents);
    REFOCUS_CUDA(Append({device.Params(nullptr), value.get(), device_slots.get(), k.get(), v.get(), stride}, nullptr));
    AppendParams params{device.Params(nullptr), value.get(), device_tail_slots.get()};
    params.tails = tails.get();
    params.layer = 1;
    CheckRotateAndAppend(c, params);
    const auto keys = std::pair(k.Download(), tail_k.Download()), values = std::pair(v.Download(), tail_v.Download());
    for (const auto& [plain, own] : {keys, values}) {
      std::vector<Bits> expected(own.size(), 0xffff);
      for (int64_t row = 0; row < c.rows; ++row) {
        for (int64_t i = 0; slots[row] >= 0 && i < c.heads * d; ++i) {
          const int64_t to = row * 2 * layer + layer + i / d * 2 * d + tail_slots[row] * d + i % d;
          expected[to] = plain[i / d * stride + row * d + i % d];
        }
      }
      EXPECT_TRUE(SameBits(own, expected)) << Name("tails", c);
    }
  }
}

// In eight bits. Values are known exactly, so their codes are, too; keys are rounded from fp32 and lie within half a step.
struct PackedExtent {
  explicit PackedExtent(int64_t vectors, int64_t head_dim)
      : k(vectors * head_dim), v(vectors * head_dim), k_scale(vectors), v_scale(vectors) {}
  DeviceArray<uint8_t> k, v;
  DeviceArray<Bits> k_scale, v_scale;
};

void CheckCodes(const std::string& what, const std::vector<double>& x, const uint8_t* codes, Bits scale, bool exact) {
  float most = 0.0f;
  for (const double value : x) most = std::max(most, static_cast<float>(std::fabs(value)));
  const Bits want = Int8Scale(std::bit_cast<uint32_t>(most));
  ASSERT_LE(std::abs(int{scale} - int{want}), exact ? 0 : 1) << what << ": bits of the scale";
  const double step = Wide(scale);
  for (size_t i = 0; i < x.size(); ++i) {
    const double got = (codes[i] & 127) * step * (codes[i] >= 128 ? -1 : 1);
    const double cut = std::min(std::fabs(x[i]), 127 * step);  // the scale may have been rounded down
    ASSERT_LE(std::fabs(std::fabs(got) - cut), 0.501 * step + 1e-4 * std::fabs(x[i])) << what << ", element " << i;
    ASSERT_TRUE((codes[i] & 127) <= 1 || (got < 0) == (x[i] < 0)) << what << ", element " << i;
    if (!exact) continue;
    const auto whole = std::lrint(std::fabs(static_cast<float>(x[i])) * Int8Inverse(scale));
    ASSERT_EQ(codes[i] & 127, std::min<long>(whole, 127)) << what << ", element " << i;
  }
}

TEST_F(RotateTest, AppendInEightBits) {
  for (const Case& c : kCases) {
    if (c.head_dim % 16 != 0 || c.head_dim > 256 || c.rows == 0) continue;
    Inputs in = MakeInputs(c, 19);
    for (int64_t i = 0; i < c.head_dim; ++i) in.value[i] = 0;  // a vector of zeros
    const std::vector<double> want = ForwardAll(in, c);
    const int64_t capacity = c.rows + 5, d = c.head_dim, layer = c.heads * 2 * d;
    std::vector<int64_t> slots, tail_slots;
    for (int64_t row = 0; row < c.rows; ++row) {
      slots.push_back(row % 3 == 1 ? -1 : capacity - 1 - row);
      tail_slots.push_back(row % 3 == 1 ? -1 : row % 2);
    }
    Device device(in, c, 0);
    DeviceArray<Bits> value(in.value);
    PackedExtent extent(c.heads * capacity, d), tail(c.rows * 2 * c.heads * 2, d);
    std::vector<TailExtent> extents(c.rows * kTailExtents);
    for (int64_t row = 0; row < c.rows; ++row) {
      const int64_t at = row * 2 * layer;
      extents[row * kTailExtents] = {tail.k.get() + at, tail.v.get() + at, layer, 2 * d, 2, 0,
                                     tail.k_scale.get() + at / d, tail.v_scale.get() + at / d};
    }
    DeviceArray<int64_t> device_slots(slots), device_tail_slots(tail_slots);
    DeviceArray<TailExtent> tails(extents);
    AppendParams params{device.Params(nullptr), value.get(), device_slots.get(), extent.k.get(), extent.v.get(),
                        capacity * d};
    params.int8 = true;
    params.k_scale = extent.k_scale.get();
    params.v_scale = extent.v_scale.get();
    REFOCUS_CUDA(Append(params, nullptr));
    AppendParams to_tails{device.Params(nullptr), value.get(), device_tail_slots.get()};
    to_tails.int8 = true;
    to_tails.tails = tails.get();
    to_tails.layer = 1;
    CheckRotateAndAppend(c, to_tails);
    const auto k = extent.k.Download(), v = extent.v.Download(), tail_k = tail.k.Download(), tail_v = tail.v.Download();
    const auto k_scale = extent.k_scale.Download(), v_scale = extent.v_scale.Download();
    const auto tail_k_scale = tail.k_scale.Download(), tail_v_scale = tail.v_scale.Download();
    std::vector<bool> written(k_scale.size(), false);
    for (int64_t item = 0; item < c.rows * c.heads; ++item) {
      const int64_t row = item / c.heads, head = item % c.heads;
      if (slots[row] < 0) continue;
      const std::string what = Name("append in eight bits", c) + ", item " + std::to_string(item);
      const int64_t at = head * capacity + slots[row];
      written[at] = true;
      std::vector<double> values;
      for (int64_t i = 0; i < d; ++i) values.push_back(Wide(in.value[item * d + i]));
      CheckCodes(what + " K", {want.begin() + item * d, want.begin() + (item + 1) * d}, &k[at * d], k_scale[at], false);
      CheckCodes(what + " V", values, &v[at * d], v_scale[at], true);
      if (HasFatalFailure()) return;
      const int64_t own = row * 4 * c.heads + 2 * c.heads + head * 2 + tail_slots[row];
      EXPECT_TRUE(std::equal(&k[at * d], &k[at * d] + d, &tail_k[own * d]) && k_scale[at] == tail_k_scale[own]) << what;
      EXPECT_TRUE(std::equal(&v[at * d], &v[at * d] + d, &tail_v[own * d]) && v_scale[at] == tail_v_scale[own]) << what;
    }
    for (size_t i = 0; i < written.size(); ++i) {
      ASSERT_TRUE(written[i] || (k_scale[i] == 0xffff && v_scale[i] == 0xffff && k[i * d] == 0xff)) << "vector " << i;
    }
  }
}

TEST_F(RotateTest, EightBitsOfWhatIsNotFinite) {
  const Case c{3, 1, 32, false};
  Inputs in = MakeInputs(c, 20);
  in.raw[3] = INFINITY;
  in.raw[32 + 5] = NAN;
  in.value[2 * 32 + 7] = 0x7f80;  // infinite
  Device device(in, c, 0);
  DeviceArray<Bits> value(in.value);
  DeviceArray<int64_t> slots(std::vector<int64_t>{0, 1, 2});
  PackedExtent extent(3, 32);
  AppendParams params{device.Params(nullptr), value.get(), slots.get(), extent.k.get(), extent.v.get(), 3 * 32};
  params.int8 = true;
  params.k_scale = extent.k_scale.get();
  params.v_scale = extent.v_scale.get();
  REFOCUS_CUDA(Append(params, nullptr));
  const std::vector<Bits> k = extent.k_scale.Download(), v = extent.v_scale.Download();
  for (int slot = 0; slot < 3; ++slot) {
    EXPECT_EQ(k[slot] == kInt8ScaleNaN, slot < 2) << slot;
    EXPECT_EQ(v[slot] == kInt8ScaleNaN, slot == 2) << slot;
  }
  params.head_stride = 3 * 32 + 16;  // scales would not lie head_dim times as dense
  EXPECT_EQ(Append(params, nullptr), cudaErrorInvalidValue);
}

TEST_F(RotateTest, RefusesOddHeads) {
  const Case c{1, 1, 8, false};
  const Inputs in = MakeInputs(c, 16);
  Device device(in, c, 0);
  DeviceArray<Bits> out(8);
  RotateParams params = device.Params(out.get());
  params.head_dim = 7;
  EXPECT_EQ(Rotate(params, nullptr), cudaErrorInvalidValue);
  params.head_dim = 8;
  params.heads = 0;
  EXPECT_EQ(Rotate(params, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace refocus::kernels
