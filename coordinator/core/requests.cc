// What Coordinator does for each RPC: admission, then a job or an answer. Adapters' are in adapter_requests.cc.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "base/shard_plan.h"
#include "coordinator/core/check_field.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/digest.h"
#include "coordinator/core/prefix.h"
#include "coordinator/core/refusals.h"
#include "coordinator/core/validate.h"

namespace refocus {
namespace {

constexpr int32_t kDefaultPage = 50;
constexpr int32_t kMaxPage = 1000;
constexpr size_t kMaxPageBytes = 512 << 10;  // an answer must fit what clients receive by default

std::string CreateKey(const api::CreateContextRequest::Header& header) { return "create/" + header.request_id(); }

}  // namespace

// ---- Contexts.

StatusOr<Coordinator::UploadTicket> Coordinator::BeginUpload(const api::CreateContextRequest::Header& header) {
  REFOCUS_RETURN_IF_ERROR(Admit());
  REFOCUS_RETURN_IF_ERROR(CheckHeader(header));
  if (header.has_prologue()) {
    REFOCUS_RETURN_IF_ERROR(options_.chat.CheckUsable());
    REFOCUS_RETURN_IF_ERROR(options_.chat.CheckOpening(OpeningOf(header)));
  }
  UploadTicket ticket;
  ticket.name = "contexts/" + (header.context_id().empty() ? RandomName(environment_.random()) : header.context_id());
  const bool repeated = !header.request_id().empty() && requests_.Contains(CreateKey(header));
  if (repeated) return ticket;  // decided when the whole body is known
  REFOCUS_RETURN_IF_ERROR(catalog_.Claim(ticket.name));
  ticket.claimed = true;
  return ticket;
}

void Coordinator::GiveUpUpload(const UploadTicket& ticket) {
  if (ticket.claimed) catalog_.Unclaim(ticket.name);
}

Status Coordinator::CheckTokenCount(int64_t tokens) const {
  const int64_t limit = std::min(options_.model.max_positions, kMaxContextTokens);
  if (tokens <= limit) return absl::OkStatus();
  return Error(StatusCode::kInvalidArgument, "CONTEXT_TOO_LONG",
               "context: got " + std::to_string(tokens) + " tokens or more, allowed " + std::to_string(limit),
               {{"got", std::to_string(tokens)}, {"limit", std::to_string(limit)}});
}

StatusOr<api::Context> Coordinator::FinishUpload(const UploadTicket& ticket,
                                                 const api::CreateContextRequest::Header& header, TokenIds tokens,
                                                 const std::string& content_hash) {
  GiveUpUpload(ticket);  // claimed or not: from here on it is decided at once
  REFOCUS_RETURN_IF_ERROR(Admit());
  const auto count = static_cast<int64_t>(tokens->size());
  if (count == 0) return FieldError("tokens", "0", "1 or more");
  REFOCUS_RETURN_IF_ERROR(CheckTokenCount(count));
  api::CreateContextRequest::Header body = header;
  body.clear_request_id();
  const std::string body_hash = MessageDigest(body) + content_hash;
  if (!header.request_id().empty()) {
    REFOCUS_ASSIGN_OR_RETURN(const RequestOutcome* outcome, requests_.Find(CreateKey(header), body_hash));
    if (outcome != nullptr) {
      const auto& created = std::get<CreateOutcome>(*outcome);
      const std::shared_ptr<Session> session = created.session.lock();
      if (session != nullptr && Exists(session) && !session->deleting) return created.context;
    }
  }
  if (group_.state() == Group::State::kServing) {
    const int64_t shared = FindPrefix(catalog_.sessions(), *tokens, kBlockTokens * group_.size()).tokens;
    REFOCUS_RETURN_IF_ERROR(ledger_.Check(shared, count - shared));
  }
  if (catalog_.stored_tokens() + count > options_.max_stored_tokens) {
    return Error(StatusCode::kResourceExhausted, "TOKEN_MEMORY",
                 "stored tokens: got " + std::to_string(catalog_.stored_tokens() + count) + ", allowed " +
                     std::to_string(options_.max_stored_tokens) + "; delete a context",
                 {{"limit", std::to_string(options_.max_stored_tokens)}});
  }
  REFOCUS_RETURN_IF_ERROR(catalog_.Claim(ticket.name));
  Session::Setup setup;
  setup.name = ticket.name;
  setup.tokens = std::move(tokens);
  setup.labels = {header.labels().begin(), header.labels().end()};
  setup.ttl_seconds = TtlSeconds(header, options_.default_ttl_seconds);
  if (header.has_prologue()) setup.chat_format = options_.chat.name();
  auto session = std::make_shared<Session>(std::move(setup), now(), environment_.unix_now());
  api::Context context = session->ToProto(now(), environment_.unix_now());
  if (header.validate_only()) {
    catalog_.Unclaim(ticket.name);
    return context;
  }
  if (!header.request_id().empty()) requests_.Put(CreateKey(header), body_hash, CreateOutcome{session, context});
  catalog_.Put(std::move(session));
  return context;
}

StatusOr<api::Context> Coordinator::GetContext(const std::string& name) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(name));
  REFOCUS_ASSIGN_OR_RETURN(const auto session, catalog_.Get(name));
  return session->ToProto(now(), environment_.unix_now());
}

StatusOr<api::ListContextsResponse> Coordinator::ListContexts(const api::ListContextsRequest& request) {
  if (request.page_size() < 0) return FieldError("page_size", std::to_string(request.page_size()), "0 or more");
  const int32_t size = request.page_size() == 0 ? kDefaultPage : std::min(request.page_size(), kMaxPage);
  REFOCUS_ASSIGN_OR_RETURN(const auto sessions, catalog_.Page(request.page_token()));
  api::ListContextsResponse response;
  size_t bytes = 0;
  for (const std::shared_ptr<Session>& session : sessions) {
    if (response.contexts_size() == size || bytes > kMaxPageBytes) {
      response.set_next_page_token(catalog_.PageToken(response.contexts(response.contexts_size() - 1).name()));
      break;
    }
    *response.add_contexts() = session->ToProto(now(), environment_.unix_now());
    bytes += response.contexts(response.contexts_size() - 1).ByteSizeLong();
  }
  return response;
}

StatusOr<std::shared_ptr<Session>> Coordinator::DeleteContext(const api::DeleteContextRequest& request) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(request.name()));
  auto found = catalog_.Get(request.name());
  if (!found.ok()) {
    if (request.allow_missing()) return std::shared_ptr<Session>();
    return found.status();
  }
  const std::shared_ptr<Session> session = *found;
  // Of work that has answered only the clean-up is left, which its caller cannot wait for.
  const bool works = std::any_of(tracked_.begin(), tracked_.end(), [&](const Tracked& tracked) {
    return tracked.session == session && !tracked.job->answered();
  });
  if (works && !request.force()) {
    return Busy(StatusCode::kFailedPrecondition, request.name(), "work runs on it; wait, or set force to cancel it");
  }
  session->deleting = true;
  const std::vector<Tracked> running = tracked_;
  for (const Tracked& tracked : running) {
    if (tracked.session == session) {
      scheduler_.Stop(*tracked.job, absl::CancelledError("the context was deleted"), now());
    }
  }
  Settle();
  return session;
}

// ---- Work.

StatusOr<Coordinator::PrefillStart> Coordinator::Prefill(const api::PrefillContextRequest& request) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(request.name()));
  REFOCUS_RETURN_IF_ERROR(CheckOnDisconnect(request.on_disconnect()));
  REFOCUS_ASSIGN_OR_RETURN(const auto session, catalog_.Get(request.name()));
  session->Touch(now());
  if (session->has_cache()) return PrefillStart{nullptr, session};
  if (session->state() == api::Context::PREFILLING) {
    const std::shared_ptr<PrefillJob> job = prefills_.at(request.name());
    if (job->stopping())
      return Busy(StatusCode::kFailedPrecondition, request.name(), "its prefill is being cancelled; retry");
    ++job->watchers;
    job->keep |= request.on_disconnect() != api::CANCEL;
    return PrefillStart{job, session};
  }
  REFOCUS_RETURN_IF_ERROR(CheckServing());
  REFOCUS_RETURN_IF_ERROR(CheckQueue());
  SharedPrefix prefix = FindPrefix(catalog_.sessions(), session->tokens(), kBlockTokens * group_.size());
  REFOCUS_ASSIGN_OR_RETURN(auto memory, ledger_.Reserve(prefix.tokens, session->token_count() - prefix.tokens));
  std::vector<ContextExtent> extents = std::exchange(prefix.extents, {});  // the session's alone
  extents.push_back({prefix.tokens, std::move(memory)});
  session->StartPrefill(NextId(), std::move(extents));
  auto job = std::make_shared<PrefillJob>(NextId(), now(), session, std::move(prefix), &tools_);
  ++job->watchers;
  job->keep = request.on_disconnect() != api::CANCEL;
  prefills_[request.name()] = job;
  Track(job, session);
  return PrefillStart{job, session};
}

api::PrefillEvent Coordinator::PrefillResult(const Session& session) const {
  api::PrefillEvent event = session.last_prefill();
  *event.mutable_context() = session.ToProto(now(), environment_.unix_now());
  return event;
}

// Refused for now, or for good: what running answers hold comes back soon.
StatusOr<std::shared_ptr<KvReservation>> Coordinator::ReserveTail(int64_t first_pos, int64_t tokens) {
  auto memory = ledger_.Reserve(first_pos, tokens);
  if (memory.ok()) return memory;
  const bool answering = std::any_of(tracked_.begin(), tracked_.end(), [](const Tracked& tracked) {
    const Job* job = tracked.job.get();
    return dynamic_cast<const GenerateJob*>(job) || dynamic_cast<const ScoreJob*>(job) ||
           dynamic_cast<const ProbeJob*>(job);
  });
  if (!answering) return memory;
  ErrorDetail detail = DetailOf(memory.status());
  detail.metadata.emplace_back("retry_seconds", RetrySeconds());
  return Error(memory.status().code(), detail.reason, std::string(memory.status().message()), detail.metadata);
}

StatusOr<SequencePlan> Coordinator::PlanSequence(const std::shared_ptr<Session>& session, const std::string& adapter_id,
                                                 std::vector<int32_t> prompt, int64_t answer_tokens) {
  if (!session->has_cache()) {
    REFOCUS_RETURN_IF_ERROR(CheckServing());
    return NotReady(*session);
  }
  const auto prompt_tokens = static_cast<int64_t>(prompt.size());
  REFOCUS_RETURN_IF_ERROR(
      CheckWindow(session->token_count(), prompt_tokens, answer_tokens, options_.model.max_positions));
  SequencePlan plan;
  plan.adapter_id = adapter_id;
  if (!adapter_id.empty()) {
    REFOCUS_RETURN_IF_ERROR(CheckAdapterId(adapter_id));
    if (session->FindAdapter(adapter_id) == nullptr) return AdapterNotFound(*session, adapter_id);
  }
  REFOCUS_RETURN_IF_ERROR(CheckQueue());
  REFOCUS_ASSIGN_OR_RETURN(plan.memory, ReserveTail(session->token_count(), prompt_tokens + answer_tokens));
  plan.prompt = std::move(prompt);
  return plan;
}

namespace {

Status CheckConversation(const Session& session) {
  if (!session.chat_format().empty()) return absl::OkStatus();
  return Error(StatusCode::kFailedPrecondition, "NO_CONVERSATION",
               "chat: " + session.name() + " was created without a prologue; create it with one, or ask with `prompt`",
               {{"name", session.name()}});
}

}  // namespace

StatusOr<std::shared_ptr<GenerateJob>> Coordinator::Generate(const api::GenerateRequest& request,
                                                             std::vector<int32_t> prompt, double seconds,
                                                             std::shared_ptr<const ChatFormat::Thinking> thinking) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(request.name()));
  REFOCUS_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  REFOCUS_ASSIGN_OR_RETURN(const auto session, catalog_.Get(request.name()));
  if (request.has_chat()) REFOCUS_RETURN_IF_ERROR(CheckConversation(*session));
  REFOCUS_ASSIGN_OR_RETURN(GeneratePlan plan,
                           PlanGenerate(request, options_.model, tokenizer_.get(), environment_.random()));
  if (request.chat().has_thinking_budget()) plan.thinking_budget = request.chat().thinking_budget();
  plan.thinking = std::move(thinking);
  if (plan.sampling.prompt_logprobs) {
    REFOCUS_RETURN_IF_ERROR(CheckInt("prompt (tokens, with prompt_logprobs)", static_cast<int64_t>(prompt.size()), 0,
                                     kMaxPromptLogprobs));
  }
  REFOCUS_ASSIGN_OR_RETURN(plan.sequence, PlanSequence(session, request.adapter_id(), std::move(prompt),
                                                       plan.max_tokens + plan.forced_tokens()));
  plan.request_id = request.request_id().empty() ? RandomName(environment_.random()) : request.request_id();
  std::vector<std::shared_ptr<KvReservation>> tails;  // of the further samples, behind the prompt
  const int64_t behind = session->token_count() + static_cast<int64_t>(plan.sequence.prompt.size());
  REFOCUS_RETURN_IF_ERROR(CheckQueue(plan.sampling.samples));
  for (int32_t sample = 1; sample < plan.sampling.samples; ++sample) {
    REFOCUS_ASSIGN_OR_RETURN(auto tail, ReserveTail(behind, plan.max_tokens + plan.forced_tokens()));
    tails.push_back(std::move(tail));
  }
  const auto start = [&](GeneratePlan own) {
    session->StartAnswer();
    auto job = std::make_shared<GenerateJob>(NextId(), now(), session, std::move(own), tokenizer_.get(), &tools_);
    job->deadline = now() + seconds;
    return job;
  };
  const std::shared_ptr<GenerateJob> job = start(std::move(plan));
  std::vector<std::shared_ptr<GenerateJob>> forks;
  for (auto& tail : tails) {
    forks.push_back(start(job->ForkPlan(static_cast<int32_t>(forks.size()) + 1, std::move(tail))));
  }
  GenerateJob::Fork(job, forks);
  Track(job, session);
  for (const std::shared_ptr<GenerateJob>& fork : forks) Track(fork, session);
  return job;
}

StatusOr<std::shared_ptr<ScoreJob>> Coordinator::Score(const api::ScoreRequest& request, std::vector<int32_t> prompt,
                                                       std::vector<int32_t> target, double seconds) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(request.name()));
  if (target.empty()) return FieldError("target", "0 tokens", "1 or more");
  if (request.target_id().size() > 256) return FieldError("target_id", "longer", "at most 256 bytes");
  REFOCUS_ASSIGN_OR_RETURN(const auto session, catalog_.Get(request.name()));
  if (request.has_chat()) REFOCUS_RETURN_IF_ERROR(CheckConversation(*session));
  ScorePlan plan;
  const auto target_tokens = static_cast<int64_t>(target.size());
  REFOCUS_ASSIGN_OR_RETURN(plan.sequence,
                           PlanSequence(session, request.adapter_id(), std::move(prompt), target_tokens));
  plan.target = std::move(target);
  plan.token_logprobs = request.token_logprobs();
  plan.target_id = request.target_id();
  session->StartAnswer();
  auto job = std::make_shared<ScoreJob>(NextId(), now(), session, std::move(plan), &tools_);
  job->deadline = now() + seconds;
  Track(job, session);
  return job;
}

StatusOr<std::shared_ptr<ProbeJob>> Coordinator::Probe(const api::ProbeAttentionRequest& request,
                                                       std::vector<int32_t> prompt, double seconds) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(request.name()));
  REFOCUS_ASSIGN_OR_RETURN(const auto session, catalog_.Get(request.name()));
  REFOCUS_ASSIGN_OR_RETURN(ProbePlan plan, PlanProbe(request, options_.model, session->token_count(),
                                                     static_cast<int64_t>(prompt.size())));
  REFOCUS_ASSIGN_OR_RETURN(plan.sequence, PlanSequence(session, request.adapter_id(), std::move(prompt), 0));
  session->StartAnswer();
  auto job = std::make_shared<ProbeJob>(NextId(), now(), session, std::move(plan), &tools_);
  job->deadline = now() + seconds;
  Track(job, session);
  return job;
}

}  // namespace refocus
