#include "coordinator/inference_service.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/limits.h"
#include "coordinator/core/validate.h"

namespace refocus {
namespace {

constexpr double kPollSeconds = 0.05;
constexpr size_t kScoreWindow = 8;  // targets under way in one call: enough to keep two commands out

using GenerateCall = WriteCall<api::GenerateEvent>;
using ProbeCall = WriteCall<api::ProbeAttentionEvent>;
using ScoreCall = BidiCall<api::ScoreRequest, api::ScoreEvent>;

// Work that ends with its call.
template <typename OwnedJob>
class Owned {
 public:
  Owned(Hub& hub, std::shared_ptr<OwnedJob> job, std::shared_ptr<Wakeup> wakeup)
      : hub_(hub), job_(std::move(job)), watching_(hub, job_->id(), std::move(wakeup)) {}
  ~Owned() {
    hub_.With([&](Coordinator& core) { core.Stop(*job_, absl::CancelledError("the caller went away")); });
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  OwnedJob* operator->() const { return job_.get(); }

 private:
  Hub& hub_;
  const std::shared_ptr<OwnedJob> job_;
  const Watching watching_;
};

// Until the call's deadline; infinity when there is none.
double SecondsLeft(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return std::numeric_limits<double>::infinity();
  return std::chrono::duration<double>(deadline - std::chrono::system_clock::now()).count();
}

template <typename OwnedJob>
using OwnedJobs = std::deque<Owned<OwnedJob>>;

// Writes the jobs' events as they come, and ends with the first failure among them, or when all are answered.
template <typename StreamCall, typename EventJob>
Status StreamEvents(StreamCall& call, Hub& hub, const OwnedJobs<EventJob>& jobs) {
  decltype(jobs.front()->TakeEvents()) pending;
  size_t written = 0;
  while (true) {
    REFOCUS_RETURN_IF_ERROR(call.Gone());
    const bool can_write = call.CanWrite();
    bool over = false;
    Status status;
    hub.With([&](Coordinator&) {
      const bool take = can_write && written == pending.size();
      if (take) {
        pending.clear();
        written = 0;
      }
      over = true;
      for (const Owned<EventJob>& job : jobs) {
        if (take) std::ranges::move(job->TakeEvents(), std::back_inserter(pending));
        over = over && job->answered();
        if (job->answered()) status.Update(job->status());
      }
      over = over || !status.ok();
    });
    if (can_write && written < pending.size()) {
      call.Write(std::move(pending[written++]));
      continue;
    }
    // A failure does not wait for a caller that does not read.
    if (over && written == pending.size() && can_write) return status;
    if (over && !can_write && !status.ok()) return status;
    call.Wait(kPollSeconds);
  }
}

Status StreamAnswer(GenerateCall& call, Hub& hub, const api::GenerateRequest& request, double seconds) {
  REFOCUS_ASSIGN_OR_RETURN(auto prompt, QuestionIds(request, hub.model(), hub.tokenizer(), hub.chat()));
  REFOCUS_ASSIGN_OR_RETURN(auto job, hub.With([&](Coordinator& core) {
    const Status admitted = core.Admit();
    return admitted.ok() ? core.Generate(request, std::move(prompt.ids), seconds, std::move(prompt.thinking))
                         : StatusOr<std::shared_ptr<GenerateJob>>(admitted);
  }));
  OwnedJobs<GenerateJob> samples;
  samples.emplace_back(hub, job, call.wakeup());
  for (const std::shared_ptr<GenerateJob>& fork : job->forks()) samples.emplace_back(hub, fork, call.wakeup());
  return StreamEvents(call, hub, samples);
}

Status StreamMasses(ProbeCall& call, Hub& hub, const api::ProbeAttentionRequest& request, double seconds) {
  REFOCUS_ASSIGN_OR_RETURN(auto prompt, PromptIds("prompt", request.prompt(), hub.model(), hub.tokenizer()));
  REFOCUS_ASSIGN_OR_RETURN(auto job, hub.With([&](Coordinator& core) {
    const Status admitted = core.Admit();
    return admitted.ok() ? core.Probe(request, std::move(prompt), seconds)
                         : StatusOr<std::shared_ptr<ProbeJob>>(admitted);
  }));
  OwnedJobs<ProbeJob> probe;
  probe.emplace_back(hub, std::move(job), call.wakeup());
  return StreamEvents(call, hub, probe);
}

StatusOr<std::shared_ptr<ScoreJob>> StartScore(Hub& hub, const api::ScoreRequest& request, double seconds) {
  if (request.chat().has_thinking_budget()) {
    return FieldError("chat.thinking_budget", std::to_string(request.chat().thinking_budget()), "not set in Score");
  }
  REFOCUS_ASSIGN_OR_RETURN(auto prompt, QuestionIds(request, hub.model(), hub.tokenizer(), hub.chat()));
  REFOCUS_ASSIGN_OR_RETURN(auto target, PromptIds("target", request.target(), hub.model(), hub.tokenizer()));
  return hub.With([&](Coordinator& core) {
    const Status admitted = core.Admit();
    return admitted.ok() ? core.Score(request, std::move(prompt.ids), std::move(target), seconds)
                         : StatusOr<std::shared_ptr<ScoreJob>>(admitted);
  });
}

// The call lasts `seconds`.
Status StreamScores(ScoreCall& call, Hub& hub, double idle_seconds, double seconds) {
  std::deque<std::unique_ptr<Owned<ScoreJob>>> window;  // in the order of the targets
  Status refused;                                       // of a target: those before it are still answered
  api::ScoreRequest request;
  int64_t targets = 0;
  double last_moved = 0;
  while (true) {
    REFOCUS_RETURN_IF_ERROR(call.Gone());
    bool moved = false;
    if (window.size() < kScoreWindow && refused.ok() && call.Take(&request)) {
      moved = true;
      ++targets;
      auto job = StartScore(hub, request, seconds - call.age_seconds());
      if (job.ok()) {
        window.push_back(std::make_unique<Owned<ScoreJob>>(hub, *std::move(job), call.wakeup()));
      } else {
        refused = job.status();
      }
    }
    if (!window.empty() && call.CanWrite()) {
      Status status;
      api::ScoreEvent event;
      const bool over = hub.With([&](Coordinator&) {
        status = (*window.front())->status();
        event = (*window.front())->event();
        return (*window.front())->answered();
      });
      if (over) {
        REFOCUS_RETURN_IF_ERROR(status);
        call.Write(std::move(event));
        window.pop_front();
        moved = true;
      }
    }
    if (moved) {
      last_moved = call.age_seconds();
      continue;
    }
    if (window.empty() && call.CanWrite()) {
      REFOCUS_RETURN_IF_ERROR(refused);
      if (call.read_closed() && targets == 0) return FieldError("target", "none", "1 or more");
      if (call.read_closed()) return absl::OkStatus();
      if (call.age_seconds() - last_moved > idle_seconds) {
        const std::string seconds = std::to_string(static_cast<int>(idle_seconds));
        return Error(StatusCode::kDeadlineExceeded, "DEADLINE", "no target for " + seconds + " s",
                     {{"limit_seconds", seconds}});
      }
    }
    call.Wait(kPollSeconds);
  }
}

Status NoTokenizer() {
  return Error(StatusCode::kFailedPrecondition, "NO_TOKENIZER", "this model has no tokenizer; use ids");
}

Status Tokenized(Hub& hub, const api::TokenizeRequest& request, api::TokenizeResponse* response) {
  REFOCUS_RETURN_IF_ERROR(hub.With([](Coordinator& core) { return core.Admit(); }));
  const Tokenizer* tokenizer = hub.tokenizer();
  if (tokenizer == nullptr) return NoTokenizer();
  REFOCUS_ASSIGN_OR_RETURN(const auto ids,
                           tokenizer->Encode(request.text(), request.allow_special(), kMaxContextTokens));
  response->mutable_ids()->Reserve(static_cast<int>(ids.size()) + 1);
  if (request.add_bos() && tokenizer->adds_bos() && tokenizer->bos_token()) {
    response->add_ids(static_cast<uint32_t>(*tokenizer->bos_token()));
  }
  for (const int32_t id : ids) response->add_ids(static_cast<uint32_t>(id));
  return absl::OkStatus();
}

Status Detokenized(Hub& hub, const api::DetokenizeRequest& request, api::DetokenizeResponse* response) {
  REFOCUS_RETURN_IF_ERROR(hub.With([](Coordinator& core) { return core.Admit(); }));
  const Tokenizer* tokenizer = hub.tokenizer();
  if (tokenizer == nullptr) return NoTokenizer();
  REFOCUS_ASSIGN_OR_RETURN(const auto ids, CheckIds(request.ids(), hub.model().vocab, 0));
  Utf8Stream characters;
  for (const int32_t id : ids) response->mutable_text()->append(characters.Push(tokenizer->TokenBytes(id, true)));
  response->mutable_text()->append(characters.Finish());
  return absl::OkStatus();
}

}  // namespace

grpc::ServerWriteReactor<api::GenerateEvent>* InferenceService::Generate(grpc::CallbackServerContext* context,
                                                                         const api::GenerateRequest* request) {
  const double seconds = SecondsLeft(*context);
  return GenerateCall::Start(hub_.calls(), [this, request = *request, seconds](GenerateCall& call) {
    return StreamAnswer(call, hub_, request, seconds - call.age_seconds());
  });
}

grpc::ServerBidiReactor<api::ScoreRequest, api::ScoreEvent>* InferenceService::Score(
    grpc::CallbackServerContext* context) {
  const double seconds = SecondsLeft(*context);
  return ScoreCall::Start(hub_.calls(), [this, seconds](ScoreCall& call) {
    return StreamScores(call, hub_, score_idle_seconds_, seconds);
  });
}

grpc::ServerWriteReactor<api::ProbeAttentionEvent>* InferenceService::ProbeAttention(
    grpc::CallbackServerContext* context, const api::ProbeAttentionRequest* request) {
  const double seconds = SecondsLeft(*context);
  return ProbeCall::Start(hub_.calls(), [this, request = *request, seconds](ProbeCall& call) {
    return StreamMasses(call, hub_, request, seconds - call.age_seconds());
  });
}

grpc::Status InferenceService::Tokenize(grpc::ServerContext*, const api::TokenizeRequest* request,
                                        api::TokenizeResponse* response) {
  return ToGrpc(Guarded([&] { return Tokenized(hub_, *request, response); }));
}

grpc::Status InferenceService::Detokenize(grpc::ServerContext*, const api::DetokenizeRequest* request,
                                          api::DetokenizeResponse* response) {
  return ToGrpc(Guarded([&] { return Detokenized(hub_, *request, response); }));
}

}  // namespace refocus
