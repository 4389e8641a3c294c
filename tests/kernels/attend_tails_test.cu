// Attention of decode rows over their own extents against the fp64 reference: rows with different extents, lengths and
// layers' places in one launch; rows that see nothing; a replayed graph that reads what the host wrote meanwhile.
#include <utility>

#include "tests/kernels/attention_fixture.cuh"

namespace refocus::kernels {
namespace {

struct Shape {
  int heads, kv_heads, head_dim;
  int64_t shards;
  bool int8 = false;
};

// One row of a launch, with a case of its own for its keys.
struct Row {
  Inputs in;
  const AttentionShape& shape(int64_t shard) const { return in.shards[shard].shape; }
  const AttentionShape& packed(int64_t shard) const { return in.shards[shard].packed; }
};

constexpr int64_t kLayer = 3;
constexpr int64_t kLayerStride = int64_t{5} << 20;  // the other layers are never read, so they need not exist

std::vector<Row> MakeRows(const Shape& shape) {
  std::vector<Row> rows;
  uint64_t seed = 1;
  for (const int64_t keys : {1, 2, 17, 63, 64, 65, 300, 513, 1100, 5000}) {
    Case c;
    c.heads = shape.heads;
    c.kv_heads = shape.kv_heads;
    c.head_dim = shape.head_dim;
    c.shards = shape.shards;
    c.keys = keys;
    c.int8 = shape.int8;
    c.seed = seed++;
    if (keys % 2 == 1) c.cuts = {0.0, 0.3, 1.0};
    if (keys == 1100) c.cuts = {0.0, 0.1, 0.4, 0.8, 1.0};
    c.order = keys == 300 ? "behind" : keys > 1000 ? "random" : "tail";  // random: not all keys are seen
    c.gain = keys == 513 ? 30.0f : 1.0f;
    rows.push_back({MakeInputs(c)});
  }
  return rows;
}

// The host's side of a launch: every row's place in the tables.
struct Tables {
  std::vector<int64_t> pos;
  std::vector<TailExtent> tails;
};

Tables MakeTables(const std::vector<Row>& rows, int64_t shard) {
  Tables tables;
  for (const Row& row : rows) {
    const AttentionShape& shape = row.packed(shard);
    const int64_t bytes = shape.int8 ? 1 : 2;
    tables.pos.push_back(row.in.pos_host[0]);
    for (int e = 0; e < kTailExtents; ++e) {
      TailExtent tail;
      if (e < shape.extents) {
        const KvSlots& kv = shape.kv[e];
        tail.k = static_cast<const char*>(kv.k) - kLayer * kLayerStride * bytes;
        tail.v = static_cast<const char*>(kv.v) - kLayer * kLayerStride * bytes;
        if (shape.int8) {
          tail.k_scale = static_cast<const uint16_t*>(kv.k_scale) - kLayer * kLayerStride / shape.head_dim;
          tail.v_scale = static_cast<const uint16_t*>(kv.v_scale) - kLayer * kLayerStride / shape.head_dim;
        }
        tail.layer_stride = kLayerStride;
        tail.head_stride = kv.head_stride;
        tail.slots = kv.slots;
        tail.first_index = kv.first_index;
      }
      tables.tails.push_back(tail);
    }
  }
  return tables;
}

// All rows in one launch, its splits combined.
class Launch {
 public:
  Launch(const Shape& shape, const std::vector<Row>& rows, int64_t shard, int sm_count)
      : sm_count_(sm_count), count_(static_cast<int64_t>(rows.size())), size_(shape.heads * shape.head_dim) {
    Tables tables = MakeTables(rows, shard);
    pos_ = DeviceBuffer<int64_t>(tables.pos);
    tails_ = DeviceBuffer<TailExtent>(tables.tails);
    q_ = Bf16Buffer(count_ * size_);
    for (int64_t i = 0; i < count_; ++i) {
      cudaMemcpy(q_.get() + i * size_, rows[i].in.q.get(), size_ * sizeof(__nv_bfloat16), cudaMemcpyDeviceToDevice);
    }
    splits_ = TailSplits(count_, shape.kv_heads, sm_count);
    part_out_ = DeviceBuffer<float>(splits_ * count_ * size_);
    part_lse_ = DeviceBuffer<float>(splits_ * count_ * shape.heads);
    out_ = DeviceBuffer<float>(count_ * size_);
    lse_ = DeviceBuffer<float>(count_ * shape.heads);
    params_.rows = count_;
    params_.heads = shape.heads;
    params_.kv_heads = shape.kv_heads;
    params_.head_dim = shape.head_dim;
    params_.scale = rows[0].shape(shard).scale;
    params_.shards = shape.shards;
    params_.shard = shard;
    params_.layer = kLayer;
    params_.int8 = shape.int8;
    params_.q = q_.get();
    params_.pos = pos_.get();
    params_.tails = tails_.get();
    params_.out = part_out_.get();
    params_.lse = part_lse_.get();
  }

  cudaError_t Enqueue(cudaStream_t stream) const {
    const cudaError_t error = AttendTails(params_, sm_count_, stream);
    if (error != cudaSuccess) return error;
    CombineParams combine;
    combine.parts = splits_;
    combine.rows = count_;
    combine.heads = params_.heads;
    combine.head_dim = params_.head_dim;
    combine.part_out = part_out_.get();
    combine.part_lse = part_lse_.get();
    combine.out = out_.get();
    combine.lse = lse_.get();
    return Combine(combine, stream);
  }
  void Write(const Tables& tables) {
    cudaMemcpy(pos_.get(), tables.pos.data(), tables.pos.size() * sizeof(int64_t), cudaMemcpyHostToDevice);
    cudaMemcpy(tails_.get(), tables.tails.data(), tables.tails.size() * sizeof(TailExtent), cudaMemcpyHostToDevice);
  }
  // Row i's part of the result.
  PartialOut Result(int64_t i) const {
    const std::vector<float> out = out_.Host(), lse = lse_.Host();
    const int64_t heads = params_.heads;
    return {{out.begin() + i * size_, out.begin() + (i + 1) * size_},
            {lse.begin() + i * heads, lse.begin() + (i + 1) * heads}};
  }
  const AttendTailsParams& params() const { return params_; }

 private:
  const int sm_count_;
  const int64_t count_;
  const int64_t size_;  // of a row
  int splits_ = 0;
  AttendTailsParams params_;
  DeviceBuffer<int64_t> pos_;
  DeviceBuffer<TailExtent> tails_;
  Bf16Buffer q_;
  DeviceBuffer<float> part_out_, part_lse_, out_, lse_;
};

class AttendTailsTest : public Attention {};

TEST_F(AttendTailsTest, RaggedRowsEqualTheReference) {
  Worst worst;
  for (const Shape& shape : {Shape{32, 8, 128, 1}, Shape{9, 3, 64, 2}, Shape{28, 4, 128, 3}, Shape{4, 4, 80, 1},
                             Shape{8, 1, 256, 1}, Shape{4, 1, 16, 2}, Shape{32, 8, 128, 1, true},
                             Shape{9, 3, 64, 2, true}, Shape{4, 4, 80, 1, true}, Shape{8, 1, 256, 3, true}}) {
    const std::vector<Row> rows = MakeRows(shape);
    for (int64_t shard = 0; shard < shape.shards; ++shard) {
      for (const int sms : {1, sm_count_}) {  // one split, and several
        const Launch launch(shape, rows, shard, sms);
        ASSERT_CUDA(launch.Enqueue(nullptr));
        ASSERT_CUDA(cudaDeviceSynchronize());
        for (size_t i = 0; i < rows.size(); ++i) {
          const PartialOut got = launch.Result(static_cast<int64_t>(i));
          const AttendReference want = ReferenceAttend(rows[i].shape(shard), rows[i].in.q);
          worst.Merge(CompareAttend(got.out, got.lse, want, shape.head_dim),
                      std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " x " +
                          std::to_string(shape.head_dim) + ", shard " + std::to_string(shard) + ", row " +
                          std::to_string(i) + ", multiprocessors " + std::to_string(sms));
        }
      }
    }
  }
  Print("tails", worst);
  EXPECT_LE(worst.share, 1.0) << worst.where;
}

// A captured launch: rows leave (position -1), swap places, and see fewer keys, between two replays.
TEST_F(AttendTailsTest, ReplaysReadTheTablesAnew) {
  const Shape shape{32, 8, 128, 1};
  const std::vector<Row> rows = MakeRows(shape);
  Launch launch(shape, rows, 0, sm_count_);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t step;
  ASSERT_CUDA(cudaStreamCreate(&stream));
  ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  ASSERT_CUDA(launch.Enqueue(stream));
  ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&step, graph, 0));
  Tables tables = MakeTables(rows, 0);
  for (int run = 0; run < 3; ++run) {
    if (run == 1) tables.pos[4] = -1;
    if (run == 2) {
      tables.pos[4] = rows[4].in.pos_host[0];
      --tables.pos[8];
      for (int e = 0; e < kTailExtents; ++e) tables.tails[9 * kTailExtents + e].slots = 0;
    }
    launch.Write(tables);
    ASSERT_CUDA(cudaGraphLaunch(step, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < rows.size(); ++i) {
      AttentionShape want_shape = rows[i].shape(0);
      const DeviceBuffer<int64_t> pos(std::vector<int64_t>{tables.pos[i]});
      want_shape.pos = pos.get();
      const auto first = tables.tails.begin() + static_cast<std::ptrdiff_t>(i * kTailExtents);
      const bool empty = std::all_of(first, first + kTailExtents, [](const TailExtent& e) { return e.slots == 0; });
      if (tables.pos[i] < 0 || empty) want_shape.extents = 0;
      const PartialOut got = launch.Result(static_cast<int64_t>(i));
      const Worst error = CompareAttend(got.out, got.lse, ReferenceAttend(want_shape, rows[i].in.q), shape.head_dim);
      EXPECT_LE(error.share, 1.0) << "run " << run << ", row " << i << ": " << error.where;
      if (want_shape.extents > 0) continue;
      for (const float lse : got.lse) EXPECT_EQ(lse, -INFINITY);
      for (const float out : got.out) EXPECT_EQ(out, 0.0f);
    }
  }
  cudaGraphExecDestroy(step);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// A row's bits do not depend on who else is in the launch, as long as the splits are the same.
TEST_F(AttendTailsTest, RowsDoNotKnowEachOther) {
  const Shape shape{9, 3, 64, 1};
  std::vector<Row> rows = MakeRows(shape);
  const Launch whole(shape, rows, 0, 1);
  ASSERT_CUDA(whole.Enqueue(nullptr));
  ASSERT_CUDA(cudaDeviceSynchronize());
  const PartialOut last = whole.Result(static_cast<int64_t>(rows.size()) - 1);
  std::vector<Row> one;
  one.push_back(std::move(rows.back()));
  const Launch alone(shape, one, 0, 1);
  ASSERT_CUDA(alone.Enqueue(nullptr));
  ASSERT_CUDA(cudaDeviceSynchronize());
  EXPECT_TRUE(SameBits(last.out, alone.Result(0).out));
  EXPECT_TRUE(SameBits(last.lse, alone.Result(0).lse));
}

// A decode step: few rows over a shared context, beside the launch of their tails, whose parts are not combined yet.
TEST_F(AttendTailsTest, AContextBesideTheTails) {
  for (const bool int8 : {false, true}) {
    const Shape shape{32, 8, 128, 1, int8};
    const std::vector<Row> rows = MakeRows(shape);
    const Launch tails(shape, rows, 0, sm_count_);
    Case c{.rows = 3, .heads = 32, .kv_heads = 8, .head_dim = 128, .keys = 20000, .order = "random", .int8 = int8};
    c.seed = 99;
    const Inputs context = MakeInputs(c);
    AttendParams params;
    params.shape = context.shards[0].packed;
    params.q = context.q.get();
    const int64_t splits = AttendSplits(params.shape, sm_count_), row_heads = c.rows * c.heads;
    ASSERT_GT(splits, kPartsInOrder);
    DeviceBuffer<float> part_out(splits * row_heads * c.head_dim), part_lse(splits * row_heads);
    params.partials = true;
    params.out = part_out.get();
    params.lse = part_lse.get();
    ASSERT_CUDA(tails.Enqueue(nullptr));
    ASSERT_CUDA(Attend(params, sm_count_, nullptr));
    ASSERT_CUDA(cudaDeviceSynchronize());
    const PartialOut alone{part_out.Host(), part_lse.Host()}, last = tails.Result(9);
    std::vector<PartialOut> parts;
    for (int64_t i = 0; i < splits; ++i) {
      const auto out = alone.out.begin() + i * row_heads * c.head_dim;
      const auto lse = alone.lse.begin() + i * row_heads;
      parts.push_back({{out, out + row_heads * c.head_dim}, {lse, lse + row_heads}});
    }
    Combined combined;
    RunCombine(c, parts, &combined);
    if (HasFatalFailure()) return;
    const Worst worst = CompareAttend(combined.partial.out, combined.partial.lse,
                                      ReferenceAttend(context.shards[0].shape, context.q), c.head_dim);
    Print("context", worst);
    EXPECT_LE(worst.share, 1.0) << worst.where;

    params.beside_previous = true;
    for (int run = 0; run < 20; ++run) {
      part_out.Poison(0xff);
      part_lse.Poison(0xff);
      ASSERT_CUDA(AttendTails(tails.params(), sm_count_, nullptr));
      ASSERT_CUDA(Attend(params, sm_count_, nullptr));
      ASSERT_CUDA(cudaDeviceSynchronize());
      ASSERT_TRUE(SameBits(part_out.Host(), alone.out) && SameBits(part_lse.Host(), alone.lse)) << "run " << run;
    }
    ASSERT_CUDA(tails.Enqueue(nullptr));
    ASSERT_CUDA(cudaDeviceSynchronize());
    EXPECT_TRUE(SameBits(tails.Result(9).out, last.out));
  }
}

TEST_F(AttendTailsTest, RefusesWhatItCannotDo) {
  const Shape shape{4, 4, 64, 1};
  std::vector<Row> rows = MakeRows(shape);
  const Launch launch(shape, rows, 0, sm_count_);
  const auto refused = [&](auto change) {
    AttendTailsParams params = launch.params();
    change(params);
    return AttendTails(params, sm_count_, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refused([](AttendTailsParams& p) { p.head_dim = 12; }));
  EXPECT_TRUE(refused([](AttendTailsParams& p) { p.head_dim = 264; }));
  EXPECT_TRUE(refused([](AttendTailsParams& p) {
    p.head_dim = 72;
    p.int8 = true;
  }));
  EXPECT_TRUE(refused([](AttendTailsParams& p) { p.heads = 3; }));
  EXPECT_TRUE(refused([](AttendTailsParams& p) { p.rows = 65536; }));
  EXPECT_TRUE(refused([](AttendTailsParams& p) { p.shard = 1; }));
  AttendTailsParams none = launch.params();
  none.rows = 0;
  EXPECT_EQ(AttendTails(none, sm_count_, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace refocus::kernels
