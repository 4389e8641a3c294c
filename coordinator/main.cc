// refocus-coordinator: public API, tokenizer, admission, scheduling. Exit codes: 0 planned stop, 2 configuration, 3
// weights.
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include <CLI/CLI.hpp>

#include "base/limits.h"
#include "base/log.h"
#include "coordinator/server.h"

namespace refocus {
namespace {

struct Flags {
  std::string model;
  std::string rope_scaling = "none";
  ServerOptions server;
  double drain_seconds = 30;
  bool insecure = false;
  std::string chat_template = "auto";
  std::string log_level = "info";
};

void DeclareFlags(CLI::App& app, Flags& flags) {
  CoordinatorOptions& core = flags.server.core;
  app.option_defaults()->always_capture_default();
  app.set_version_flag("--version", std::string("refocus-coordinator ") + REFOCUS_VERSION);
  app.add_option("--model", flags.model, "Hugging Face folder or .gguf file")->required()->envname("REFOCUS_MODEL");
  app.add_option("--rope-scaling", flags.rope_scaling,
                 "Stretch RoPE over a longer window: TYPE:FACTOR[:WINDOW], linear, llama3 or yarn; as the ranks do")
      ->envname("REFOCUS_ROPE_SCALING");
  app.add_option("--chat-template", flags.chat_template,
                 "How conversations are written: auto (by the model's own template), none, chatml, qwen3, llama3, "
                 "llama3.1, llama3.2, mistral, mistral-v3, mistral-tekken");
  app.add_option("--ranks", core.group.size, "Ranks of the worker group; 0: as many as the first one says")
      ->check(CLI::Range(0, 4096));
  app.add_option("--max-kv-bytes", core.max_kv_bytes, "K/V bytes to use on each rank, below what it offers; 0: all")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--default-ttl", core.default_ttl_seconds, "Idle life of a context without a ttl, seconds")
      ->check(CLI::Range(60.0, 604800.0));
  app.add_option("--stuck-seconds", core.group.stuck_seconds, "A rank without progress for so long loses the group")
      ->check(CLI::Range(1.0, 86400.0));
  app.add_option("--drain-seconds", flags.drain_seconds, "Time for running requests after SIGTERM")
      ->check(CLI::Range(0.0, 86400.0));
  app.add_option("--listen", flags.server.listen, "Address for clients; port 0: any")->envname("REFOCUS_LISTEN");
  app.add_option("--worker-listen", flags.server.worker_listen, "Address for ranks; port 0: any");
  app.add_flag("--insecure", flags.insecure, "Allow addresses beyond this machine although nothing is encrypted");
  app.add_flag("--enable-reflection", flags.server.enable_reflection, "gRPC server reflection, for development");
  app.add_option("--log-level", flags.log_level, "debug, info, warning, error");
}

// The packaged gRPC stops listening for good once accept finds no descriptor left: idle connections must not take the
// last one.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

bool IsLoopback(const std::string& address) {
  const std::string host = address.substr(0, address.rfind(':'));
  return host == "localhost" || host == "[::1]" || host.rfind("127.", 0) == 0 || host.rfind("unix", 0) == 0;
}

Status ConfigError(const std::string& message) {
  return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", message);
}

Status CheckAddress(const char* flag, const std::string& address, bool insecure) {
  const size_t colon = address.rfind(':');
  const std::string port = colon == std::string::npos ? "" : address.substr(colon + 1);
  const bool digits = !port.empty() && port.size() <= 5 && std::all_of(port.begin(), port.end(), ::isdigit);
  if (!digits || std::stoi(port) > 65535) {
    return ConfigError(std::string(flag) + ": got \"" + address + "\", allowed HOST:PORT");
  }
  if (IsLoopback(address)) return absl::OkStatus();
  if (!insecure) {
    return ConfigError(
        std::string(flag) + ": got " + address +
        ", allowed a loopback address; nothing is encrypted or authenticated, so other machines need --insecure");
  }
  LogWarning(std::string(flag) + " " + address + ": anyone who can reach it can use it; nothing is encrypted");
  return absl::OkStatus();
}

StatusOr<std::unique_ptr<Server>> StartServer(Flags& flags) {
  REFOCUS_RETURN_IF_ERROR(CheckAddress("--listen", flags.server.listen, flags.insecure));
  REFOCUS_RETURN_IF_ERROR(CheckAddress("--worker-listen", flags.server.worker_listen, flags.insecure));
  REFOCUS_ASSIGN_OR_RETURN(ModelConfig model, LoadModelConfig(flags.model, flags.rope_scaling));
  REFOCUS_ASSIGN_OR_RETURN(std::shared_ptr<const Tokenizer> tokenizer, Tokenizer::Load(flags.model));
  if (tokenizer != nullptr && tokenizer->vocab_size() > model.vocab) {
    return ConfigError(flags.model + ": vocab_size: got " + std::to_string(model.vocab) +
                       ", but the tokenizer has ids up to " + std::to_string(tokenizer->vocab_size() - 1));
  }
  REFOCUS_ASSIGN_OR_RETURN(flags.server.core.chat, ChatFormat::Make(flags.chat_template, tokenizer));
  const ChatFormat& chat = flags.server.core.chat;
  LogInfo(chat.usable() ? "conversations: " + chat.name() : "no conversations: " + chat.refusal());
  LogInfo("model " + model.name + ", " + FamilyName(model.family) + ", " + std::to_string(model.parameters()) +
          " parameters, window " + std::to_string(model.max_positions) + ", RoPE scaling " + model.rope.Text() + ", " +
          (tokenizer != nullptr ? "with tokenizer" : "token ids only"));
  flags.server.core.group.fingerprint = model.Fingerprint();
  flags.server.core.version = REFOCUS_VERSION;
  flags.server.core.model = std::move(model);
  return Server::Start(flags.server, std::move(tokenizer), SystemEnvironment());
}

// Waits for SIGTERM or SIGINT, drains; a second one ends the wait.
void ServeUntilSignal(Server& server, const Flags& flags, const sigset_t& signals) {
  int signal_number = 0;
  sigwait(&signals, &signal_number);
  LogInfo("stopping: running requests have " + std::to_string(static_cast<int>(flags.drain_seconds)) + " s");
  server.Drain(flags.drain_seconds, [&] {
    const timespec now{};
    return sigtimedwait(&signals, nullptr, &now) > 0;
  });
}

int Main(int argc, char** argv) {
  CLI::App app{"The Refocus coordinator: public API, tokenizer, admission, scheduling."};
  Flags flags;
  DeclareFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitConfig;
  }
  LogLevel level = LogLevel::kInfo;
  if (!ParseLogLevel(flags.log_level, &level)) {
    std::fprintf(stderr, "--log-level: got \"%s\", allowed debug, info, warning, error\n", flags.log_level.c_str());
    return kExitConfig;
  }
  SetLog("coordinator", level);
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // before any thread exists: all inherit it
  RaiseDescriptorLimit();
  auto server = StartServer(flags);
  if (!server.ok()) {
    LogError(std::string(server.status().message()));
    return ExitCodeOf(server.status());
  }
  std::printf("refocus-coordinator ready public=%s worker=%s\n", (*server)->public_address().c_str(),
              (*server)->worker_address().c_str());
  std::fflush(stdout);
  ServeUntilSignal(**server, flags, signals);
  LogInfo("stopped");
  return kExitOk;
}

}  // namespace
}  // namespace refocus

int main(int argc, char** argv) { return refocus::Main(argc, argv); }
