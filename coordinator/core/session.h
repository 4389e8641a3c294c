// One context from upload to deletion. Start reading the coordinator here.
//
//   CREATED --StartPrefill--> PREFILLING --FinishPrefill--> READY <--FinishAdapt / StartAdapt--> ADAPTING
//      ^------------------------- DropCache (failed, cancelled, group lost) -------------------------'
//
// A session holds what outlives the worker group (name, tokens, labels, times) and what does not (K/V reservation,
// adapters). Jobs drive it: prefill.h computes its K/V, adapt.h its adapters, generate.h and score.h answer from it.
// Every transition is checked: an illegal one is a bug, not bad input; callers ask state() first.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/core/kv_ledger.h"
#include "coordinator/core/messages.h"

namespace refocus {

// Memory of a context's tokens from `first_pos` on. Contexts that begin alike share extents: each holds all that it
// needs, and the last one gives the memory back, on the ranks and in the ledger alike.
struct ContextExtent {
  int64_t first_pos = 0;
  std::shared_ptr<KvReservation> memory;
};

void SetTimestamp(double unix_seconds, google::protobuf::Timestamp* out);

using TokenIds = std::shared_ptr<const std::vector<int32_t>>;

class Session {
 public:
  using State = api::Context::State;
  struct Adapter {
    uint64_t uid = 0;  // on the ranks
    api::Adapter info;
    std::shared_ptr<KvReservation> memory;  // of the committed delta
    std::optional<api::AdaptEvent::Effective> training;  // settings behind this revision, where known
  };
  struct Setup {
    std::string name;  // "contexts/{id}"
    TokenIds tokens;   // >= 1
    std::map<std::string, std::string> labels;
    double ttl_seconds = 3600;
    std::string chat_format;  // of a conversation; else empty
  };

  Session(Setup setup, double now, double unix_now);

  const std::string& name() const { return setup_.name; }
  const std::vector<int32_t>& tokens() const { return *setup_.tokens; }
  const TokenIds& token_ids() const { return setup_.tokens; }
  int64_t token_count() const { return static_cast<int64_t>(setup_.tokens->size()); }
  const std::string& chat_format() const { return setup_.chat_format; }
  State state() const { return state_; }
  bool busy() const { return state_ == api::Context::PREFILLING || adapting() || answers_ > 0; }
  bool adapting() const { return state_ == api::Context::ADAPTING; }
  bool has_cache() const { return state_ == api::Context::READY || adapting(); }
  uint64_t cache_uid() const { return cache_uid_; }  // of the context on the ranks; a new one for every prefill

  // Prefill.
  // `extents` follow each other, the last one is the context's own; those before it hold another context's K/V already.
  void StartPrefill(uint64_t cache_uid, std::vector<ContextExtent> extents);
  // What was to be shared is gone, and no command was sent yet: all of it is computed anew, in `memory` (nullptr:
  // soon).
  void DropPrefix(std::shared_ptr<KvReservation> memory);
  void Prefilled(int64_t tokens) { prefilled_ = tokens; }
  int64_t prefilled() const { return prefilled_; }
  const std::vector<ContextExtent>& extents() const { return extents_; }
  int64_t shared_tokens() const { return extents_.empty() ? 0 : extents_.back().first_pos; }
  // Tokens whose K/V other contexts may share from now on: from when the ranks have opened it until they are told to
  // close it.
  int64_t shareable_tokens() const { return shareable_ && !deleting ? prefilled_ : 0; }
  void SetShareable(bool shareable) { shareable_ = shareable; }
  void FinishPrefill(const api::PrefillEvent& last);
  const api::PrefillEvent& last_prefill() const { return last_prefill_; }
  // K/V and adapters are gone or going; the tokens stay. `why`: one sentence.
  void DropCache(const std::string& why);

  // Adaptation or import: one at a time. `committed` is the adapter's new revision; none: it stays at the old one, and
  // `memory`, which is the new delta's, is given back.
  void StartAdapt();
  void FinishAdapt(uint64_t adapter_uid, const std::optional<api::Adapter>& committed,
                   std::shared_ptr<KvReservation> memory, std::optional<api::AdaptEvent::Effective> training);
  // While a commit of that adapter is on its way nobody can say which revision the next command will find.
  void StartCommit(const std::string& adapter_id) { committing_ = adapter_id; }
  void EndCommit() { committing_.clear(); }
  bool committing(const std::string& adapter_id) const { return !adapter_id.empty() && committing_ == adapter_id; }
  Adapter* FindAdapter(const std::string& id);
  int64_t adapter_count() const { return static_cast<int64_t>(adapters_.size()); }
  void EraseAdapter(const std::string& id) { adapters_.erase(id); }

  // Answers, probes and exports while they run.
  void StartAnswer();
  void EndAnswer();

  // Idle life. Running work keeps a session alive.
  void Touch(double now) { last_used_ = now; }
  bool Expired(double now) const { return !busy() && !deleting && now >= last_used_ + setup_.ttl_seconds; }

  api::Context ToProto(double now, double unix_now) const;

  bool deleting = false;  // no new work; goes as soon as nothing runs

 private:
  const Setup setup_;
  const double created_unix_;
  double last_used_;
  State state_ = api::Context::CREATED;
  std::string state_reason_;
  uint64_t cache_uid_ = 0;
  std::vector<ContextExtent> extents_;
  bool shareable_ = false;
  int64_t prefilled_ = 0;
  api::PrefillEvent last_prefill_;
  std::map<std::string, Adapter> adapters_;
  std::string committing_;  // adapter; empty: none
  int answers_ = 0;
};

}  // namespace refocus
