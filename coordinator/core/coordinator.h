// The coordinator as a pure state machine: requests and worker messages in, messages to workers and job progress out.
// No threads, no I/O, no clock of its own; the service (coordinator/hub.h) holds one lock around it and does the rest.
//
// A request becomes a Job on a Session (prefill.h, adapt.h, generate.h, score.h, probe.h); the Scheduler orders the jobs'
// commands; the Group says which ranks there are; the KvLedger admits; the Catalog names.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/model_config.h"
#include "base/status.h"
#include "coordinator/chat_format.h"
#include "coordinator/core/adapt.h"
#include "coordinator/core/adapter_transfer.h"
#include "coordinator/core/catalog.h"
#include "coordinator/core/environment.h"
#include "coordinator/core/generate.h"
#include "coordinator/core/group.h"
#include "coordinator/core/kv_ledger.h"
#include "coordinator/core/prefill.h"
#include "coordinator/core/probe.h"
#include "coordinator/core/scheduler.h"
#include "coordinator/core/score.h"
#include "coordinator/core/session.h"
#include "coordinator/tokenizer.h"

namespace refocus {

struct CoordinatorOptions {
  ModelConfig model;
  GroupOptions group;
  ChatFormat chat;
  std::string version;  // of the product
  double default_ttl_seconds = 3600;
  int64_t max_kv_bytes = 0;                      // on each rank, below what it offers; 0: no further limit
  int64_t max_stored_tokens = int64_t{1} << 28;  // of all contexts together, in this process
};

class Coordinator {
 public:
  Coordinator(CoordinatorOptions options, std::shared_ptr<const Tokenizer> tokenizer, Environment environment);
  ~Coordinator();

  // ---- Ranks. `link` is the caller's number for a stream, never used twice. A refused hello must end its stream.
  Status OnHello(uint64_t link, const wire::Hello& hello);
  void OnMessage(uint64_t link, const wire::WorkerMessage& message);
  void OnClosed(uint64_t link, const std::string& why);
  void Tick();  // timeouts and expiry; at least once a second

  // What to send, in order. A Shutdown is the last message of its link.
  struct Outgoing {
    uint64_t link = 0;
    std::shared_ptr<const wire::CoordinatorMessage> message;
  };
  std::vector<Outgoing> TakeOutgoing();
  std::vector<uint64_t> TakeChanged() { return scheduler_.TakeChanged(); }  // ids of jobs with news

  // ---- Contexts. An upload claims its name first; every ticket must be finished or given up.
  struct UploadTicket {
    std::string name;
    bool claimed = false;  // not for a repeated request id, nor for validate_only with a name in use
  };
  StatusOr<UploadTicket> BeginUpload(const api::CreateContextRequest::Header& header);
  StatusOr<api::Context> FinishUpload(const UploadTicket& ticket, const api::CreateContextRequest::Header& header,
                                      TokenIds tokens, const std::string& content_hash);
  void GiveUpUpload(const UploadTicket& ticket);
  // INVALID_ARGUMENT CONTEXT_TOO_LONG; for uploads under way too.
  Status CheckTokenCount(int64_t tokens) const;

  StatusOr<api::Context> GetContext(const std::string& name);
  StatusOr<api::ListContextsResponse> ListContexts(const api::ListContextsRequest& request);
  // The session may live on until its work has stopped: wait for !Exists(session). nullptr: there was none, and that is
  // fine.
  StatusOr<std::shared_ptr<Session>> DeleteContext(const api::DeleteContextRequest& request);
  bool Exists(const std::shared_ptr<Session>& session) const { return catalog_.Find(session->name()) == session; }

  // ---- Adapters.
  StatusOr<api::ListAdaptersResponse> ListAdapters(const api::ListAdaptersRequest& request);
  StatusOr<api::Adapter> GetAdapter(const api::GetAdapterRequest& request);
  Status DeleteAdapter(const api::DeleteAdapterRequest& request);
  // Header and numbers of an adapter's file go through the job; the caller forms and checks the checksum, and must stop
  // a job that it gives up.
  StatusOr<std::shared_ptr<ExportJob>> Export(const api::ExportAdapterRequest& request);
  std::string TakeExported(ExportJob& job);  // empty: nothing now
  StatusOr<std::shared_ptr<ImportJob>> Import(const api::ImportAdapterRequest::Header& request,
                                              const api::AdapterFileHeader& file);
  void PushImported(ImportJob& job, std::string piece);
  void FinishImport(ImportJob& job);  // the checksum was right: commit

  // ---- Work. Callers follow job->version(), read, and Detach when they leave.
  struct PrefillStart {
    std::shared_ptr<PrefillJob> job;  // nullptr: READY already, see PrefillResult
    std::shared_ptr<Session> session;
  };
  StatusOr<PrefillStart> Prefill(const api::PrefillContextRequest& request);
  api::PrefillEvent PrefillResult(const Session& session) const;  // of a READY one

  struct AdaptStart {
    std::shared_ptr<AdaptJob> job;        // nullptr: see events
    std::vector<api::AdaptEvent> events;  // the answer to validate_only or to a request id that was done before
    // The request needs to know which rows of the text it may train on: nothing has changed yet; call FindRows outside
    // of any lock and ask again with the result. What was found in another text is asked for anew.
    std::optional<RowSearch> search;
  };
  StatusOr<AdaptStart> Adapt(const api::AdaptContextRequest& request, FoundRows found = {});

  // `prompt` and `target` were tokenized and checked (PromptIds, QuestionIds) outside of any lock. By now() + `seconds`
  // the caller is gone: what has not started then never does. Generate: sample 0; the others are its forks().
  StatusOr<std::shared_ptr<GenerateJob>> Generate(const api::GenerateRequest& request, std::vector<int32_t> prompt,
                                                  double seconds = std::numeric_limits<double>::infinity(),
                                                  std::shared_ptr<const ChatFormat::Thinking> thinking = nullptr);
  StatusOr<std::shared_ptr<ScoreJob>> Score(const api::ScoreRequest& request, std::vector<int32_t> prompt,
                                            std::vector<int32_t> target,
                                            double seconds = std::numeric_limits<double>::infinity());
  StatusOr<std::shared_ptr<ProbeJob>> Probe(const api::ProbeAttentionRequest& request, std::vector<int32_t> prompt,
                                            double seconds = std::numeric_limits<double>::infinity());
  void Stop(Job& job, const Status& why);
  // The caller of an attached job went away; the last one takes the work with it when nobody ever wanted it kept.
  template <typename AttachedJob>
  void Detach(AttachedJob& job, bool gone, api::OnDisconnect on_disconnect) {
    if (--job.watchers == 0 && gone && on_disconnect == api::CANCEL && !job.keep)
      Stop(job, absl::CancelledError("cancelled by the caller"));
  }

  // ---- The whole.
  api::GetClusterResponse GetCluster() const;
  api::Model GetModel() const;
  bool serving() const { return group_.state() == Group::State::kServing && !draining_; }
  Status Admit() const;  // UNAVAILABLE DRAINING
  void BeginDrain() { draining_ = true; }
  bool drained() const { return scheduler_.jobs() == 0; }
  void FinishDrain();  // what still runs fails; ranks are told to leave

  // ---- For tests: nothing may be left behind.
  int64_t kv_used_bytes() const { return ledger_.used_bytes(); }
  int64_t jobs() const { return scheduler_.jobs(); }
  const Group& group() const { return group_; }
  const Scheduler& scheduler() const { return scheduler_; }
  const Catalog& catalog() const { return catalog_; }
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }
  const ModelConfig& model() const { return options_.model; }
  double now() const { return environment_.now(); }

 private:
  struct Tracked {
    std::shared_ptr<Job> job;
    std::shared_ptr<Session> session;
  };
  Status CheckServing() const;
  Status CheckQueue(int64_t jobs = 1) const;
  // After how long it makes sense to ask again for what running work holds: about when the next of it ends.
  std::string RetrySeconds() const;
  StatusOr<std::shared_ptr<KvReservation>> ReserveTail(int64_t first_pos, int64_t tokens);
  StatusOr<SequencePlan> PlanSequence(const std::shared_ptr<Session>& session, const std::string& adapter_id,
                                      std::vector<int32_t> prompt, int64_t answer_tokens);
  StatusOr<AdaptPlan> PlanAdaptJob(const api::AdaptContextRequest& request, Session& session, FoundRows found);
  // The context, when it has this adapter.
  StatusOr<std::shared_ptr<Session>> SessionOf(const std::string& name, const std::string& adapter_id);
  AdapterTarget TargetOf(Session& session, const std::string& adapter_id);
  Status CheckAdapterCount(Session& session, const std::string& adapter_id) const;
  Status CheckCanAdapt(const Session& session) const;
  api::AdaptEvent::Forecast ForecastOf(const AdaptPlan& plan, const Session& session, int64_t work) const;
  void Track(std::shared_ptr<Job> job, std::shared_ptr<Session> session);
  void Handle(const Group::Events& events);
  void LoseGroup(const std::string& cause, bool planned);
  bool StillThere(const AdaptOutcome& outcome, Session& session) const;
  void SendAll(const wire::CoordinatorMessage& message);
  void SendFirst(wire::Command command);  // clean-up that nobody waits for
  void Settle();
  void SettleJobs();
  void SettleSessions();
  uint64_t NextId() { return next_id_++; }

  const CoordinatorOptions options_;
  const std::shared_ptr<const Tokenizer> tokenizer_;
  const Environment environment_;
  const double started_;
  Group group_;
  KvLedger ledger_;
  Scheduler scheduler_;
  Catalog catalog_;
  RequestTable requests_;
  JobTools tools_;
  std::vector<Tracked> tracked_;                                          // jobs that have not ended
  std::map<std::string, std::shared_ptr<PrefillJob>> prefills_;           // running, by context name
  std::map<const Job*, std::pair<std::string, std::string>> adapt_keys_;  // running: request key, body hash
  std::vector<Outgoing> outgoing_;
  uint64_t next_id_ = 1;  // jobs, sequences, contexts and adapters on the ranks
  bool draining_ = false;
};

}  // namespace refocus
