#include "kernels/query_update.h"

#include <limits>
#include <memory>

#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using QueryUpdateTest = RowwiseTest;

struct Shape {
  int64_t layers = 0, rows = 0, out = 0, in = 0;
  int64_t numbers() const { return layers * out * in; }
  std::string name() const {
    return std::to_string(layers) + " x " + std::to_string(rows) + " rows, " + std::to_string(out) + " x " +
           std::to_string(in);
  }
};

const std::vector<Shape>& Shapes() {
  static const std::vector<Shape> shapes = {
      {1, 1, 24, 40},     {2, 3, 8, 8},       {3, 63, 136, 200}, {2, 127, 264, 1032},
      {1, 128, 520, 640}, {2, 16, 128, 128},  {1, 17, 1032, 72}, {130, 5, 16, 8},
      {1, 80, 64, 1544},  {2, 128, 128, 2560}, {1, 0, 24, 40}};
  return shapes;
}

struct Factors {
  std::vector<std::vector<Bits>> dq, h;  // by layer

  // Rows of h have much in common, as normed rows do.
  Factors(const Shape& s, uint64_t seed) {
    Random random(seed);
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      dq.push_back(random.Bf16s(s.rows * s.out, 0.02f));
      h.push_back(random.Bf16s(s.rows * s.in));
      const std::vector<float> common = random.Floats(s.in);
      for (size_t i = 0; i < h.back().size(); ++i) h.back()[i] = ToBf16(FromBf16(h.back()[i]) + common[i % s.in]);
    }
  }
};

// dW [layers, out, in].
std::vector<double> GradientOf(const Shape& s, const Factors& f) {
  std::vector<double> g(static_cast<size_t>(s.numbers()), 0.0);
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t i = 0; i < s.out; ++i) {
        const double d = Wide(f.dq[layer][r * s.out + i]);
        double* const to = g.data() + (layer * s.out + i) * s.in;
        for (int64_t j = 0; j < s.in; ++j) to[j] += d * Wide(f.h[layer][r * s.in + j]);
      }
    }
  }
  return g;
}

double NormOf(const std::vector<double>& g) {
  double sum = 0.0;
  for (const double x : g) sum += x * x;
  return std::sqrt(sum);
}

// Factors in device memory, each array between guards of NaN.
class PlacedFactors {
 public:
  PlacedFactors(const Shape& s, const Factors& f) {
    for (int64_t layer = 0; layer < s.layers; ++layer) {
      arrays_.push_back(std::make_unique<DeviceArray<Bits>>(f.dq[layer]));
      dq_.push_back(arrays_.back()->get());
      arrays_.push_back(std::make_unique<DeviceArray<Bits>>(f.h[layer]));
      h_.push_back(arrays_.back()->get());
    }
    factors = {s.layers, s.rows, s.out, s.in, dq_.data(), h_.data()};
  }
  QueryFactors factors;

 private:
  std::vector<std::unique_ptr<DeviceArray<Bits>>> arrays_;
  std::vector<const void*> dq_, h_;
};

double NormOnDevice(const PlacedFactors& placed, cudaStream_t stream = nullptr) {
  DeviceArray<char> workspace(QueryNormWorkspaceBytes(placed.factors));
  DeviceArray<double> norm(1);
  EXPECT_EQ(QueryNorm(placed.factors, workspace.get(), norm.get(), stream), cudaSuccess);
  workspace.Download();
  return norm.Download()[0];
}

struct Settings {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0.01;
  float rate = 1e-2f, divisor = 1.0f;
};

template <typename T>
void Upload(DeviceArray<T>& to, const std::vector<T>& values) {
  ASSERT_EQ(cudaMemcpy(to.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
}

// A delta and its moments, on the device.
class State {
 public:
  State(const Shape& s, uint64_t seed) : p_(s.numbers()), m_(s.numbers()), v_(s.numbers()), rounded_(s.numbers()) {
    Random random(seed);
    p = random.Floats(s.numbers(), 0.05f);
    m = random.Floats(s.numbers(), 0.02f);
    // Far enough from zero that a step is no more than a few rates.
    for (const float x : random.Floats(s.numbers(), 0.05f)) v.push_back(4e-4f + x * x);
    Put();
  }
  void Put() {
    Upload(p_, p);
    Upload(m_, m);
    Upload(v_, v);
    cudaMemset(rounded_.get(), 0xff, p.size() * sizeof(Bits));
  }
  // Of the next step.
  QueryUpdateParams Params(const QueryFactors& factors, const Settings& settings, bool skip = false) {
    Upload(scalars_, {settings.rate, made + 1.0f, settings.divisor, skip ? 1.0f : 0.0f});
    const float* const scalars = scalars_.get();
    return {factors,     p_.get(),    m_.get(),    v_.get(),         rounded_.get(), scalars,          scalars + 1,
            scalars + 2, scalars + 3, workspace_.get(), settings.beta1,  settings.beta2, settings.epsilon,
            settings.weight_decay};
  }
  void Step(const QueryFactors& factors, const Settings& settings, bool skip = false) {
    EXPECT_EQ(QueryUpdate(Params(factors, settings, skip), nullptr), cudaSuccess);
    made += skip ? 0.0f : 1.0f;
    Get();
  }
  void Get() {
    p = p_.Download();
    m = m_.Download();
    v = v_.Download();
    rounded = rounded_.Download();
  }

  std::vector<float> p, m, v;
  std::vector<Bits> rounded;
  float made = 2.0f;  // steps

 private:
  DeviceArray<float> p_, m_, v_;
  DeviceArray<Bits> rounded_;
  DeviceArray<float> scalars_{4}, workspace_{kQueryUpdateWords};
};

bool SameState(const State& a, const State& b) {
  return SameBits(a.p, b.p) && SameBits(a.m, b.m) && SameBits(a.v, b.v) && SameBits(a.rounded, b.rounded);
}

void ExpectStep(const Shape& s, const Settings& settings, const std::vector<double>& gradient, const State& before,
                const State& after) {
  const double divisor = settings.divisor, rate = settings.rate;
  const double count = before.made + 1.0;
  std::vector<double> p, m, v;
  for (size_t i = 0; i < gradient.size(); ++i) {
    const double g = gradient[i] / divisor;
    m.push_back(settings.beta1 * before.m[i] + (1.0 - settings.beta1) * g);
    v.push_back(settings.beta2 * before.v[i] + (1.0 - settings.beta2) * g * g);
    p.push_back(before.p[i] - rate * settings.weight_decay * before.p[i] -
                rate * (m[i] / (1.0 - std::pow(settings.beta1, count))) /
                    (std::sqrt(v[i] / (1.0 - std::pow(settings.beta2, count))) + settings.epsilon));
  }
  // Roundings of fp32: a few in each number, and those of up to 128 products in the gradient.
  const double scale = 0.3 / divisor;  // of its entries
  ExpectNear("m, " + s.name(), after.m, m, 3e-7, 1e-6 * scale);
  ExpectNear("v, " + s.name(), after.v, v, 5e-7, 1e-8 * scale * scale);
  ExpectNear("p, " + s.name(), after.p, p, 2e-7, 1e-6 * rate);
  for (size_t i = 0; i < after.p.size(); ++i) ASSERT_EQ(after.rounded[i], ToBf16(after.p[i])) << i;
}

TEST_F(QueryUpdateTest, NormOfTheGradient) {
  for (const Shape& s : Shapes()) {
    const Factors f(s, 1);
    const PlacedFactors placed(s, f);
    const double want = NormOf(GradientOf(s, f)), got = NormOnDevice(placed);
    std::printf("norm, %s: got %.9g want %.9g\n", s.name().c_str(), got, want);
    EXPECT_NEAR(got, want, 1e-5 * want) << s.name();
    EXPECT_EQ(got, NormOnDevice(placed)) << "the same bits";
  }
}

TEST_F(QueryUpdateTest, NormOfRowsThatCancel) {
  const Shape s{1, 2, 512, 640};
  Factors f(s, 2);
  for (int64_t i = 0; i < s.out; ++i) f.dq[0][s.out + i] = f.dq[0][i] ^ 0x8000;
  for (int64_t i = 0; i < s.in; ++i) f.h[0][s.in + i] = f.h[0][i];
  EXPECT_LE(NormOnDevice(PlacedFactors(s, f)), 1e-2);  // a row's own is 16
}

TEST_F(QueryUpdateTest, NormThatIsNotFinite) {
  const Shape s{2, 20, 136, 72};
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Factors f(s, 3);
    f.dq[1][19 * s.out + 135] = ToBf16(value);
    EXPECT_FALSE(std::isfinite(NormOnDevice(PlacedFactors(s, f))));
    Factors other(s, 3);
    other.h[0][0] = ToBf16(value);
    EXPECT_FALSE(std::isfinite(NormOnDevice(PlacedFactors(s, other))));
  }
}

TEST_F(QueryUpdateTest, StepsOfEveryShape) {
  for (const Shape& s : Shapes()) {
    State state(s, 4);
    for (int step = 0; step < 2; ++step) {
      const Factors f(s, 5 + step);
      State before(s, 4);
      before.p = state.p;
      before.m = state.m;
      before.v = state.v;
      before.made = state.made;
      state.Step(PlacedFactors(s, f).factors, {});
      ExpectStep(s, {}, GradientOf(s, f), before, state);
    }
  }
}

TEST_F(QueryUpdateTest, EverySetting) {
  const Shape s{2, 33, 72, 136};
  const Factors f(s, 6);
  const std::vector<double> gradient = GradientOf(s, f);
  const PlacedFactors placed(s, f);
  Settings no_decay, clipped;
  no_decay.weight_decay = 0.0;
  clipped.divisor = 7.3f;
  for (const Settings& settings : {no_decay, clipped, Settings{0.5, 0.9, 1e-4, 0.3, 0.5f, 60.0f}}) {
    const State before(s, 7);
    State state(s, 7);
    state.Step(placed.factors, settings);
    ExpectStep(s, settings, gradient, before, state);
  }
}

// From nothing: v is zero before, and where the gradient is zero it stays so.
TEST_F(QueryUpdateTest, FirstStepOfAZeroDelta) {
  const Shape s{1, 9, 40, 24};
  Factors f(s, 8);
  for (int64_t r = 0; r < s.rows; ++r) f.dq[0][r * s.out + 3] = 0;
  State state(s, 9);
  std::fill(state.p.begin(), state.p.end(), 0.0f);
  std::fill(state.m.begin(), state.m.end(), 0.0f);
  std::fill(state.v.begin(), state.v.end(), 0.0f);
  state.made = 0.0f;
  state.Put();
  State before(s, 9);
  before.p = before.m = before.v = state.p;
  before.made = 0.0f;
  const std::vector<double> gradient = GradientOf(s, f);
  state.Step(PlacedFactors(s, f).factors, {});
  ExpectStep(s, {}, gradient, before, state);
  for (int64_t j = 0; j < s.in; ++j) EXPECT_EQ(state.p[3 * s.in + j], 0.0f);
}

TEST_F(QueryUpdateTest, NothingChangesInASkippedStep) {
  const Shape s{1, 20, 136, 72};
  Factors f(s, 10);
  f.dq[0][7] = ToBf16(std::numeric_limits<float>::quiet_NaN());
  const PlacedFactors placed(s, f);
  State before(s, 11), state(s, 11);
  before.Get();
  for (const float divisor : {1.0f, std::numeric_limits<float>::quiet_NaN()}) {
    Settings settings;
    settings.divisor = divisor;
    state.Step(placed.factors, settings, /*skip=*/true);
    EXPECT_TRUE(SameState(state, before)) << divisor;
  }
}

// A recorded step reads rate, divisor and count anew, and gives the bits of steps one by one.
TEST_F(QueryUpdateTest, Repeats) {
  const Shape s{3, 128, 264, 328};
  const PlacedFactors placed(s, Factors(s, 12));
  const auto settings = [](float rate, float divisor) {
    Settings settings;
    settings.rate = rate;
    settings.divisor = divisor;
    return settings;
  };
  const std::vector<Settings> steps = {settings(1e-2f, 3.0f), settings(5e-3f, 1.0f), settings(1e-3f, 20.0f)};
  State alone(s, 13), recorded(s, 13);
  for (const Settings& step : steps) alone.Step(placed.factors, step);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  REFOCUS_CUDA(cudaStreamCreate(&stream));
  const QueryUpdateParams params = recorded.Params(placed.factors, {});
  REFOCUS_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  EXPECT_EQ(QueryUpdate(params, stream), cudaSuccess);
  REFOCUS_CUDA(cudaStreamEndCapture(stream, &graph));
  REFOCUS_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  for (const Settings& step : steps) {
    recorded.Params(placed.factors, step);
    recorded.made += 1.0f;
    REFOCUS_CUDA(cudaGraphLaunch(replay, stream));
    REFOCUS_CUDA(cudaStreamSynchronize(stream));
  }
  recorded.Get();
  EXPECT_TRUE(SameState(recorded, alone));
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(QueryUpdateTest, RefusesWhatDoesNotFit) {
  for (const Shape& s : {Shape{1, 129, 16, 16}, Shape{1, 4, 12, 16}, Shape{1, 4, 16, 20}}) {
    const PlacedFactors placed(s, Factors(s, 14));
    State state(s, 15);
    DeviceArray<double> norm(1);
    EXPECT_EQ(QueryNorm(placed.factors, norm.get(), norm.get(), nullptr), cudaErrorInvalidValue);
    EXPECT_EQ(QueryUpdate(state.Params(placed.factors, {}), nullptr), cudaErrorInvalidValue);
    const State before(s, 15);
    state.Get();
    EXPECT_TRUE(SameBits(state.p, before.p));
  }
}

}  // namespace
}  // namespace refocus::kernels
