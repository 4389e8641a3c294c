// serve: coordinator and workers on this machine, kept running.
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <optional>

#include "base/log.h"
#include "base/memory_plan.h"
#include "base/rope.h"
#include "cli/commands.h"
#include "cli/supervisor.h"

namespace refocus::cli {
namespace {

struct ServeFlags {
  ServeOptions options;
  std::optional<int> ranks;
  std::optional<int> threads;
  std::string rope_scaling = "none";
  std::string kv_memory;
  std::string kv_dtype;
  std::string device;
  std::string chat_template;
  bool check_finite = false;
  std::optional<uint64_t> random_weights;
  std::optional<double> collective_deadline;
  std::optional<double> default_ttl;
  std::optional<double> stuck;
  std::string log_level = "info";
  bool reflection = false;
  bool insecure = false;
};

// Checked here as well as in the children: one clear line instead of one from every rank.
std::string FindProblem(const ServeFlags& flags) {
  std::error_code error;
  if (!std::filesystem::exists(flags.options.model, error)) {
    return "--model: got '" + flags.options.model +
           "', which does not exist; allowed: a folder with config.json, or a .gguf file";
  }
  if (const Status scaling = ParseRopeScaling(flags.rope_scaling).status(); !scaling.ok()) {
    return std::string(scaling.message());
  }
  const DeviceKind device = flags.device == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu;
  if (const Status kv = ParseKvType(flags.kv_dtype, device).status(); !kv.ok()) return std::string(kv.message());
  for (const char* name : {"refocus-coordinator", "refocus-worker"}) {
    const std::string path = OwnFolder() + "/" + name;
    if (access(path.c_str(), X_OK) != 0) return path + ": not there; it belongs beside 'refocus'";
  }
  if (!OnPath("mpirun")) return "mpirun: not on PATH; install Open MPI 4.1 (Debian, Ubuntu: openmpi-bin)";
  return "";
}

int Serve(ServeFlags flags) {
  LogLevel level = LogLevel::kInfo;
  ParseLogLevel(flags.log_level, &level);
  SetLog("serve", level);
  if (const std::string problem = FindProblem(flags); !problem.empty()) {
    std::cerr << "refocus serve: " << problem << " [CONFIG_INVALID]" << std::endl;
    return kExitConfig;
  }
  flags.options.ranks = flags.ranks ? *flags.ranks
                        : flags.device == "cuda" ? VisibleGpus(std::getenv("CUDA_VISIBLE_DEVICES")) : 1;
  auto& coordinator = flags.options.coordinator_flags;
  auto& worker = flags.options.worker_flags;
  const auto add = [](std::vector<std::string>* to, const std::string& flag, const std::string& value) {
    to->push_back(flag);
    to->push_back(value);
  };
  add(&coordinator, "--log-level", flags.log_level);
  add(&coordinator, "--drain-seconds", std::to_string(flags.options.drain_seconds));
  if (flags.default_ttl) add(&coordinator, "--default-ttl", std::to_string(*flags.default_ttl));
  if (flags.stuck) add(&coordinator, "--stuck-seconds", std::to_string(*flags.stuck));
  if (!flags.chat_template.empty()) add(&coordinator, "--chat-template", flags.chat_template);
  if (flags.reflection) coordinator.push_back("--enable-reflection");
  if (flags.insecure) coordinator.push_back("--insecure");
  add(&worker, "--log-level", flags.log_level);
  for (auto* part : {&coordinator, &worker}) add(part, "--rope-scaling", flags.rope_scaling);
  if (!flags.device.empty()) add(&worker, "--device", flags.device);
  if (flags.check_finite) worker.push_back("--check-finite");
  if (flags.random_weights) add(&worker, "--random-weights", std::to_string(*flags.random_weights));
  if (flags.threads) add(&worker, "--threads", std::to_string(*flags.threads));
  if (!flags.kv_memory.empty()) add(&worker, "--kv-memory", flags.kv_memory);
  if (!flags.kv_dtype.empty()) add(&worker, "--kv-dtype", flags.kv_dtype);
  if (flags.collective_deadline) add(&worker, "--collective-deadline", std::to_string(*flags.collective_deadline));
  return Supervisor(flags.options).Run();
}

}  // namespace

void AddServe(CLI::App& app, Run* run) {
  auto* verb =
      app.add_subcommand("serve", "Run coordinator and workers on this machine; a group that dies is started anew");
  const auto f = std::make_shared<ServeFlags>();
  verb->add_option("--model", f->options.model, "Folder with config.json and *.safetensors, or a .gguf file")
      ->envname("REFOCUS_MODEL")->type_name("PATH")->required()->group("Model");
  verb->add_option("--chat-template", f->chat_template,
                   "How conversations are written: auto, none, chatml, qwen3, llama3, llama3.1, llama3.2, mistral, "
                   "mistral-v3, mistral-tekken (auto: as the model's own template)")
      ->type_name("NAME")->group("Model");
  verb->add_option("--ranks", f->ranks, "Worker processes, 1 to 256; each owns a part of every context (1; with "
                   "--device cuda one for every visible GPU)")
      ->check(CLI::Range(1, kMaxServedRanks))->group("Model");
  verb->add_option("--device", f->device, "Where ranks compute; cuda: one GPU a rank (cpu)")
      ->envname("REFOCUS_DEVICE")->check(CLI::IsMember({"cpu", "cuda"}))->group("Model");
  verb->add_option("--rope-scaling", f->rope_scaling,
                   "Stretch RoPE over a longer window, in place of what the model states: TYPE:FACTOR or "
                   "TYPE:FACTOR:WINDOW, linear, llama3 or yarn, as yarn:4:32768; WINDOW: the model's own before "
                   "stretching")
      ->envname("REFOCUS_ROPE_SCALING")->type_name("SCALING")->capture_default_str()->group("Model");
  verb->add_flag("--check-finite", f->check_finite, "Refuse weights that hold NaN or Inf")
      ->envname("REFOCUS_CHECK_FINITE")->group("Model");
  verb->add_option("--random-weights", f->random_weights,
                   "Make weights from this seed instead of reading any, for measurements: PATH needs config.json alone")
      ->envname("REFOCUS_RANDOM_WEIGHTS")->type_name("SEED")->group("Model");
  const std::string memory = "Memory and cores";
  verb->add_option("--kv-memory", f->kv_memory, "Memory for K and V, per rank, such as 4GiB (from the free memory)")
      ->type_name("SIZE")->group(memory);
  verb->add_option("--kv-dtype", f->kv_dtype,
                   "How K and V are kept: fp32 (cpu), bf16 (cuda), or int8, a quarter or half of that (what the device "
                   "computes with)")
      ->envname("REFOCUS_KV_DTYPE")->check(CLI::IsMember({"fp32", "bf16", "int8"}))->type_name("TYPE")->group(memory);
  verb->add_option("--threads-per-rank", f->threads, "Threads of a rank (its share of the cores)")
      ->check(CLI::Range(1, 1024))->group(memory);
  const std::string network = "Network";
  verb->add_option("--listen", f->options.listen, "Public address, host:port; port 0 takes a free one")
      ->envname("REFOCUS_LISTEN")->capture_default_str()->group(network);
  verb->add_flag("--insecure", f->insecure, "Allow an address that other machines reach, without encryption")
      ->group(network);
  verb->add_flag("--enable-reflection", f->reflection, "gRPC server reflection")->group(network);
  const std::string life = "Life";
  verb->add_option("--default-ttl", f->default_ttl, "Idle life of a context, seconds (3600)")->group(life);
  verb->add_option("--drain-seconds", f->options.drain_seconds,
                   "Time that requests in progress have after SIGTERM, seconds")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str()
      ->group(life);
  verb->add_option("--collective-deadline", f->collective_deadline,
                   "Longest exchange between ranks before the group is lost, "
                   "seconds (worker's default)")
      ->group(life);
  verb->add_option("--stuck-seconds", f->stuck, "Work without progress before the group is given up, seconds "
                   "(coordinator's default)")->group(life);
  verb->add_option("--give-up-after", f->options.give_up_after,
                   "Failures of the group in a row, each within a minute of its start")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str()
      ->group(life);
  verb->add_option("--log-level", f->log_level, "Logs go to stderr")
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}))->capture_default_str()->group("Logging");
  verb->callback([=] { *run = [=] { return Serve(*f); }; });
}

}  // namespace refocus::cli
