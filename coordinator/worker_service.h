// The ranks' side: one stream per rank. Its port is not the clients'.
#pragma once

#include "coordinator/hub.h"
#include "refocus/internal/v1/group.grpc.pb.h"

namespace refocus {

class WorkerService : public wire::GroupService::CallbackService {
 public:
  explicit WorkerService(Hub& hub) : hub_(hub) {}
  grpc::ServerBidiReactor<wire::WorkerMessage, wire::CoordinatorMessage>* Join(grpc::CallbackServerContext*) override;

 private:
  Hub& hub_;
};

}  // namespace refocus
