// fp32 attention on the CPU. For one K/V head, the rows of all its query heads are packed together, sorted by position
// and cut into tiles; a tile walks over the blocks of keys that any of its rows sees and keeps a running softmax. Tiles
// are independent tasks; where they are fewer than the threads need, their keys are split too and the parts combined in
// order.
#include "worker/backend_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include "base/check.h"
#include "worker/backend_cpu_rowwise.h"
#include "worker/backend_cpu_threads.h"

namespace refocus {
namespace {

constexpr float kNoKey = -std::numeric_limits<float>::infinity();
constexpr int64_t kLinearTaskBytes = 128 << 10;  // of w: balances, yet large against the cost of taking a task
constexpr int64_t kLinearTaskRows = 16;          // outputs of a task are a multiple: threads share no cache line of y

void CheckRows(const at::Tensor& tensor, at::IntArrayRef shape) {
  REFOCUS_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous());
  REFOCUS_CHECK_EQ(tensor.sizes(), shape);
}

// Shapes and places of one call.
struct Problem {
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t kv_heads = 0;
  int64_t group = 0;                     // query heads per K/V head
  float scale = 0;
  std::vector<const KvView*> extents;    // those with keys
  std::vector<int64_t> order;            // rows by rising position, stable
  std::vector<std::vector<int64_t>> visible;  // [extents][rows], in that order
  bool int8 = false;                     // what the extents hold
  bool few = false;                      // layout of the kernels
  int64_t width = 0;                     // most lanes (or few rows) of a tile

  // Packed row i of a K/V head: (row in call order) * heads + query head.
  int64_t Source(int64_t kv_head, int64_t packed) const {
    return order[packed / group] * heads + kv_head * group + packed % group;
  }
};

// Packed rows [first, first + count) of one K/V head.
struct Tile {
  int64_t kv_head = 0;
  int64_t first = 0;
  int64_t count = 0;
  int64_t vectors = 0;  // 0: few rows
};

// One tile against one share of its blocks.
struct Item {
  int64_t tile = 0;
  int64_t part = 0;
  int64_t blocks = 0;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;  // longest first
  int64_t parts = 1;
};

Problem MakeProblem(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents) {
  Problem problem;
  REFOCUS_CHECK_EQ(q.dim(), 3);
  problem.rows = q.size(0);
  problem.heads = q.size(1);
  problem.head_dim = q.size(2);
  problem.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(problem.head_dim)));
  CheckRows(q, {problem.rows, problem.heads, problem.head_dim});
  REFOCUS_CHECK(pos.scalar_type() == at::kLong && pos.is_cpu() && pos.is_contiguous());
  REFOCUS_CHECK_EQ(pos.numel(), problem.rows);

  const int64_t* position = pos.const_data_ptr<int64_t>();
  problem.order.resize(problem.rows);
  std::iota(problem.order.begin(), problem.order.end(), int64_t{0});
  const auto earlier = [&](int64_t a, int64_t b) { return position[a] < position[b]; };
  if (!std::is_sorted(problem.order.begin(), problem.order.end(), earlier)) {
    std::stable_sort(problem.order.begin(), problem.order.end(), earlier);
  }
  for (const KvView& extent : extents) {
    if (extent.length == 0) continue;
    if (problem.extents.empty()) {
      problem.kv_heads = extent.k.size(0);
      problem.int8 = extent.k.scalar_type() == at::kByte;
    }
    const at::ScalarType type = problem.int8 ? at::kByte : at::kFloat;
    for (const at::Tensor* tensor : {&extent.k, &extent.v}) {
      REFOCUS_CHECK(tensor->scalar_type() == type && tensor->is_cpu() && tensor->dim() == 3);
      REFOCUS_CHECK_EQ(tensor->size(0), problem.kv_heads);
      REFOCUS_CHECK_LE(extent.length, tensor->size(1));
      REFOCUS_CHECK_EQ(tensor->size(2), problem.head_dim);
      REFOCUS_CHECK(tensor->stride(2) == 1 || problem.head_dim == 1);
      REFOCUS_CHECK_EQ(tensor->stride(1), extent.k.stride(1));
    }
    for (const at::Tensor* scale : {&extent.k_scale, &extent.v_scale}) {
      if (!problem.int8) continue;
      REFOCUS_CHECK(scale->scalar_type() == at::kBFloat16 && scale->is_cpu());
      REFOCUS_CHECK_EQ(scale->sizes(), extent.k.sizes().slice(0, 2));
      REFOCUS_CHECK(scale->stride(1) == 1 || scale->size(1) <= 1);
    }
    problem.extents.push_back(&extent);
    std::vector<int64_t>& visible = problem.visible.emplace_back(problem.rows);
    for (int64_t i = 0; i < problem.rows; ++i) visible[i] = extent.VisibleSlots(position[problem.order[i]]);
  }
  if (problem.extents.empty()) return problem;
  REFOCUS_CHECK_GT(problem.kv_heads, 0);
  REFOCUS_CHECK_EQ(problem.heads % problem.kv_heads, 0);
  problem.group = problem.heads / problem.kv_heads;
  return problem;
}

// Blocks that the last row of a tile sees, over all extents.
int64_t BlocksOf(const Problem& problem, const Tile& tile) {
  int64_t blocks = 0;
  const int64_t last = (tile.first + tile.count - 1) / problem.group;
  for (const std::vector<int64_t>& visible : problem.visible) {
    blocks += (visible[last] + kCpuBlockKeys - 1) / kCpuBlockKeys;
  }
  return blocks;
}

Plan MakePlan(const CpuKernels& kernels, Problem* problem, bool allow_few) {
  Plan plan;
  const int64_t packed = problem->rows * problem->group;
  problem->few = allow_few && packed <= kCpuFewRows && problem->head_dim % kernels.lanes == 0;
  const int64_t vectors = (packed + kernels.lanes - 1) / kernels.lanes;
  const int64_t tiles = problem->few ? 1 : (vectors + kernels.tile_vectors - 1) / kernels.tile_vectors;
  for (int64_t kv_head = 0; kv_head < problem->kv_heads; ++kv_head) {
    for (int64_t i = 0; i < tiles; ++i) {
      // Vectors are dealt evenly: a tile of one vector alone would waste most of the multipliers.
      const int64_t begin = problem->few ? 0 : vectors * i / tiles;
      const int64_t end = problem->few ? 0 : vectors * (i + 1) / tiles;
      Tile tile{.kv_head = kv_head, .first = begin * kernels.lanes, .count = packed, .vectors = end - begin};
      if (!problem->few) tile.count = std::min(end * kernels.lanes, packed) - tile.first;
      problem->width = std::max(problem->width, problem->few ? packed : tile.vectors * kernels.lanes);
      plan.tiles.push_back(tile);
    }
  }
  int64_t longest = 0;
  for (const Tile& tile : plan.tiles) longest = std::max(longest, BlocksOf(*problem, tile));
  const int64_t threads = CpuThreads();
  const int64_t wanted = threads == 1 ? 1 : (problem->few ? 8 : 4) * threads;
  const int64_t count = static_cast<int64_t>(plan.tiles.size());
  const int64_t parts = (wanted + count - 1) / count;
  plan.parts = std::max<int64_t>(1, std::min(parts, longest / 2));
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t blocks = BlocksOf(*problem, plan.tiles[tile]);
    for (int64_t part = 0; part < plan.parts; ++part) plan.items.push_back({tile, part, blocks});
  }
  const auto longer = [](const Item& a, const Item& b) { return a.blocks > b.blocks; };
  std::stable_sort(plan.items.begin(), plan.items.end(), longer);
  return plan;
}

// Memory of one thread for the tile in hand.
struct Scratch {
  float* q;        // [head_dim, width], or [rows, head_dim] for few rows
  float* second;   // the same: dout
  float* out;      // the same: out or dq
  float* scores;   // [2 * kCpuBlockKeys, width]
  float* visible;  // [width]
  float* a;        // [width]: peak or lse
  float* b;        // [width]: total or row_dot
  float* k;        // [kCpuBlockKeys, head_dim] of int8 K in hand
  float* v;        // the same of V

  static int64_t Size(const Problem& problem) {
    const int64_t size = problem.width * (3 * problem.head_dim + 2 * kCpuBlockKeys + 3);
    const int64_t unpacked = problem.int8 ? 2 * kCpuBlockKeys * problem.head_dim : 0;
    return (size + unpacked + 63) / 64 * 64;  // threads share no cache line
  }

  Scratch(const Problem& problem, float* memory) {
    const int64_t matrix = problem.width * problem.head_dim;
    q = memory;
    second = q + matrix;
    out = second + matrix;
    scores = out + matrix;
    visible = scores + 2 * kCpuBlockKeys * problem.width;
    a = visible + problem.width;
    b = a + problem.width;
    k = b + problem.width;
    v = k + kCpuBlockKeys * problem.head_dim;
  }
};

class TileRun {
 public:
  TileRun(const CpuKernels& kernels, const Problem& problem, const Tile& tile, const Scratch& scratch)
      : kernels_(kernels), problem_(problem), tile_(tile), scratch_(scratch),
        width_(tile.vectors == 0 ? tile.count : tile.vectors * kernels.lanes) {}

  // [rows * heads, head_dim] -> the kernels' layout; lanes without a row are 0.
  void Gather(const float* from, float* to) const {
    const int64_t depth = problem_.head_dim;
    if (tile_.vectors != 0) std::memset(to, 0, sizeof(float) * depth * width_);
    for (int64_t i = 0; i < tile_.count; ++i) {
      const float* row = from + problem_.Source(tile_.kv_head, tile_.first + i) * depth;
      if (tile_.vectors == 0) {
        std::memcpy(to + i * depth, row, sizeof(float) * depth);
      } else {
        for (int64_t c = 0; c < depth; ++c) to[c * width_ + i] = row[c];
      }
    }
  }

  // Row i of the result times `factor` -> [rows * heads, head_dim].
  void Scatter(int64_t i, float factor, float* to) const {
    const int64_t depth = problem_.head_dim;
    float* row = to + problem_.Source(tile_.kv_head, tile_.first + i) * depth;
    const float* from = tile_.vectors == 0 ? scratch_.out + i * depth : scratch_.out + i;
    const int64_t stride = tile_.vectors == 0 ? 1 : width_;
    for (int64_t c = 0; c < depth; ++c) row[c] = from[c * stride] * factor;
  }

  void ClearOut() const { std::memset(scratch_.out, 0, sizeof(float) * problem_.head_dim * width_); }

  // run(block) for this part's share of the blocks. Rows with hidden[i] see nothing.
  template <typename Run>
  void ForBlocks(int64_t part, int64_t parts, const std::vector<char>& hidden, const Run& run) const {
    const int64_t blocks = BlocksOf(problem_, tile_);
    const int64_t begin = blocks * part / parts;
    const int64_t end = blocks * (part + 1) / parts;
    const int64_t first_row = tile_.first / problem_.group;
    const int64_t last_row = (tile_.first + tile_.count - 1) / problem_.group;
    const bool any_hidden = std::find(hidden.begin(), hidden.end(), 1) != hidden.end();
    int64_t number = 0;  // of the block over all extents
    for (size_t e = 0; e < problem_.extents.size(); ++e) {
      const std::vector<int64_t>& visible = problem_.visible[e];
      for (int64_t key = 0; key < visible[last_row]; key += kCpuBlockKeys, ++number) {
        if (number < begin || number >= end) continue;
        CpuKeyBlock block = BlockAt(*problem_.extents[e], key, visible[last_row]);
        if (any_hidden || visible[first_row] < key + block.keys) {
          SetVisible(visible, key, block.keys, hidden);
          block.visible = scratch_.visible;
        }
        run(block);
      }
    }
  }

  int64_t width() const { return width_; }

 private:
  CpuKeyBlock BlockAt(const KvView& extent, int64_t key, int64_t visible) const {
    CpuKeyBlock block;
    block.keys = std::min(kCpuBlockKeys, visible - key);
    block.head_dim = problem_.head_dim;
    block.scale = problem_.scale;
    if (problem_.int8) {
      block.stride = problem_.head_dim;
      block.k = Unpacked(extent.k, extent.k_scale, key, block.keys, scratch_.k);
      block.v = Unpacked(extent.v, extent.v_scale, key, block.keys, scratch_.v);
      return block;
    }
    block.stride = extent.k.stride(1);
    block.k = extent.k.const_data_ptr<float>() + tile_.kv_head * extent.k.stride(0) + key * block.stride;
    block.v = extent.v.const_data_ptr<float>() + tile_.kv_head * extent.v.stride(0) + key * block.stride;
    if (visible - key > kCpuBlockKeys) block.next_k = block.k + kCpuBlockKeys * block.stride;
    return block;
  }

  const float* Unpacked(const at::Tensor& from, const at::Tensor& scales, int64_t key, int64_t keys, float* to) const {
    const uint8_t* const codes = from.const_data_ptr<uint8_t>();
    const auto* const scale = static_cast<const uint16_t*>(scales.const_data_ptr());
    kernels_.unpack(keys, problem_.head_dim, codes + tile_.kv_head * from.stride(0) + key * from.stride(1),
                    from.stride(1), scale + tile_.kv_head * scales.stride(0) + key, to);
    return to;
  }

  void SetVisible(const std::vector<int64_t>& visible, int64_t key, int64_t keys,
                  const std::vector<char>& hidden) const {
    for (int64_t i = 0; i < width_; ++i) {
      const bool row = i < tile_.count;
      const int64_t seen = row ? std::clamp<int64_t>(visible[(tile_.first + i) / problem_.group] - key, 0, keys) : keys;
      scratch_.visible[i] = row && !hidden.empty() && hidden[i] != 0 ? 0.0f : static_cast<float>(seen);
    }
  }

  const CpuKernels& kernels_;
  const Problem& problem_;
  const Tile& tile_;
  const Scratch& scratch_;
  const int64_t width_;
};

// One part of one tile of Attend: normalised rows to out [rows * heads, head_dim] and lse [rows * heads].
void AttendItem(const CpuKernels& kernels, const Problem& problem, const Tile& tile, int64_t part, int64_t parts,
                const Scratch& scratch, const float* q, float* out, float* lse) {
  const TileRun run(kernels, problem, tile, scratch);
  run.Gather(q, scratch.q);
  run.ClearOut();
  std::fill_n(scratch.a, run.width(), kNoKey);
  std::fill_n(scratch.b, run.width(), 0.0f);
  const CpuAttendState state{.out = scratch.out, .peak = scratch.a, .total = scratch.b};
  run.ForBlocks(part, parts, {}, [&](const CpuKeyBlock& block) {
    if (tile.vectors == 0) {
      kernels.attend_few(tile.count, block, scratch.q, scratch.scores, state);
    } else {
      kernels.attend(tile.vectors, block, scratch.q, scratch.scores, state);
    }
  });
  for (int64_t i = 0; i < tile.count; ++i) {
    // A NaN score leaves the peak at -inf but makes the total NaN, and must come through as a NaN lse.
    const bool seen = scratch.a[i] != kNoKey || scratch.b[i] != 0.0f;
    run.Scatter(i, seen ? 1.0f / scratch.b[i] : 0.0f, out);
    lse[problem.Source(tile.kv_head, tile.first + i)] = seen ? scratch.a[i] + std::log(scratch.b[i]) : kNoKey;
  }
}

struct GradInput {
  const float* q;
  const float* dout;
  const float* lse;
  const float* row_dot;
};

// One part of one tile of QueryGrad, to dq [rows * heads, head_dim].
void QueryGradItem(const CpuKernels& kernels, const Problem& problem, const Tile& tile, int64_t part, int64_t parts,
                   const Scratch& scratch, const GradInput& input, float* dq) {
  const TileRun run(kernels, problem, tile, scratch);
  run.Gather(input.q, scratch.q);
  run.Gather(input.dout, scratch.second);
  run.ClearOut();
  std::fill_n(scratch.a, run.width(), 0.0f);
  std::fill_n(scratch.b, run.width(), 0.0f);
  std::vector<char> hidden(tile.count, 0);
  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t source = problem.Source(tile.kv_head, tile.first + i);
    hidden[i] = input.lse[source] == kNoKey;
    if (hidden[i]) continue;
    scratch.a[i] = input.lse[source];
    scratch.b[i] = input.row_dot[source];
  }
  const CpuGradState state{
      .q = scratch.q, .dout = scratch.second, .lse = scratch.a, .row_dot = scratch.b, .dq = scratch.out};
  run.ForBlocks(part, parts, hidden, [&](const CpuKeyBlock& block) {
    kernels.query_grad(tile.vectors, block, scratch.scores, state);
  });
  for (int64_t i = 0; i < tile.count; ++i) run.Scatter(i, problem.scale, dq);
}

class CpuBackend : public CpuRowwise {
 public:
  CpuBackend(const ModelConfig& config, const CpuKernels& kernels, KvType kv)
      : CpuRowwise(config, kv), kernels_(kernels) {}

  Partial Attend(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents) override {
    Problem problem = MakeProblem(q, pos, extents);
    const auto [rows, heads, depth] = std::tuple(problem.rows, problem.heads, problem.head_dim);
    if (rows == 0 || problem.extents.empty()) {
      Partial empty{at::empty({rows, heads, depth}, q.options()), at::empty({rows, heads}, q.options())};
      empty.out.zero_();
      empty.lse.fill_(kNoKey);
      return empty;
    }
    const Plan plan = MakePlan(kernels_, &problem, /*allow_few=*/true);
    const at::Tensor out = at::empty({plan.parts, rows, heads, depth}, q.options());
    const at::Tensor lse = at::empty({plan.parts, rows, heads}, q.options());
    const float* from = q.const_data_ptr<float>();
    float* const out_data = out.data_ptr<float>();
    float* const lse_data = lse.data_ptr<float>();
    ForItems(problem, plan, [&](const Item& item, const Scratch& scratch) {
      AttendItem(kernels_, problem, plan.tiles[item.tile], item.part, plan.parts, scratch, from,
                 out_data + item.part * rows * heads * depth, lse_data + item.part * rows * heads);
    });
    if (plan.parts == 1) return {out.select(0, 0), lse.select(0, 0)};
    return Combine(out, lse);
  }

  at::Tensor QueryGrad(const at::Tensor& q, const at::Tensor& pos, const std::vector<KvView>& extents,
                       const at::Tensor& dout, const at::Tensor& lse, const at::Tensor& row_dot) override {
    Problem problem = MakeProblem(q, pos, extents);
    CheckRows(dout, q.sizes());
    CheckRows(lse, {problem.rows, problem.heads});
    CheckRows(row_dot, {problem.rows, problem.heads});
    if (problem.rows == 0 || problem.extents.empty()) return at::empty(q.sizes(), q.options()).zero_();
    const Plan plan = MakePlan(kernels_, &problem, /*allow_few=*/false);
    const int64_t size = q.numel();
    at::Tensor dq = at::empty({plan.parts, problem.rows, problem.heads, problem.head_dim}, q.options());
    float* const to = dq.data_ptr<float>();
    const GradInput input{q.const_data_ptr<float>(), dout.const_data_ptr<float>(), lse.const_data_ptr<float>(),
                          row_dot.const_data_ptr<float>()};
    ForItems(problem, plan, [&](const Item& item, const Scratch& scratch) {
      QueryGradItem(kernels_, problem, plan.tiles[item.tile], item.part, plan.parts, scratch, input,
                    to + item.part * size);
    });
    for (int64_t part = 1; part < plan.parts; ++part) {
      for (int64_t i = 0; i < size; ++i) to[i] += to[part * size + i];
    }
    return plan.parts == 1 ? dq.select(0, 0) : dq.select(0, 0).clone();  // the other parts' memory is not kept
  }

  Partial Combine(const at::Tensor& out, const at::Tensor& lse) override {
    REFOCUS_CHECK_EQ(out.dim(), 4);
    const int64_t parts = out.size(0);
    const int64_t depth = out.size(3);
    CheckRows(out, out.sizes());
    CheckRows(lse, {parts, out.size(1), out.size(2)});
    Partial whole{at::empty(out.sizes().slice(1), out.options()), at::empty(lse.sizes().slice(1), lse.options())};
    const int64_t count = whole.lse.numel();
    const float* const part_out = out.const_data_ptr<float>();
    const float* const part_lse = lse.const_data_ptr<float>();
    float* const to_out = whole.out.data_ptr<float>();
    float* const to_lse = whole.lse.data_ptr<float>();
    constexpr int64_t kTaskRows = 64;
    ParallelTasks((count + kTaskRows - 1) / kTaskRows, [&](int64_t task, int64_t) {
      for (int64_t row = task * kTaskRows; row < std::min(count, (task + 1) * kTaskRows); ++row) {
        to_lse[row] = CombineRow(parts, count, depth, part_out + row * depth, part_lse + row, to_out + row * depth);
      }
    });
    return whole;
  }

  at::Tensor Linear(const at::Tensor& x, const at::Tensor& w) override {
    REFOCUS_CHECK(x.dim() == 2 && w.dim() == 2);
    REFOCUS_CHECK_EQ(x.size(1), w.size(1));
    const int64_t rows = x.size(0), in = x.size(1), outputs = w.size(0);
    if (rows > kCpuFewRows || rows == 0 || in == 0) return at::linear(x, w);
    CheckRows(x, {rows, in});
    REFOCUS_CHECK(w.scalar_type() == at::kFloat && w.stride(1) == 1);
    const int64_t stride = w.stride(0);
    at::Tensor y = at::empty({rows, outputs}, x.options());
    const int64_t step =
        std::max<int64_t>(1, kLinearTaskBytes / (in * 4) / kLinearTaskRows) * kLinearTaskRows;
    const float* const from = x.const_data_ptr<float>();
    const float* const weights = w.const_data_ptr<float>();
    float* const to = y.data_ptr<float>();
    ParallelTasks((outputs + step - 1) / step, [&](int64_t task, int64_t) {
      const int64_t first = task * step;
      kernels_.linear_few(rows, in, std::min(step, outputs - first), from, weights + first * stride, stride, to + first,
                          outputs);
    });
    return y;
  }

 private:
  template <typename Run>
  static void ForItems(const Problem& problem, const Plan& plan, const Run& run) {
    const int64_t size = Scratch::Size(problem);
    const at::Tensor memory = at::empty({CpuThreads() * size}, at::TensorOptions(at::kFloat));
    float* const base = memory.data_ptr<float>();
    ParallelTasks(static_cast<int64_t>(plan.items.size()), [&](int64_t index, int64_t thread) {
      run(plan.items[index], Scratch(problem, base + thread * size));
    });
  }

  // Returns the row's lse. Parts lie `count` rows apart. Parts without keys are not read, so that a single part comes
  // back bit for bit.
  static float CombineRow(int64_t parts, int64_t count, int64_t depth, const float* out, const float* lse, float* to) {
    float peak = kNoKey;
    bool seen = false;  // not peak == kNoKey: std::max drops a NaN, which must come through
    for (int64_t part = 0; part < parts; ++part) {
      peak = std::max(peak, lse[part * count]);
      seen = seen || lse[part * count] != kNoKey;
    }
    std::fill_n(to, depth, 0.0f);
    if (!seen) return kNoKey;
    float total = 0;
    for (int64_t part = 0; part < parts; ++part) total += std::exp(lse[part * count] - peak);
    for (int64_t part = 0; part < parts; ++part) {
      if (lse[part * count] == kNoKey) continue;
      const float weight = std::exp(lse[part * count] - peak) / total;
      const float* from = out + part * count * depth;
      for (int64_t c = 0; c < depth; ++c) to[c] += weight * from[c];
    }
    return peak + std::log(total);
  }

  const CpuKernels& kernels_;
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(const CpuKernels& kernels, const ModelConfig& config, KvType kv) {
  return std::make_unique<CpuBackend>(config, kernels, kv);
}

std::unique_ptr<Backend> MakeCpuBackend(const ModelConfig& config, KvType kv) {
  return MakeCpuBackend(BestCpuKernels(), config, kv);
}

}  // namespace refocus
