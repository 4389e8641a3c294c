#include "coordinator/core/coordinator.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "base/log.h"

namespace refocus {
namespace {

// A command that nobody waits for.
class OneCommand : public Job {
 public:
  OneCommand(uint64_t id, double now, wire::Command command) : Job(id, now), command_(std::move(command)) {}

 protected:
  bool NextCommand(wire::Command* command, double) override {
    if (sent_) return false;
    sent_ = true;
    *command = command_;
    return true;
  }
  void OnResult(const wire::Command&, const wire::Result& result, double now) override {
    if (result.code() != 0) LogWarning("a clean-up command failed: " + result.message());
    Stop(StatusOf(result), now);
  }

 private:
  const wire::Command command_;
  bool sent_ = false;
};

Status WorkerLost(const std::string& cause) {
  return Error(StatusCode::kUnavailable, "WORKER_LOST",
               "the worker group was lost: " + cause + "; uploaded contexts are kept, prefill them again",
               {{"cause", cause}});
}

}  // namespace

Coordinator::Coordinator(CoordinatorOptions options, std::shared_ptr<const Tokenizer> tokenizer,
                         Environment environment)
    : options_(std::move(options)),
      tokenizer_(std::move(tokenizer)),
      environment_(std::move(environment)),
      started_(environment_.now()),
      group_(options_.group),
      catalog_(environment_.random()) {
  tools_.ledger = &ledger_;
  tools_.unix_now = environment_.unix_now;
  tools_.rank_memory = [this] {
    std::vector<int64_t> bytes;
    for (const auto& [index, rank] : group_.ranks()) bytes.push_back(rank.heartbeat.resident_bytes());
    return bytes;
  };
}

Coordinator::~Coordinator() = default;

// ---- Ranks.

Status Coordinator::OnHello(uint64_t link, const wire::Hello& hello) {
  if (draining_) return Admit();
  Group::Events events;
  const Status status = group_.Hello(link, hello, now(), &events);
  Handle(events);
  Settle();
  return status;
}

void Coordinator::OnMessage(uint64_t link, const wire::WorkerMessage& message) {
  const auto rank = group_.RankOf(link);
  if (!rank) return;  // of a group that is gone
  Group::Events events;
  if (message.has_ready()) {
    group_.Ready(link, message.ready(), now(), &events);
  } else if (message.has_key()) {
    group_.Key(link, message.key(), now(), &events);
  } else if (message.has_heartbeat()) {
    group_.Beat(link, message.heartbeat(), now());
  } else if (message.has_result() && group_.state() == Group::State::kServing) {
    group_.Progressed(*rank, now());
    const Status status = scheduler_.OnResult(*rank, message.result(), now());
    if (!status.ok()) group_.Lose(std::string(status.message()), &events);
  } else if (message.has_hello()) {
    group_.Lose("rank " + std::to_string(*rank) + " said hello twice", &events);
  }
  Handle(events);
  Settle();
}

void Coordinator::OnClosed(uint64_t link, const std::string& why) {
  Group::Events events;
  group_.Closed(link, why, &events);
  Handle(events);
  Settle();
}

void Coordinator::Tick() {
  Group::Events events;
  std::vector<bool> working;
  for (const auto& [index, rank] : group_.ranks()) {
    working.push_back(group_.state() == Group::State::kServing && scheduler_.Working(index));
  }
  group_.Tick(now(), working, &events);
  Handle(events);
  for (const Tracked& tracked : tracked_) {
    auto* generate = dynamic_cast<GenerateJob*>(tracked.job.get());
    if (generate == nullptr || generate->full_since() < 0 || now() - generate->full_since() < kSlowReaderSeconds)
      continue;
    scheduler_.Stop(*generate,
                    Error(StatusCode::kResourceExhausted, "SLOW_READER",
                          "the answer was not read for 30 s while 1024 events waited"),
                    now());
  }
  for (const auto& [name, session] : catalog_.sessions()) {
    if (session->Expired(now())) session->deleting = true;
  }
  Settle();
}

void Coordinator::Handle(const Group::Events& events) {
  const auto send = [&](uint64_t link, const wire::CoordinatorMessage& message) {
    outgoing_.push_back({link, std::make_shared<wire::CoordinatorMessage>(message)});
  };
  wire::CoordinatorMessage message;
  if (events.lost) {
    message.mutable_shutdown()->set_reason(*events.lost);
    message.mutable_shutdown()->set_planned(events.planned);
    for (const uint64_t link : events.leave) send(link, message);
    LoseGroup(*events.lost, events.planned);
  }
  for (const auto& [link, rank] : events.form) {
    message.mutable_form_group()->set_epoch(group_.epoch());
    message.mutable_form_group()->set_size(group_.size());
    message.mutable_form_group()->set_rank(rank);
    send(link, message);
  }
  for (const uint64_t link : events.connect) {
    message.mutable_key()->set_epoch(group_.epoch());
    message.mutable_key()->set_key(events.key);
    send(link, message);
  }
  if (!events.formed) return;
  std::vector<int64_t> capacity;
  for (const auto& [index, rank] : group_.ranks()) {
    const int64_t offered = rank.hello.kv_capacity_bytes();
    capacity.push_back(options_.max_kv_bytes > 0 ? std::min(offered, options_.max_kv_bytes) : offered);
  }
  ledger_.Reset(std::move(capacity), group_.ranks().begin()->second.hello.kv_bytes_per_token());
  tools_.chunks = ChunkClock();
  tools_.steps = StepClock();
  tools_.ranks = group_.size();
  scheduler_.Start(group_.epoch(), group_.size());
  LogInfo("group formed: epoch " + std::to_string(group_.epoch()) + ", " + std::to_string(group_.size()) + " ranks");
}

void Coordinator::LoseGroup(const std::string& cause, bool planned) {
  planned ? LogInfo("group dismissed: " + cause) : LogError("group lost: " + cause);
  scheduler_.Lose(draining_ ? Admit() : WorkerLost(cause), now());
  for (const auto& [name, session] : catalog_.sessions()) session->DropCache("the worker group was lost: " + cause);
  ledger_.Clear();
}

void Coordinator::SendAll(const wire::CoordinatorMessage& message) {
  const auto shared = std::make_shared<wire::CoordinatorMessage>(message);
  for (const auto& [index, rank] : group_.ranks()) outgoing_.push_back({rank.link, shared});
}

std::vector<Coordinator::Outgoing> Coordinator::TakeOutgoing() { return std::exchange(outgoing_, {}); }

// ---- After every event: follow-ups of what ended, then new commands.

void Coordinator::Settle() {
  SettleJobs();
  SettleSessions();
  std::vector<wire::CoordinatorMessage> messages;
  scheduler_.Pump(now(), &messages);
  for (const wire::CoordinatorMessage& message : messages) SendAll(message);
}

void Coordinator::SettleJobs() {
  for (const Tracked& tracked : tracked_) {
    if (!tracked.job->ended()) continue;
    const auto prefill = prefills_.find(tracked.session->name());
    if (prefill != prefills_.end() && prefill->second == tracked.job) prefills_.erase(prefill);
    const auto key = adapt_keys_.find(tracked.job.get());
    if (key == adapt_keys_.end()) continue;
    if (tracked.job->status().ok()) {
      const auto& events = static_cast<const AdaptJob&>(*tracked.job).events();
      requests_.Put(key->second.first, key->second.second, AdaptOutcome{events.front(), events.back()});
    } else {
      requests_.Erase(key->second.first);
    }
    adapt_keys_.erase(key);
  }
  std::erase_if(tracked_, [](const Tracked& tracked) { return tracked.job->ended(); });
}

void Coordinator::SendFirst(wire::Command command) {
  scheduler_.AddFirst(std::make_shared<OneCommand>(NextId(), now(), std::move(command)));
}

void Coordinator::SettleSessions() {
  std::vector<std::shared_ptr<Session>> gone;
  for (const auto& [name, session] : catalog_.sessions()) {
    if (session->deleting && !session->busy()) gone.push_back(session);
  }
  for (const std::shared_ptr<Session>& session : gone) {
    if (session->has_cache()) {
      // Before any later OpenContext, so that its memory may be given away now.
      wire::Command command;
      command.mutable_close_context()->set_context(session->cache_uid());
      SendFirst(std::move(command));
      session->DropCache("deleted");
    }
    catalog_.Erase(session->name());
  }
}

void Coordinator::Track(std::shared_ptr<Job> job, std::shared_ptr<Session> session) {
  session->Touch(now());
  tracked_.push_back({job, std::move(session)});
  scheduler_.Add(std::move(job));
  Settle();
}

void Coordinator::Stop(Job& job, const Status& why) {
  scheduler_.Stop(job, why, now());
  Settle();
}

// ---- The whole.

Status Coordinator::Admit() const {
  if (!draining_) return absl::OkStatus();
  return Error(StatusCode::kUnavailable, "DRAINING",
               "the server is stopping; use another one, or retry after its restart");
}

Status Coordinator::CheckServing() const {
  if (group_.state() == Group::State::kServing) return absl::OkStatus();
  const auto here = static_cast<int64_t>(group_.ranks().size());
  return Error(StatusCode::kUnavailable, "GROUP_REBUILDING",
               "the worker group is not complete: " + std::to_string(here) + " of " + std::to_string(group_.size()) +
                   " ranks are there; retry",
               {{"ranks_present", std::to_string(here)}, {"ranks", std::to_string(group_.size())}});
}

Status Coordinator::CheckQueue(int64_t jobs) const {
  if (static_cast<int64_t>(tracked_.size()) + jobs <= kMaxQueuedJobs) return absl::OkStatus();
  return Error(StatusCode::kUnavailable, "QUEUE_FULL",
               "queue: got one request more than " + std::to_string(kMaxQueuedJobs) + "; retry",
               {{"limit", std::to_string(kMaxQueuedJobs)}, {"retry_seconds", RetrySeconds()}});
}

// All jobs of a fair schedule end within the time of all the work; evenly, for want of a better guess.
std::string Coordinator::RetrySeconds() const {
  const double each = scheduler_.SecondsLeft() / static_cast<double>(std::max<size_t>(1, tracked_.size()));
  return std::to_string(static_cast<int64_t>(std::clamp(std::ceil(each), 1.0, 60.0)));
}

void Coordinator::FinishDrain() {
  draining_ = true;
  Group::Events events;
  events.planned = true;
  group_.Lose("the coordinator stops", &events);
  Handle(events);
  scheduler_.Lose(Admit(), now());
  Settle();
}

api::GetClusterResponse Coordinator::GetCluster() const {
  api::GetClusterResponse out;
  switch (group_.state()) {
    case Group::State::kWaiting:
      out.set_state(api::GetClusterResponse::WAITING);
      break;
    case Group::State::kForming:
      out.set_state(api::GetClusterResponse::FORMING);
      break;
    case Group::State::kServing:
      out.set_state(api::GetClusterResponse::SERVING);
      break;
  }
  if (draining_) out.set_state(api::GetClusterResponse::DRAINING);
  out.set_epoch(group_.epoch());
  out.set_size(group_.size());
  for (const auto& [index, rank] : group_.ranks()) {
    api::Rank* entry = out.add_ranks();
    entry->set_rank(index);
    entry->set_host(rank.hello.host());
    entry->set_pid(rank.hello.pid());
    entry->set_device(rank.hello.device());
    entry->set_resident_bytes(rank.heartbeat.resident_bytes());
    entry->set_weight_bytes(rank.hello.weight_bytes());
    entry->set_kv_capacity_bytes(rank.hello.kv_capacity_bytes());
    entry->set_heartbeat_age_seconds(now() - rank.last_heartbeat);
  }
  out.set_kv_capacity_bytes(ledger_.capacity_bytes());
  out.set_kv_used_bytes(ledger_.used_bytes());
  out.set_contexts(static_cast<int32_t>(catalog_.sessions().size()));
  out.set_running(static_cast<int32_t>(scheduler_.running()));
  out.set_waiting(static_cast<int32_t>(scheduler_.waiting()));
  out.set_queue_limit(static_cast<int32_t>(kMaxQueuedJobs));
  out.set_work_seconds(scheduler_.SecondsLeft());
  for (const Scheduler::Waiting& waiting : scheduler_.Queue()) {
    api::QueuedRequest* entry = out.add_queue();
    entry->set_kind(waiting.job->kind());
    entry->set_position(out.queue_size());
    entry->set_waited_seconds(waiting.job->queue_seconds(now()));
    entry->set_wait_seconds(waiting.seconds);
    for (const Tracked& tracked : tracked_) {
      if (tracked.job.get() == waiting.job) entry->set_context(tracked.session->name());
    }
  }
  out.set_last_incident(group_.last_incident());
  out.set_version(options_.version);
  out.set_uptime_seconds(now() - started_);
  return out;
}

api::Model Coordinator::GetModel() const {
  const ModelConfig& model = options_.model;
  api::Model out;
  out.set_name(model.name);
  out.set_family(FamilyName(model.family));
  out.set_parameters(model.parameters());
  out.set_layers(static_cast<int32_t>(model.layers));
  out.set_hidden_size(static_cast<int32_t>(model.hidden));
  out.set_query_heads(static_cast<int32_t>(model.heads));
  out.set_kv_heads(static_cast<int32_t>(model.kv_heads));
  out.set_head_dim(static_cast<int32_t>(model.head_dim));
  out.set_mlp_size(static_cast<int32_t>(model.mlp));
  out.set_vocab_size(static_cast<int32_t>(model.vocab));
  out.set_max_positions(model.max_positions);
  out.set_rope_scaling(model.rope.Text());
  constexpr int64_t kElementBytes = 4;
  const int64_t reported = ledger_.bytes_per_token();  // by the ranks, when there are any
  out.set_kv_bytes_per_token(reported > 0 ? reported : model.kv_bytes_per_token(kElementBytes));
  if (!group_.ranks().empty()) out.set_kv_dtype(group_.ranks().begin()->second.hello.kv_dtype());
  out.set_dtype(group_.device() == DeviceKind::kCuda ? "bfloat16" : "float32");
  out.set_has_tokenizer(tokenizer_ != nullptr);
  std::vector<int32_t> eos = model.eos_tokens;
  std::optional<int32_t> bos = model.bos_token;
  if (tokenizer_ != nullptr) {
    for (const int32_t id : tokenizer_->eos_tokens()) eos.push_back(id);
    if (tokenizer_->bos_token()) bos = tokenizer_->bos_token();
  }
  out.set_chat_format(options_.chat.name());
  out.set_chat_refusal(options_.chat.refusal());
  out.set_thinks(options_.chat.thinks());
  std::sort(eos.begin(), eos.end());
  eos.erase(std::unique(eos.begin(), eos.end()), eos.end());
  for (const int32_t id : eos) out.add_eos_token_ids(static_cast<uint32_t>(id));
  if (bos) out.set_bos_token_id(static_cast<uint32_t>(*bos));
  return out;
}

}  // namespace refocus
