#include "worker/options.h"

#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string_view>

#include <CLI/CLI.hpp>

#include "base/limits.h"
#include "base/status.h"

namespace refocus {
namespace {

constexpr char kAbout[] =
    "refocus-worker: one rank of a group that serves a model. Start a group of P ranks with\n"
    "  mpirun -np P --bind-to none refocus-worker --model PATH --coordinator HOST:PORT\n"
    "and a group of one rank without mpirun. Ranks with a GPU may also start one by one, on any hosts, as\n"
    "  refocus-worker --device cuda --group-size P --group-name NAME --model PATH --coordinator HOST:PORT\n"
    "and get their places from the coordinator.";
constexpr char kExitCodes[] =
    "Exit codes: 0 planned stop, 2 configuration, 3 weights, 4 hardware, 5 group failure, 130 interrupt.\n"
    "SIGTERM or SIGINT stops a group of one rank as planned; sent to one rank of several it breaks the group up: stop\n"
    "the coordinator instead, which ends all ranks together.\n"
    "A flag wins over its environment variable, which wins over the default.\n";

std::string CheckAddress(const std::string& text) {
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) return "got '" + text + "', allowed HOST:PORT";
  const std::string port = text.substr(colon + 1);
  const bool digits = !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
  if (!digits || std::stoi(port) < 1 || std::stoi(port) > 65535) return "port: got '" + port + "', allowed 1 to 65535";
  return "";
}

void AddModelOptions(CLI::App& app, WorkerOptions& options) {
  app.add_option("--model", options.model, "Folder with config.json and *.safetensors, or a .gguf file")
      ->envname("REFOCUS_MODEL")->required()->type_name("PATH")->group("Model");
  app.add_option("--rope-scaling", options.rope_scaling,
                 "Stretch RoPE over a longer window, in place of what the model states: TYPE:FACTOR or "
                 "TYPE:FACTOR:WINDOW, linear, llama3 or yarn, as yarn:4:32768; WINDOW: the model's own before "
                 "stretching. The same on all ranks and the coordinator")
      ->envname("REFOCUS_ROPE_SCALING")->default_str("none")->type_name("SCALING")->group("Model");
  app.add_flag("--check-finite", options.check_finite, "Refuse weights that hold NaN or Inf (exit 3)")
      ->envname("REFOCUS_CHECK_FINITE")->group("Model");
  app.add_option("--random-weights", options.random_seed,
                 "Make weights from this seed instead of reading any, for measurements: PATH needs config.json alone")
      ->envname("REFOCUS_RANDOM_WEIGHTS")->type_name("SEED")->group("Model");
}

void AddResourceOptions(CLI::App& app, WorkerOptions& options, std::string& kv_dtype) {
  app.add_option_function<std::string>(
         "--device", [&options](const std::string& name) { options.device = *ParseDevice(name); },
         "Where to compute; cuda: each rank takes the visible GPU (CUDA_VISIBLE_DEVICES) with its number on the host")
      ->envname("REFOCUS_DEVICE")->check(CLI::IsMember({"cpu", "cuda"}))->default_str("cpu")->group("Resources");
  app.add_option("--threads", options.threads,
                 "Threads of this rank; 0: its share of the cores that it and the host's other ranks may run on")
      ->envname("REFOCUS_THREADS")->check(CLI::Range(0, 4096))->capture_default_str()->type_name("N")
      ->group("Resources");
  app.add_option("--kv-memory", options.kv_bytes,
                 "Memory that this rank may reserve for K and V and adapters, as 4GiB or a number of bytes; 0: half of "
                 "the host's memory that the weights leave free, divided by its ranks; of a GPU, all that weights and "
                 "work space leave")
      ->envname("REFOCUS_KV_MEMORY")->transform(CLI::AsSizeValue(false))->check(CLI::NonNegativeNumber)
      ->default_str("0")->type_name("BYTES")->group("Resources");
  app.add_option("--kv-dtype", kv_dtype,
                 "How K and V are kept: fp32 (cpu), bf16 (cuda) or int8 (both); what the device computes with unless said. "
                 "The same on all ranks")
      ->envname("REFOCUS_KV_DTYPE")->check(CLI::IsMember({"fp32", "bf16", "int8"}))->type_name("TYPE")
      ->group("Resources");
}

void AddGroupOptions(CLI::App& app, WorkerOptions& options) {
  app.add_option("--coordinator", options.coordinator, "Worker port of the coordinator")
      ->envname("REFOCUS_COORDINATOR")->required()->check(CheckAddress, "")->type_name("HOST:PORT")->group("Group");
  app.add_option("--connect-seconds", options.connect_seconds,
                 "How long to dial at the start before giving up (exit 5)")
      ->envname("REFOCUS_CONNECT_SECONDS")->check(CLI::Range(0.0, 86400.0))->capture_default_str()->type_name("SECONDS")
      ->group("Group");
  app.add_option("--collective", options.collective, "How ranks exchange tensors; auto: mpi on cpu, nccl on cuda")
      ->envname("REFOCUS_COLLECTIVE")->check(CLI::IsMember({"auto", "mpi", "nccl"}))->default_str("auto")
      ->group("Group");
  app.add_option("--group-size", options.group_size,
                 "Ranks of a group whose processes start by themselves, without mpirun, and get their places from the "
                 "coordinator; 0: mpirun says")
      ->envname("REFOCUS_GROUP_SIZE")->check(CLI::Range(0, 4096))->capture_default_str()->type_name("P")
      ->group("Group");
  app.add_option("--group-name", options.group_name,
                 "With --group-size above 1: the same on all processes of this group and on no other")
      ->envname("REFOCUS_GROUP_NAME")->type_name("NAME")->group("Group");
  app.add_option("--collective-deadline", options.deadline_seconds,
                 "Longest wait for the other ranks in one exchange; beyond it the group is lost (exit 5)")
      ->envname("REFOCUS_COLLECTIVE_DEADLINE")->check(CLI::Range(0.1, 86400.0))->capture_default_str()
      ->type_name("SECONDS")->group("Group");
  app.add_option("--peer-memory", options.peer_memory,
                 "Let GPUs of one host exchange through each other's memory where all of the group can; false: through "
                 "NCCL alone")
      ->envname("REFOCUS_PEER_MEMORY")->default_str("true")->type_name("BOOLEAN")->group("Group");
}

[[noreturn]] void End(int code, bool print, const std::string& text, std::ostream& out) {
  if (print) out << text << std::flush;
  std::exit(code);
}

// What CLI11 cannot see in one option alone; empty when all is well. Fills in what "auto" stands for.
std::string FindContradiction(WorkerOptions& options) {
  const bool gpu = options.device == DeviceKind::kCuda;
  const std::string spoken = gpu ? "nccl" : "mpi";
  if (options.collective.empty() || options.collective == "auto") options.collective = spoken;
  if (options.collective != spoken) {
    return "--collective: got " + options.collective + " with --device " + (gpu ? "cuda" : "cpu") + ", allowed " +
           spoken;
  }
  if (options.group_size > 1 && !gpu) {
    return "--group-size: got " + std::to_string(options.group_size) +
           " with --device cpu, allowed 1: ranks on CPUs talk through MPI, start them with mpirun";
  }
  if (options.group_size > 1 && (options.group_name.empty() || options.group_name.size() > 128)) {
    return "--group-name: got " + std::to_string(options.group_name.size()) +
           " characters with --group-size above 1, allowed 1 to 128";
  }
  if (options.group_size > 0 && std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr) {
    return "--group-size: got " + std::to_string(options.group_size) +
           " under mpirun, which says how many ranks there are; use one of them";
  }
  return "";
}

}  // namespace

WorkerOptions ParseWorkerOptions(int argc, char** argv) {
  WorkerOptions options;
  std::string level = "info", kv_dtype;
  CLI::App app{kAbout, "refocus-worker"};
  app.footer(kExitCodes);
  app.set_version_flag("--version",
                       std::string("refocus-worker ") + REFOCUS_VERSION + ", protocol " + kProtocolVersion);
  AddModelOptions(app, options);
  AddResourceOptions(app, options, kv_dtype);
  AddGroupOptions(app, options);
  app.add_option("--log-level", level, "Least important lines to log")
      ->envname("REFOCUS_LOG_LEVEL")->check(CLI::IsMember({"debug", "info", "warning", "error"}))->capture_default_str()
      ->group("Logging");

  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");
  const bool print = rank == nullptr || std::string_view(rank) == "0";
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::ostringstream text;
    const int code = app.exit(error, text, text);
    if (code == 0) End(kExitOk, print, text.str(), std::cout);
    End(kExitConfig, print, text.str(), std::cerr);
  }
  ParseLogLevel(level, &options.log_level);
  std::string problem = FindContradiction(options);
  if (const StatusOr<KvType> kv = ParseKvType(kv_dtype, options.device); kv.ok()) {
    options.kv = *kv;
  } else {
    problem = std::string(kv.status().message());
  }
  if (!problem.empty()) End(kExitConfig, print, problem + " [CONFIG_INVALID]\n", std::cerr);
  return options;
}

}  // namespace refocus
