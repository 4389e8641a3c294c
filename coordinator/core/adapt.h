// Adaptation: BeginAdapt, probe loss before, that of candidates to train on if there are any, gradient steps with two
// on the way (one, near the end of max_seconds), probe loss after (and the delta's hash), then commit, or roll back when
// something was not finite, diverged, failed, or was cancelled. The adapter is at its old revision or at the next one,
// on all ranks, whatever happens.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/memory_plan.h"
#include "base/model_config.h"
#include "coordinator/core/job.h"
#include "coordinator/core/prefill.h"
#include "coordinator/core/rate_search.h"
#include "coordinator/core/session.h"
#include "coordinator/core/span_policy.h"

namespace refocus {

// The adapter that work makes or replaces.
struct AdapterTarget {
  std::string id;
  uint64_t uid = 0;  // on the ranks
  std::string public_uid;
  int64_t kept_revision = 0;  // of the adapter now; 0: a new one
  google::protobuf::Timestamp create_time;  // unset for a new one
};

std::string Hex(uint64_t value);  // 16 digits

// Identity, next revision and times in `adapter`.
void FillTarget(const AdapterTarget& target, double unix_now, api::Adapter* adapter);

struct AdaptPlan {
  AdapterTarget target;
  api::AdaptEvent::Effective effective;  // checked, with defaults filled in
  std::vector<SpanRange> probes;
  std::vector<SpanRange> explicit_spans;  // these, if any
  std::vector<int64_t> recall_rows;       // else these, if any
  std::vector<SpanRange> candidates;      // else some of these, if any, by their loss; else uniform
  std::optional<RowSearch> search;        // rows must be found first: nothing below is filled, nor the search's tokens
  bool automatic = false;     // no step where what is held out is known
  uint64_t from_uid = 0;      // on the ranks: whose committed delta it starts from; 0: from nothing
  int64_t earlier_steps = 0;  // behind that delta
  int64_t adapter_bytes = 0;  // of the committed delta on each rank
  std::shared_ptr<KvReservation> work_memory;   // AdaptationBytes on every rank
  std::shared_ptr<KvReservation> delta_memory;  // AdapterBytes: the delta once committed
};

// Learning rate of step 1, 2, ...: warm-up, then the schedule, as proto/refocus/v1/context.proto defines them.
double ScheduledRate(const api::AdaptEvent::Effective& effective, int64_t step);

// With `behind`: so many first steps read their spans where they stand. Early ones see few keys: where all of the text is
// too much for the queries that it starts from, there is a slope only there.
int64_t NearSteps(const api::AdaptEvent::Effective& effective);

AdaptationShape ShapeOf(const api::AdaptEvent::Effective& effective);

// Of all steps and probes, with uniform spans in the middle of the context.
double AdaptFlops(const ModelConfig& model, const AdaptPlan& plan, int64_t token_count);

class AdaptJob : public Job {
 public:
  // `session` was just moved to ADAPTING.
  AdaptJob(uint64_t id, double now, std::shared_ptr<Session> session, AdaptPlan plan, const ModelConfig& model,
           JobTools* tools);

  bool answered() const override { return ended(); }
  const std::vector<api::AdaptEvent>& events() const { return events_; }
  const std::shared_ptr<Session>& session() const { return session_; }
  int watchers = 0;
  bool keep = false;  // one of them chose CONTINUE
  double Predict(const wire::Command& command) const override;
  double SecondsLeft() const override;
  const char* kind() const override { return "adapt"; }

 protected:
  bool NextCommand(wire::Command* command, double now) override;
  bool HasCleanup() const override { return begun_; }
  void NextCleanup(wire::Command* command) override;
  void OnResult(const wire::Command& command, const wire::Result& result, double now) override;
  void OnEnd(double now) override;

 private:
  enum class Phase { kBegin, kProbeBefore, kCandidates, kTrials, kSteps, kProbeAfter, kCommit, kAllSent };
  void FillBegin(wire::BeginAdapt* begin) const;
  double KeepBelow() const;
  void FillProbe(wire::ProbeLoss* probe);
  void FillStep(double rate, wire::AdaptStep* step);
  bool NextCandidate(wire::Command* command);
  bool NextTrial(wire::Command* command);
  void FillTrialProbe(wire::ProbeLoss* probe);
  void OnTrialProbe(int64_t trials, double loss);
  void BeginSteps();
  bool StepMayWait() const;
  // The command's next span, or spans of a row each where rows to recall are read behind the text. `draw`: which one of
  // their places there, probes always have the first, so that they can be compared; none: where it stands.
  template <typename CommandWithSpans>
  void AddSpan(const SpanRange& range, std::optional<int64_t> draw, CommandWithSpans* command) const;
  void FillSpan(const SpanRange& range, std::optional<int64_t> draw, wire::Span* span) const;
  void OnProbe(const wire::Result& result, double now);
  void OnCandidate(double loss);
  void ChooseSpans();
  void OnLastProbe(double loss, double now);
  bool StepsAreOver() const {
    return out_of_time_ || out_of_patience_ || nothing_to_learn_ || steps_sent_ == plan_.effective.steps();
  }
  void OnStep(const wire::AdaptStep& step, const wire::Result& result, double now);
  void OnCommitted(double now);
  void RollBack(const char* reason, const std::string& message, int64_t step, double now);

  const std::shared_ptr<Session> session_;
  AdaptPlan plan_;
  const ModelConfig& model_;
  JobTools* const tools_;
  std::unique_ptr<SpanPolicy> spans_;  // null until the candidates are measured
  Phase phase_ = Phase::kBegin;
  bool begun_ = false;  // the ranks hold a delta under adaptation
  size_t candidates_sent_ = 0;
  std::vector<double> candidate_losses_;  // of the first ones
  int64_t steps_sent_ = 0;
  int64_t steps_done_ = 0;
  int64_t delta_steps_ = 0;                // of those sent, how many the delta has: since the last restart
  int64_t last_probe_ = 0;                 // steps sent before the last probe between steps
  std::optional<RateSearch> search_;       // while it lasts: steps are of trials from the start
  bool trial_sent_ = false;                // its probe is next
  std::vector<SpanRange> trial_probes_;    // those of plan_.probes that trials are compared on
  int64_t trial_steps_ = 1;                // of one trial
  std::vector<std::vector<SpanRange>> trial_spans_;  // of its steps
  api::AdaptEvent::Effective schedule_;    // of the steps behind the trials
  std::deque<double> rates_under_way_;     // of steps
  struct SentProbe {
    int64_t steps = 0;  // sent before it
    int64_t delta_steps = 0;
    bool trial = false;
    bool candidate = false;
  };
  std::deque<SentProbe> probes_under_way_;
  struct Probed {
    int64_t steps = 0;  // of the delta
    double loss = 0;
    uint64_t delta_hash = 0;
  };
  Probed best_;  // without keep_best the last one
  bool trial_diverged_ = false;
  double lowest_loss_ = 0;
  int64_t probes_without_gain_ = 0;
  bool out_of_patience_ = false;
  bool nothing_to_learn_ = false;
  double slowest_step_ = 0;     // seconds
  bool out_of_time_ = false;
  int64_t rows_done_ = 0;
  bool measured_after_ = false;
  api::Adapter adapter_;  // as it will be
  std::optional<api::Adapter> committed_;
  std::vector<api::AdaptEvent> events_;
};

}  // namespace refocus
