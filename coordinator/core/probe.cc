#include "coordinator/core/probe.h"

#include <algorithm>
#include <iterator>

#include "base/limits.h"
#include "base/shard_plan.h"

namespace refocus {

ProbeJob::ProbeJob(uint64_t id, double now, std::shared_ptr<Session> session, ProbePlan plan, JobTools* tools)
    : Job(id, now), session_(std::move(session)), plan_(std::move(plan)), tools_(tools) {
  const size_t heads = plan_.mean_over_heads ? 1 : plan_.heads.size();
  if (plan_.mean_over_rows) sums_.assign(plan_.layers.size() * plan_.ranges.size() * heads, 0.0);
}

bool ProbeJob::NextCommand(wire::Command* command, double now) {
  if (!open_sent_) {
    if (!ResolveAdapter(*session_, &plan_.sequence)) return false;
    open_sent_ = true;
    started_ = now;
    queued_ = queue_seconds(now);
    wire::OpenSequence* open = command->mutable_open_sequence();
    open->set_sequence(id());
    open->set_job(id());
    open->set_context(session_->cache_uid());
    open->set_adapter(plan_.sequence.adapter_uid);
    open->set_revision(plan_.sequence.revision);
    open->set_capacity(static_cast<int64_t>(plan_.sequence.prompt.size()));
    return true;
  }
  if (rows_sent_ == plan_.positions.size()) return false;
  FillProbe(command->mutable_probe_attention());
  command->set_job(id());
  return true;
}

double ProbeJob::KeysShare() const {
  int64_t keys = session_->token_count();
  for (const auto& [begin, end] : plan_.ranges) keys += end - begin;
  return static_cast<double>(keys) / static_cast<double>(session_->token_count());
}

int64_t ProbeJob::NextRows() const {
  const int64_t left = static_cast<int64_t>(plan_.positions.size() - rows_sent_);
  const int64_t rows = tools_->chunks.NextRows(plan_.positions.back(), left, kBlockTokens * tools_->ranks);
  return std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(rows) / KeysShare()));
}

double ProbeJob::Seconds(int64_t rows, int64_t reported) const {
  const int64_t last = plan_.positions.back();  // none sees more keys
  const int64_t again = static_cast<int64_t>(static_cast<double>(reported) * (KeysShare() - 1));
  return tools_->chunks.Seconds(last, last + rows + again);
}

double ProbeJob::SecondsLeft() const {
  const int64_t left = static_cast<int64_t>(plan_.positions.size() - rows_sent_);
  return Seconds(std::max(left, static_cast<int64_t>(plan_.sequence.prompt.size())), left);
}

Lane ProbeJob::lane() const { return SecondsLeft() > kShortPromptSeconds ? Lane::kWork : Lane::kPrompts; }

double ProbeJob::Predict(const wire::Command& command) const {
  if (!command.has_probe_attention()) return Job::Predict(command);
  return Seconds(command.probe_attention().ids_size(), command.probe_attention().rows_size());
}

void ProbeJob::FillProbe(wire::ProbeAttention* probe) {
  const int64_t context = session_->token_count();
  const auto& positions = plan_.positions;
  probe->set_sequence(id());
  const size_t inside = std::lower_bound(positions.begin(), positions.end(), context) - positions.begin();
  const int64_t count = NextRows();
  if (rows_sent_ < inside) {
    for (int64_t row = 0; row < count && rows_sent_ < inside; ++row, ++rows_sent_) {
      probe->add_positions(positions[rows_sent_]);
      probe->add_ids(static_cast<uint32_t>(session_->tokens()[positions[rows_sent_]]));
      probe->add_rows(row);
    }
  } else {  // the prompt's rows attend to each other: all of them, whoever is asked for
    const std::vector<int32_t>& prompt = plan_.sequence.prompt;
    for (size_t i = 0; i < prompt.size(); ++i) {
      probe->add_positions(context + static_cast<int64_t>(i));
      probe->add_ids(static_cast<uint32_t>(prompt[i]));
    }
    for (int64_t row = 0; row < count && rows_sent_ < positions.size(); ++row, ++rows_sent_) {
      probe->add_rows(positions[rows_sent_] - context);
    }
  }
  for (const auto& [begin, end] : plan_.ranges) {
    wire::ProbeAttention::KeyRange* range = probe->add_ranges();
    range->set_begin(begin);
    range->set_end(end);
  }
  probe->mutable_layers()->Add(plan_.layers.begin(), plan_.layers.end());
  probe->mutable_heads()->Add(plan_.heads.begin(), plan_.heads.end());
}

void ProbeJob::OnPartial(const wire::Command& command, const wire::Result& result, double) {
  if (!stopping() && result.code() == 0 && command.has_probe_attention()) {
    OnMasses(command.probe_attention(), result);
  }
}

void ProbeJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  const bool ok = result.code() == 0 && !result.cancelled();
  if (command.has_open_sequence()) opened_ = ok;
  if (command.has_close_sequence()) opened_ = false;
  if (!ok || stopping() || !command.has_probe_attention()) return;
  const wire::ProbeAttention& probe = command.probe_attention();
  OnMasses(probe, result);
  if (layers_done_ != probe.layers_size() || !masses_.empty()) {
    Stop(Error(StatusCode::kInternal, "RANK_DIVERGENCE",
               "attention masses: got " + std::to_string(layers_done_) + " layers and " +
                   std::to_string(masses_.size()) + " values, asked for " + std::to_string(probe.layers_size()) +
                   " layers"),
         now);
    return;
  }
  layers_done_ = 0;
  rows_done_ += probe.rows_size();
  if (rows_done_ == plan_.positions.size()) Finish(now);
}

void ProbeJob::OnMasses(const wire::ProbeAttention& probe, const wire::Result& result) {
  const size_t size = static_cast<size_t>(probe.rows_size()) * probe.ranges_size() * probe.heads_size();
  for (const float mass : result.masses()) {
    masses_.push_back(mass);
    if (masses_.size() < size || layers_done_ == probe.layers_size()) continue;
    OnLayer(probe, probe.layers(layers_done_++));
    masses_.clear();
  }
}

void ProbeJob::OnLayer(const wire::ProbeAttention& probe, int32_t layer) {
  const size_t heads = plan_.heads.size();
  if (plan_.mean_over_heads) {
    for (size_t i = 0; i < masses_.size() / heads; ++i) {
      double sum = 0;
      for (size_t head = 0; head < heads; ++head) sum += masses_[i * heads + head];
      masses_[i] = static_cast<float>(sum / static_cast<double>(heads));
    }
    masses_.resize(masses_.size() / heads);
  }
  const size_t row_size = masses_.size() / probe.rows_size();
  if (plan_.mean_over_rows) {
    double* const sums = sums_.data() + (layers_done_ - 1) * row_size;
    for (size_t i = 0; i < masses_.size(); ++i) sums[i % row_size] += masses_[i];
    return;
  }
  const int at_once = static_cast<int>(std::max<size_t>(1, kProbeValuesAtOnce / row_size));
  for (int first = 0; first < probe.rows_size(); first += at_once) {
    const int last = std::min(probe.rows_size(), first + at_once);
    api::ProbeAttentionEvent& event = queue_.emplace_back();
    event.set_layer(layer);
    event.set_row_count(last - first);
    for (int row = first; row < last; ++row) event.add_positions(probe.positions(static_cast<int>(probe.rows(row))));
    event.mutable_mass()->Add(masses_.begin() + first * row_size, masses_.begin() + last * row_size);
  }
  Changed();
}

void ProbeJob::Finish(double now) {
  const size_t row_size = sums_.size() / plan_.layers.size();
  for (size_t i = 0; plan_.mean_over_rows && i < plan_.layers.size(); ++i) {
    api::ProbeAttentionEvent& event = queue_.emplace_back();
    event.set_layer(plan_.layers[i]);
    event.set_row_count(1);
    for (size_t j = i * row_size; j < (i + 1) * row_size; ++j) {
      event.add_mass(static_cast<float>(sums_[j] / static_cast<double>(plan_.positions.size())));
    }
  }
  api::ProbeAttentionSummary* summary = queue_.emplace_back().mutable_summary();
  summary->set_context_tokens(session_->token_count());
  summary->set_prompt_tokens(static_cast<int64_t>(plan_.sequence.prompt.size()));
  summary->set_rows(static_cast<int64_t>(plan_.positions.size()));
  summary->mutable_layers()->Add(plan_.layers.begin(), plan_.layers.end());
  summary->mutable_heads()->Add(plan_.heads.begin(), plan_.heads.end());
  summary->set_adapter_revision(plan_.sequence.revision);
  summary->set_queue_seconds(queued_);
  summary->set_seconds(now - started_);
  Stop(absl::OkStatus(), now);
}

std::vector<api::ProbeAttentionEvent> ProbeJob::TakeEvents() {
  std::vector<api::ProbeAttentionEvent> events(std::make_move_iterator(queue_.begin()),
                                               std::make_move_iterator(queue_.end()));
  queue_.clear();
  return events;
}

void ProbeJob::NextCleanup(wire::Command* command) {
  command->mutable_close_sequence()->set_sequence(id());
  opened_ = false;
}

void ProbeJob::OnEnd(double now) {
  plan_.sequence.memory.reset();
  session_->EndAnswer();
  session_->Touch(now);
}

}  // namespace refocus
