#include "coordinator/cluster_service.h"

namespace refocus {

// Both answer during a drain, too: that is when people look.
grpc::Status ClusterService::GetCluster(grpc::ServerContext*, const api::GetClusterRequest*,
                                        api::GetClusterResponse* response) {
  *response = hub_.With([](Coordinator& core) { return core.GetCluster(); });
  return grpc::Status::OK;
}

grpc::Status ClusterService::GetModel(grpc::ServerContext*, const api::GetModelRequest*, api::Model* response) {
  *response = hub_.With([](Coordinator& core) { return core.GetModel(); });
  return grpc::Status::OK;
}

}  // namespace refocus
