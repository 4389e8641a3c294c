#pragma once

#include "coordinator/hub.h"
#include "refocus/v1/cluster.grpc.pb.h"

namespace refocus {

class ClusterService : public api::ClusterService::Service {
 public:
  explicit ClusterService(Hub& hub) : hub_(hub) {}
  grpc::Status GetCluster(grpc::ServerContext*, const api::GetClusterRequest*,
                          api::GetClusterResponse* response) override;
  grpc::Status GetModel(grpc::ServerContext*, const api::GetModelRequest*, api::Model* response) override;

 private:
  Hub& hub_;
};

}  // namespace refocus
