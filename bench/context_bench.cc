// Contexts through the engine, without the service around it: prefill, adaptation steps, decode. Each rank runs this
// program; start several with mpirun. Prints a table (floor: the time that the arithmetic or the bytes need at the
// matrix-multiply and copy rates measured in the same run) and, with --jsonl, one line per row.
//
//   mpirun -np 2 context_bench --model MODEL --tokens 4096 --threads 1
//   mpirun -np 2 context_bench --model FOLDER --random-weights 1 --device cuda --tokens 32768,131072
//   context_bench --model FOLDER --random-weights 1 --device cuda --tokens 131072 --batch 1,16 --adapters 0,1,8
//   ... the same with --lora-rank 16: adapters that are LoRAs
#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randn.h>
#include <c10/util/accumulate.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/limits.h"
#include "bench/engine_driver.h"
#include "worker/device.h"
#include "worker/engine.h"
#include "worker/launch.h"
#include "worker/query_delta.h"

namespace refocus {
namespace {

struct Options {
  std::string model;
  std::string device = "cpu";
  std::string kv_dtype;
  std::string ids_file;  // int32, little-endian
  std::string jsonl;
  std::string results;
  std::vector<int64_t> tokens = {4096};
  int64_t layers = 0;
  int64_t chunk = 0;
  int64_t steps = 32;
  int64_t span = 128;
  int64_t spans_per_step = 1;
  double at = -1.0;
  bool peer_memory = true;
  int64_t decode = 32;
  std::vector<int64_t> batch;
  std::vector<int64_t> adapters = {0};
  int64_t lora_rank = 0;
  double learning_rate = 1e-4;
  std::optional<uint64_t> random_weights;
  uint64_t seed = 1;
  int threads = 1;
  bool synthetic_cache = false;
  bool cuda() const { return device == "cuda"; }
  DeviceKind kind() const { return cuda() ? DeviceKind::kCuda : DeviceKind::kCpu; }
  KvType kv() const { return *ParseKvType(kv_dtype, kind()); }  // checked before
};

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int64_t ResidentBytes(const char* field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field, 0) == 0) return std::stoll(line.substr(line.find(':') + 1)) * 1024;
  }
  return 0;
}

struct Row {
  std::string what;
  int64_t tokens = 0;
  int64_t units = 0;          // tokens or steps; of a batch, tokens of all its rows
  double seconds = 0.0;       // of all units
  double median_seconds = 0.0;  // of one unit, where each was timed
  double flops = 0.0;         // arithmetic that the method needs, all ranks
  double bytes = 0.0;         // memory that must be moved, on one rank
  double floor_seconds = 0.0;
  double unit_seconds() const { return median_seconds > 0.0 ? median_seconds : seconds / static_cast<double>(units); }
};

// Multiplications and additions of the linear layers for one row; keys: with K and V; output: with the output matrix.
double LinearFlops(const ModelConfig& c, bool keys, bool output) {
  const double layer = 2.0 * static_cast<double>(c.hidden) *
                       static_cast<double>(2 * c.q_dim() + (keys ? 2 * c.kv_dim() : 0) + 3 * c.mlp);
  return layer * static_cast<double>(c.layers) + (output ? 2.0 * static_cast<double>(c.hidden * c.vocab) : 0.0);
}

struct Ceilings {
  double gemm_flops = 0.0;
  double copy_bytes = 0.0;  // read and written
};

// On the device and in the type that the model uses.
Ceilings MeasureCeilings(Backend& backend) {
  Ceilings best;
  const bool cpu = backend.device().is_cpu();
  const int64_t n = cpu ? 2048 : 8192;
  const auto options = at::TensorOptions(backend.device()).dtype(backend.dtype());
  const at::Tensor a = at::randn({n, n}, options), b = at::randn({n, n}, options);
  const at::Tensor from = at::randn({cpu ? int64_t{24} << 20 : int64_t{256} << 20}, options);
  at::Tensor to = at::empty(from.sizes(), options);
  for (int i = 0; i < 5; ++i) {
    backend.Synchronize();
    double begin = Now();
    at::mm(a, b);
    backend.Synchronize();
    best.gemm_flops = std::max(best.gemm_flops, 2.0 * std::pow(static_cast<double>(n), 3) / (Now() - begin));
    begin = Now();
    to.copy_(from);
    backend.Synchronize();
    best.copy_bytes = std::max(best.copy_bytes, 2.0 * static_cast<double>(from.nbytes()) / (Now() - begin));
  }
  return best;
}

std::vector<int32_t> ReadIds(const Options& options, int64_t count, int64_t vocab) {
  std::vector<int32_t> ids(count);
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

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// What the run computed, for comparison with a peer on the same weights and ids.
struct Results {
  std::vector<double> losses, grad_norms, seconds;
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
};

class ContextBench {
 public:
  ContextBench(Driver& driver, const ModelConfig& config, const Options& options, const Ceilings& ceilings, int ranks,
               int64_t element_bytes)
      : driver_(driver), c_(config), options_(options), ceilings_(ceilings), ranks_(ranks), element_(element_bytes) {}

  std::vector<Row> Run(int64_t tokens, Results* results) {
    tokens_ = tokens;
    ids_ = ReadIds(options_, tokens, c_.vocab);
    rows_.clear();
    driver_.Run(OpenContext{1, tokens});
    if (!options_.synthetic_cache) Prefill();
    Adapt(results);
    Decode(0, results);
    Decode(1, results);
    for (const int64_t rows : options_.batch) {
      for (const int64_t adapters : options_.adapters) DecodeBatch(rows, adapters);
    }
    driver_.Run(CloseContext{1});
    return rows_;
  }

 private:
  double attention_row() const { return 4.0 * static_cast<double>(c_.q_dim() * c_.layers); }  // per visible key
  double Real(int64_t value) const { return static_cast<double>(value); }
  DeltaConfig delta() const { return {options_.lora_rank, 2.0f * static_cast<float>(options_.lora_rank)}; }
  double delta_numbers() const { return Real(c10::multiply_integers(DeltaSizes(c_, delta()))); }
  double weight_bytes() const { return Real(c_.parameters() * element_); }

  void Prefill() {
    const int64_t chunk = options_.chunk > 0 ? options_.chunk : (options_.cuda() ? 8192 : 512);
    const double begin = Now();
    for (int64_t pos = 0; pos < tokens_; pos += chunk) {
      const int64_t end = std::min(pos + chunk, tokens_);
      driver_.Run(PrefillChunk{1, pos, {ids_.begin() + pos, ids_.begin() + end}});
    }
    Row row{"prefill", tokens_, tokens_, Now() - begin};
    row.flops = LinearFlops(c_, true, false) * Real(tokens_) + attention_row() * Real(tokens_) * Real(tokens_ + 1) / 2;
    row.floor_seconds = row.flops / (ceilings_.gemm_flops * ranks_);
    rows_.push_back(row);
  }

  void BeginAdapter(uint64_t adapter) {
    BeginAdapt begin{1, adapter};
    begin.delta = delta();
    driver_.Run(begin);
  }

  void Adapt(Results* results) {
    BeginAdapter(1);
    std::mt19937_64 random(options_.seed);
    const double k = Real(options_.span * options_.spans_per_step);
    std::vector<double> each;
    Row row{"adapt step", tokens_, options_.steps};
    for (int64_t step = 1; step <= options_.steps; ++step) {
      AdaptStep command{1, step, {}, static_cast<float>(options_.learning_rate)};
      for (int64_t s = 0; s < options_.spans_per_step; ++s) {
        const int64_t last = tokens_ - options_.span - 1;
        int64_t start = static_cast<int64_t>(random() % static_cast<uint64_t>(last + 1));
        if (options_.at >= 0.0) start = std::min(last, static_cast<int64_t>(options_.at * Real(tokens_)) + step - 1);
        command.spans.push_back({start, {ids_.begin() + start, ids_.begin() + start + options_.span + 1}});
        // Forward and activation gradient, dW_Q (as much as the projection's forward); attention: 2 + 3 products.
        row.flops += attention_row() * 2.5 * Real(options_.span) * (Real(start) + (Real(options_.span) + 1) / 2);
      }
      const double begin = Now();
      const Result result = driver_.Run(std::move(command));
      each.push_back(Now() - begin);
      results->losses.push_back(result.loss);
      results->grad_norms.push_back(result.grad_norm);
    }
    // Attention by arithmetic, spread over the ranks; linear layers by arithmetic or by reading the weights twice; AdamW
    // by bytes: gradient, moments and delta read, all but the gradient and the rounded delta written.
    const double steps = Real(options_.steps);
    const bool split = element_ == 4 || k >= 192.0 * ranks_;  // as the backends do it
    const double linear = k / (split ? ranks_ : 1) * (2 * LinearFlops(c_, false, true) + 2.0 * delta_numbers());
    const double adam = delta_numbers() * (16.0 + 12.0 + (element_ == 4 ? 0.0 : 2.0));
    row.floor_seconds = row.flops / (ceilings_.gemm_flops * ranks_) +
                        steps * (std::max(linear / ceilings_.gemm_flops, 2.0 * weight_bytes() / ceilings_.copy_bytes) +
                                 adam / ceilings_.copy_bytes);
    row.flops += steps * linear * (split ? ranks_ : 1);
    for (const double seconds : each) row.seconds += seconds;
    row.median_seconds = Median({each.begin() + (each.size() > 4 ? 3 : 0), each.end()});
    rows_.push_back(row);
    driver_.Run(EndAdapt{1, true, 1});
  }

  void Decode(uint64_t adapter, Results* results) {
    constexpr int kWarm = 4;
    OpenSequence open{1 + adapter, 1, adapter, adapter == 0 ? 0 : 1, options_.decode + kWarm + 2, {}};
    driver_.Run(open);
    driver_.Run(ExtendSequence{open.sequence, tokens_ - 1, {ids_.back(), ids_.front()}, true, {}});
    driver_.Run(DecodeSteps{{open.sequence}, kWarm});
    Row row{adapter == 0 ? "decode" : "decode adapted", tokens_, options_.decode};
    const double begin = Now();
    driver_.Run(DecodeSteps{{open.sequence}, static_cast<int32_t>(options_.decode)});
    row.seconds = Now() - begin;
    const double count = Real(options_.decode);
    row.flops = (LinearFlops(c_, true, true) + attention_row() * Real(tokens_)) * count;
    row.bytes = count * (weight_bytes() + (adapter == 0 ? 0.0 : delta_numbers() * Real(element_)) +
                         Real(KvBytesPerToken(c_, options_.kind(), options_.kv())) * Real(tokens_) / ranks_);
    row.floor_seconds = row.bytes / ceilings_.copy_bytes;
    rows_.push_back(row);
    driver_.Run(CloseSequence{open.sequence});
    if (adapter != 0) return;
    for (const Token& token : driver_.TakeTokens()) {
      results->tokens.push_back(token.id);
      results->logprobs.push_back(token.logprob);
    }
  }

  // `rows` questions over the context, with so many different adapters in turn (0: base queries), a step for all at once.
  // The second pass over the same adapters is the one that a recording replays, so the warm-up holds both.
  void DecodeBatch(int64_t rows, int64_t adapters) {
    constexpr int kWarm = 4;
    for (int64_t a = 1; a < adapters; ++a) {  // 1 has been adapted; an adapter costs the same whatever its numbers are
      if (adapters_made_ > a) continue;
      const auto uid = static_cast<uint64_t>(a + 1);
      BeginAdapter(uid);
      driver_.Run(EndAdapt{uid, true, 1});
      adapters_made_ = a + 1;
    }
    DecodeSteps decode{{}, kWarm};
    for (int64_t i = 0; i < rows; ++i) {
      const auto uid = static_cast<uint64_t>(100 + i);
      const auto adapter = static_cast<uint64_t>(adapters == 0 ? 0 : 1 + i % adapters);
      driver_.Run(OpenSequence{uid, 1, adapter, adapter == 0 ? 0 : 1, options_.decode + kWarm + 3, {}});
      driver_.Run(ExtendSequence{uid, tokens_ - 1, {ids_.back(), static_cast<int32_t>((i + 1) % c_.vocab)}, true, {}});
      decode.sequences.push_back(uid);
    }
    driver_.Run(decode);
    Row row{"decode x" + std::to_string(rows) + (adapters == 0 ? "" : ", " + std::to_string(adapters) + " adapted"), tokens_,
            options_.decode * rows};
    decode.steps = static_cast<int32_t>(options_.decode);
    const double begin = Now();
    driver_.Run(decode);
    row.seconds = Now() - begin;
    const double steps = Real(options_.decode);
    row.flops = (LinearFlops(c_, true, true) + attention_row() * Real(tokens_)) * Real(row.units);
    row.bytes = steps * (weight_bytes() + Real(std::min(adapters, rows) * element_) * delta_numbers() +
                         Real(KvBytesPerToken(c_, options_.kind(), options_.kv())) * Real(tokens_) / ranks_);
    row.floor_seconds = row.bytes / ceilings_.copy_bytes;
    rows_.push_back(row);
    for (const uint64_t uid : decode.sequences) driver_.Run(CloseSequence{uid});
    driver_.TakeTokens();
  }

  Driver& driver_;
  const ModelConfig& c_;
  const Options& options_;
  const Ceilings ceilings_;
  const int ranks_;
  const int64_t element_;
  int64_t tokens_ = 0;
  int64_t adapters_made_ = 1;
  std::vector<int32_t> ids_;
  std::vector<Row> rows_;
};

void Report(const std::vector<Row>& rows, const std::string& device, int ranks, const Options& options) {
  std::ofstream jsonl;
  if (!options.jsonl.empty()) jsonl.open(options.jsonl, std::ios::app);
  for (const Row& row : rows) {
    const double unit = row.unit_seconds();
    const double floor = row.floor_seconds / static_cast<double>(row.units);
    std::printf("| %-22s | %8lld | %9.3f | %10.3f | %10.1f | %8.1f | %7.2f | %6.3f | %4.0f%% |\n", row.what.c_str(),
                static_cast<long long>(row.tokens), row.seconds, unit * 1e3, 1.0 / unit,
                row.flops / static_cast<double>(row.units) / unit / 1e12,
                row.bytes / static_cast<double>(row.units) / unit / 1e12, floor * 1e3, 100.0 * floor / unit);
    if (jsonl) {
      jsonl << "{\"phase\":\"" << row.what << "\",\"tokens\":" << row.tokens << ",\"ranks\":" << ranks << ",\"device\":\""
            << device << "\",\"kv_dtype\":\"" << KvTypeName(options.kv(), options.kind())
            << "\",\"synthetic_cache\":" << (options.synthetic_cache ? "true" : "false")
            << ",\"lora_rank\":" << options.lora_rank << ",\"threads\":" << options.threads
            << ",\"units\":" << row.units << ",\"seconds\":" << row.seconds
            << ",\"unit_ms\":" << unit * 1e3 << ",\"floor_ms\":" << floor * 1e3
            << ",\"tflops\":" << row.flops / static_cast<double>(row.units) / unit / 1e12 << "}\n";
    }
  }
  std::fflush(stdout);
}

// Time of a whole phase (prefill) or of one unit (step, token) as a power of the length, by least squares over the
// logarithms: the whole exponent, and that of the last two lengths, which small lengths' constant costs do not bend.
void ReportGrowth(const std::vector<Row>& rows) {
  std::map<std::string, std::vector<std::pair<double, double>>> phases;  // log tokens, log seconds
  for (const Row& row : rows) {
    const double seconds = row.what == "prefill" ? row.seconds : row.unit_seconds();
    phases[row.what].emplace_back(std::log(static_cast<double>(row.tokens)), std::log(seconds));
  }
  for (const auto& [what, points] : phases) {
    if (points.size() < 2) continue;
    const auto slope = [](const auto begin, const auto end) {
      double x = 0, y = 0, xx = 0, xy = 0;
      const auto n = static_cast<double>(end - begin);
      for (auto it = begin; it != end; ++it) {
        x += it->first / n;
        y += it->second / n;
      }
      for (auto it = begin; it != end; ++it) {
        xx += (it->first - x) * (it->first - x);
        xy += (it->first - x) * (it->second - y);
      }
      return xy / xx;
    };
    std::printf("# growth of %s with length: exponent %.2f over %zu lengths, %.2f over the last two\n", what.c_str(),
                slope(points.begin(), points.end()), points.size(), slope(points.end() - 2, points.end()));
  }
}

void WriteResults(const std::string& path, const Results& results) {
  if (path.empty()) return;
  std::ofstream out(path);
  out.precision(17);
  const auto list = [&](const char* name, const auto& values, const char* end) {
    out << "\"" << name << "\":[";
    for (size_t i = 0; i < values.size(); ++i) out << (i == 0 ? "" : ",") << values[i];
    out << "]" << end;
  };
  out << "{";
  list("losses", results.losses, ",");
  list("grad_norms", results.grad_norms, ",");
  list("tokens", results.tokens, ",");
  list("logprobs", results.logprobs, "}\n");
}

template <typename T>
T OrDie(StatusOr<T> value) {
  if (value.ok()) return std::move(value).value();
  std::fprintf(stderr, "context_bench: %s\n", value.status().ToString().c_str());
  std::_Exit(1);
}

// The collective is gone when this returns, as MPI_Finalize wants it.
Status RunRank(const Options& options, const Launch& launch) {
  Gpu gpu;
  if (options.cuda()) gpu = OrDie(UseGpu(launch.local_rank, launch.ranks_on_host));
  ModelConfig config = OrDie(LoadModelConfig(options.model));
  if (options.layers > 0) config.layers = options.layers;
  std::shared_ptr<Collective> collective;
  std::unique_ptr<Backend> backend;
  if (options.cuda()) {
    std::string id;
    if (launch.size > 1 && launch.rank == 0) id = MakeGpuGroupId();
    if (launch.size > 1) ShareFromRankZero(&id);
    collective = MakeGpuCollective(id, launch.rank, launch.size, 600.0, options.peer_memory);
    backend = MakeGpuBackend(config, gpu, options.kv());
  } else {
    collective = MakeMpiCollective(600.0);
    backend = MakeCpuBackend(config, options.kv());
  }
  LoadOptions load;
  load.threads = options.cuda() ? std::max(launch.threads, 1) : options.threads;
  load.random_seed = options.random_weights;
  load.device = backend->device();
  const double begin = Now();
  auto weights = std::make_shared<const Weights>(OrDie(LoadWeights(options.model, config, load)));
  const double load_seconds = Now() - begin;
  const std::string device = options.cuda() ? gpu.name : "CPU";
  const Ceilings ceilings = MeasureCeilings(*backend);
  GpuReleaseCached();  // what the ceilings took is not the engine's
  const int64_t element_bytes = static_cast<int64_t>(c10::elementSize(backend->dtype()));
  const std::string kept =
      ", K/V " + KvTypeName(options.kv(), options.kind()) + (options.synthetic_cache ? ", synthetic" : "") +
      (options.lora_rank == 0 ? "" : ", LoRA of rank " + std::to_string(options.lora_rank));
  if (launch.rank == 0) {
    std::printf("# %s, %lld layers, %d x %s%s; GEMM %.3f TFLOP/s, copy %.3f TB/s; %.2f GB of weights in %.1f s\n",
                config.name.c_str(), static_cast<long long>(config.layers), launch.size, device.c_str(),
                kept.c_str(), ceilings.gemm_flops / 1e12,
                ceilings.copy_bytes / 1e12, static_cast<double>(weights->bytes) / 1e9, load_seconds);
    std::printf("| phase | tokens | seconds | ms a unit | units/s | TFLOP/s | TB/s a rank | floor ms | of floor |\n");
    std::printf("|---|---:|---:|---:|---:|---:|---:|---:|---:|\n");
  }
  Driver* driver_pointer = nullptr;
  EngineOptions engine_options;
  engine_options.kv_capacity_bytes = int64_t{1} << 40;  // what does not fit fails
  engine_options.synthetic_cache = options.synthetic_cache;
  Engine engine(engine_options, std::move(weights), std::move(backend), collective,
                [&](Result result) { driver_pointer->OnResult(std::move(result)); });
  Driver driver(engine);
  driver_pointer = &driver;
  std::thread commands([&] {
    std::vector<Row> all;
    for (const int64_t tokens : options.tokens) {
      Results results;
      ContextBench bench(driver, config, options, ceilings, launch.size, element_bytes);
      const std::vector<Row> rows = bench.Run(tokens, &results);
      if (launch.rank != 0) continue;
      Report(rows, device, launch.size, options);
      all.insert(all.end(), rows.begin(), rows.end());
      WriteResults(options.results, results);
      const double held = options.cuda() ? static_cast<double>(GpuUsedBytes()) : static_cast<double>(ResidentBytes("VmHWM"));
      std::printf("# %lld tokens: loss of first and last step %.4f %.4f; %s %.2f GB\n", static_cast<long long>(tokens),
                  results.losses.front(), results.losses.back(),
                  options.cuda() ? "GPU memory held by rank 0" : "peak resident of rank 0", held / 1e9);
    }
    ReportGrowth(all);
    engine.Stop();
  });
  const Status status = engine.Run();
  commands.join();
  return status;
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app("Contexts through the engine: prefill, adaptation steps, decode");
  app.add_option("--model", options.model, "Hugging Face folder or GGUF file")->required();
  app.add_option("--device", options.device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
  app.add_option("--kv-dtype", options.kv_dtype, "How K and V are kept: fp32 (cpu), bf16 (cuda) or int8")
      ->check([&options](const std::string& name) {
        const Status status = ParseKvType(name, options.kind()).status();
        return status.ok() ? "" : std::string(status.message());
      }, "");
  app.add_option("--random-weights", options.random_weights, "Weights made from this seed instead of read");
  app.add_option("--layers", options.layers, "With random weights: fewer layers than the configuration says");
  app.add_option("--ids", options.ids_file, "Token ids, little-endian int32; random ids without it");
  app.add_option("--tokens", options.tokens, "Lengths of the contexts")->delimiter(',')->capture_default_str();
  app.add_flag("--synthetic-cache", options.synthetic_cache, "Random K/V instead of a prefill: times of steps and decode");
  app.add_option("--chunk", options.chunk, "Rows of a prefill chunk; 0: 512 on the CPU, 8192 on GPUs");
  app.add_option("--steps", options.steps, "Adaptation steps")->capture_default_str();
  app.add_option("--span", options.span, "Rows of a span")->capture_default_str();
  app.add_option("--spans-per-step", options.spans_per_step, "Spans of a step")->capture_default_str();
  app.add_option("--at", options.at, "Where spans begin, as a fraction of the context; negative: anywhere");
  app.add_option("--decode", options.decode, "Tokens to decode")->capture_default_str();
  app.add_option("--batch", options.batch, "Also decode so many questions at once over the context")->delimiter(',');
  app.add_option("--adapters", options.adapters, "With --batch: with so many adapters among them; 0: none")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--lora-rank", options.lora_rank, "Adapters are LoRAs of this rank; 0: full deltas")
      ->check(CLI::Range(int64_t{0}, kMaxLoraRank))
      ->capture_default_str();
  app.add_option("--learning-rate", options.learning_rate, "AdamW's")->capture_default_str();
  app.add_option("--peer-memory", options.peer_memory, "Exchange through each other's memory, where GPUs can")
      ->capture_default_str();
  app.add_option("--threads", options.threads, "Threads of each CPU rank")->capture_default_str();
  app.add_option("--jsonl", options.jsonl, "Append one line per row to this file");
  app.add_option("--results", options.results, "Write losses, gradient norms and decoded tokens to this file");
  CLI11_PARSE(app, argc, argv);
  const Launch launch = StartLaunch();
  at::set_num_threads(options.threads);
  const Status status = RunRank(options, launch);
  if (!status.ok()) {
    std::fprintf(stderr, "context_bench: %s\n", status.ToString().c_str());
    std::_Exit(1);
  }
  FinishLaunch(launch);
  return 0;
}

}  // namespace
}  // namespace refocus

int main(int argc, char** argv) { return refocus::Main(argc, argv); }
