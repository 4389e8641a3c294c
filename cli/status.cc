// status: one screen about server, model and ranks. version: this binary.
#include <google/protobuf/stubs/common.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <iostream>
#include <thread>

#include "base/limits.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

std::string StateName(const v1::GetClusterResponse& cluster) {
  return v1::GetClusterResponse::GroupState_Name(cluster.state());
}

Status PrintHealth(Client& client, bool* serving) {
  REFOCUS_ASSIGN_OR_RETURN(*serving, client.Healthy());
  std::cout << (*serving ? "SERVING" : "NOT_SERVING") << std::endl;
  return absl::OkStatus();
}

// For scripts that start a server and then use it. Waits as long for an address where nobody listens yet.
Status WaitUntilServing(const Settings& settings, double seconds) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  ClientOptions options = settings.client;
  options.max_attempts = 1;
  options.read_seconds = 5;
  while (true) {
    const auto serving = Client(options).Healthy();
    if (serving.ok() && *serving) return absl::OkStatus();
    if (Interrupted()) return absl::CancelledError();
    if (std::chrono::steady_clock::now() >= deadline) {
      if (!serving.ok()) return serving.status();
      return Error(StatusCode::kUnavailable, "NOT_SERVING",
                   "the server at " + options.address + " is not serving after " + FormatSeconds(seconds) +
                       "; 'refocus status' says why");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
}

void PrintModel(const v1::Model& model) {
  std::cout << "model       " << model.name() << ": " << model.family() << ", "
            << FormatCount(model.parameters() / 1'000'000) << " million parameters, " << model.layers() << " layers, "
            << model.dtype() << '\n'
            << "            " << FormatCount(model.max_positions()) << " positions"
            << (model.rope_scaling() == "none" || model.rope_scaling().empty() ? "" : " (RoPE " + model.rope_scaling() + ")")
            << ", K/V "
            << FormatBytes(model.kv_bytes_per_token()) << " a token"
            << (model.kv_dtype().empty() ? "" : " (" + model.kv_dtype() + ")") << ", "
            << (model.has_tokenizer() ? "with tokenizer" : "token ids only")
            << (model.chat_format().empty() ? "" : ", chat format " + model.chat_format())
            << (model.thinks() ? " with reasoning" : "") << '\n';
  if (model.has_tokenizer() && model.chat_format().empty()) {
    std::cout << "            no conversations: " << model.chat_refusal() << '\n';
  }
}

Status PrintStatus(Client& client, const Settings& settings) {
  REFOCUS_ASSIGN_OR_RETURN(const auto cluster, client.GetCluster());
  REFOCUS_ASSIGN_OR_RETURN(const auto model, client.GetModel());
  if (settings.json) {
    PrintJson(cluster);
    PrintJson(model);
    return absl::OkStatus();
  }
  std::cout << "server      " << settings.client.address << ", version " << cluster.version() << ", up "
            << FormatSeconds(cluster.uptime_seconds()) << '\n';
  PrintModel(model);
  std::cout << "group       " << StateName(cluster) << ", epoch " << cluster.epoch() << ", " << cluster.ranks_size()
            << " of " << cluster.size() << " ranks\n"
            << "K/V         " << FormatBytes(cluster.kv_used_bytes()) << " of "
            << FormatBytes(cluster.kv_capacity_bytes()) << '\n'
            << "work        " << FormatCount(cluster.contexts())
            << (cluster.contexts() == 1 ? " context, " : " contexts, ") << cluster.running() << " running, "
            << cluster.waiting() << " waiting";
  if (cluster.work_seconds() >= 0.05) std::cout << ", about " << FormatSeconds(cluster.work_seconds()) << " of work";
  std::cout << '\n';
  if (!cluster.last_incident().empty()) std::cout << "incident    " << cluster.last_incident() << '\n';
  Table table({"rank", "host", "pid", "device", "memory", "weights", "K/V capacity", "heartbeat"});
  for (const auto& rank : cluster.ranks()) {
    table.Add({std::to_string(rank.rank()), rank.host(), std::to_string(rank.pid()), rank.device(),
               FormatBytes(rank.resident_bytes()), FormatBytes(rank.weight_bytes()),
               FormatBytes(rank.kv_capacity_bytes()), FormatSeconds(rank.heartbeat_age_seconds()) + " ago"});
  }
  if (!table.empty()) {
    std::cout << '\n';
    table.Print(std::cout);
  }
  std::cout << std::flush;
  return absl::OkStatus();
}

int PrintVersion(bool json) {
  const std::string protobuf = google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION);
  if (json) {
    std::cout << R"({"version":")" << REFOCUS_VERSION << R"(","protocol":")" << kProtocolVersion << R"(","build":")"
              << REFOCUS_BUILD_TYPE << R"(","compiler":")" << __VERSION__ << R"(","grpc":")" << grpc::Version()
              << R"(","protobuf":")" << protobuf << "\"}" << std::endl;
  } else {
    std::cout << "refocus " << REFOCUS_VERSION << " (protocol " << kProtocolVersion << ", " << REFOCUS_BUILD_TYPE
              << ", g++ " << __VERSION__ << ", gRPC " << grpc::Version() << ", protobuf " << protobuf << ")"
              << std::endl;
  }
  return kExitOk;
}

}  // namespace

void AddStatus(CLI::App& app, Settings* settings, Run* run) {
  auto* verb = app.add_subcommand("status", "Server, model, worker group, memory and load on one screen");
  const auto health = std::make_shared<bool>(false);
  verb->add_flag("--health", *health, "Print SERVING or NOT_SERVING only; exit code 0 or 1 (for probes)");
  const auto wait = std::make_shared<double>(0);
  verb->add_option("--wait", *wait, "First wait so many seconds at most until the server serves")
      ->check(CLI::Range(0.0, 86400.0))->capture_default_str();
  AddCommonOptions(verb, settings);
  verb->callback([=] {
    *run = [=] {
      InstallInterrupt();
      if (*wait > 0) {
        const Status status = WaitUntilServing(*settings, *wait);
        if (!status.ok()) return Finish("status", status);
      }
      Client client(settings->client);
      if (!*health) return Finish("status", PrintStatus(client, *settings));
      bool serving = false;
      const int code = Finish("status", PrintHealth(client, &serving));
      return code == kExitOk && !serving ? static_cast<int>(kExitError) : code;
    };
  });
}

void AddVersion(CLI::App& app, Run* run) {
  auto* verb = app.add_subcommand("version", "What this binary is and was built with");
  const auto json = std::make_shared<bool>(false);
  verb->add_flag("--json", *json, "As one JSON object");
  verb->callback([=] { *run = [=] { return PrintVersion(*json); }; });
}

}  // namespace refocus::cli
