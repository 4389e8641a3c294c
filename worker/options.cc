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
    "and a group of one rank without mpirun.";
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
  app.add_flag("--check-finite", options.check_finite, "Refuse weights that hold NaN or Inf (exit 3)")
      ->envname("REFOCUS_CHECK_FINITE")->group("Model");
}

void AddResourceOptions(CLI::App& app, WorkerOptions& options) {
  app.add_option("--device", options.device, "Where to compute")
      ->envname("REFOCUS_DEVICE")->check(CLI::IsMember({"cpu"}))->capture_default_str()->group("Resources");
  app.add_option("--threads", options.threads,
                 "Threads of this rank; 0: its share of the cores that it and the host's other ranks may run on")
      ->envname("REFOCUS_THREADS")->check(CLI::Range(0, 4096))->capture_default_str()->type_name("N")
      ->group("Resources");
  app.add_option("--kv-memory", options.kv_bytes,
                 "Memory that this rank may reserve for K and V, as 4GiB or a number of bytes; 0: half of the host's "
                 "memory that the weights leave free, divided by its ranks")
      ->envname("REFOCUS_KV_MEMORY")->transform(CLI::AsSizeValue(false))->check(CLI::NonNegativeNumber)
      ->default_str("0")->type_name("BYTES")->group("Resources");
}

void AddGroupOptions(CLI::App& app, WorkerOptions& options) {
  app.add_option("--coordinator", options.coordinator, "Worker port of the coordinator")
      ->envname("REFOCUS_COORDINATOR")->required()->check(CheckAddress, "")->type_name("HOST:PORT")->group("Group");
  app.add_option("--connect-seconds", options.connect_seconds,
                 "How long to dial at the start before giving up (exit 5)")
      ->envname("REFOCUS_CONNECT_SECONDS")->check(CLI::Range(0.0, 86400.0))->capture_default_str()->type_name("SECONDS")
      ->group("Group");
  app.add_option("--collective", options.collective, "How ranks exchange tensors")
      ->envname("REFOCUS_COLLECTIVE")->check(CLI::IsMember({"mpi"}))->capture_default_str()->group("Group");
  app.add_option("--collective-deadline", options.deadline_seconds,
                 "Longest wait for the other ranks in one exchange; beyond it the group is lost (exit 5)")
      ->envname("REFOCUS_COLLECTIVE_DEADLINE")->check(CLI::Range(0.1, 86400.0))->capture_default_str()
      ->type_name("SECONDS")->group("Group");
}

[[noreturn]] void End(int code, bool print, const std::string& text, std::ostream& out) {
  if (print) out << text << std::flush;
  std::exit(code);
}

}  // namespace

WorkerOptions ParseWorkerOptions(int argc, char** argv) {
  WorkerOptions options;
  std::string level = "info";
  CLI::App app{kAbout, "refocus-worker"};
  app.footer(kExitCodes);
  app.set_version_flag("--version",
                       std::string("refocus-worker ") + REFOCUS_VERSION + ", protocol " + kProtocolVersion);
  AddModelOptions(app, options);
  AddResourceOptions(app, options);
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
  return options;
}

}  // namespace refocus
