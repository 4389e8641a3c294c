// Generate: a sequence of its own after the context. The prompt's rows start with the context's last token, queried
// again, so that there is a row to predict from; with the first token it joins the decode batch of all answers
// (decode_batch.h). A stop token or string, max_tokens, a cancel or a failure ends it and leaves the others alone; the
// sequence is closed on the ranks in every case.
//
// Samples of one prompt are jobs of their own that fork from the first: when it has its first token they open with it
// as their parent, query the last row of the prompt again, and then decode as any answer does. The first one waits for
// that before it goes on or is closed.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "coordinator/chat_format.h"
#include "coordinator/core/answer_text.h"
#include "coordinator/core/job.h"
#include "coordinator/core/prefill.h"
#include "coordinator/core/sampling.h"
#include "coordinator/core/session.h"
#include "coordinator/tokenizer.h"

namespace refocus {

// A sequence on the ranks: which context, which queries.
struct SequencePlan {
  std::string adapter_id;    // empty: base queries
  uint64_t adapter_uid = 0;  // both as they are when the sequence is opened; base queries: 0
  int64_t revision = 0;
  std::vector<int32_t> prompt;  // may be empty
  std::shared_ptr<KvReservation> memory;
};

// Looks up which revision to open with. false: not now, the next one is being committed.
bool ResolveAdapter(Session& session, SequencePlan* plan);

struct GeneratePlan {
  SequencePlan sequence;
  std::string request_id;
  int64_t max_tokens = 0;
  SamplingPlan sampling;
  std::vector<std::string> stops;
  std::set<int32_t> eos_ids;   // end tokens of the model; empty with ignore_eos
  std::set<int32_t> stop_ids;  // the caller's
  std::optional<int32_t> logprobs;
  int32_t sample = 0;  // of sampling.samples
  std::shared_ptr<const ChatFormat::Thinking> thinking;  // null: the answer comes at once
  int64_t thinking_budget = 0;  // tokens of reasoning; 0: no limit

  bool limits_thinking() const { return thinking != nullptr && thinking_budget > 0; }
  int64_t forced_tokens() const { return limits_thinking() ? static_cast<int64_t>(thinking->forced_end.size()) : 0; }
};

// What callers are sent and have not taken yet: bounded, so that one that does not read costs nothing but itself.
inline constexpr size_t kMaxQueuedEvents = 1024;
inline constexpr double kSlowReaderSeconds = 30;

class GenerateJob : public Job {
 public:
  // StartAnswer was called on `session`. `tokenizer` may be null: ids only.
  GenerateJob(uint64_t id, double now, std::shared_ptr<Session> session, GeneratePlan plan, const Tokenizer* tokenizer,
              JobTools* tools);

  // Makes `forks`, with plans of first->ForkPlan, the further samples of the same prompt. Before any of them starts.
  static void Fork(const std::shared_ptr<GenerateJob>& first, std::vector<std::shared_ptr<GenerateJob>> forks);
  const std::vector<std::shared_ptr<GenerateJob>>& forks() const { return forks_; }
  GeneratePlan ForkPlan(int32_t sample, std::shared_ptr<KvReservation> memory) const;

  // Events since the last call, the one with the summary last.
  std::vector<api::GenerateEvent> TakeEvents();
  // When the queue has been full, since when; else negative.
  double full_since() const { return full_since_; }

  Lane lane() const override;
  double Predict(const wire::Command& command) const override;
  double SecondsLeft() const override;
  double DecodeSecondsLeft() const override;
  const char* kind() const override { return "generate"; }
  std::string adapter_id() const override { return plan_.sequence.adapter_id; }
  void AddDecodeRows(std::vector<DecodeRow>* rows) const override;

 protected:
  bool NextCommand(wire::Command* command, double now) override;
  bool HasCleanup() const override { return opened_; }
  bool MayCleanUp() const override { return forks_waiting_ == 0; }
  void NextCleanup(wire::Command* command) override;
  void OnDecode(uint64_t, int64_t steps) override { tokens_asked_ += steps; }
  void OnPartial(const wire::Command& command, const wire::Result& result, double now) override;
  void OnResult(const wire::Command& command, const wire::Result& result, double now) override;
  void OnEnd(double now) override;

 private:
  bool NextOpen(wire::Command* command, double now);
  void LeaveParent();
  void FillOpen(wire::OpenSequence* open) const;
  void FillExtend(wire::ExtendSequence* extend);
  int64_t prompt_rows() const { return static_cast<int64_t>(plan_.sequence.prompt.size()) + 1; }
  void OnEnded(const wire::Result& result, double now);
  void FillForced(wire::ExtendSequence* extend);
  bool MustForce() const;
  // Sampled tokens that may be asked for as things stand; more when the reasoning has ended.
  int64_t TokenLimit() const;
  void OnTokens(const wire::Result& result, double now);
  void OnToken(const wire::Token& token, api::GenerateEvent* event);
  void AddToken(int32_t id, api::GenerateEvent* event);
  void Finish(api::FinishReason reason, api::GenerateEvent* event, double now);

  const std::shared_ptr<Session> session_;
  GeneratePlan plan_;
  const Tokenizer* const tokenizer_;
  JobTools* const tools_;
  AnswerText text_;
  Reasoning reasoning_;
  std::vector<std::shared_ptr<GenerateJob>> forks_;
  int forks_waiting_ = 0;                     // that have not been opened yet
  std::shared_ptr<GenerateJob> parent_;       // of a fork, until it is opened
  std::shared_ptr<KvReservation> of_parent_;  // a fork holds the prompt's memory, too
  bool force_sent_ = false;  // the end of the reasoning
  bool force_done_ = false;
  int32_t last_id_ = 0;      // sampled
  bool open_sent_ = false;
  bool opened_ = false;
  int64_t rows_sent_ = 0;      // of 1 + prompt
  int extending_ = 0;          // rows on their way
  int64_t tokens_asked_ = 0;   // in commands
  bool left_ = false;          // the ranks decode it no more
  int64_t tokens_ = 0;         // sampled, the end token included
  int64_t answer_tokens_ = 0;  // without the end token
  double step_seconds_ = 0;    // of the newest batch that it was in
  double started_ = -1;
  double first_token_ = -1;
  double last_token_ = -1;
  api::FinishReason reason_ = api::FINISH_REASON_UNSPECIFIED;
  std::deque<api::GenerateEvent> queue_;
  double full_since_ = -1;
  std::vector<float> prompt_logprobs_;  // of the next event
  std::vector<api::TokenLogprob> prompt_best_;
};

}  // namespace refocus
