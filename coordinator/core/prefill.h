// Prefill: OpenContext reserves the extents, then chunks in order, behind what is shared with another context
// (prefix.h). A failure or a cancel closes the context on the ranks and leaves it CREATED.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "coordinator/core/chunk_clock.h"
#include "coordinator/core/job.h"
#include "coordinator/core/prefix.h"
#include "coordinator/core/session.h"
#include "coordinator/core/step_clock.h"

namespace refocus {

// What jobs share; lives as long as the coordinator.
struct JobTools {
  ChunkClock chunks;
  StepClock steps;
  int32_t ranks = 0;
  KvLedger* ledger = nullptr;
  std::function<std::vector<int64_t>()> rank_memory;  // resident bytes, per rank
  std::function<double()> unix_now;
};

api::PhaseUsage UsageOf(const Job& job, int64_t tokens, double now, const JobTools& tools);

class PrefillJob : public Job {
 public:
  // `session` was just moved to PREFILLING. `tools` outlives the job.
  PrefillJob(uint64_t id, double now, std::shared_ptr<Session> session, SharedPrefix prefix, JobTools* tools);

  bool answered() const override { return ended(); }         // a context that can be prefilled again, or is READY
  const api::PrefillEvent& event() const { return event_; }  // newest progress
  const std::shared_ptr<Session>& session() const { return session_; }
  int watchers = 0;   // callers attached
  bool keep = false;  // one of them chose CONTINUE
  double Predict(const wire::Command& command) const override;
  double SecondsLeft() const override { return tools_->chunks.Seconds(done_, session_->token_count()); }
  const char* kind() const override { return "prefill"; }

 protected:
  bool NextCommand(wire::Command* command, double now) override;
  bool HasCleanup() const override { return opened_ && !status().ok(); }
  void NextCleanup(wire::Command* command) override;
  void OnResult(const wire::Command& command, const wire::Result& result, double now) override;
  void OnEnd(double now) override;

 private:
  bool FillOpen(wire::OpenContext* open, double now);
  void OnChunk(const wire::PrefillChunk& chunk, const wire::Result& result, double now);

  const std::shared_ptr<Session> session_;
  SharedPrefix prefix_;
  JobTools* const tools_;
  bool open_sent_ = false;
  bool opened_ = false;
  int64_t sent_ = 0;  // tokens in commands
  int64_t done_ = 0;  // tokens whose K/V exist on all ranks
  api::PrefillEvent event_;
};

}  // namespace refocus
