// plan: what fits where, from the model's configuration alone; asks no server and touches no weight.
#include <iostream>
#include <optional>

#include "base/limits.h"
#include "base/memory_plan.h"
#include "base/model_config.h"
#include "cli/commands.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

constexpr int64_t kDefaultGpuMemory = 80'000'000'000;

struct PlanOptions {
  std::string model;
  std::string rope_scaling = "none";
  std::string device = "cuda";
  std::string kv_dtype;
  int64_t ranks = 1;
  int64_t tokens = 0;
  std::optional<int64_t> memory;
  std::optional<int64_t> adapters;
  int64_t lora_rank = 0;
  bool adapt = false;
  bool json = false;
};

StatusOr<MemoryQuestion> QuestionOf(const PlanOptions& options) {
  MemoryQuestion question;
  REFOCUS_ASSIGN_OR_RETURN(question.device, ParseDevice(options.device));
  REFOCUS_ASSIGN_OR_RETURN(question.kv, ParseKvType(options.kv_dtype, question.device));
  if (question.device == DeviceKind::kCpu && !options.memory) {
    return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
                 "--memory: got none, allowed with --device cpu: what one rank may use, such as 16GiB");
  }
  question.ranks = options.ranks;
  question.memory_bytes = options.memory.value_or(kDefaultGpuMemory);
  question.tokens = options.tokens;
  question.shape.lora_rank = options.lora_rank;
  question.adapting = options.adapt ? 1 : 0;
  // The service sets aside room for the finished delta before it starts.
  question.committed = options.adapters.value_or(options.adapt ? 1 : 0);
  return question;
}

void PrintTable(const ModelConfig& config, const MemoryQuestion& question, const MemoryPlan& plan) {
  const bool gpu = question.device == DeviceKind::kCuda;
  std::cout << "model       " << config.name << ": " << FamilyName(config.family) << ", "
            << FormatCount(config.parameters() / 1'000'000) << " million parameters, " << (gpu ? "bf16" : "fp32")
            << ", K/V " << FormatBytes(plan.kv_per_token) << " a token ("
            << KvTypeName(question.kv, question.device) << ")\n"
            << "ranks       " << question.ranks << (gpu ? ", one GPU each, " : " on CPU, ") << FormatBytes(plan.memory)
            << " a rank\n\n";
  Table table({"component", "per rank", "all ranks"});
  const auto add = [&](const std::string& component, int64_t bytes, std::optional<int64_t> all = {}) {
    // Only shown: never above 2^63 where the plan fits, and a plan that does not fit shows no more digits than these.
    const double sum = static_cast<double>(bytes) * static_cast<double>(question.ranks);
    const int64_t shown = all.value_or(sum < 9e18 ? bytes * question.ranks : INT64_MAX);
    table.Add({component, FormatBytes(bytes), FormatBytes(shown)});
  };
  add("weights", plan.weights);
  add("K/V of " + FormatCount(question.tokens) + " tokens", plan.kv, plan.kv_all_ranks);
  if (question.adapting > 0) add("adaptation: delta, gradient, moments", plan.adaptation);
  if (question.committed > 0) add("adapters kept: " + FormatCount(question.committed), plan.adapters);
  add(gpu ? "workspace: activations, logits" : "workspace: half of the rest", plan.workspace);
  if (gpu) add(question.ranks > 1 ? "CUDA context, cuBLAS, NCCL" : "CUDA context, cuBLAS", plan.runtime);
  add("total", plan.total);
  if (plan.fits) add("free", plan.free);
  table.Print(std::cout);
  std::cout << "\nlargest context: " << FormatCount(plan.largest_context) << " tokens";
  if (plan.adaptation + plan.adapters > 0) {
    std::cout << ", without adaptation " << FormatCount(plan.largest_context_base);
  }
  std::cout << "; the model's own limit is " << FormatCount(config.max_positions) << " positions\n" << std::flush;
}

void PrintAsJson(const PlanOptions& options, const ModelConfig& config, const MemoryPlan& plan) {
  const std::pair<const char*, int64_t> numbers[] = {{"ranks", options.ranks},
                                                     {"tokens", options.tokens},
                                                     {"memory_bytes", plan.memory},
                                                     {"weight_bytes", plan.weights},
                                                     {"kv_bytes_per_token", plan.kv_per_token},
                                                     {"kv_bytes", plan.kv},
                                                     {"kv_bytes_all_ranks", plan.kv_all_ranks},
                                                     {"adaptation_bytes", plan.adaptation},
                                                     {"adapter_bytes", plan.adapters},
                                                     {"workspace_bytes", plan.workspace},
                                                     {"runtime_bytes", plan.runtime},
                                                     {"total_bytes", plan.total},
                                                     {"free_bytes", plan.free},
                                                     {"largest_context", plan.largest_context},
                                                     {"largest_context_without_adaptation", plan.largest_context_base},
                                                     {"max_positions", config.max_positions}};
  std::cout << "{\"device\":\"" << options.device << "\",\"fits\":" << (plan.fits ? "true" : "false");
  for (const auto& [name, value] : numbers) std::cout << ",\"" << name << "\":" << value;
  std::cout << ",\"advice\":\"" << plan.advice << "\"}" << std::endl;  // digits and plain words
}

Status PrintPlan(const PlanOptions& options) {
  REFOCUS_ASSIGN_OR_RETURN(const MemoryQuestion question, QuestionOf(options));
  REFOCUS_ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model, options.rope_scaling));
  REFOCUS_ASSIGN_OR_RETURN(const MemoryPlan plan, PlanMemory(config, question));
  if (options.json) {
    PrintAsJson(options, config, plan);
  } else {
    PrintTable(config, question, plan);
  }
  if (plan.fits) return absl::OkStatus();
  return Error(StatusCode::kResourceExhausted, "HARDWARE", "does not fit: " + plan.advice);
}

}  // namespace

void AddPlan(CLI::App& app, Run* run) {
  auto* verb = app.add_subcommand("plan", "What memory a model and a context take, and whether they fit");
  const auto o = std::make_shared<PlanOptions>();
  verb->add_option("--model", o->model, "Folder with config.json (weights may be missing), or a .gguf file")
      ->envname("REFOCUS_MODEL")->type_name("PATH")->required()->group("Model");
  verb->add_option("--rope-scaling", o->rope_scaling, "RoPE stretched over a longer window, as serve takes it")
      ->envname("REFOCUS_ROPE_SCALING")->type_name("SCALING")->capture_default_str()->group("Model");
  verb->add_option("--tokens", o->tokens, "Length of the context with question and answer, tokens")
      ->check(CLI::Range(int64_t{0}, kMaxContextTokens))->capture_default_str()->group("Model");
  verb->add_flag("--adapt", o->adapt, "Room for one adaptation under way")->group("Model");
  verb->add_option("--adapters", o->adapters, "Adapters kept (1 with --adapt, else 0)")
      ->check(CLI::Range(0, 65536))->group("Model");
  verb->add_option("--lora-rank", o->lora_rank, "Adapters are LoRAs of this rank (full)")
      ->check(CLI::Range(int64_t{1}, kMaxLoraRank))->group("Model");
  const std::string memory = "Devices";
  verb->add_option("--device", o->device, "Where to compute")
      ->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str()->group(memory);
  verb->add_option("--kv-dtype", o->kv_dtype,
                   "How K and V are kept: fp32 (cpu), bf16 (cuda) or int8 (what the device computes with)")
      ->envname("REFOCUS_KV_DTYPE")->check(CLI::IsMember({"fp32", "bf16", "int8"}))->type_name("TYPE")->group(memory);
  verb->add_option("--gpus,--ranks", o->ranks, "Ranks, one GPU each; 1 to 256")
      ->check(CLI::Range(1, 256))->capture_default_str()->group(memory);
  verb->add_option("--gpu-memory,--memory", o->memory,
                   "Memory that each rank may use, as 80GB or 139GiB (80GB; with --device cpu it must be given)")
      ->transform(CLI::AsSizeValue(true))->check(CLI::PositiveNumber)->type_name("SIZE")->group(memory);
  verb->add_flag("--json", o->json, "As one JSON object, sizes in bytes");
  verb->callback([=] { *run = [=] { return Finish("plan", PrintPlan(*o)); }; });
}

}  // namespace refocus::cli
