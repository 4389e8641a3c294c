// One context through the engine, without the service around it: prefill, adaptation steps, decode. Each rank runs this
// program; start several with mpirun. Prints a table (share: of the matrix-multiply and read rates measured in the same
// run, times ranks) and, with --jsonl, one line per row.
//
//   mpirun -np 2 context_bench --model MODEL --tokens 4096 --threads 1
#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "worker/engine.h"

namespace refocus {
namespace {

struct Options {
  std::string model;
  std::string ids_file;  // int32, little-endian
  std::string jsonl;
  int64_t tokens = 4096;
  int64_t chunk = 512;
  int64_t steps = 32;
  int64_t span = 128;
  int64_t spans_per_step = 1;
  int64_t decode = 32;
  double learning_rate = 1e-4;
  uint64_t seed = 1;
  int threads = 1;
};

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int64_t ResidentBytes(const char* field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field, 0) == 0) return std::stoll(line.substr(line.find(':') + 1)) * 1024;
  }
  return 0;
}

// Submits commands to this rank's engine and waits for their final results.
class Driver {
 public:
  explicit Driver(Engine& engine) : engine_(engine) {}

  void OnResult(Result result) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!result.final) return;
    result_ = std::move(result);
    done_ = true;
    wake_.notify_one();
  }

  template <typename Body>
  Result Run(Body body) {
    Command command;
    command.seq = ++seq_;
    command.body = std::move(body);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = false;
    }
    engine_.Submit(std::move(command));
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return done_; });
    if (!result_.status.ok()) {
      std::fprintf(stderr, "context_bench: %s\n", result_.status.ToString().c_str());
      std::_Exit(1);
    }
    return result_;
  }

 private:
  Engine& engine_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool done_ = false;
  int64_t seq_ = 0;
  Result result_;
};

struct Row {
  std::string what;
  int64_t units = 0;  // tokens or steps
  double seconds = 0.0;
  double flops = 0.0;  // arithmetic that the method needs, all ranks
  double bytes = 0.0;  // memory that must be read once per unit
};

// Multiplications and additions of the linear layers for one row; keys: with K and V; output: with the output matrix.
double LinearFlops(const ModelConfig& c, bool keys, bool output) {
  const double layer = 2.0 * static_cast<double>(c.hidden) *
                       static_cast<double>(2 * c.q_dim() + (keys ? 2 * c.kv_dim() : 0) + 3 * c.mlp);
  return layer * static_cast<double>(c.layers) + (output ? 2.0 * static_cast<double>(c.hidden * c.vocab) : 0.0);
}

struct Ceilings {
  double gemm_flops = 0.0;
  double read_bytes = 0.0;
};

Ceilings MeasureCeilings() {
  Ceilings best;
  const at::Tensor a = at::randn({2048, 2048}), b = at::randn({2048, 2048}), big = at::ones({int64_t{64} << 20});
  for (int i = 0; i < 3; ++i) {
    double begin = Now();
    at::mm(a, b);
    best.gemm_flops = std::max(best.gemm_flops, 2.0 * 2048 * 2048 * 2048 / (Now() - begin));
    begin = Now();
    big.sum();
    best.read_bytes = std::max(best.read_bytes, static_cast<double>(big.nbytes()) / (Now() - begin));
  }
  return best;
}

std::vector<int32_t> ReadIds(const Options& options, int64_t vocab) {
  std::vector<int32_t> ids(options.tokens);
  if (!options.ids_file.empty()) {
    std::ifstream in(options.ids_file, std::ios::binary);
    in.read(reinterpret_cast<char*>(ids.data()), static_cast<std::streamsize>(ids.size() * 4));
    REFOCUS_CHECK_EQ(in.gcount(), static_cast<std::streamsize>(ids.size() * 4));
    return ids;
  }
  std::mt19937_64 random(options.seed);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint64_t>(vocab));
  return ids;
}

std::vector<Row> Measure(Driver& driver, const ModelConfig& c, const Options& options, const std::vector<int32_t>& ids,
                         std::vector<double>* losses) {
  const double tokens = static_cast<double>(options.tokens);
  const double attention_row = 4.0 * static_cast<double>(c.q_dim() * c.layers);  // per visible key
  std::vector<Row> rows;
  driver.Run(OpenContext{1, options.tokens});

  double begin = Now();
  for (int64_t pos = 0; pos < options.tokens; pos += options.chunk) {
    const int64_t end = std::min(pos + options.chunk, options.tokens);
    driver.Run(PrefillChunk{1, pos, {ids.begin() + pos, ids.begin() + end}});
  }
  rows.push_back({"prefill", options.tokens, Now() - begin,
                  LinearFlops(c, true, false) * tokens + attention_row * tokens * (tokens + 1) / 2, 0.0});

  AdamWConfig optimizer;
  optimizer.learning_rate = static_cast<float>(options.learning_rate);
  driver.Run(BeginAdapt{1, 1, false, optimizer});
  std::mt19937_64 random(options.seed);
  double step_flops = 0.0;
  begin = Now();
  for (int64_t step = 1; step <= options.steps; ++step) {
    AdaptStep command{1, step, {}};
    for (int64_t s = 0; s < options.spans_per_step; ++s) {
      const auto start = static_cast<int64_t>(random() % static_cast<uint64_t>(options.tokens - options.span));
      command.spans.push_back({start, {ids.begin() + start, ids.begin() + start + options.span + 1}});
      const double rows_in_span = static_cast<double>(options.span);
      // Forward and activation gradient, dW_Q (as much as the projection's forward); attention 2 + 3 matrix products.
      step_flops += rows_in_span * (2 * LinearFlops(c, false, true) + 2.0 * static_cast<double>(c.query_parameters()));
      step_flops += attention_row * 2.5 * rows_in_span * (static_cast<double>(start) + (rows_in_span + 1) / 2);
    }
    losses->push_back(driver.Run(std::move(command)).loss);
  }
  rows.push_back({"adapt step", options.steps, Now() - begin, step_flops, 0.0});
  driver.Run(EndAdapt{1, true, 1});

  for (const bool adapted : {false, true}) {
    OpenSequence open{adapted ? 2u : 1u, 1, adapted ? 1u : 0u, adapted ? 1 : 0, options.decode + 2, {}};
    driver.Run(open);
    driver.Run(ExtendSequence{open.sequence, options.tokens - 1, {ids.back(), ids.front()}, true, {}});
    begin = Now();
    driver.Run(DecodeSteps{open.sequence, static_cast<int32_t>(options.decode)});
    const double weights = 4.0 * static_cast<double>(c.parameters() + (adapted ? c.query_parameters() : 0));
    rows.push_back(
        {adapted ? "decode adapted" : "decode", options.decode, Now() - begin,
         (LinearFlops(c, true, true) + attention_row * tokens) * static_cast<double>(options.decode),
         (weights + static_cast<double>(c.kv_bytes_per_token(4)) * tokens) * static_cast<double>(options.decode)});
    driver.Run(CloseSequence{open.sequence});
  }
  return rows;
}

void Report(const std::vector<Row>& rows, const Ceilings& ceilings, int ranks, const Options& options,
            const std::vector<double>& losses) {
  std::printf("# %s, %lld tokens, %d ranks x %d threads; per rank: GEMM %.0f GFLOP/s, read %.1f GB/s\n",
              options.model.c_str(), static_cast<long long>(options.tokens), ranks, options.threads,
              ceilings.gemm_flops / 1e9, ceilings.read_bytes / 1e9);
  std::printf("%-15s %8s %10s %12s %10s %10s %8s\n", "phase", "units", "seconds", "ms/unit", "GFLOP/s", "GB/s",
              "share");
  std::ofstream jsonl;
  if (!options.jsonl.empty()) jsonl.open(options.jsonl, std::ios::app);
  for (const Row& row : rows) {
    const bool by_bytes = row.bytes > 0.0;
    const double share = by_bytes ? row.bytes / row.seconds / ceilings.read_bytes
                                  : row.flops / row.seconds / (ceilings.gemm_flops * ranks);
    std::printf("%-15s %8lld %10.3f %12.3f %10.1f %10.1f %7.0f%%\n", row.what.c_str(),
                static_cast<long long>(row.units), row.seconds, row.seconds / static_cast<double>(row.units) * 1e3,
                row.flops / row.seconds / 1e9, row.bytes / row.seconds / 1e9, share * 100);
    if (jsonl) {
      jsonl << "{\"phase\":\"" << row.what << "\",\"tokens\":" << options.tokens << ",\"ranks\":" << ranks
            << ",\"threads\":" << options.threads << ",\"units\":" << row.units << ",\"seconds\":" << row.seconds
            << ",\"gflops\":" << row.flops / row.seconds / 1e9 << ",\"share\":" << share << "}\n";
    }
  }
  std::printf("# loss of first and last step %.4f %.4f; peak resident per rank %.0f MB\n", losses.front(),
              losses.back(), static_cast<double>(ResidentBytes("VmHWM")) / 1e6);
}

// The collective is gone when this returns, as MPI_Finalize wants it.
Status RunRank(const Options& options, const ModelConfig& config, std::shared_ptr<const Weights> weights) {
  const std::shared_ptr<Collective> collective = MakeMpiCollective(600.0);
  const int rank = collective->rank(), ranks = collective->size();
  const Ceilings ceilings = MeasureCeilings();
  const std::vector<int32_t> ids = ReadIds(options, config.vocab);
  Driver* driver_pointer = nullptr;
  Engine engine({}, std::move(weights), MakeCpuBackend(), collective,
                [&](Result result) { driver_pointer->OnResult(std::move(result)); });
  Driver driver(engine);
  driver_pointer = &driver;
  std::thread commands([&] {
    std::vector<double> losses;
    const std::vector<Row> rows = Measure(driver, config, options, ids, &losses);
    if (rank == 0) Report(rows, ceilings, ranks, options, losses);
    engine.Stop();
  });
  const Status status = engine.Run();
  commands.join();
  return status;
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("One context through the engine: prefill, adaptation steps, decode");
  app.add_option("--model", options.model, "Hugging Face folder or GGUF file")->required();
  app.add_option("--ids", options.ids_file, "Token ids, little-endian int32; random ids without it");
  app.add_option("--tokens", options.tokens, "Length of the context")->capture_default_str();
  app.add_option("--chunk", options.chunk, "Rows of a prefill chunk")->capture_default_str();
  app.add_option("--steps", options.steps, "Adaptation steps")->capture_default_str();
  app.add_option("--span", options.span, "Rows of a span")->capture_default_str();
  app.add_option("--spans-per-step", options.spans_per_step, "Spans of a step")->capture_default_str();
  app.add_option("--decode", options.decode, "Tokens to decode")->capture_default_str();
  app.add_option("--learning-rate", options.learning_rate, "AdamW's")->capture_default_str();
  app.add_option("--threads", options.threads, "Threads of each rank")->capture_default_str();
  app.add_option("--jsonl", options.jsonl, "Append one line per row to this file");
  CLI11_PARSE(app, argc, argv);

  int provided = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
  at::set_num_threads(options.threads);
  const auto config = LoadModelConfig(options.model);
  if (!config.ok()) return std::fprintf(stderr, "%s\n", config.status().ToString().c_str()), 2;
  auto weights = LoadWeights(options.model, *config, {});
  if (!weights.ok()) return std::fprintf(stderr, "%s\n", weights.status().ToString().c_str()), 3;

  const Status status = RunRank(options, *config, std::make_shared<const Weights>(std::move(*weights)));
  MPI_Finalize();
  return status.ok() ? 0 : kExitGroup;
}

}  // namespace
}  // namespace refocus

int main(int argc, char** argv) { return refocus::Main(argc, argv); }
