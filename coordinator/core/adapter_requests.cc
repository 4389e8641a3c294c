// What Coordinator does for the RPCs about adapters: admission, then a job or an answer.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "base/memory_plan.h"
#include "coordinator/core/adapter_file.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/digest.h"
#include "coordinator/core/refusals.h"
#include "coordinator/core/validate.h"

namespace refocus {

StatusOr<std::shared_ptr<Session>> Coordinator::SessionOf(const std::string& name, const std::string& adapter_id) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(name));
  REFOCUS_RETURN_IF_ERROR(CheckAdapterId(adapter_id));
  REFOCUS_ASSIGN_OR_RETURN(auto session, catalog_.Get(name));
  if (session->FindAdapter(adapter_id) == nullptr) return AdapterNotFound(*session, adapter_id);
  return session;
}

StatusOr<api::ListAdaptersResponse> Coordinator::ListAdapters(const api::ListAdaptersRequest& request) {
  REFOCUS_ASSIGN_OR_RETURN(const api::Context context, GetContext(request.name()));
  api::ListAdaptersResponse response;
  *response.mutable_adapters() = context.adapters();
  return response;
}

StatusOr<api::Adapter> Coordinator::GetAdapter(const api::GetAdapterRequest& request) {
  REFOCUS_ASSIGN_OR_RETURN(const auto session, SessionOf(request.name(), request.adapter_id()));
  return session->FindAdapter(request.adapter_id())->info;
}

Status Coordinator::DeleteAdapter(const api::DeleteAdapterRequest& request) {
  REFOCUS_ASSIGN_OR_RETURN(const auto session, SessionOf(request.name(), request.adapter_id()));
  // Work that has answered only closes its sequence, which keeps the numbers for as long as it is there: its caller
  // cannot wait for that.
  const bool read = std::any_of(tracked_.begin(), tracked_.end(), [&](const Tracked& tracked) {
    const Job& job = *tracked.job;
    return tracked.session == session && job.adapter_id() == request.adapter_id() && !job.answered();
  });
  if (session->adapting() || read) {
    return Busy(StatusCode::kFailedPrecondition, request.name(), "the adapter is in use; wait");
  }
  wire::Command command;
  command.mutable_drop_adapter()->set_adapter(session->FindAdapter(request.adapter_id())->uid);
  session->EraseAdapter(request.adapter_id());
  SendFirst(std::move(command));
  Settle();
  return absl::OkStatus();
}

// What a repeated request id may answer with: the adapter is the one that the first call made.
bool Coordinator::StillThere(const AdaptOutcome& outcome, Session& session) const {
  const Session::Adapter* adapter = session.FindAdapter(outcome.last.adapter().id());
  return adapter != nullptr && adapter->info.uid() == outcome.last.adapter().uid();
}

// Room for one more adapter, where this is a new one.
Status Coordinator::CheckAdapterCount(Session& session, const std::string& adapter_id) const {
  if (session.FindAdapter(adapter_id) != nullptr || session.adapter_count() < kMaxAdaptersPerContext) {
    return absl::OkStatus();
  }
  const std::string limit = std::to_string(kMaxAdaptersPerContext);
  return Error(StatusCode::kResourceExhausted, "TOO_MANY_ADAPTERS",
               session.name() + ": got one adapter more than " + limit + "; delete one", {{"limit", limit}});
}

// Identity and revision of the adapter that work is about to make or to replace.
AdapterTarget Coordinator::TargetOf(Session& session, const std::string& adapter_id) {
  const Session::Adapter* adapter = session.FindAdapter(adapter_id);
  AdapterTarget target;
  target.id = adapter_id;
  target.uid = adapter != nullptr ? adapter->uid : NextId();
  target.public_uid = adapter != nullptr ? adapter->info.uid() : RandomName(environment_.random());
  target.kept_revision = adapter != nullptr ? adapter->info.revision() : 0;
  if (adapter != nullptr) target.create_time = adapter->info.create_time();
  return target;
}

StatusOr<AdaptPlan> Coordinator::PlanAdaptJob(const api::AdaptContextRequest& request, Session& session,
                                              FoundRows found) {
  // A request id without a seed gets the same one again: a repeated call repeats the work.
  uint64_t seed = environment_.random();
  if (!request.request_id().empty())
    seed = std::stoull(Digest("seed/" + request.request_id()).substr(0, 16), nullptr, 16);
  const std::string id = AdapterIdOf(request);
  const std::string& from = request.continue_adapter() ? id : request.base_adapter();
  const Session::Adapter* start = from.empty() ? nullptr : session.FindAdapter(from);
  HeldOutRows* rows = found.tokens == session.token_ids() ? &found.rows : nullptr;
  REFOCUS_ASSIGN_OR_RETURN(AdaptPlan plan, PlanAdapt(request, options_.model, start == nullptr ? nullptr : &start->info,
                                                     session.token_count(), seed, rows));
  if (start == nullptr && !from.empty()) return AdapterNotFound(session, from);
  REFOCUS_RETURN_IF_ERROR(CheckAdapterCount(session, id));
  plan.target = TargetOf(session, id);
  plan.from_uid = start != nullptr ? start->uid : 0;
  plan.earlier_steps = start != nullptr ? start->info.steps() : 0;
  plan.adapter_bytes = AdapterBytes(options_.model, group_.device(), plan.effective.lora_rank());
  return plan;
}

// The room that is left, and how long it would take, as far as this group has shown how fast it is.
api::AdaptEvent::Forecast Coordinator::ForecastOf(const AdaptPlan& plan, const Session& session, int64_t work) const {
  api::AdaptEvent::Forecast forecast;
  forecast.set_adapting_bytes(work);
  forecast.set_adapter_bytes(plan.adapter_bytes);
  forecast.set_free_bytes(ledger_.least_free_bytes());
  const double flops = AdaptFlops(options_.model, plan, session.token_count());
  double seconds = tools_.steps.Seconds(flops);
  if (seconds == 0) {
    seconds = tools_.chunks.Seconds(0, session.token_count()) * flops /
              PrefillFlops(options_.model, session.token_count());
  }
  if (seconds > 0) forecast.set_seconds(seconds);
  return forecast;
}

StatusOr<Coordinator::AdaptStart> Coordinator::Adapt(const api::AdaptContextRequest& request, FoundRows found) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(request.name()));
  REFOCUS_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  REFOCUS_RETURN_IF_ERROR(CheckOnDisconnect(request.on_disconnect()));
  REFOCUS_ASSIGN_OR_RETURN(const auto session, catalog_.Get(request.name()));
  const std::string key = "adapt/" + request.request_id();
  api::AdaptContextRequest body = request;
  body.clear_request_id();
  body.clear_on_disconnect();
  const std::string body_hash = MessageDigest(body);
  if (!request.request_id().empty() && !request.validate_only()) {
    REFOCUS_ASSIGN_OR_RETURN(const RequestOutcome* outcome, requests_.Find(key, body_hash));
    if (outcome != nullptr && std::holds_alternative<AdaptOutcome>(*outcome)) {
      const auto& done = std::get<AdaptOutcome>(*outcome);
      if (StillThere(done, *session)) return AdaptStart{nullptr, {done.effective, done.last}, {}};
    } else if (outcome != nullptr) {
      AdaptStart start{std::get<std::shared_ptr<AdaptJob>>(*outcome), {}, {}};
      if (start.job->stopping()) {
        return Busy(StatusCode::kAborted, request.name(), "the adaptation of this request_id is stopping; retry");
      }
      ++start.job->watchers;
      start.job->keep |= request.on_disconnect() != api::CANCEL;
      return start;
    }
  }
  REFOCUS_ASSIGN_OR_RETURN(AdaptPlan plan, PlanAdaptJob(request, *session, std::move(found)));
  REFOCUS_RETURN_IF_ERROR(CheckCanAdapt(*session));
  const AdaptationShape shape = ShapeOf(plan.effective);
  const int64_t work = AdaptationBytes(options_.model, group_.device(), shape);
  REFOCUS_RETURN_IF_ERROR(ledger_.CheckEach(work + plan.adapter_bytes));
  if (plan.search) {
    plan.search->tokens = session->token_ids();
    return AdaptStart{nullptr, {}, std::move(plan.search)};
  }
  if (request.validate_only()) {
    AdaptStart start;
    api::AdaptEvent& event = start.events.emplace_back();
    *event.mutable_effective() = plan.effective;
    *event.mutable_forecast() = ForecastOf(plan, *session, work);
    return start;
  }
  REFOCUS_RETURN_IF_ERROR(CheckQueue());
  plan.work_memory = ledger_.TakeEach(work);
  plan.delta_memory = ledger_.TakeEach(plan.adapter_bytes);
  session->StartAdapt();
  auto job = std::make_shared<AdaptJob>(NextId(), now(), session, std::move(plan), options_.model, &tools_);
  ++job->watchers;
  job->keep = request.on_disconnect() != api::CANCEL;
  if (!request.request_id().empty()) {
    requests_.Put(key, body_hash, job);
    adapt_keys_[job.get()] = {key, body_hash};
  }
  Track(job, session);
  return AdaptStart{job, {}, {}};
}

Status Coordinator::CheckCanAdapt(const Session& session) const {
  if (!session.has_cache()) {
    REFOCUS_RETURN_IF_ERROR(CheckServing());
    return NotReady(session);
  }
  if (session.adapting()) {
    return Busy(StatusCode::kAborted, session.name(), "another adaptation or import runs; wait for its end");
  }
  return absl::OkStatus();
}

StatusOr<std::shared_ptr<ExportJob>> Coordinator::Export(const api::ExportAdapterRequest& request) {
  REFOCUS_ASSIGN_OR_RETURN(const auto session, SessionOf(request.name(), request.adapter_id()));
  REFOCUS_RETURN_IF_ERROR(CheckServing());
  REFOCUS_RETURN_IF_ERROR(CheckQueue());
  const Session::Adapter& adapter = *session->FindAdapter(request.adapter_id());
  const wire::Hello& rank = group_.ranks().begin()->second.hello;
  api::AdapterFileHeader header;
  header.set_model_fingerprint(rank.model_fingerprint());
  header.set_weights_hash(rank.weights_hash());
  header.set_model_name(options_.model.name);
  header.set_layers(options_.model.layers);
  header.set_hidden_size(options_.model.hidden);
  header.set_query_size(options_.model.q_dim());
  header.set_dtype("F32");
  header.set_data_bytes(4 * DeltaNumbers(options_.model, adapter.info.lora_rank()));
  *header.mutable_adapter() = adapter.info;
  if (adapter.training) *header.mutable_training() = *adapter.training;
  session->StartAnswer();
  auto job = std::make_shared<ExportJob>(NextId(), now(), session, adapter.uid, std::move(header));
  Track(job, session);
  return job;
}

StatusOr<std::shared_ptr<ImportJob>> Coordinator::Import(const api::ImportAdapterRequest::Header& request,
                                                         const api::AdapterFileHeader& file) {
  REFOCUS_RETURN_IF_ERROR(CheckContextName(request.name()));
  const std::string id = request.adapter_id().empty() ? file.adapter().id() : request.adapter_id();
  REFOCUS_RETURN_IF_ERROR(CheckAdapterId(id));
  REFOCUS_ASSIGN_OR_RETURN(const auto session, catalog_.Get(request.name()));
  REFOCUS_RETURN_IF_ERROR(CheckServing());
  const wire::Hello& rank = group_.ranks().begin()->second.hello;
  const ModelIdentity model{rank.model_fingerprint(), rank.weights_hash()};
  REFOCUS_RETURN_IF_ERROR(
      CheckAdapterFile(file, options_.model, request.allow_other_model() ? ModelIdentity{} : model));
  REFOCUS_RETURN_IF_ERROR(CheckCanAdapt(*session));
  REFOCUS_RETURN_IF_ERROR(CheckAdapterCount(*session, id));
  const int64_t bytes = AdapterBytes(options_.model, group_.device(), file.adapter().lora_rank());
  // Beside what it replaces, until it is committed.
  REFOCUS_RETURN_IF_ERROR(ledger_.CheckEach(bytes));
  REFOCUS_RETURN_IF_ERROR(CheckQueue());
  ImportPlan plan;
  plan.target = TargetOf(*session, id);
  plan.file = file;
  plan.file.DiscardUnknownFields();  // what is kept is exported again: it must stay small
  if (!CheckAdapterId(file.training().base_adapter()).ok()) plan.file.mutable_training()->clear_base_adapter();
  if (!file.has_training()) plan.file.clear_training();
  plan.adapter_bytes = bytes;
  plan.memory = ledger_.TakeEach(bytes);
  session->StartAdapt();
  auto job = std::make_shared<ImportJob>(NextId(), now(), session, std::move(plan), &tools_);
  Track(job, session);
  return job;
}

std::string Coordinator::TakeExported(ExportJob& job) {
  std::string piece = job.Take();
  Settle();
  return piece;
}

void Coordinator::PushImported(ImportJob& job, std::string piece) {
  job.Push(std::move(piece));
  Settle();
}

void Coordinator::FinishImport(ImportJob& job) {
  job.AllThere();
  Settle();
}

}  // namespace refocus
