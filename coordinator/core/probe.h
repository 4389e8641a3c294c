// Probe: how much attention rows give to ranges of a context's keys. One sequence a request; every command is a chunk of
// the context's rows, or the whole prompt and which of its rows to report. The ranks answer in pieces; callers get a
// layer of some rows at a time.
#pragma once

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "coordinator/core/generate.h"

namespace refocus {

struct ProbePlan {
  SequencePlan sequence;
  std::vector<int64_t> positions;                   // of the rows, rising
  std::vector<std::pair<int64_t, int64_t>> ranges;  // [begin, end) of the context
  std::vector<int32_t> layers;                      // rising
  std::vector<int32_t> heads;                       // rising
  bool mean_over_heads = false;
  bool mean_over_rows = false;
};

class ProbeJob : public Job {
 public:
  // StartAnswer was called on `session`.
  ProbeJob(uint64_t id, double now, std::shared_ptr<Session> session, ProbePlan plan, JobTools* tools);

  // Events since the last call, the one with the summary last. No more than kMaxProbeValues lie here at any time.
  std::vector<api::ProbeAttentionEvent> TakeEvents();
  Lane lane() const override;
  double Predict(const wire::Command& command) const override;
  double SecondsLeft() const override;
  const char* kind() const override { return "probe"; }
  std::string adapter_id() const override { return plan_.sequence.adapter_id; }

 protected:
  bool NextCommand(wire::Command* command, double now) override;
  bool HasCleanup() const override { return opened_; }
  void NextCleanup(wire::Command* command) override;
  void OnPartial(const wire::Command& command, const wire::Result& result, double now) override;
  void OnResult(const wire::Command& command, const wire::Result& result, double now) override;
  void OnEnd(double now) override;

 private:
  // Every range is attended to once more, beside the pass itself: keys of both over those of the pass.
  double KeysShare() const;
  double Seconds(int64_t rows, int64_t reported) const;
  int64_t NextRows() const;
  void FillProbe(wire::ProbeAttention* probe);
  void OnMasses(const wire::ProbeAttention& probe, const wire::Result& result);
  // masses_ is one layer of the command's rows.
  void OnLayer(const wire::ProbeAttention& probe, int32_t layer);
  void Finish(double now);

  const std::shared_ptr<Session> session_;
  ProbePlan plan_;
  JobTools* const tools_;
  bool open_sent_ = false;
  bool opened_ = false;
  size_t rows_sent_ = 0;  // of plan_.positions
  size_t rows_done_ = 0;
  int layers_done_ = 0;        // of the command that is being answered
  std::vector<float> masses_;  // [rows, ranges, heads] of the layer that is coming in
  std::vector<double> sums_;   // mean_over_rows: [layers, ranges, heads or 1]
  double started_ = 0;
  double queued_ = 0;
  std::deque<api::ProbeAttentionEvent> queue_;
};

}  // namespace refocus
