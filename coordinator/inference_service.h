// Answers from contexts: core/generate.h, core/score.h and core/probe.h work; here their events become streams.
#pragma once

#include "coordinator/hub.h"
#include "refocus/v1/inference.grpc.pb.h"

namespace refocus {

using InferenceServiceBase = api::InferenceService::WithCallbackMethod_Generate<
    api::InferenceService::WithCallbackMethod_Score<
        api::InferenceService::WithCallbackMethod_ProbeAttention<api::InferenceService::Service>>>;

class InferenceService : public InferenceServiceBase {
 public:
  InferenceService(Hub& hub, double score_idle_seconds) : hub_(hub), score_idle_seconds_(score_idle_seconds) {}

  grpc::ServerWriteReactor<api::GenerateEvent>* Generate(grpc::CallbackServerContext*,
                                                         const api::GenerateRequest* request) override;
  grpc::ServerBidiReactor<api::ScoreRequest, api::ScoreEvent>* Score(grpc::CallbackServerContext*) override;
  grpc::ServerWriteReactor<api::ProbeAttentionEvent>* ProbeAttention(
      grpc::CallbackServerContext*, const api::ProbeAttentionRequest* request) override;
  grpc::Status Tokenize(grpc::ServerContext*, const api::TokenizeRequest* request,
                        api::TokenizeResponse* response) override;
  grpc::Status Detokenize(grpc::ServerContext*, const api::DetokenizeRequest* request,
                          api::DetokenizeResponse* response) override;

 private:
  Hub& hub_;
  const double score_idle_seconds_;
};

}  // namespace refocus
