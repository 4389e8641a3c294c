// Partial attention, its query gradient and the combination against fp64 references on the same bf16 inputs. Keys that
// no row sees, the gaps between heads, results and workspaces hold NaN beforehand.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "tests/kernels/attention_fixture.cuh"

namespace refocus::kernels {
namespace {

TEST_F(Attention, ReferenceAgreesWithTheDefinitionOnTheHost) {
  Case c{.rows = 5, .heads = 6, .kv_heads = 2, .head_dim = 40, .keys = 700, .shards = 2, .order = "random"};
  const Inputs in = MakeInputs(c);
  const AttentionShape& shape = in.shards[1].shape;
  const AttendReference got = ReferenceAttend(shape, in.q);
  const std::vector<__nv_bfloat16> q = in.q.Host(), k = in.shards[1].memory[0].Host(),
                                   v = in.shards[1].memory[1].Host();
  for (int64_t i = 0; i < c.rows * c.heads; ++i) {
    const int64_t kv = i % c.heads / 3 * shape.kv[0].head_stride;
    double sum = 0.0;
    std::vector<double> out(c.head_dim, 0.0);
    int64_t slot = 0;
    for (int64_t position = 0; position < c.keys; ++position) {
      if (position / 256 % 2 != 1) continue;
      if (position <= in.pos_host[i / c.heads]) {
        double score = 0.0;
        for (int d = 0; d < 40; ++d) {
          score += static_cast<double>(__bfloat162float(q[i * 40 + d])) * __bfloat162float(k[kv + slot * 40 + d]);
        }
        const double weight = std::exp(score * shape.scale);
        sum += weight;
        for (int d = 0; d < 40; ++d) out[d] += weight * __bfloat162float(v[kv + slot * 40 + d]);
      }
      ++slot;
    }
    if (sum == 0.0) {
      EXPECT_EQ(got.lse[i], -INFINITY);
      continue;
    }
    EXPECT_NEAR(got.lse[i], std::log(sum), 1e-9);
    for (int d = 0; d < 40; ++d) EXPECT_NEAR(got.out[i * 40 + d], out[d] / sum, 1e-9);
  }
}

// Few and small enough for the race checker.
TEST_F(Attention, SmallestOfEveryPath) {
  std::vector<Case> cases;
  for (const int head_dim : {40, 64, 128}) {
    for (const int64_t rows : {1, 33}) {  // split over the keys, and not
      cases.push_back({.rows = rows, .heads = 4, .kv_heads = 2, .head_dim = head_dim, .keys = 300, .seed = 77});
      if (head_dim == 40) continue;
      cases.push_back(cases.back());
      cases.back().int8 = true;
    }
  }
  CheckAll(cases, sm_count_);
}

TEST_F(Attention, EveryHeadDimension) {
  std::vector<Case> cases;
  uint64_t seed = 100;
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    // A decode tile, a middle one and a full one of each.
    cases.push_back({.rows = 3, .heads = 6, .kv_heads = 2, .head_dim = head_dim, .keys = 513, .seed = ++seed});
    cases.push_back({.rows = 17, .heads = 6, .kv_heads = 2, .head_dim = head_dim, .keys = 300, .seed = ++seed});
    cases.push_back(
        {.rows = 65, .heads = 6, .kv_heads = 2, .head_dim = head_dim, .keys = 700, .shards = 2, .seed = ++seed});
  }
  CheckAll(cases, sm_count_);
}

TEST_F(Attention, EightBits) {
  std::vector<Case> cases;
  uint64_t seed = 20000;
  const std::vector<std::vector<double>> cuts = {{0.0, 1.0}, {0.0, 0.0, 0.4, 1.0}, {0.1, 0.33, 0.34, 1.0}};
  for (int head_dim = 16; head_dim <= 256; head_dim += 16) {
    for (const int64_t rows : {1, 3, 9, 40, 150}) {  // tiles of 16, of 64 and of 128 rows
      for (const int64_t keys : {1, 63, 65, 513, 2000}) {
        ++seed;
        const char* order = seed % 3 == 0 ? "tail" : seed % 3 == 1 ? "random" : "early";
        cases.push_back({.rows = rows,
                         .heads = 4,
                         .kv_heads = 2,
                         .head_dim = head_dim,
                         .keys = keys,
                         .shards = 1 + static_cast<int64_t>(seed % 3),
                         .cuts = cuts[seed % 5 % 3],
                         .order = order,
                         .gain = seed % 7 == 0 ? 30.0f : 1.0f,
                         .expected_keys = seed % 2 == 0 ? -1 : 100000,
                         .seed = seed,
                         .int8 = true});
      }
    }
  }
  CheckAll(cases, sm_count_);
}

// Rows of one tile that widens codes in registers, and whole and padded head_dims of both its sizes.
TEST_F(Attention, EightBitsOfFewRows) {
  std::vector<Case> cases;
  uint64_t seed = 22000;
  const std::vector<std::vector<double>> cuts = {{0.0, 1.0}, {0.0, 0.0, 0.4, 1.0}, {0.1, 0.33, 0.34, 1.0}};
  for (const int head_dim : {48, 64, 112, 128}) {
    for (const int group : {1, 3, 4, 8, 16}) {
      for (const int64_t keys : {1, 31, 33, 127, 128, 129, 255, 257, 700, 5000}) {
        for (const int64_t rows : {1, 2, 5, 16}) {
          if (rows * group > 16) continue;
          ++seed;
          const char* order = seed % 4 == 0 ? "tail" : seed % 4 == 1 ? "random" : seed % 4 == 2 ? "early" : "behind";
          cases.push_back({.rows = rows,
                           .heads = 2 * group,
                           .kv_heads = 2,
                           .head_dim = head_dim,
                           .keys = keys,
                           .shards = 1 + static_cast<int64_t>(seed % 3),
                           .cuts = cuts[seed % 5 % 3],
                           .order = order,
                           .gain = seed % 7 == 0 ? 30.0f : 1.0f,
                           .expected_keys = seed % 2 == 0 ? -1 : 100000,
                           .seed = seed,
                           .int8 = true});
        }
      }
    }
  }
  CheckAll(cases, sm_count_);
}

// The output of a row that sees one key is its V: code * scale rounded to bf16, which the bounds of other tests are too
// wide to tell from code * scale.
TEST_F(Attention, EightBitsStandForRoundedNumbers) {
  for (int head_dim = 16; head_dim <= 256; head_dim += 16) {
    for (const int64_t rows : {1, 12, 40}) {
      const Case c{.rows = rows,
                   .heads = 4,
                   .kv_heads = 2,
                   .head_dim = head_dim,
                   .keys = 1,
                   .order = "behind",
                   .seed = 23000 + static_cast<uint64_t>(head_dim),
                   .int8 = true};
      SCOPED_TRACE(c.Describe());
      const Inputs in = MakeInputs(c);
      PartialOut got;
      RunAttend(in.shards[0].packed, in.q, sm_count_, &got);
      if (HasFatalFailure()) return;
      const std::vector<__nv_bfloat16> v = in.shards[0].memory[1].Host();
      const int64_t head_stride = in.shards[0].shape.kv[0].head_stride;
      int64_t wrong = 0;
      for (int64_t i = 0; i < rows * c.heads; ++i) {
        for (int d = 0; d < head_dim; ++d) {
          const float want = __bfloat162float(v[i % c.heads / 2 * head_stride + d]);
          const float error = std::fabs(got.out[i * head_dim + d] - want);
          wrong += !(error <= 1e-5f * std::fabs(want));
        }
      }
      EXPECT_EQ(wrong, 0);
    }
  }
}

TEST_F(Attention, EveryNumberOfRowsAndKeys) {
  std::vector<Case> cases;
  uint64_t seed = 1000;
  for (const int64_t rows : {0, 1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300}) {
    for (const int64_t keys : {0, 1, 63, 64, 65, 255, 256, 257, 1000}) {
      ++seed;
      const char* order = seed % 3 == 0 ? "tail" : seed % 3 == 1 ? "random" : "early";
      cases.push_back({.rows = rows,
                       .heads = 4,
                       .kv_heads = 1 + static_cast<int>(seed % 2),
                       .head_dim = 64,
                       .keys = keys,
                       .order = order,
                       .seed = seed});
    }
  }
  CheckAll(cases, sm_count_);
}

TEST_F(Attention, EveryGroupSize) {
  std::vector<Case> cases;
  for (const int group : {1, 2, 3, 4, 5, 8, 16}) {
    for (const int64_t rows : {1, 7, 33}) {
      cases.push_back({.rows = rows,
                       .heads = 2 * group,
                       .kv_heads = 2,
                       .head_dim = 128,
                       .keys = 1000,
                       .shards = 3,
                       .order = "random",
                       .seed = static_cast<uint64_t>(group * 100 + rows)});
    }
  }
  CheckAll(cases, sm_count_);
}

TEST_F(Attention, ExtentsAnywhereInTheShard) {
  std::vector<Case> cases;
  uint64_t seed = 2000;
  const std::vector<std::vector<double>> cuts = {
      {0.3, 1.0}, {0.0, 0.5, 1.0}, {0.0, 0.0, 1.0}, {0.0, 1.0, 1.0}, {0.1, 0.1, 0.4, 0.4, 1.0}, {0.0, 0.33, 0.34, 1.0},
      {0.0}};
  for (const std::vector<double>& cut : cuts) {
    for (const int64_t shards : {1, 2, 3}) {
      for (const char* order : {"tail", "random", "behind", "early"}) {
        for (const int64_t rows : {2, 40}) {
          cases.push_back({.rows = rows,
                           .heads = 8,
                           .kv_heads = 2,
                           .head_dim = 96,
                           .keys = 1500,
                           .shards = shards,
                           .cuts = cut,
                           .order = order,
                           .seed = ++seed});
        }
      }
    }
  }
  CheckAll(cases, sm_count_);
}

// More splits than key tiles, and one where many would do.
TEST_F(Attention, WrongExpectationsCostTimeOnly) {
  std::vector<Case> cases;
  uint64_t seed = 3000;
  for (const int64_t expected : {0, 1000, 1000000}) {
    for (const int64_t rows : {1, 9, 70}) {
      for (const int64_t keys : {1, 200, 5000}) {
        for (const int head_dim : {64, 128, 256}) {
          cases.push_back({.rows = rows,
                           .heads = 8,
                           .kv_heads = 2,
                           .head_dim = head_dim,
                           .keys = keys,
                           .shards = 2,
                           .order = "random",
                           .expected_keys = expected,
                           .seed = ++seed});
        }
      }
    }
  }
  CheckAll(cases, sm_count_);
}

TEST_F(Attention, ExtremeLogits) {
  std::vector<Case> cases;
  uint64_t seed = 4000;
  for (const int64_t rows : {1, 9, 70}) {
    for (const int head_dim : {16, 80, 128, 256}) {
      for (const float gain : {0.0f, 30.0f}) {
        cases.push_back({.rows = rows,
                         .heads = 8,
                         .kv_heads = 2,
                         .head_dim = head_dim,
                         .keys = 2000,
                         .shards = 2,
                         .order = "random",
                         .gain = gain,
                         .expected_keys = 100000,
                         .seed = ++seed});
      }
    }
  }
  CheckAll(cases, sm_count_);
}

TEST_F(Attention, RandomShapes) {
  std::mt19937_64 random(5);
  const auto pick = [&](const auto& values) { return values[random() % values.size()]; };
  std::vector<Case> cases;
  for (int i = 0; i < 150; ++i) {
    Case c;
    c.rows = pick(std::vector<int64_t>{1, 2, 3, 5, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200});
    c.kv_heads = pick(std::vector<int>{1, 2, 3, 8});
    c.heads = c.kv_heads * pick(std::vector<int>{1, 2, 3, 4, 5, 8});
    c.head_dim = 8 * (1 + static_cast<int>(random() % 32));
    c.keys = pick(std::vector<int64_t>{1, 64, 255, 256, 257, 511, 1000, 3000});
    c.shards = pick(std::vector<int64_t>{1, 2, 3, 8});
    c.cuts = pick(std::vector<std::vector<double>>{{0.0, 1.0}, {0.0, 0.6, 1.0}, {0.2, 0.5, 0.5, 1.0}, {0.7, 0.9}});
    c.order = pick(std::vector<const char*>{"tail", "random", "early", "behind"});
    c.gain = pick(std::vector<float>{1.0f, 4.0f});
    c.expected_keys = pick(std::vector<int64_t>{-1, 0, 100000});
    c.seed = 5000 + i;
    cases.push_back(c);
  }
  CheckAll(cases, sm_count_);
}

// The shards of one context against the same context unsharded: forward combined, backward added up.
TEST_F(Attention, ShardsAddUpToTheWhole) {
  Case whole{.rows = 33, .heads = 12, .kv_heads = 4, .head_dim = 128, .keys = 3000, .order = "random", .seed = 6000};
  const Inputs in_whole = MakeInputs(whole);
  const AttendReference want = ReferenceAttend(in_whole.shards[0].shape, in_whole.q);
  const std::vector<float> lse_host(want.lse.begin(), want.lse.end());
  const DeviceBuffer<float> lse(lse_host), row_dot(RowDot(in_whole.dout, want.out, whole.head_dim));
  const QueryGradReference want_dq =
      ReferenceQueryGrad(in_whole.shards[0].shape, in_whole.q, in_whole.dout, lse, row_dot);
  for (const int64_t shards : {1, 2, 3, 8}) {
    Case c = whole;
    c.shards = shards;
    const Inputs in = MakeInputs(c);
    std::vector<PartialOut> parts(shards);
    std::vector<float> dq(want_dq.dq.size(), 0.0f);
    for (int64_t shard = 0; shard < shards; ++shard) {
      RunAttend(in.shards[shard].shape, in.q, sm_count_, &parts[shard]);
      std::vector<float> part;
      RunQueryGrad(in.shards[shard].shape, in, lse, row_dot, sm_count_, &part);
      if (HasFatalFailure()) return;
      for (size_t i = 0; i < dq.size(); ++i) dq[i] += part[i];
    }
    Combined combined;
    RunCombine(c, parts, &combined);
    if (HasFatalFailure()) return;
    const Worst forward = CompareAttend(combined.partial.out, combined.partial.lse, want, c.head_dim);
    const Worst backward = CompareQueryGrad(dq, want_dq, want, lse_host, c.head_dim);
    std::printf("  %d shards\n", static_cast<int>(shards));
    Print("forward", forward);
    Print("backward", backward);
    EXPECT_LE(forward.share, 1.0) << shards << " shards: " << forward.where;
    EXPECT_LE(backward.share, 1.0) << shards << " shards: " << backward.where;
  }
}

TEST_F(Attention, CombineLeavesEmptyPartsOut) {
  Case c{.rows = 3, .heads = 1, .head_dim = 8};
  const float none = -INFINITY;
  std::vector<PartialOut> parts(20, PartialOut{std::vector<float>(24, 7.5f), {none, none, none}});
  for (int j = 0; j < 8; ++j) {
    parts[2].out[j] = 1.0f;
    parts[17].out[j] = 3.0f;
    parts[19].out[8 + j] = -2.0f;
  }
  parts[2].lse[0] = 100.0f;
  parts[17].lse[0] = 100.0f + std::log(3.0f);
  parts[19].lse[1] = -300.0f;
  Combined got;
  RunCombine(c, parts, &got);
  if (HasFatalFailure()) return;
  for (int j = 0; j < 8; ++j) {
    EXPECT_NEAR(got.partial.out[j], 2.5f, 1e-4f);
    EXPECT_EQ(got.partial.out[8 + j], -2.0f);
    EXPECT_EQ(got.partial.out[16 + j], 0.0f);
  }
  EXPECT_NEAR(got.partial.lse[0], 100.0f + std::log(4.0f), 2e-5f);
  EXPECT_EQ(got.partial.lse[1], -300.0f);
  EXPECT_EQ(got.partial.lse[2], none);
}

// A replayed graph reads the positions of that moment.
void CheckGraph(int64_t rows, int sm_count) {
  Case c{.rows = rows, .heads = 8, .kv_heads = 2, .head_dim = 128, .keys = 4000, .order = "tail", .seed = 7000};
  const Inputs in = MakeInputs(c);
  AttendParams params;
  params.shape = in.shards[0].shape;
  DeviceBuffer<float> out(rows * 8 * 128), lse(rows * 8);
  DeviceBuffer<unsigned char> workspace(AttendWorkspaceBytes(params.shape, sm_count));
  params.q = in.q.get();
  params.out = out.get();
  params.lse = lse.get();
  params.workspace = workspace.get();
  ASSERT_GT(AttendSplits(params.shape, sm_count), 1);
  ASSERT_CUDA(Attend(params, sm_count, nullptr));  // loads the kernels, which a capture may not
  ASSERT_CUDA(cudaDeviceSynchronize());

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_CUDA(cudaStreamCreate(&stream));
  ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  const cudaError_t enqueued = Attend(params, sm_count, stream);
  ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  ASSERT_CUDA(enqueued);
  ASSERT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (const int64_t at : {3999, 5, 2000}) {
    std::vector<int64_t> pos(rows, at);
    pos.back() = at / 2;
    ASSERT_CUDA(cudaMemcpy(in.pos.get(), pos.data(), rows * sizeof(int64_t), cudaMemcpyHostToDevice));
    ASSERT_CUDA(cudaGraphLaunch(exec, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    const PartialOut replayed{out.Host(), lse.Host()};
    const Worst worst = CompareAttend(replayed.out, replayed.lse, ReferenceAttend(params.shape, in.q), 128);
    EXPECT_LE(worst.share, 1.0) << "position " << at << ": " << worst.where;
    PartialOut direct;
    RunAttend(params.shape, in.q, sm_count, &direct);
    EXPECT_TRUE(SameBits(direct.out, replayed.out)) << "position " << at;
  }
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST_F(Attention, GraphReplaysWithNewPositions) {
  CheckGraph(2, sm_count_);
  CheckGraph(40, sm_count_);
}

TEST_F(Attention, RefusesShapesOutsideItsLimits) {
  AttendParams params;
  params.shape.rows = 1;
  params.shape.heads = 3;
  params.shape.kv_heads = 2;
  params.shape.head_dim = 64;
  params.shape.scale = 1.0f;
  EXPECT_EQ(Attend(params, sm_count_, nullptr), cudaErrorInvalidValue);
  params.shape.heads = 4;
  params.shape.head_dim = 264;
  EXPECT_EQ(Attend(params, sm_count_, nullptr), cudaErrorInvalidValue);
  QueryGradParams gradient;
  gradient.shape = params.shape;
  EXPECT_EQ(QueryGrad(gradient, sm_count_, nullptr), cudaErrorInvalidValue);
  params.shape.head_dim = 64;
  params.shape.int8 = true;
  params.shape.extents = 1;
  const Bf16Buffer some(64);
  params.shape.kv[0] = {some.get(), some.get(), 64, 1, 0};  // no scales
  EXPECT_EQ(Attend(params, sm_count_, nullptr), cudaErrorInvalidValue);
  params.shape.extents = 0;
  params.shape.head_dim = 72;
  EXPECT_EQ(Attend(params, sm_count_, nullptr), cudaErrorInvalidValue);
  CombineParams combine;
  combine.parts = -1;
  EXPECT_EQ(Combine(combine, nullptr), cudaErrorInvalidValue);
}

__global__ void PlantKey(__nv_bfloat16* k, int64_t slot, int head_dim) {
  k[slot * head_dim + threadIdx.x] = __float2bfloat16(threadIdx.x % 2 == 0 ? 2.0f : -2.0f);
}

__global__ void PlantQuery(__nv_bfloat16* q, int head_dim) {
  q[blockIdx.x * head_dim + threadIdx.x] = __float2bfloat16(threadIdx.x % 2 == 0 ? 1.0f : -1.0f);
}

// Offsets beyond 2^31 elements within one head: keys planted on both sides of the border take nearly all the weight.
TEST_F(Attention, OffsetsBeyondTwoToThe31) {
  constexpr int kDim = 256;
  constexpr int64_t kBorder = (int64_t{1} << 31) / kDim;
  constexpr int64_t kSlots = kBorder + 1000;
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  ASSERT_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < (size_t{10} << 30))
    GTEST_SKIP() << "10 GiB of GPU memory wanted, " << (free_bytes >> 20) << " MiB free";
  Bf16Buffer k(kSlots * kDim), v(kSlots * kDim);
  FillNoise<<<4096, 256>>>(k.get(), k.size(), 1, 0.5f);
  FillNoise<<<4096, 256>>>(v.get(), v.size(), 2, 1.0f);
  for (const int64_t slot : {int64_t{3}, kBorder - 1, kBorder + 5, kBorder + 700})
    PlantKey<<<1, kDim>>>(k.get(), slot, kDim);

  Inputs in;
  in.pos_host = {kSlots - 1, kBorder + 6};
  in.pos = DeviceBuffer<int64_t>(in.pos_host);
  AttentionShape shape;
  shape.rows = 2;
  shape.heads = 2;
  shape.kv_heads = 1;
  shape.head_dim = kDim;
  shape.scale = 1.0f / 16;
  shape.extents = 1;
  shape.kv[0] = {k.get(), v.get(), kSlots * kDim, kSlots, 0};
  shape.pos = in.pos.get();
  shape.expected_keys = kSlots;
  in.q = Bf16Buffer(4 * kDim);
  in.dout = Bf16Buffer(4 * kDim);
  PlantQuery<<<4, kDim>>>(in.q.get(), kDim);
  FillNoise<<<4, 256>>>(in.dout.get(), in.dout.size(), 3, 1.0f);

  PartialOut got;
  RunAttend(shape, in.q, sm_count_, &got);
  if (HasFatalFailure()) return;
  const AttendReference want = ReferenceAttend(shape, in.q);
  const Worst forward = CompareAttend(got.out, got.lse, want, kDim);
  Print("forward", forward);
  EXPECT_LE(forward.share, 1.0) << forward.where;
  const std::vector<float> lse_host(want.lse.begin(), want.lse.end());
  const DeviceBuffer<float> lse(lse_host), row_dot(RowDot(in.dout, want.out, kDim));
  std::vector<float> dq;
  RunQueryGrad(shape, in, lse, row_dot, sm_count_, &dq);
  if (HasFatalFailure()) return;
  const Worst backward =
      CompareQueryGrad(dq, ReferenceQueryGrad(shape, in.q, in.dout, lse, row_dot), want, lse_host, kDim);
  Print("backward", backward);
  EXPECT_LE(backward.share, 1.0) << backward.where;
}

}  // namespace
}  // namespace refocus::kernels
