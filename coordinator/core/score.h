// Score: log-probabilities of a given continuation. One sequence a target; its rows are the context's last token, the
// prompt and the target but its last token; the commands follow from the start, so the whole of it is pipelined.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "coordinator/core/generate.h"

namespace refocus {

struct ScorePlan {
  SequencePlan sequence;
  std::vector<int32_t> target;  // >= 1
  bool token_logprobs = false;
  std::string target_id;
};

class ScoreJob : public Job {
 public:
  // StartAnswer was called on `session`.
  ScoreJob(uint64_t id, double now, std::shared_ptr<Session> session, ScorePlan plan, JobTools* tools);

  const api::ScoreEvent& event() const { return event_; }  // complete when answered with an OK status
  Lane lane() const override;
  double Predict(const wire::Command& command) const override;
  double SecondsLeft() const override;
  const char* kind() const override { return "score"; }
  std::string adapter_id() const override { return plan_.sequence.adapter_id; }

 protected:
  bool NextCommand(wire::Command* command, double now) override;
  bool HasCleanup() const override { return opened_; }
  void NextCleanup(wire::Command* command) override;
  void OnResult(const wire::Command& command, const wire::Result& result, double now) override;
  void OnEnd(double now) override;

 private:
  int64_t rows() const { return static_cast<int64_t>(plan_.sequence.prompt.size() + plan_.target.size()); }
  int32_t RowId(int64_t row) const;
  void FillExtend(wire::ExtendSequence* extend);

  const std::shared_ptr<Session> session_;
  ScorePlan plan_;
  JobTools* const tools_;
  bool open_sent_ = false;
  bool opened_ = false;
  int64_t rows_sent_ = 0;
  int64_t scored_ = 0;
  double sum_logprob_ = 0;
  bool greedy_ = true;
  double started_ = 0;
  api::ScoreEvent event_;
};

}  // namespace refocus
