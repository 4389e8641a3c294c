// The backend's operations against an unsharded fp64 oracle, for every instruction set that this processor has. Bound:
// our error is at most twice that of plain fp32 LibTorch, plus a few roundings; places without a visible key are exact.
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include "tests/worker/backend_oracle.h"
#include "worker/backend_cpu.h"

namespace refocus {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Threads of this process.
int64_t ThreadCount() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return std::distance(begin(tasks), end(tasks));
}

at::Tensor Random(at::IntArrayRef shape, std::mt19937_64& random, float scale = 1) {
  at::Tensor x = at::empty(shape, at::TensorOptions(at::kFloat));
  std::normal_distribution<float> normal;
  float* data = x.data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i) data[i] = normal(random) * scale;
  return x;
}

struct Scene {
  std::vector<int64_t> pos;
  int64_t keys = 0;
  int64_t heads = 1;
  int64_t kv_heads = 1;
  int64_t head_dim = 2;
  int64_t shards = 1;
  std::vector<int64_t> cuts = {};  // positions where a new extent starts
  float scale = 1;                 // of q: logits grow with it
  int threads = 1;
  bool int8 = false;               // K and V in eight bits

  std::string Text() const {
    std::string text = std::to_string(pos.size()) + " rows, " + std::to_string(keys) + " keys, " +
                       std::to_string(heads) + "/" + std::to_string(kv_heads) + " heads, d " +
                       std::to_string(head_dim) + ", " +
                       std::to_string(shards) + " shards, cuts";
    for (const int64_t cut : cuts) text.append(1, ' ').append(std::to_string(cut));
    return text + (int8 ? ", int8" : "");
  }
};

// K or V in eight bits, as base/kv_int8.h says, and what they stand for.
struct Packed {
  at::Tensor codes;   // like the numbers, uint8
  at::Tensor scales;  // bf16, without the last dimension
};

at::Tensor Unpacked(const Packed& packed) {
  const at::Tensor codes = packed.codes.to(at::kInt);
  const at::Tensor magnitude = codes.bitwise_and(127).to(at::kFloat).mul(packed.scales.to(at::kFloat).unsqueeze(-1));
  return magnitude.to(at::kBFloat16).to(at::kFloat).mul(codes.ge(128).to(at::kFloat).mul(-2).add(1));
}

Packed Pack(const at::Tensor& x) {
  const at::Tensor scales = x.abs().amax({-1}).div(127).to(at::kBFloat16);
  const at::Tensor magnitude = x.abs().div(scales.to(at::kFloat).unsqueeze(-1)).round().clamp_max(127);
  return {magnitude.add(x.lt(0).to(at::kFloat).mul(128)).to(at::kByte), scales};
}

struct SceneInput : OracleInput {
  Packed packed_k, packed_v;  // of a scene in eight bits; k and v are then what they stand for
};

SceneInput MakeInput(const Scene& scene) {
  std::mt19937_64 random(scene.keys * 1000 + static_cast<int64_t>(scene.pos.size()) * 10 + scene.head_dim);
  const int64_t rows = static_cast<int64_t>(scene.pos.size());
  SceneInput input;
  input.q = Random({rows, scene.heads, scene.head_dim}, random, scene.scale);
  input.dout = Random({rows, scene.heads, scene.head_dim}, random);
  input.k = Random({scene.kv_heads, scene.keys, scene.head_dim}, random);
  input.v = Random({scene.kv_heads, scene.keys, scene.head_dim}, random);
  input.pos = at::tensor(at::ArrayRef<int64_t>(scene.pos), at::TensorOptions(at::kLong));
  if (scene.int8 && scene.keys > 0) {
    input.packed_k = Pack(input.k);
    input.packed_v = Pack(input.v);
    input.k = Unpacked(input.packed_k);
    input.v = Unpacked(input.packed_v);
  }
  return input;
}

// The keys at positions [begin, end) that `plan` owns, in a longer buffer full of NaN, heads far apart.
KvView MakeView(const SceneInput& input, const ShardPlan& plan, int64_t begin, int64_t end) {
  KvView view;
  view.plan = plan;
  view.first_index = 0;
  for (int64_t p = 0; p < begin; ++p) view.first_index += plan.Owns(p) ? 1 : 0;
  std::vector<int64_t> owned;
  for (int64_t p = begin; p < end; ++p) {
    if (plan.Owns(p)) owned.push_back(p);
  }
  view.length = static_cast<int64_t>(owned.size());
  const at::Tensor index = at::tensor(at::ArrayRef<int64_t>(owned), at::TensorOptions(at::kLong));
  const auto place = [&](const at::Tensor& from) {
    const at::Tensor memory = at::full({from.size(0), 2, view.length + 5, from.size(2)}, kNaN, from.options());
    const at::Tensor slots = memory.select(1, 1);
    slots.narrow(1, 0, view.length).copy_(from.index_select(1, index));
    return slots;
  };
  if (!input.packed_k.codes.defined()) {
    view.k = place(input.k);
    view.v = place(input.v);
    return view;
  }
  // Codes have no NaN: their scales have.
  const auto place_codes = [&](const at::Tensor& from) {
    return place(from.to(at::kFloat)).nan_to_num(255.0).to(at::kByte);
  };
  const auto place_scales = [&](const at::Tensor& from) { return place(from.unsqueeze(-1)).select(2, 0); };
  view.k = place_codes(input.packed_k.codes);
  view.v = place_codes(input.packed_v.codes);
  view.k_scale = place_scales(input.packed_k.scales);
  view.v_scale = place_scales(input.packed_v.scales);
  return view;
}

std::vector<KvView> MakeViews(const SceneInput& input, const Scene& scene, int64_t shard) {
  std::vector<KvView> views;
  int64_t begin = 0;
  for (size_t i = 0; i <= scene.cuts.size(); ++i) {
    const int64_t end = i < scene.cuts.size() ? scene.cuts[i] : scene.keys;
    views.push_back(MakeView(input, {.shards = scene.shards, .shard = shard}, begin, end));
    begin = end;
  }
  return views;
}

double MaxError(const at::Tensor& x, const at::Tensor& exact) {
  if (x.numel() == 0) return 0;
  return x.to(at::kDouble).sub(exact).masked_fill(exact.isinf(), 0).abs().max().item<double>();
}

// -inf in the same places, and max |ours - exact| <= 2 * max |plain - exact| + a few roundings of the largest value.
void ExpectClose(const at::Tensor& ours, const at::Tensor& plain, const at::Tensor& exact, const char* what) {
  ASSERT_EQ(ours.sizes(), exact.sizes()) << what;
  if (ours.numel() == 0) return;
  ASSERT_FALSE(ours.isnan().any().item<bool>()) << what;
  ASSERT_TRUE(at::equal(ours.isinf(), exact.isinf())) << what;
  const double largest = exact.masked_fill(exact.isinf(), 0).abs().max().item<double>();
  const double error = MaxError(ours, exact), allowed = 2 * MaxError(plain, exact) + 8 * 6e-8 * std::max(largest, 1.0);
  if (error <= allowed) return;
  const at::Tensor distance = ours.to(at::kDouble).sub(exact).masked_fill(exact.isinf(), 0).abs().flatten();
  const int64_t worst = distance.argmax().item<int64_t>();
  ADD_FAILURE() << what << ": error " << error << ", allowed " << allowed << ", worst at " << worst << ": got "
                << ours.flatten()[worst].item<float>() << ", exact " << exact.flatten()[worst].item<double>();
}

// Sums and partials of all shards against the oracle.
void CheckScene(Backend& backend, const Scene& scene) {
  SCOPED_TRACE(scene.Text());
  const SceneInput input = MakeInput(scene);
  const OracleResult exact = Oracle(input);
  const at::Tensor lse32 = exact.lse.to(at::kFloat), dot32 = exact.row_dot.to(at::kFloat);
  const PlainResult plain = PlainTorch(input, lse32, dot32);
  std::vector<at::Tensor> outs, lses;
  at::Tensor dq = at::zeros(input.q.sizes(), input.q.options());
  for (int64_t shard = 0; shard < scene.shards; ++shard) {
    const std::vector<KvView> views = MakeViews(input, scene, shard);
    at::set_num_threads(scene.threads);
    const Partial partial = backend.Attend(input.q, input.pos, views);
    const at::Tensor slice = backend.QueryGrad(input.q, input.pos, views, input.dout, lse32, dot32);
    at::set_num_threads(1);
    for (int64_t row = 0; row < input.q.size(0); ++row) {
      bool any = false;
      const ShardPlan plan{.shards = scene.shards, .shard = shard};
      for (int64_t p = 0; p <= scene.pos[row] && p < scene.keys && !any; ++p) any = plan.Owns(p);
      const at::Tensor empty = partial.lse[row].eq(-kInfinity);
      ASSERT_EQ(empty.all().item<bool>(), !any) << "row " << row;
      if (any) continue;
      ASSERT_TRUE(partial.out[row].eq(0).all().item<bool>()) << "row " << row;
    }
    outs.push_back(partial.out);
    lses.push_back(partial.lse);
    dq += slice;
  }
  const Partial whole = backend.Combine(at::stack(outs), at::stack(lses));
  ExpectClose(whole.out, plain.out, exact.out, "out");
  ExpectClose(whole.lse, plain.lse, exact.lse, "lse");
  ExpectClose(dq, plain.dq, exact.dq, "dq");
}

std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> range(std::max<int64_t>(0, end - begin));
  std::iota(range.begin(), range.end(), begin);
  return range;
}

// First in this file: later tests start LibTorch's threads.
TEST(CpuBackendThreads, OneThreadStartsNone) {
  at::set_num_threads(1);
  const int64_t before = ThreadCount();
  const Scene scene{.pos = Range(500, 700), .keys = 700, .heads = 3, .kv_heads = 1, .head_dim = 16};
  CheckScene(*MakeCpuBackend(), scene);
  EXPECT_EQ(ThreadCount(), before);
}

class BackendTest : public testing::TestWithParam<const CpuKernels*> {
 protected:
  void SetUp() override {
    at::set_num_threads(1);  // OpenMP's waits are slow on a busy machine: two only where keys are split over threads
    if (GetParam() == nullptr) GTEST_SKIP() << "this processor lacks the instruction set";
    backend_ = MakeCpuBackend(*GetParam());
  }
  std::unique_ptr<Backend> backend_;
};

TEST_P(BackendTest, RowCounts) {
  for (const int64_t rows : {0, 1, 2, 3, 5, 16, 17, 63, 127, 129}) {
    CheckScene(*backend_, {.pos = Range(300 - rows, 300),
                           .keys = 300,
                           .heads = 3,
                           .kv_heads = 1,
                           .head_dim = 64,
                           .threads = 2});
    CheckScene(*backend_, {.pos = Range(0, rows), .keys = rows + 1, .heads = 2, .kv_heads = 2, .head_dim = 16});
  }
}

TEST_P(BackendTest, HeadsAndDims) {
  struct Heads {
    int64_t heads, kv_heads;
  };
  for (const Heads h : {Heads{1, 1}, Heads{3, 3}, Heads{3, 1}, Heads{9, 3}, Heads{4, 1}, Heads{12, 3}}) {
    for (const int64_t depth : {2, 3, 5, 7, 17, 64, 80, 128}) {
      for (const int64_t rows : {1, 21}) {
        CheckScene(*backend_, {.pos = Range(131 - rows, 131),
                               .keys = 131,
                               .heads = h.heads,
                               .kv_heads = h.kv_heads,
                               .head_dim = depth});
      }
    }
  }
}

TEST_P(BackendTest, ShardsAndBlockEdges) {
  for (const int64_t shards : {1, 2, 3}) {
    for (const int64_t keys : {1, 127, 128, 129, 255, 256, 257, 511, 513, 769, 1025}) {
      for (const int64_t rows : {1, 33}) {
        CheckScene(*backend_, {.pos = Range(std::max<int64_t>(0, keys - rows), keys),
                               .keys = keys,
                               .heads = 3,
                               .kv_heads = 1,
                               .head_dim = 16,
                               .shards = shards,
                               .threads = keys > 512 ? 2 : 1});
      }
    }
  }
}

TEST_P(BackendTest, SeveralExtents) {
  for (const int64_t shards : {1, 2, 3}) {
    for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{300}, {1, 2}, {256, 256, 700}, {690}, {699}}) {
      for (const int64_t rows : {1, 30, 127}) {
        CheckScene(*backend_, {.pos = Range(720 - rows, 720),
                               .keys = 720,
                               .heads = 6,
                               .kv_heads = 2,
                               .head_dim = 16,
                               .shards = shards,
                               .cuts = cuts});
      }
    }
  }
}

TEST_P(BackendTest, PositionsInAnyOrder) {
  std::mt19937_64 random(7);
  for (const int64_t shards : {1, 2, 3}) {
    for (const int64_t rows : {2, 5, 63}) {
      std::vector<int64_t> pos(rows);
      for (int64_t& p : pos) p = static_cast<int64_t>(random() % 600);
      pos[rows / 2] = pos[0];
      pos[rows - 1] = 100000;  // younger than every key
      CheckScene(*backend_, {.pos = pos, .keys = 600, .heads = 3, .kv_heads = 1, .head_dim = 16, .shards = shards});
    }
  }
}

TEST_P(BackendTest, RowsOlderThanEveryKey) {
  // The views start at position 300, so rows before it see nothing, alone or beside rows that do.
  for (const int64_t shards : {1, 2}) {
    Scene scene{.pos = {}, .keys = 700, .heads = 3, .kv_heads = 1, .head_dim = 16, .shards = shards, .cuts = {300}};
    const std::vector<std::vector<int64_t>> cases = {{299}, {0, 299, 10}, Range(290, 310), Range(200, 299)};
    for (const std::vector<int64_t>& pos : cases) {
      scene.pos = pos;
      const SceneInput input = MakeInput(scene);
      for (int64_t shard = 0; shard < shards; ++shard) {
        const std::vector<KvView> views = {MakeViews(input, scene, shard)[1]};
        const Partial partial = backend_->Attend(input.q, input.pos, views);
        const at::Tensor dq =
            backend_->QueryGrad(input.q, input.pos, views, input.dout, partial.lse, partial.lse.exp());
        for (size_t row = 0; row < pos.size(); ++row) {
          const bool sees = views[0].length > 0 && views[0].plan.PositionAt(views[0].first_index) <= pos[row];
          EXPECT_EQ(partial.lse[row].eq(-kInfinity).all().item<bool>(), !sees) << row;
          EXPECT_EQ(partial.out[row].eq(0).all().item<bool>(), !sees) << row;
          EXPECT_EQ(dq[row].eq(0).all().item<bool>(), !sees) << row;
          EXPECT_FALSE(partial.out[row].isnan().any().item<bool>() || dq[row].isnan().any().item<bool>()) << row;
        }
      }
    }
  }
}

TEST_P(BackendTest, NoKeysAtAll) {
  const Scene scene{.pos = {0, 5, 9}, .keys = 10, .heads = 4, .kv_heads = 2, .head_dim = 8};
  const SceneInput input = MakeInput(scene);
  KvView undefined;
  for (const std::vector<KvView>& views :
       {std::vector<KvView>{}, {undefined}, {MakeView(input, {}, 0, 0), MakeView(input, {}, 4, 4)}}) {
    const Partial partial = backend_->Attend(input.q, input.pos, views);
    EXPECT_TRUE(partial.lse.eq(-kInfinity).all().item<bool>());
    EXPECT_TRUE(partial.out.eq(0).all().item<bool>());
    const at::Tensor dq = backend_->QueryGrad(input.q, input.pos, views, input.dout, partial.lse, partial.lse);
    EXPECT_EQ(dq.sizes(), input.q.sizes());
    EXPECT_TRUE(dq.eq(0).all().item<bool>());
  }
}

TEST_P(BackendTest, EightBits) {
  for (const int64_t rows : {1, 2, 5, 33, 129}) {
    for (const int64_t shards : {1, 3}) {
      for (const int64_t depth : {3, 16, 64, 80}) {
        CheckScene(*backend_, {.pos = Range(520 - rows, 520),
                               .keys = 520,
                               .heads = 6,
                               .kv_heads = 2,
                               .head_dim = depth,
                               .shards = shards,
                               .cuts = {1, 300, 519},
                               .threads = rows == 129 ? 2 : 1,
                               .int8 = true});
      }
    }
  }
  for (const float scale : {0.0f, 1e4f}) {
    CheckScene(*backend_, {.pos = {0, 130, 100000}, .keys = 257, .head_dim = 32, .scale = scale, .int8 = true});
  }
  CheckScene(*backend_, {.pos = {0, 7}, .keys = 1, .head_dim = 16, .int8 = true});
}

// Every code under scales from the least to the most; a scale of NaN makes the whole vector NaN.
TEST_P(BackendTest, EveryCode) {
  Packed packed;
  packed.codes = at::arange(256, at::kByte).view({1, 1, 256}).repeat({1, 300, 1});
  packed.scales = at::zeros({1, 300}, at::kBFloat16);
  std::mt19937_64 random(5);
  for (int64_t i = 1; i < 300; ++i) {
    packed.scales[0][i] = std::ldexp(1.0 + static_cast<double>(random() % 128) / 128, static_cast<int>(i % 213) - 100);
  }
  packed.scales[0][299] = kNaN;
  const at::Tensor exact = Unpacked(packed), got = at::empty({300, 256}, at::kFloat);
  GetParam()->unpack(300, 256, packed.codes.const_data_ptr<uint8_t>(), 256,
                     static_cast<const uint16_t*>(packed.scales.const_data_ptr()), got.data_ptr<float>());
  EXPECT_TRUE(at::equal(got.narrow(0, 0, 299), exact[0].narrow(0, 0, 299)));
  EXPECT_TRUE(got[299].isnan().all().item<bool>());
}

// What Append writes lies within half a step of what the fp32 backend writes, and the scale is the largest's.
TEST_P(BackendTest, AppendInEightBits) {
  ModelConfig config;
  config.kv_heads = 3;
  config.heads = 3;
  config.head_dim = 48;
  config.hidden = 20;
  std::mt19937_64 random(11);
  const at::Tensor h = Random({9, 20}, random, 3);
  h[2].zero_();           // a vector of zeros
  h[3].mul_(1e-38f);      // of numbers too small for a scale
  h[4][1] = kInfinity;
  h[5][1] = kNaN;
  h[6].mul_(1e30f);
  const KeyValueWeights weights{Random({144, 20}, random), Random({144, 20}, random), {}, {}};
  const at::Tensor slots = at::tensor(std::vector<int64_t>{5, 0, 7, 6, 1, 2, 3, 8, -1}, at::kLong);
  KvView plain, small;
  plain.length = small.length = 9;
  plain.k = at::full({3, 9, 48}, 0.0, at::kFloat);
  plain.v = plain.k.clone();
  small.k = at::full({3, 9, 48}, 255, at::kByte);
  small.v = small.k.clone();
  small.k_scale = at::full({3, 9}, kNaN, at::kBFloat16);
  small.v_scale = small.k_scale.clone();
  const auto append = [&](KvType kv, const KvView& to) {
    const std::unique_ptr<Backend> backend = MakeCpuBackend(*GetParam(), config, kv);
    const at::Tensor pos = at::arange(100, 109, at::kLong);
    backend->Append(h, weights, backend->RotationAt(pos), slots, to);
  };
  append(KvType::kDevice, plain);
  append(KvType::kInt8, small);
  for (const auto& [x, codes, scales] : {std::tuple(plain.k, small.k, small.k_scale),
                                         std::tuple(plain.v, small.v, small.v_scale)}) {
    const at::Tensor largest = x.abs().amax({-1}), got = Unpacked({codes, scales});
    const at::Tensor step = scales.to(at::kFloat).unsqueeze(-1);
    for (int64_t slot = 0; slot < 9; ++slot) {
      if (slot == 4) continue;  // nobody's
      SCOPED_TRACE(slot);
      if (slot == 1 || slot == 2) {
        EXPECT_TRUE(got.select(1, slot).isnan().all().item<bool>());
        continue;
      }
      const auto of = [&](const at::Tensor& t) { return t.select(1, slot); };
      const float floor = slot == 6 ? 0.0f : 1.0f;  // too small for a scale
      EXPECT_TRUE(at::equal(of(largest).mul(floor / 127).to(at::kBFloat16), of(scales)));
      // Half a step, what the scale's rounding cuts off the largest, and a last bit of bf16.
      EXPECT_TRUE((of(got) - of(x)).abs().le(of(step).mul(0.5001 + 127.0 / 512) + of(x).abs().mul(1.001 / 512) + 1e-30f).all()
                      .item<bool>());
    }
    EXPECT_TRUE(codes.select(1, 4).eq(255).all().item<bool>() && scales.select(1, 4).isnan().all().item<bool>());
  }
}

TEST_P(BackendTest, ExtremeLogits) {
  for (const int64_t rows : {1, 70}) {  // head_dim 16: logits spread by the scale of q, to beyond 1e4
    for (const float scale : {0.0f, 30.0f, 3e3f, 1e4f}) {
      CheckScene(*backend_, {.pos = Range(400 - rows, 400),
                             .keys = 400,
                             .heads = 3,
                             .kv_heads = 1,
                             .head_dim = 16,
                             .shards = 2,
                             .scale = scale});
    }
  }
}

// Also behind a mask (230 keys, the last row sees 200), and when another rank holds no key for the row.
TEST_P(BackendTest, NanQueryStaysLoud) {
  for (const int64_t keys : {200, 230}) {
    const Scene scene{.pos = Range(180, 200), .keys = keys, .heads = 3, .kv_heads = 1, .head_dim = 16};
    for (const int64_t rows : {1, 20}) {
      SceneInput input = MakeInput(scene);
      const at::Tensor q = input.q.narrow(0, 0, rows).clone();
      q[rows - 1][1][3] = kNaN;
      const Partial partial = backend_->Attend(q, input.pos.narrow(0, 20 - rows, rows), MakeViews(input, scene, 0));
      EXPECT_TRUE(partial.out[rows - 1][1].isnan().all().item<bool>());
      EXPECT_EQ(partial.out.isnan().sum().item<int64_t>(), 16);
      EXPECT_TRUE(partial.lse[rows - 1][1].isnan().item<bool>());
      EXPECT_EQ(partial.lse.isnan().sum().item<int64_t>(), 1);
      const Partial none = backend_->Attend(q, input.pos.narrow(0, 20 - rows, rows), {});
      const Partial both = backend_->Combine(at::stack({partial.out, none.out}), at::stack({partial.lse, none.lse}));
      EXPECT_TRUE(both.out[rows - 1][1].isnan().all().item<bool>());
      EXPECT_TRUE(both.lse[rows - 1][1].isnan().item<bool>());
    }
  }
}

TEST_P(BackendTest, FiniteDifferences) {
  const Scene scene{.pos = {4, 260, 2, 300}, .keys = 301, .heads = 2, .kv_heads = 1, .head_dim = 3, .shards = 2};
  const SceneInput input = MakeInput(scene);
  const OracleResult exact = Oracle(input);
  at::Tensor dq = at::zeros(input.q.sizes(), input.q.options());
  for (int64_t shard = 0; shard < 2; ++shard) {
    dq += backend_->QueryGrad(input.q, input.pos, MakeViews(input, scene, shard), input.dout, exact.lse.to(at::kFloat),
                              exact.row_dot.to(at::kFloat));
  }
  constexpr double kStep = 1e-5;
  for (int64_t i = 0; i < input.q.numel(); ++i) {
    const auto loss = [&](double step) {
      OracleInput moved = input;
      moved.q = input.q.to(at::kDouble).clone();
      moved.q.flatten()[i] += step;
      return Oracle(moved).out.mul(input.dout.to(at::kDouble)).sum().item<double>();
    };
    EXPECT_NEAR(dq.flatten()[i].item<double>(), (loss(kStep) - loss(-kStep)) / (2 * kStep), 2e-6) << i;
  }
}

TEST_P(BackendTest, SameBitsTwiceAndThreadsAgree) {
  for (const int64_t rows : {1, 4, 129}) {
    const Scene scene{.pos = Range(3000 - rows, 3000), .keys = 3000, .heads = 9, .kv_heads = 3, .head_dim = 64};
    const SceneInput input = MakeInput(scene);
    const std::vector<KvView> views = MakeViews(input, scene, 0);
    std::vector<Partial> results;
    std::vector<at::Tensor> grads;
    for (const int threads : {2, 2, 1, 1}) {
      at::set_num_threads(threads);
      results.push_back(backend_->Attend(input.q, input.pos, views));
      const at::Tensor row_dot = results[0].out.mul(input.dout).sum(-1);
      grads.push_back(backend_->QueryGrad(input.q, input.pos, views, input.dout, results[0].lse, row_dot));
    }
    for (const size_t i : {0, 2}) {
      EXPECT_TRUE(at::equal(results[i].out, results[i + 1].out));
      EXPECT_TRUE(at::equal(results[i].lse, results[i + 1].lse));
      EXPECT_TRUE(at::equal(grads[i], grads[i + 1]));
    }
    EXPECT_LT(MaxError(results[2].out, results[0].out.to(at::kDouble)), 1e-6);
    EXPECT_LT(MaxError(results[2].lse, results[0].lse.to(at::kDouble)), 2e-6);
    EXPECT_LT(MaxError(grads[2], grads[0].to(at::kDouble)), 1e-6);
  }
}

TEST_P(BackendTest, LopsidedMergeIsOneShot) {
  Scene scene{.pos = Range(3136 - 9, 3136), .keys = 3136, .heads = 6, .kv_heads = 2, .head_dim = 64};
  const SceneInput input = MakeInput(scene);
  const OracleResult exact = Oracle(input);
  const at::Tensor unused = at::zeros(exact.lse.sizes(), input.q.options());
  const PlainResult plain = PlainTorch(input, unused, unused);
  const Partial most = backend_->Attend(input.q, input.pos, {MakeView(input, {}, 0, 3072)});
  const Partial rest = backend_->Attend(input.q, input.pos, {MakeView(input, {}, 3072, 3136)});
  const Partial merged = backend_->Combine(at::stack({most.out, rest.out}), at::stack({most.lse, rest.lse}));
  ExpectClose(merged.out, plain.out, exact.out, "out");
  ExpectClose(merged.lse, plain.lse, exact.lse, "lse");
}

TEST_P(BackendTest, CombineLaws) {
  std::mt19937_64 random(3);
  const at::Tensor out = Random({3, 67, 2, 5}, random), lse = Random({3, 67, 2}, random, 20);
  const at::Tensor zero = at::zeros({1, 67, 2, 5}, out.options());
  const at::Tensor none = at::full({1, 67, 2}, -kInfinity, out.options());
  const auto part = [](const at::Tensor& x, int64_t i) { return x.narrow(0, i, 1); };
  // One part alone, and with identities around it, comes back bit for bit.
  const at::Tensor padded_out = at::cat({zero, part(out, 0), zero}), padded_lse = at::cat({none, part(lse, 0), none});
  for (const Partial& same :
       {backend_->Combine(part(out, 0), part(lse, 0)), backend_->Combine(padded_out, padded_lse)}) {
    EXPECT_TRUE(at::equal(same.out, out[0]));
    EXPECT_TRUE(at::equal(same.lse, lse[0]));
  }
  const Partial empty = backend_->Combine(at::cat({zero, zero}), at::cat({none, none}));
  EXPECT_TRUE(empty.out.eq(0).all().item<bool>());
  EXPECT_TRUE(empty.lse.eq(-kInfinity).all().item<bool>());
  // Against fp64, and the order and grouping of parts.
  const at::Tensor weights = lse.to(at::kDouble).softmax(0);
  const at::Tensor exact = out.to(at::kDouble).mul(weights.unsqueeze(-1)).sum(0);
  const Partial all = backend_->Combine(out, lse);
  EXPECT_LT(MaxError(all.out, exact), 1e-6);
  EXPECT_LT(MaxError(all.lse, lse.to(at::kDouble).logsumexp({0})), 1e-5);
  const Partial turned = backend_->Combine(out.flip({0}), lse.flip({0}));
  EXPECT_LT(MaxError(turned.out, exact), 1e-6);
  const Partial two = backend_->Combine(out.narrow(0, 0, 2), lse.narrow(0, 0, 2));
  const Partial grouped = backend_->Combine(at::stack({two.out, out[2]}), at::stack({two.lse, lse[2]}));
  EXPECT_LT(MaxError(grouped.out, exact), 1e-6);
  EXPECT_EQ(backend_->Combine(out.narrow(1, 0, 0).contiguous(), lse.narrow(1, 0, 0).contiguous()).out.numel(), 0);
}

TEST_P(BackendTest, Linear) {
  std::mt19937_64 random(5);
  for (const int64_t rows : {0, 1, 2, 3, 4, 5, 7, 8, 9, 17}) {
    for (const int64_t in : {1, 3, 16, 63, 576, 1025}) {
      for (const int64_t outputs : {1, 3, 4, 37, 515}) {
        const at::Tensor x = Random({rows, in}, random), w = Random({outputs, in}, random);
        const at::Tensor exact = x.to(at::kDouble).matmul(w.to(at::kDouble).t());
        at::set_num_threads(in * outputs > 300'000 ? 2 : 1);
        const at::Tensor y = backend_->Linear(x, w);
        at::set_num_threads(1);
        ExpectClose(y, at::linear(x, w), exact, "y");
      }
    }
  }
}

TEST_P(BackendTest, LinearPairs) {
  std::mt19937_64 random(6);
  for (const int64_t rows : {0, 1, 8, 17}) {
    const at::Tensor x = Random({rows, 72}, random);
    const at::Tensor dy = Random({rows, 40}, random), other_dy = Random({rows, 40}, random);
    const at::Tensor one = Random({40, 72}, random), other = Random({40, 72}, random);
    const auto [y, z] = backend_->LinearPair(x, one, other);
    EXPECT_TRUE(at::equal(y, backend_->Linear(x, one)));
    EXPECT_TRUE(at::equal(z, backend_->Linear(x, other)));
    const at::Tensor exact = dy.to(at::kDouble).matmul(one.to(at::kDouble)) +
                             other_dy.to(at::kDouble).matmul(other.to(at::kDouble));
    if (rows > 0) {
      EXPECT_LT(MaxError(backend_->LinearPairGrad(dy, one, other_dy, other, false), exact), 1e-4);
    }
    EXPECT_EQ(backend_->LinearPairGrad(dy, one, other_dy, other, false).sizes(), x.sizes());
  }
}

// A part of the columns of a larger matrix; the others hold what must not be read.
TEST_P(BackendTest, LinearOfColumns) {
  std::mt19937_64 random(6);
  for (const int64_t rows : {1, 3, 8, 9}) {
    for (const int64_t in : {8, 72, 1024}) {
      const at::Tensor x = Random({rows, in}, random), w = Random({37, in}, random);
      const at::Tensor wide = at::full({37, 3 * in}, std::numeric_limits<float>::quiet_NaN());
      const at::Tensor columns = wide.narrow(1, in, in);
      columns.copy_(w);
      EXPECT_TRUE(at::equal(backend_->Linear(x, columns), backend_->Linear(x, w))) << rows << " x " << in;
    }
  }
}

TEST_P(BackendTest, StridesBeyond31Bits) {
  // Two heads 2^31 + 64 elements apart in memory that is never touched between them.
  constexpr int64_t kStride = (int64_t{1} << 31) + 64, kBytes = 2 * kStride * 4;
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "no " << kBytes << " bytes of address space";
  const Scene scene{.pos = Range(100, 140), .keys = 140, .heads = 4, .kv_heads = 2, .head_dim = 16};
  const SceneInput input = MakeInput(scene);
  KvView view;
  view.length = scene.keys;
  view.k = at::from_blob(memory, {2, scene.keys, 16}, {kStride, 16, 1}, at::TensorOptions(at::kFloat));
  view.v = at::from_blob(static_cast<float*>(memory) + 4096, {2, scene.keys, 16}, {kStride, 16, 1},
                         at::TensorOptions(at::kFloat));
  view.k.copy_(input.k);
  view.v.copy_(input.v);
  const Partial far = backend_->Attend(input.q, input.pos, {view});
  const Partial near = backend_->Attend(input.q, input.pos, MakeViews(input, scene, 0));
  EXPECT_TRUE(at::equal(far.out, near.out));
  EXPECT_TRUE(at::equal(far.lse, near.lse));
  munmap(memory, kBytes);
}

INSTANTIATE_TEST_SUITE_P(Kernels, BackendTest, testing::Values(&BaselineKernels(), Avx2Kernels(), Avx512Kernels()),
                         [](const testing::TestParamInfo<const CpuKernels*>& info) {
                           return std::string(std::array{"baseline", "avx2", "avx512"}[info.index]);
                         });

}  // namespace
}  // namespace refocus
