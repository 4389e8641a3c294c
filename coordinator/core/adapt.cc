#include "coordinator/core/adapt.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <utility>

#include "base/check.h"

namespace refocus {
namespace {

constexpr double kKnownLoss = 0.01;  // nats: what is held out is known as it is
constexpr double kLeastGain = 0.02;  // automatic: a smaller share of the loss is no more than chance in so few rows
constexpr double kMeasuringShare = 0.5;  // of max_seconds, for candidates
constexpr int64_t kNearOf = 4;           // with `behind`, one of so many steps reads its spans where they stand
constexpr int64_t kFewTrials = 4;        // a trial has that share of the trials' steps,
constexpr int64_t kMostTrialSteps = 3;   // and at most so many
constexpr size_t kEarlyOf = 4;           // trials are compared on the first one of so many held-out spans,
constexpr size_t kFewestEarly = 8;       // if those are so many
constexpr double kTellingShare = 0.5;    // and their loss is this share of all's

}  // namespace

std::string Hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016" PRIx64, value);
  return text;
}

void FillTarget(const AdapterTarget& target, double unix_now, api::Adapter* adapter) {
  adapter->set_id(target.id);
  adapter->set_uid(target.public_uid);
  adapter->set_revision(target.kept_revision + 1);
  SetTimestamp(unix_now, adapter->mutable_update_time());
  *adapter->mutable_create_time() = target.kept_revision > 0 ? target.create_time : adapter->update_time();
}

double ScheduledRate(const api::AdaptEvent::Effective& effective, int64_t step) {
  const auto t = static_cast<double>(step - 1), warmup = static_cast<double>(effective.warmup_steps());
  if (t < warmup) return effective.learning_rate() * (t + 1) / (warmup + 1);
  const double x = (t - warmup) / (static_cast<double>(effective.steps()) - warmup);
  if (effective.schedule() == api::LINEAR) return effective.learning_rate() * (1 - x);
  if (effective.schedule() == api::COSINE) return effective.learning_rate() * (1 + std::cos(M_PI * x)) / 2;
  return effective.learning_rate();
}

int64_t NearSteps(const api::AdaptEvent::Effective& effective) {
  return effective.behind() != 0 ? effective.steps() / kNearOf : 0;
}

AdaptationShape ShapeOf(const api::AdaptEvent::Effective& effective) {
  const bool sgd = effective.optimizer() == api::SGD;
  return {effective.lora_rank(), !sgd ? 2 : effective.momentum() != 0 ? 1 : 0, effective.keep_best()};
}

double AdaptFlops(const ModelConfig& model, const AdaptPlan& plan, int64_t token_count) {
  double rows = 0, row_keys = 0, flops = 0;
  for (const SpanRange& span : plan.explicit_spans) {
    rows += static_cast<double>(span.rows);
    row_keys += static_cast<double>(span.rows) * static_cast<double>(span.start + span.rows / 2);
  }
  const auto& e = plan.effective;
  const auto spans = static_cast<double>(e.steps() * e.spans_per_step());
  const double keys = rows > 0 ? row_keys / rows : static_cast<double>(token_count) / 2;
  const auto reach = [&](const SpanRange& span) {  // keys of its first row
    return static_cast<double>(plan.effective.behind() != 0 ? token_count : span.start);
  };
  const double near = e.behind() != 0 ? static_cast<double>(NearSteps(e)) / static_cast<double>(e.steps()) : 1;
  const double span_rows =
      rows > 0 ? rows / static_cast<double>(plan.explicit_spans.size()) : static_cast<double>(e.span_tokens());
  flops += spans * span_rows * near * StepRowFlops(model, keys);
  flops += spans * span_rows * (1 - near) * StepRowFlops(model, static_cast<double>(token_count));
  const double probes = 2 + static_cast<double>(e.trial_steps()) +
                        (e.probe_every() > 0 ? static_cast<double>((e.steps() - 1) / e.probe_every()) : 0);
  for (const SpanRange& span : plan.candidates) {
    flops += static_cast<double>(span.rows) * ForwardRowFlops(model, reach(span));
  }
  for (const SpanRange& probe : plan.probes) {
    flops += probes * static_cast<double>(probe.rows) * ForwardRowFlops(model, reach(probe));
  }
  return flops;
}

AdaptJob::AdaptJob(uint64_t id, double now, std::shared_ptr<Session> session, AdaptPlan plan, const ModelConfig& model,
                   JobTools* tools)
    : Job(id, now), session_(std::move(session)), plan_(std::move(plan)), model_(model), tools_(tools) {
  const auto& effective = plan_.effective;
  const int64_t per_step = effective.spans_per_step();
  if (!plan_.explicit_spans.empty()) {
    spans_ = MakeExplicitSpans(plan_.explicit_spans, per_step);
  } else if (!plan_.recall_rows.empty()) {
    spans_ = MakeScatteredRows(std::move(plan_.recall_rows), per_step * effective.span_tokens(), effective.seed());
  } else if (plan_.candidates.empty()) {
    spans_ = MakeUniformSpans(session_->token_count(), effective.span_tokens(), plan_.probes, effective.seed(), per_step);
  }
  schedule_ = effective;
  trial_steps_ = std::clamp<int64_t>(effective.trial_steps() / kFewTrials, 1, kMostTrialSteps);
  if (effective.trial_steps() > 0) search_.emplace(effective.learning_rate(), effective.trial_steps() / trial_steps_);
  adapter_.set_id(plan_.target.id);
  adapter_.set_revision(plan_.target.kept_revision + 1);
  adapter_.set_kind(effective.kind());
  adapter_.set_lora_rank(effective.lora_rank());
  adapter_.set_lora_alpha(effective.lora_alpha());
  adapter_.set_base_adapter(effective.base_adapter());
  adapter_.set_memory_bytes(plan_.adapter_bytes);
  *events_.emplace_back().mutable_effective() = effective;
}

bool AdaptJob::NextCommand(wire::Command* command, double) {
  if (phase_ == Phase::kProbeBefore && plan_.probes.empty()) phase_ = Phase::kCandidates;
  if (phase_ == Phase::kCandidates && spans_ != nullptr) phase_ = Phase::kTrials;
  if (phase_ == Phase::kTrials && !search_) phase_ = Phase::kSteps;
  if ((phase_ == Phase::kTrials || phase_ == Phase::kSteps) && StepsAreOver()) phase_ = Phase::kProbeAfter;
  switch (phase_) {
    case Phase::kBegin:
      FillBegin(command->mutable_begin_adapt());
      phase_ = Phase::kProbeBefore;
      return true;
    case Phase::kProbeBefore:
      FillProbe(command->mutable_probe_loss());
      phase_ = Phase::kCandidates;
      break;
    case Phase::kCandidates:
      if (!NextCandidate(command)) return false;
      break;
    case Phase::kTrials:
      if (!NextTrial(command)) return false;
      break;
    case Phase::kSteps: {
      if (StepMayWait()) return false;
      const int64_t every = plan_.effective.probe_every();
      if (every > 0 && steps_sent_ == last_probe_ + every) {
        last_probe_ = steps_sent_;
        FillProbe(command->mutable_probe_loss());
      } else {
        FillStep(ScheduledRate(schedule_, delta_steps_ + 1), command->mutable_adapt_step());
      }
      break;
    }
    case Phase::kProbeAfter:  // also without probes: it brings the delta's hash
      FillProbe(command->mutable_probe_loss());
      phase_ = Phase::kCommit;
      break;
    case Phase::kCommit: {
      if (!measured_after_) return false;  // commit or not is decided by what comes back
      wire::EndAdapt* end = command->mutable_end_adapt();
      end->set_adapter(plan_.target.uid);
      end->set_commit(true);
      end->set_revision(adapter_.revision());
      end->set_kept(plan_.effective.keep_best());
      session_->StartCommit(plan_.target.id);
      phase_ = Phase::kAllSent;
      return true;
    }
    case Phase::kAllSent:
      return false;
  }
  command->set_job(id());
  return true;
}

// Before the first step was measured: a row costs about three times what it does in a chunk, forward and backward.
double AdaptJob::Predict(const wire::Command& command) const {
  const double measured = Job::Predict(command);
  if (measured > 0 || !(command.has_adapt_step() || command.has_probe_loss())) return measured;
  double seconds = 0;
  const auto add = [&](const auto& spans, double factor) {
    for (const wire::Span& span : spans) {
      const int64_t first = span.behind() != 0 ? session_->token_count() : span.start();
      seconds += factor * tools_->chunks.Seconds(first, first + span.ids_size() - 1);
    }
  };
  add(command.adapt_step().spans(), 3);
  add(command.probe_loss().spans(), 1);
  return seconds;
}

double AdaptJob::SecondsLeft() const {
  wire::Command step;
  step.mutable_adapt_step();
  wire::Command probe;
  probe.mutable_probe_loss();
  return Job::Predict(step) * static_cast<double>(plan_.effective.steps() - steps_sent_) +
         Job::Predict(probe) * static_cast<double>(plan_.candidates.size() - candidates_sent_);
}

void AdaptJob::FillBegin(wire::BeginAdapt* begin) const {
  const auto& effective = plan_.effective;
  begin->set_context(session_->cache_uid());
  begin->set_adapter(plan_.target.uid);
  begin->set_from_adapter(plan_.from_uid);
  begin->set_weight_decay(static_cast<float>(effective.weight_decay()));
  begin->set_clip_norm(static_cast<float>(effective.clip_norm()));
  begin->set_beta1(static_cast<float>(effective.beta1()));
  begin->set_beta2(static_cast<float>(effective.beta2()));
  begin->set_epsilon(static_cast<float>(effective.epsilon()));
  begin->set_sgd(effective.optimizer() == api::SGD);
  begin->set_momentum(static_cast<float>(effective.momentum()));
  begin->set_lora_rank(effective.lora_rank());
  begin->set_lora_alpha(static_cast<float>(effective.lora_alpha()));
  begin->set_seed(effective.seed());
  begin->set_keep_best(effective.keep_best());
}

template <typename CommandWithSpans>
void AdaptJob::AddSpan(const SpanRange& range, std::optional<int64_t> draw, CommandWithSpans* command) const {
  const bool alone = draw && plan_.effective.behind() != 0 && plan_.effective.recall_rows() != 0;
  for (int64_t row = 0; row < range.rows; row += alone ? 1 : range.rows) {
    FillSpan({range.start + row, alone ? 1 : range.rows}, draw, command->add_spans());
  }
}

// What rows held out must be below for a delta to be kept: behind the start's probe.
double AdaptJob::KeepBelow() const { return (1 - kLeastGain) * adapter_.probe_loss_before(); }

void AdaptJob::FillProbe(wire::ProbeLoss* probe) {
  probes_under_way_.push_back({steps_sent_, delta_steps_});
  probe->set_adapter(plan_.target.uid);
  probe->set_keep_best(plan_.effective.keep_best());
  if (plan_.automatic && adapter_.has_probe_loss_before()) probe->set_keep_below(KeepBelow());
  for (const SpanRange& range : plan_.probes) AddSpan(range, 0, probe);
}

void AdaptJob::FillStep(double rate, wire::AdaptStep* step) {
  step->set_adapter(plan_.target.uid);
  step->set_restart(delta_steps_ == 0 && steps_sent_ > 0);
  step->set_step(++delta_steps_);
  ++steps_sent_;
  rates_under_way_.push_back(rate);
  step->set_learning_rate(static_cast<float>(rate));
  // Trials are compared with each other: all train on what the first one drew.
  const auto index = static_cast<size_t>(delta_steps_ - 1);
  if (search_ && index == trial_spans_.size()) trial_spans_.push_back(spans_->NextStep());
  const bool near = search_ || delta_steps_ <= NearSteps(schedule_);
  for (const SpanRange& range : search_ ? trial_spans_[index] : spans_->NextStep()) {
    AddSpan(range, near ? std::nullopt : std::optional(steps_sent_), step);
  }
}

// One a command, as the probe of a single span, so that others get their turn between them.
bool AdaptJob::NextCandidate(wire::Command* command) {
  if (candidates_sent_ == plan_.candidates.size()) return false;
  wire::ProbeLoss* probe = command->mutable_probe_loss();
  probe->set_adapter(plan_.target.uid);
  AddSpan(plan_.candidates[candidates_sent_++], 0, probe);
  probes_under_way_.push_back({.candidate = true});
  return true;
}

// Few steps from the start, and then their probe, whose loss decides how it goes on; before the first, which spans to
// compare them on: early ones, which have the fewest keys before them, are where so few steps show first.
bool AdaptJob::NextTrial(wire::Command* command) {
  if (!probes_under_way_.empty()) return false;
  if (trial_probes_.empty()) {
    const size_t early = plan_.probes.size() / kEarlyOf;
    const auto begin = plan_.probes.begin();
    trial_probes_.assign(begin, early < kFewestEarly ? plan_.probes.end() : begin + early);
    trial_sent_ = early >= kFewestEarly;
  }
  if (trial_sent_) {
    FillTrialProbe(command->mutable_probe_loss());
    trial_sent_ = false;
  } else {
    if (delta_steps_ == trial_steps_) delta_steps_ = 0;
    FillStep(*search_->Next(), command->mutable_adapt_step());
    trial_sent_ = delta_steps_ == trial_steps_;
  }
  return true;
}

// Where they stand, as trials train; other probes' losses are not comparable, so nothing is kept.
void AdaptJob::FillTrialProbe(wire::ProbeLoss* probe) {
  probes_under_way_.push_back({.steps = steps_sent_, .trial = true});
  probe->set_adapter(plan_.target.uid);
  for (const SpanRange& range : trial_probes_) AddSpan(range, std::nullopt, probe);
}

void AdaptJob::OnTrialProbe(int64_t trials, double loss) {
  api::AdaptEvent::Probe* event = events_.emplace_back().mutable_probe();
  event->set_step(trials);
  event->set_loss(loss);
  event->set_trial(true);
  if (trials == 0) {
    if (!(loss >= kTellingShare * adapter_.probe_loss_before())) trial_probes_ = plan_.probes;
    return;
  }
  search_->Measured(std::exchange(trial_diverged_, false) ? std::numeric_limits<double>::infinity() : loss);
  if (!search_->Next()) BeginSteps();
}

// The best rate of few steps is too high for many: half of it, which is also what a schedule that decays from it has on
// average.
void AdaptJob::BeginSteps() {
  const bool decays = schedule_.schedule() != api::CONSTANT;
  schedule_.set_learning_rate((decays ? 1 : 0.5) * search_->best());
  schedule_.set_steps(plan_.effective.steps() - steps_sent_);
  schedule_.set_warmup_steps(std::min(schedule_.warmup_steps(), schedule_.steps() - 1));
  search_.reset();
  delta_steps_ = 0;
  last_probe_ = steps_sent_;
  probes_without_gain_ = 0;
}

// The first one where the start's probe may say that there is none; with a limit of time a step is not sent ahead once
// the one before it may be the last.
bool AdaptJob::StepMayWait() const {
  if (plan_.automatic && steps_sent_ == 0 && !probes_under_way_.empty()) return true;
  const double limit = plan_.effective.max_seconds();
  if (limit == 0 || steps_sent_ == steps_done_) return false;
  return steps_done_ == 0 || run_seconds() + 3 * slowest_step_ >= limit;
}

void AdaptJob::FillSpan(const SpanRange& range, std::optional<int64_t> draw, wire::Span* span) const {
  REFOCUS_CHECK_LT(range.start + range.rows, session_->token_count());
  span->set_start(range.start);
  const auto first = session_->tokens().begin() + range.start;
  span->mutable_ids()->Assign(first, first + range.rows + 1);
  const auto& effective = plan_.effective;
  if (effective.behind() == 0 || !draw) return;
  REFOCUS_CHECK_GE(effective.behind(), range.rows);
  SplitMix64 by_step(effective.seed() + static_cast<uint64_t>(*draw));
  SplitMix64 random(by_step.Next() + static_cast<uint64_t>(range.start));
  const int64_t place = static_cast<int64_t>(random.Below(static_cast<uint64_t>(effective.behind() - range.rows + 1)));
  span->set_behind(session_->token_count() + place);
}

void AdaptJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  const bool ok = result.code() == 0 && !result.cancelled();
  if (command.has_begin_adapt()) begun_ = ok;
  if (command.has_end_adapt()) session_->EndCommit();
  if (command.has_end_adapt() && ok) begun_ = false;
  if (!ok || stopping()) {
    if (command.has_end_adapt() && ok && command.end_adapt().commit()) OnCommitted(now);
    return;
  }
  if (command.has_probe_loss()) OnProbe(result, now);
  if (command.has_adapt_step()) OnStep(command.adapt_step(), result, now);
  if (command.has_end_adapt()) OnCommitted(now);
}

// The start's, those between steps, and the one behind the last step, which decides.
void AdaptJob::OnProbe(const wire::Result& result, double now) {
  const SentProbe sent = probes_under_way_.front();
  probes_under_way_.pop_front();
  const bool first = !plan_.probes.empty() && !adapter_.has_probe_loss_before();
  const bool last = phase_ == Phase::kCommit && probes_under_way_.empty();
  if ((sent.candidate || !plan_.probes.empty()) && !std::isfinite(result.loss()) && !sent.trial) {
    RollBack("NON_FINITE_LOSS", "the probe loss is not finite", steps_done_, now);
    return;
  }
  if (sent.candidate) {
    OnCandidate(result.loss());
    return;
  }
  if (sent.trial) {
    OnTrialProbe(sent.steps, result.loss());
    Changed();
    return;
  }
  const bool lower = first || result.loss() < lowest_loss_;
  if (lower) lowest_loss_ = result.loss();
  const bool best = first || (result.loss() < best_.loss && (!plan_.automatic || result.loss() < KeepBelow()));
  if (best || !plan_.effective.keep_best()) best_ = {sent.delta_steps, result.loss(), result.agree()};
  // Steps on spans where they stand need not lower the loss of those behind the text yet.
  const bool near = plan_.effective.behind() != 0 && sent.delta_steps <= NearSteps(schedule_);
  probes_without_gain_ = lower || near ? 0 : probes_without_gain_ + 1;
  if (first) {
    adapter_.set_probe_loss_before(result.loss());
    events_.emplace_back().set_probe_loss_before(result.loss());
    nothing_to_learn_ = plan_.automatic && result.loss() < kKnownLoss;
  } else if (!last) {
    api::AdaptEvent::Probe* probe = events_.emplace_back().mutable_probe();
    probe->set_step(sent.steps);
    probe->set_loss(result.loss());
    probe->set_best(best);
    const int64_t patience = plan_.effective.patience();
    out_of_patience_ |= patience > 0 && probes_without_gain_ >= patience && steps_sent_ < plan_.effective.steps();
  } else {
    OnLastProbe(result.loss(), now);
  }
  Changed();
}

void AdaptJob::OnCandidate(double loss) {
  rows_done_ += plan_.candidates[candidate_losses_.size()].rows;
  candidate_losses_.push_back(loss);
  const double limit = plan_.effective.max_seconds();
  if (limit > 0 && run_seconds() >= kMeasuringShare * limit) plan_.candidates.resize(candidates_sent_);
  if (candidate_losses_.size() == plan_.candidates.size()) ChooseSpans();
}

void AdaptJob::ChooseSpans() {
  const auto& effective = plan_.effective;
  const std::vector<size_t> chosen =
      ChooseByLoss(candidate_losses_, effective.candidate_share(), effective.candidate_skip());
  std::vector<SpanRange> spans;
  std::vector<bool> is_chosen(plan_.candidates.size());
  for (const size_t i : chosen) {
    spans.push_back(plan_.candidates[i]);
    is_chosen[i] = true;
  }
  spans_ = MakeExplicitSpans(std::move(spans), effective.spans_per_step());
  std::vector<size_t> order(plan_.candidates.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return plan_.candidates[a].start < plan_.candidates[b].start; });
  api::AdaptEvent::Candidates* event = events_.emplace_back().mutable_candidates();
  for (const size_t i : order) {
    event->add_starts(plan_.candidates[i].start);
    event->add_losses(candidate_losses_[i]);
    event->add_chosen(is_chosen[i]);
  }
  Changed();
}

void AdaptJob::OnLastProbe(double loss, double now) {
  measured_after_ = true;
  adapter_.set_delta_hash(Hex(best_.delta_hash));
  if (plan_.effective.keep_best()) adapter_.set_steps(plan_.earlier_steps + best_.steps);
  if (plan_.probes.empty()) return;
  adapter_.set_probe_loss_after(best_.loss);
  events_.emplace_back().set_probe_loss_after(loss);
  const double rise = best_.loss - adapter_.probe_loss_before();
  if (rise > plan_.effective.max_probe_rise()) {
    RollBack("LOSS_DIVERGED",
             "probe loss rose by " + std::to_string(rise) + " nats, allowed " +
                 std::to_string(plan_.effective.max_probe_rise()) + "; lower learning_rate or steps",
             steps_done_, now);
  }
}

void AdaptJob::OnStep(const wire::AdaptStep& step, const wire::Result& result, double now) {
  const double rate = rates_under_way_.front();
  rates_under_way_.pop_front();
  const int64_t number = steps_done_ + 1;
  const bool finite = std::isfinite(result.loss()) && std::isfinite(result.grad_norm());
  if (!finite && search_) {  // the ranks left the delta as it was, so that the trial's probe does not tell
    trial_diverged_ = true;
    steps_done_ = number;
    return;
  }
  if (!finite) {
    RollBack("NON_FINITE_LOSS", "loss or gradient of step " + std::to_string(number) + " is not finite", number, now);
    return;
  }
  if (number == 1) adapter_.set_first_loss(result.loss());
  adapter_.set_last_loss(result.loss());
  api::AdaptEvent::Step* event = events_.emplace_back().mutable_step();
  event->set_step(number);
  event->set_loss(result.loss());
  event->set_grad_norm(result.grad_norm());
  event->set_step_seconds(result.seconds());
  event->set_learning_rate(rate);
  double flops = 0;
  for (const wire::Span& span : step.spans()) {
    const int64_t rows = span.ids_size() - 1;
    event->add_span_starts(span.start());
    rows_done_ += rows;
    const int64_t keys = span.behind() != 0 ? session_->token_count() : span.start() + rows / 2;
    flops += static_cast<double>(rows) * StepRowFlops(model_, static_cast<double>(keys));
  }
  if (number > 1) tools_->steps.Measured(flops, result.seconds());  // the first sets up what the others find
  steps_done_ = number;
  adapter_.set_steps(plan_.earlier_steps + steps_done_);
  slowest_step_ = std::max(slowest_step_, result.seconds());
  const double limit = plan_.effective.max_seconds();
  if (limit > 0 && steps_done_ < plan_.effective.steps()) out_of_time_ |= run_seconds() >= limit;
  Changed();
}

// The ranks have committed: from here on nothing can take the revision back.
void AdaptJob::OnCommitted(double now) {
  FillTarget(plan_.target, tools_->unix_now(), &adapter_);
  committed_ = adapter_;
  api::AdaptEvent& last = events_.emplace_back();
  last.set_out_of_time(out_of_time_ && steps_done_ < plan_.effective.steps());
  last.set_out_of_patience(out_of_patience_ && !last.out_of_time());
  *last.mutable_adapter() = adapter_;
  *last.mutable_usage() = UsageOf(*this, rows_done_, now, *tools_);
  Stop(absl::OkStatus(), now);
}

void AdaptJob::RollBack(const char* reason, const std::string& message, int64_t step, double now) {
  const std::string kept = std::to_string(plan_.target.kept_revision);
  Stop(Error(StatusCode::kAborted, reason, message + "; the adapter stays at revision " + kept,
             {{"step", std::to_string(step)}, {"kept_revision", kept}}),
       now);
}

void AdaptJob::NextCleanup(wire::Command* command) {
  command->mutable_end_adapt()->set_adapter(plan_.target.uid);
  begun_ = false;
}

void AdaptJob::OnEnd(double now) {
  plan_.work_memory.reset();
  session_->FinishAdapt(plan_.target.uid, committed_, std::move(plan_.delta_memory), plan_.effective);
  session_->Touch(now);
}

}  // namespace refocus
