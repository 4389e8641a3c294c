#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>

#include "kernels/attention_plan.h"
#include "tests/kernels/attention_fixture.cuh"

namespace refocus::kernels {
namespace {

// A tensor core adds sixteen products at a time and truncates; 256 columns make sixteen such steps.
constexpr double kScoreError = 1.0 / (1 << 19);
constexpr double kBf16Error = 1.02 / 256;

std::vector<int64_t> MakePositions(const Case& c) {
  std::mt19937_64 random(c.seed * 77 + 5);
  std::vector<int64_t> pos(c.rows);
  for (int64_t i = 0; i < c.rows; ++i) {
    if (c.order == "tail") pos[i] = std::max<int64_t>(0, c.keys - c.rows + i);
    if (c.order == "early") pos[i] = i;
    if (c.order == "behind") pos[i] = c.keys + 1000 + i;
    if (c.order == "random")
      pos[i] = static_cast<int64_t>(random() % static_cast<uint64_t>(std::max<int64_t>(1, c.keys)));
  }
  return pos;
}

double Rms(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value * value;
  return values.empty() ? 0.0 : std::sqrt(sum / static_cast<double>(values.size()));
}

}  // namespace

void PackShard(Shard* shard) {
  AttentionShape& packed = shard->packed;
  packed.int8 = true;
  for (int e = 0; e < packed.extents; ++e) {
    KvSlots& kv = packed.kv[e];
    const int64_t vectors = kv.head_stride / packed.head_dim * packed.kv_heads;
    for (int value = 0; value < 2; ++value) {
      shard->codes.emplace_back(vectors * packed.head_dim);
      shard->scales.emplace_back(vectors);
      PackExtent<<<512, 256>>>(shard->memory[2 * e + value].get(), vectors, packed.head_dim, shard->codes.back().get(),
                               shard->scales.back().get());
      (value == 0 ? kv.k : kv.v) = shard->codes.back().get();
      (value == 0 ? kv.k_scale : kv.v_scale) = shard->scales.back().get();
    }
  }
}

Inputs MakeInputs(const Case& c) {
  Inputs in;
  in.pos_host = MakePositions(c);
  in.pos = DeviceBuffer<int64_t>(in.pos_host);
  const int64_t size = c.rows * c.heads * c.head_dim;
  in.q = Bf16Buffer(size);
  in.dout = Bf16Buffer(size);
  FillNoise<<<256, 256>>>(in.q.get(), size, c.seed * 10 + 1, c.gain);
  FillNoise<<<256, 256>>>(in.dout.get(), size, c.seed * 10 + 2, 1.0f);
  int64_t last_visible = -1;
  for (const int64_t pos : in.pos_host) last_visible = std::max(last_visible, pos);

  for (int64_t shard = 0; shard < c.shards; ++shard) {
    Shard made;
    AttentionShape& shape = made.shape;
    shape.rows = c.rows;
    shape.heads = c.heads;
    shape.kv_heads = c.kv_heads;
    shape.head_dim = c.head_dim;
    shape.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    shape.shards = c.shards;
    shape.shard = shard;
    shape.pos = in.pos.get();
    int64_t local = 0;
    for (int64_t position = 0; position < c.keys; ++position) local += position / 256 % c.shards == shard ? 1 : 0;
    shape.expected_keys = c.expected_keys < 0 ? local : c.expected_keys;
    shape.extents = static_cast<int>(c.cuts.size()) - 1;
    for (int e = 0; e < shape.extents; ++e) {
      KvSlots& kv = shape.kv[e];
      kv.first_index = static_cast<int64_t>(c.cuts[e] * static_cast<double>(local));
      kv.slots = static_cast<int64_t>(c.cuts[e + 1] * static_cast<double>(local)) - kv.first_index;
      kv.head_stride = (kv.slots + 3) * c.head_dim;
      for (int value = 0; value < 2; ++value) {
        made.memory.emplace_back(kv.head_stride * c.kv_heads);
        FillExtent<<<512, 256>>>(made.memory.back().get(), kv.head_stride, c.kv_heads, c.head_dim, kv.slots,
                                 kv.first_index, c.shards, shard, std::min(last_visible, c.keys - 1),
                                 c.seed * 10 + 3 + value);
        (value == 0 ? kv.k : kv.v) = made.memory.back().get();
      }
    }
    made.packed = shape;
    if (c.int8) PackShard(&made);
    in.shards.push_back(std::move(made));
  }
  return in;
}

AttendReference ReferenceAttend(const AttentionShape& shape, const Bf16Buffer& q) {
  const int64_t row_heads = shape.rows * shape.heads;
  DeviceBuffer<double> out(row_heads * shape.head_dim), lse(row_heads), out_abs(row_heads * shape.head_dim),
      score_abs(row_heads);
  if (row_heads > 0) {
    reference::AttendKernel<<<static_cast<unsigned>(row_heads), reference::kThreads>>>(
        shape, q.get(), {out.get(), lse.get(), out_abs.get(), score_abs.get()});
  }
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << "reference";
  return {out.Host(), lse.Host(), out_abs.Host(), score_abs.Host()};
}

QueryGradReference ReferenceQueryGrad(const AttentionShape& shape, const Bf16Buffer& q, const Bf16Buffer& dout,
                                      const DeviceBuffer<float>& lse, const DeviceBuffer<float>& row_dot) {
  const int64_t size = shape.rows * shape.heads * shape.head_dim;
  DeviceBuffer<double> dq(size), ds_abs(size), dot_abs(size);
  if (size > 0) {
    reference::QueryGradKernel<<<static_cast<unsigned>(shape.rows * shape.heads), reference::kThreads>>>(
        shape, q.get(), dout.get(), lse.get(), row_dot.get(), {dq.get(), ds_abs.get(), dot_abs.get()});
  }
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << "reference";
  return {dq.Host(), ds_abs.Host(), dot_abs.Host()};
}

AttendReference CombineReference(const std::vector<AttendReference>& parts, int head_dim) {
  AttendReference sum = parts.front();
  for (size_t i = 0; i < sum.lse.size(); ++i) {
    double high = -INFINITY;
    for (const AttendReference& part : parts) high = std::max(high, part.lse[i]);
    double total = 0.0;
    for (const AttendReference& part : parts) {
      total += high == -INFINITY ? 0.0 : std::exp(part.lse[i] - high);
      sum.score_abs[i] = std::max(sum.score_abs[i], part.score_abs[i]);
    }
    sum.lse[i] = high == -INFINITY ? -INFINITY : high + std::log(total);
    for (size_t j = i * head_dim; j < (i + 1) * head_dim; ++j) {
      sum.out[j] = sum.out_abs[j] = 0.0;
      for (const AttendReference& part : parts) {
        const double weight = high == -INFINITY ? 0.0 : std::exp(part.lse[i] - high) / total;
        sum.out[j] += weight * part.out[j];
        sum.out_abs[j] += weight * part.out_abs[j];
      }
    }
  }
  return sum;
}

Worst CompareAttend(const std::vector<float>& out, const std::vector<float>& lse, const AttendReference& want,
                    int head_dim) {
  Worst worst;
  const double rms = Rms(want.out);
  for (size_t i = 0; i < lse.size(); ++i) {
    const bool none = want.lse[i] == -INFINITY;
    if (none && lse[i] != -INFINITY) worst.See(NAN, 0.0, 1.0, 0.0, "lse should be -inf", static_cast<int64_t>(i));
    const double score_error = kScoreError * want.score_abs[i];
    if (!none) {
      worst.See(lse[i], want.lse[i], 1e-5 + score_error + std::fabs(want.lse[i]) / (1 << 21), 0.0, "lse",
                static_cast<int64_t>(i));
    }
    for (size_t j = i * head_dim; j < (i + 1) * head_dim; ++j) {
      const double bound = none ? 1e-300 : want.out_abs[j] * (kBf16Error + 2 * score_error + 1e-5) + 1e-30;
      worst.See(out[j], want.out[j], bound, rms, "out", static_cast<int64_t>(j));
    }
  }
  return worst;
}

Worst CompareQueryGrad(const std::vector<float>& dq, const QueryGradReference& want, const AttendReference& attend,
                       const std::vector<float>& lse, int head_dim) {
  Worst worst;
  const double rms = Rms(want.dq);
  for (size_t j = 0; j < dq.size(); ++j) {
    const size_t i = j / head_dim;
    const bool none = lse[i] == -INFINITY;
    const double weight_error = none ? 0.0 : kScoreError * attend.score_abs[i] + std::fabs(lse[i]) / (1 << 21) + 1e-5;
    const double bound = want.ds_abs[j] * (kBf16Error + 2 * weight_error) + want.dot_abs[j] * kScoreError + 1e-30;
    worst.See(dq[j], want.dq[j], bound, rms, "dq", static_cast<int64_t>(j));
  }
  return worst;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void RunAttend(const AttentionShape& shape, const Bf16Buffer& q, int sm_count, PartialOut* result) {
  const int64_t row_heads = shape.rows * shape.heads;
  for (const int poison : {0xff, 0x3f}) {
    DeviceBuffer<float> out(row_heads * shape.head_dim), lse(row_heads);
    DeviceBuffer<unsigned char> workspace(AttendWorkspaceBytes(shape, sm_count));
    out.Poison(poison);
    lse.Poison(poison);
    workspace.Poison(poison);
    AttendParams params;
    params.shape = shape;
    params.q = q.get();
    params.out = out.get();
    params.lse = lse.get();
    params.workspace = workspace.get();
    ASSERT_CUDA(Attend(params, sm_count, nullptr));
    ASSERT_CUDA(cudaDeviceSynchronize());
    PartialOut run{out.Host(), lse.Host()};
    if (poison != 0xff) {
      EXPECT_TRUE(SameBits(run.out, result->out) && SameBits(run.lse, result->lse)) << "a second run differs";
    }
    *result = std::move(run);
  }
}

void RunQueryGrad(const AttentionShape& shape, const Inputs& in, const DeviceBuffer<float>& lse,
                  const DeviceBuffer<float>& row_dot, int sm_count, std::vector<float>* result) {
  for (const int poison : {0xff, 0x3f}) {
    DeviceBuffer<float> dq(shape.rows * shape.heads * shape.head_dim);
    DeviceBuffer<unsigned char> workspace(QueryGradWorkspaceBytes(shape, sm_count));
    dq.Poison(poison);
    workspace.Poison(poison);
    QueryGradParams params;
    params.shape = shape;
    params.q = in.q.get();
    params.dout = in.dout.get();
    params.lse = lse.get();
    params.row_dot = row_dot.get();
    params.dq = dq.get();
    params.workspace = workspace.get();
    ASSERT_CUDA(QueryGrad(params, sm_count, nullptr));
    ASSERT_CUDA(cudaDeviceSynchronize());
    std::vector<float> run = dq.Host();
    if (poison != 0xff) EXPECT_TRUE(SameBits(run, *result)) << "a second run differs";
    *result = std::move(run);
  }
}

void RunCombine(const Case& c, const std::vector<PartialOut>& parts, Combined* result) {
  PartialOut all;
  for (const PartialOut& part : parts) {
    all.out.insert(all.out.end(), part.out.begin(), part.out.end());
    all.lse.insert(all.lse.end(), part.lse.begin(), part.lse.end());
  }
  const DeviceBuffer<float> part_out(all.out), part_lse(all.lse);
  DeviceBuffer<float> out(c.rows * c.heads * c.head_dim), lse(c.rows * c.heads);
  Bf16Buffer rounded(c.rows * c.heads * c.head_dim);
  CombineParams params;
  params.parts = static_cast<int64_t>(parts.size());
  params.rows = c.rows;
  params.heads = c.heads;
  params.head_dim = c.head_dim;
  params.part_out = part_out.get();
  params.part_lse = part_lse.get();
  params.out = out.get();
  params.lse = lse.get();
  params.out_bf16 = rounded.get();
  ASSERT_CUDA(Combine(params, nullptr));
  ASSERT_CUDA(cudaDeviceSynchronize());
  *result = {{out.Host(), lse.Host()}, rounded.Host()};
}

std::vector<float> RowDot(const Bf16Buffer& dout, const std::vector<double>& out, int head_dim) {
  const std::vector<__nv_bfloat16> gradient = dout.Host();
  std::vector<float> row_dot(out.size() / head_dim);
  for (size_t i = 0; i < row_dot.size(); ++i) {
    double sum = 0.0;
    for (size_t j = i * head_dim; j < (i + 1) * head_dim; ++j) sum += __bfloat162float(gradient[j]) * out[j];
    row_dot[i] = static_cast<float>(sum);
  }
  return row_dot;
}

// The portable kernels do the same arithmetic on codes as on the numbers that they stand for, unless they take columns
// in another order.
void ExpectSameAsWidened(AttentionShape shape, AttentionShape packed, const Bf16Buffer& q, int sm_count) {
  if (WidensInRegisters(PaddedHeadDim(shape.head_dim), AttendTileRows(PackedRows(shape)))) return;
  shape.portable_only = packed.portable_only = true;
  if (AttendSplits(shape, sm_count) != AttendSplits(packed, sm_count)) return;
  PartialOut got, want;
  RunAttend(packed, q, sm_count, &got);
  RunAttend(shape, q, sm_count, &want);
  EXPECT_TRUE(SameBits(got.out, want.out) && SameBits(got.lse, want.lse)) << "other bits than in bf16";
}

// Every shard forward, the combination, every shard backward: each against fp64.
void Check(const Case& c, int sm_count, Worst* forward, Worst* backward) {
  SCOPED_TRACE(c.Describe());
  const Inputs in = MakeInputs(c);
  std::vector<PartialOut> parts(c.shards);
  std::vector<AttendReference> wants;
  Worst here;
  for (int64_t shard = 0; shard < c.shards; ++shard) {
    const AttentionShape& shape = in.shards[shard].shape;
    const AttentionShape& packed = in.shards[shard].packed;
    RunAttend(packed, in.q, sm_count, &parts[shard]);
    if (c.int8) ExpectSameAsWidened(shape, packed, in.q, sm_count);
    if (::testing::Test::HasFatalFailure()) return;
    wants.push_back(ReferenceAttend(shape, in.q));
    here.Merge(CompareAttend(parts[shard].out, parts[shard].lse, wants.back(), c.head_dim),
               "shard " + std::to_string(shard) + " in " + std::to_string(AttendSplits(packed, sm_count)) + " splits");
  }
  Combined combined;
  RunCombine(c, parts, &combined);
  if (::testing::Test::HasFatalFailure()) return;
  const AttendReference want = CombineReference(wants, c.head_dim);
  here.Merge(CompareAttend(combined.partial.out, combined.partial.lse, want, c.head_dim), "combined");
  int64_t wrongly_rounded = 0;
  for (size_t i = 0; i < combined.rounded.size(); ++i) {
    wrongly_rounded +=
        __bfloat162float(combined.rounded[i]) != __bfloat162float(__float2bfloat16(combined.partial.out[i]));
  }
  EXPECT_EQ(wrongly_rounded, 0);
  EXPECT_LE(here.share, 1.0) << here.where;
  forward->Merge(here, c.Describe());

  const std::vector<float> lse_host(want.lse.begin(), want.lse.end());
  const DeviceBuffer<float> lse(lse_host), row_dot(RowDot(in.dout, want.out, c.head_dim));
  here = Worst();
  for (int64_t shard = 0; shard < c.shards; ++shard) {
    const AttentionShape& shape = in.shards[shard].shape;
    const AttentionShape& packed = in.shards[shard].packed;
    std::vector<float> dq;
    RunQueryGrad(packed, in, lse, row_dot, sm_count, &dq);
    if (::testing::Test::HasFatalFailure()) return;
    here.Merge(
        CompareQueryGrad(dq, ReferenceQueryGrad(shape, in.q, in.dout, lse, row_dot), wants[shard], lse_host,
                         c.head_dim),
        "shard " + std::to_string(shard) + " in " + std::to_string(QueryGradSplits(packed, sm_count)) + " splits");
  }
  EXPECT_LE(here.share, 1.0) << here.where;
  backward->Merge(here, c.Describe());
}

void Print(const char* what, const Worst& worst) {
  std::printf("  %s: worst error %.3f of its bound, %.2e of the rms; %s\n", what, worst.share, worst.of_rms,
              worst.where.c_str());
}

void CheckAll(const std::vector<Case>& cases, int sm_count) {
  Worst forward;
  Worst backward;
  int failed = 0;
  for (const Case& c : cases) {
    const int before = ::testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
    Check(c, sm_count, &forward, &backward);
    const int after = ::testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
    failed += after > before ? 1 : 0;
    // An illegal access fails everything after it; some failures tell as much as all.
    if (failed >= 8 || cudaPeekAtLastError() != cudaSuccess) break;
  }
  std::printf("  %zu cases\n", cases.size());
  Print("forward", forward);
  Print("backward", backward);
}

}  // namespace refocus::kernels
