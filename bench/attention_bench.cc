// Attention and the few-rows linear layer of the CPU backend beside ATen, in the same run as the two ceilings they are
// read against: MKL's GEMM (fp32, 2048^3) and a sum over memory. Ours and ATen's alternate, so that both meet the same
// noise; the best of the repeats counts. One Markdown row per case. Usage: attention_bench [--threads N] [--seconds S]
// [--filter TEXT]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/sum.h>

#include <CLI/CLI.hpp>

#include "worker/backend_cpu.h"

namespace refocus {
namespace {

struct Options {
  int threads = 0;
  double seconds = 0.6;
  std::string filter;
};

using Clock = std::chrono::steady_clock;

double SecondsOf(const std::function<void()>& run) {
  const auto start = Clock::now();
  run();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Pair {
  double ours = std::numeric_limits<double>::infinity();
  double peer = std::numeric_limits<double>::infinity();
};

Pair Best(double seconds, const std::function<void()>& ours, const std::function<void()>& peer) {
  ours();
  peer();
  Pair best;
  const auto start = Clock::now();
  for (int i = 0; i < 5 || std::chrono::duration<double>(Clock::now() - start).count() < seconds; ++i) {
    best.ours = std::min(best.ours, SecondsOf(ours));
    best.peer = std::min(best.peer, SecondsOf(peer));
  }
  return best;
}

struct Shape {
  int64_t rows;
  int64_t keys;
  int64_t heads = 9;
  int64_t kv_heads = 3;
  int64_t head_dim = 64;

  std::string Text() const {
    char text[96];
    std::snprintf(text, sizeof(text), "%ld rows, %ld keys, %ld/%ld heads, d %ld", static_cast<long>(rows),
                  static_cast<long>(keys), static_cast<long>(heads), static_cast<long>(kv_heads),
                  static_cast<long>(head_dim));
    return text;
  }
};

// The last `rows` of `keys` tokens, causal: what prefill's last chunk, a span at the end and decoding are.
struct Case {
  explicit Case(const Shape& s) : shape(s) {
    q = at::randn({s.rows, s.heads, s.head_dim});
    dout = at::randn({s.rows, s.heads, s.head_dim});
    pos = at::arange(s.keys - s.rows, s.keys, at::kLong);
    view.k = at::randn({s.kv_heads, s.keys, s.head_dim});
    view.v = at::randn({s.kv_heads, s.keys, s.head_dim});
    view.length = s.keys;
    // ATen wants one K/V head per query head and the rows aligned to the first key, so its mask is given as a tensor.
    const int64_t group = s.heads / s.kv_heads;
    const auto expand = [&](const at::Tensor& x) {
      return x.unsqueeze(1).expand({s.kv_heads, group, s.keys, s.head_dim}).reshape({1, s.heads, s.keys, s.head_dim});
    };
    peer_q = q.transpose(0, 1).unsqueeze(0);
    peer_k = expand(view.k);
    peer_v = expand(view.v);
    peer_dout = dout.transpose(0, 1).unsqueeze(0);
    mask = at::arange(s.keys, at::kLong).unsqueeze(0).le(pos.unsqueeze(1));
    mask = at::randn({}).zero_().expand({s.rows, s.keys}).masked_fill(mask.logical_not(),
                                                                        -std::numeric_limits<float>::infinity());
    if (s.rows == 1) mask = at::Tensor();
  }

  // Key and query pairs that are visible.
  double Pairs() const {
    const double rows = static_cast<double>(shape.rows), keys = static_cast<double>(shape.keys);
    return static_cast<double>(shape.heads) * rows * (keys - (rows - 1) / 2);
  }

  std::optional<at::Tensor> Mask() const {
    return mask.defined() ? std::optional<at::Tensor>(mask) : std::nullopt;
  }
  std::tuple<at::Tensor, at::Tensor> PeerForward() const {
    return at::_scaled_dot_product_flash_attention_for_cpu(peer_q, peer_k, peer_v, 0.0, false, Mask());
  }

  Shape shape;
  KvView view;
  at::Tensor q, dout, pos, peer_q, peer_k, peer_v, peer_dout, mask;
};

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options), backend_(MakeCpuBackend()) {}

  void Ceilings() {
    const at::Tensor a = at::randn({2048, 2048}), b = at::randn({2048, 2048}), big = at::randn({64 << 20});
    const Pair pair = Best(options_.seconds, [&] { at::mm(a, b); }, [&] { at::sum(big); });
    gemm_ = 2.0 * 2048 * 2048 * 2048 / pair.ours / 1e9;
    stream_ = static_cast<double>(big.nbytes()) / pair.peer / 1e9;
    std::printf("# kernels %s, %d threads; MKL GEMM %.0f GFLOP/s, sum over 256 MiB %.1f GB/s\n\n",
                BestCpuKernels().name, at::get_num_threads(), gemm_, stream_);
    std::printf("| case | ms | rate | share of ceiling | ATen ms | times ATen |\n|---|---|---|---|---|---|\n");
  }

  void Forward(const std::string& name, const Shape& shape) {
    if (Skip(name + ", " + shape.Text())) return;
    const Case c(shape);
    const Pair pair =
        Best(options_.seconds, [&] { backend_->Attend(c.q, c.pos, {c.view}); }, [&] { c.PeerForward(); });
    if (shape.rows == 1) {
      PrintBytes(name + ", " + shape.Text(), 2.0 * static_cast<double>(c.view.k.nbytes()), pair);
    } else {
      PrintFlops(name + ", " + shape.Text(), 4.0 * static_cast<double>(shape.head_dim) * c.Pairs(), pair);
    }
  }

  void Gradient(const std::string& name, const Shape& shape) {
    if (Skip(name + ", " + shape.Text())) return;
    const Case c(shape);
    const Partial whole = backend_->Attend(c.q, c.pos, {c.view});
    const at::Tensor row_dot = c.dout.mul(whole.out).sum(-1);
    const auto [out, lse] = c.PeerForward();
    const auto peer = [&, out = out, lse = lse] {  // computes dK and dV too: nothing there computes dQ alone
      at::_scaled_dot_product_flash_attention_for_cpu_backward(c.peer_dout, c.peer_q, c.peer_k, c.peer_v, out, lse, 0.0,
                                                                false, c.Mask());
    };
    const auto ours = [&] { backend_->QueryGrad(c.q, c.pos, {c.view}, c.dout, whole.lse, row_dot); };
    PrintFlops(name + ", " + shape.Text(), 6.0 * static_cast<double>(shape.head_dim) * c.Pairs(),
               Best(options_.seconds, ours, peer));
  }

  void Linear(int64_t rows, int64_t in, int64_t out) {
    const std::string name =
        "linear " + std::to_string(rows) + " x " + std::to_string(in) + " -> " + std::to_string(out);
    if (Skip(name)) return;
    const at::Tensor x = at::randn({rows, in}), w = at::randn({out, in});
    const Pair pair =
        Best(options_.seconds, [&] { backend_->Linear(x, w); }, [&] { at::linear(x, w); });
    if (rows <= 8) {
      PrintBytes(name, static_cast<double>(w.nbytes()), pair);
    } else {
      PrintFlops(name, 2.0 * static_cast<double>(rows * in * out), pair);
    }
  }

 private:
  bool Skip(const std::string& name) const { return name.find(options_.filter) == std::string::npos; }
  void PrintFlops(const std::string& name, double flops, const Pair& pair) const {
    const double rate = flops / pair.ours / 1e9;
    Print(name, "GFLOP/s", rate, rate / gemm_, pair);
  }
  void PrintBytes(const std::string& name, double bytes, const Pair& pair) const {
    const double rate = bytes / pair.ours / 1e9;
    Print(name, "GB/s", rate, rate / stream_, pair);
  }
  void Print(const std::string& name, const char* unit, double rate, double share, const Pair& pair) const {
    std::printf("| %s | %.3f | %.1f %s | %.0f%% | %.3f | %.2f |\n", name.c_str(), pair.ours * 1e3, rate, unit,
                share * 100, pair.peer * 1e3, pair.peer / pair.ours);
    std::fflush(stdout);
  }

  Options options_;
  std::unique_ptr<Backend> backend_;
  double gemm_ = 0;
  double stream_ = 0;
};

int Main(int argc, char** argv) {
  Options options;
  CLI::App app{"Attention of the CPU backend beside ATen"};
  app.add_option("--threads", options.threads, "threads, 0: all cores");
  app.add_option("--seconds", options.seconds, "seconds per case");
  app.add_option("--filter", options.filter, "only cases whose name contains this");
  CLI11_PARSE(app, argc, argv);
  if (options.threads > 0) at::set_num_threads(options.threads);
  Bench bench(options);
  bench.Ceilings();
  for (const int64_t keys : {512, 1024, 2048, 4096}) bench.Forward("prefill", {512, keys});
  for (const int64_t keys : {2048, 4096}) bench.Forward("span", {128, keys});
  for (const int64_t keys : {2048, 4096}) bench.Gradient("span gradient", {128, keys});
  bench.Forward("span", {128, 4096, 32, 8, 128});
  bench.Gradient("span gradient", {128, 4096, 32, 8, 128});
  for (const int64_t rows : {8, 16}) bench.Forward("few", {rows, 4096});
  bench.Forward("decode", {1, 512});
  bench.Forward("decode", {1, 4096});
  bench.Forward("decode", {1, 65536});
  bench.Forward("decode", {1, 32768, 32, 8, 128});
  for (const int64_t rows : {1, 2, 4, 8, 16, 32, 128}) bench.Linear(rows, 576, 1536);
  for (const int64_t rows : {1, 4, 8}) bench.Linear(rows, 576, 49152);
  bench.Linear(1, 1536, 576);
  bench.Linear(1, 576, 192);
  bench.Linear(1, 2560, 9728);
  return 0;
}

}  // namespace
}  // namespace refocus

int main(int argc, char** argv) { return refocus::Main(argc, argv); }
