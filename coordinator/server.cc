#include "coordinator/server.h"

#include <chrono>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>

#include "base/limits.h"
#include "base/log.h"
#include "coordinator/cluster_service.h"
#include "coordinator/context_service.h"
#include "coordinator/hub.h"
#include "coordinator/inference_service.h"
#include "coordinator/worker_service.h"

namespace refocus {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
const char* const kHealthNames[] = {"refocus.v1.ContextService", "refocus.v1.InferenceService",
                                    "refocus.v1.ClusterService", "readiness"};

// gRPC adds reflection to every server of a process that links it; this takes it out again.
class WithoutReflection : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins, [](const auto& plugin) { return plugin->name() == "proto_server_reflection"; });
  }
};

std::string WithPort(const std::string& address, int port) {
  return address.substr(0, address.rfind(':') + 1) + std::to_string(port);
}

void AddCommon(grpc::ServerBuilder& builder, const ServerOptions& options) {
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // so that a second coordinator cannot bind the same port
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, static_cast<int>(options.handshake_seconds * 1e3));
}

void AddPublicSettings(grpc::ServerBuilder& builder, const ServerOptions& options) {
  AddCommon(builder, options);
  builder.SetMaxReceiveMessageSize(kPublicMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 64);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, 30 * 60'000);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, 60 * 60'000);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, 5 * 60'000);
  for (const grpc_compression_algorithm algorithm : {GRPC_COMPRESS_DEFLATE, GRPC_COMPRESS_GZIP}) {
    builder.SetCompressionAlgorithmSupportStatus(algorithm, false);
  }
  grpc::ResourceQuota quota("public");
  quota.Resize(512 * kMiB).SetMaxThreads(256);
  builder.SetResourceQuota(quota);
  if (options.enable_reflection) {
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  } else {
    builder.SetOption(std::make_unique<WithoutReflection>());
  }
}

void AddWorkerSettings(grpc::ServerBuilder& builder, const ServerOptions& options) {
  AddCommon(builder, options);
  builder.SetMaxReceiveMessageSize(kWorkerMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  builder.SetOption(std::make_unique<WithoutReflection>());
}

Status CannotListen(const std::string& address) {
  return Error(StatusCode::kUnavailable, "CONFIG_INVALID",
               "cannot listen on " + address + ": the address is in use or not this machine's; choose another one",
               {{"address", address}});
}

class ServerImpl : public Server {
 public:
  ServerImpl(ServerOptions options, std::shared_ptr<const Tokenizer> tokenizer, Environment environment)
      : options_(std::move(options)),
        hub_(options_.core, std::move(tokenizer), std::move(environment), options_.read_within_seconds),
        context_service_(hub_, options_.upload_stall_seconds, options_.delete_seconds, options_.find_rows),
        inference_service_(hub_, options_.score_idle_seconds),
        cluster_service_(hub_),
        worker_service_(hub_) {}

  ~ServerImpl() override {
    if (public_server_ != nullptr || worker_server_ != nullptr) Drain(0, [] { return true; });
  }

  Status Listen() {
    grpc::ServerBuilder workers;
    AddWorkerSettings(workers, options_);
    int worker_port = 0;
    workers.AddListeningPort(options_.worker_listen, grpc::InsecureServerCredentials(), &worker_port);
    workers.RegisterService(&worker_service_);
    worker_server_ = workers.BuildAndStart();
    if (worker_server_ == nullptr || worker_port == 0) return CannotListen(options_.worker_listen);
    worker_address_ = WithPort(options_.worker_listen, worker_port);

    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    AddPublicSettings(builder, options_);
    int port = 0;
    builder.AddListeningPort(options_.listen, grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&context_service_);
    builder.RegisterService(&inference_service_);
    builder.RegisterService(&cluster_service_);
    public_server_ = builder.BuildAndStart();
    grpc::EnableDefaultHealthCheckService(false);
    if (public_server_ == nullptr || port == 0) return CannotListen(options_.listen);
    // At once: until here the library answers SERVING for "".
    grpc::HealthCheckServiceInterface* health = public_server_->GetHealthCheckService();
    hub_.OnServing([health](bool serving) {
      health->SetServingStatus("", serving);
      for (const char* name : kHealthNames) health->SetServingStatus(name, serving);
    });
    health->SetServingStatus("liveness", true);
    public_address_ = WithPort(options_.listen, port);
    return absl::OkStatus();
  }

  std::string public_address() const override { return public_address_; }
  std::string worker_address() const override { return worker_address_; }
  Hub& hub() override { return hub_; }

  void Drain(double seconds, const std::function<bool()>& hurry) override {
    hub_.With([](Coordinator& core) { core.BeginDrain(); });  // health follows
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    const auto busy = [&] {
      return !hub_.With([](Coordinator& core) { return core.drained(); }) || hub_.calls().running() > 0;
    };
    while (busy() && std::chrono::steady_clock::now() < until && !hurry()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    hub_.With([](Coordinator& core) { core.FinishDrain(); });
    hub_.OnServing(nullptr);
    // Calls whose work just failed get a moment to say so; what is left then is cut.
    const auto soon = [](int milliseconds) {
      return std::chrono::system_clock::now() + std::chrono::milliseconds(milliseconds);
    };
    if (public_server_ != nullptr) public_server_->Shutdown(soon(500));
    if (worker_server_ != nullptr) worker_server_->Shutdown(soon(2000));
    public_server_.reset();
    worker_server_.reset();
  }

 private:
  const ServerOptions options_;
  Hub hub_;
  ContextService context_service_;
  InferenceService inference_service_;
  ClusterService cluster_service_;
  WorkerService worker_service_;
  std::unique_ptr<grpc::Server> public_server_;
  std::unique_ptr<grpc::Server> worker_server_;
  std::string public_address_;
  std::string worker_address_;
};

}  // namespace

StatusOr<std::unique_ptr<Server>> Server::Start(ServerOptions options, std::shared_ptr<const Tokenizer> tokenizer,
                                                Environment environment) {
  auto server = std::make_unique<ServerImpl>(std::move(options), std::move(tokenizer), std::move(environment));
  REFOCUS_RETURN_IF_ERROR(server->Listen());
  return std::unique_ptr<Server>(std::move(server));
}

Environment SystemEnvironment() {
  const auto seconds = [](auto since_epoch) { return std::chrono::duration<double>(since_epoch).count(); };
  Environment environment;
  environment.now = [seconds] { return seconds(std::chrono::steady_clock::now().time_since_epoch()); };
  environment.unix_now = [seconds] { return seconds(std::chrono::system_clock::now().time_since_epoch()); };
  environment.random = [device = std::make_shared<std::random_device>()] {
    return (static_cast<uint64_t>((*device)()) << 32) | (*device)();
  };
  return environment;
}

}  // namespace refocus
