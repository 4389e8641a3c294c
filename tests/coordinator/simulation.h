// The whole state machine with fake ranks under a virtual clock: no threads, nothing happens unless a test says so.
#pragma once

#include <gtest/gtest.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "base/memory_plan.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/core/digest.h"
#include "coordinator/core/span_policy.h"
#include "tests/coordinator/fake_rank.h"

namespace refocus {

class Simulation {
 public:
  struct Link {
    uint64_t id = 0;
    std::unique_ptr<FakeRank> rank;
    std::deque<wire::CoordinatorMessage> inbox;
    std::deque<wire::WorkerMessage> outbox;
    int64_t progress = 0;
    bool frozen = false;  // heartbeats without progress
    bool silent = false;  // no heartbeats
    std::string told_to_leave;
    bool planned = false;
  };

  explicit Simulation(uint64_t seed = 1, CoordinatorOptions options = DefaultOptions())
      : random_(seed),
        core_(std::move(options), FakeTokenizer(),
              Environment{[this] { return now_; }, [this] { return 1e9 + now_; }, [this] { return random_.Next(); }}) {}

  static CoordinatorOptions DefaultOptions() {
    CoordinatorOptions options;
    options.model = FakeModel(100'000);
    options.group.fingerprint = "fake";
    return options;
  }

  Coordinator& core() { return core_; }
  double now() const { return now_; }
  // Time passes, and nobody notices.
  void Pass(double seconds) { now_ += seconds; }
  std::vector<Link>& links() { return links_; }
  FakeRank& rank(int32_t index) { return *links_[index].rank; }

  // A new launch dials in; `setup` may give each rank faults.
  void Launch(int32_t size, const std::function<void(FakeRank&, int32_t)>& setup = nullptr) {
    links_.clear();
    const auto agreement = std::make_shared<FakeAgreement>();
    const std::string nonce = "launch-" + std::to_string(++launches_);
    for (int32_t index = 0; index < size; ++index) {
      Link& link = links_.emplace_back();
      link.id = next_link_++;
      link.rank = std::make_unique<FakeRank>(index, size, agreement);
      if (setup) setup(*link.rank, index);
    }
    for (Link& link : links_) {
      const Status status = core_.OnHello(link.id, link.rank->Hello(nonce, "fake"));
      EXPECT_TRUE(status.ok()) << status;
    }
    Collect();
  }

  void Collect() {
    for (const auto& outgoing : core_.TakeOutgoing()) {
      for (Link& link : links_) {
        if (link.id == outgoing.link) link.inbox.push_back(*outgoing.message);
      }
    }
  }

  bool CanStepRank(const Link& link) const {
    if (link.frozen || link.inbox.empty()) return false;
    return !link.inbox.front().has_command() || link.rank->CanExecute(link.inbox.front().command().seq());
  }
  // The rank handles its next message.
  void StepRank(Link& link) {
    const wire::CoordinatorMessage message = std::move(link.inbox.front());
    link.inbox.pop_front();
    if (message.has_form_group()) {
      link.outbox.emplace_back().mutable_ready()->set_epoch(message.form_group().epoch());
    } else if (message.has_command()) {
      ++link.progress;
      for (wire::Result& result : link.rank->Execute(message.command())) {
        *link.outbox.emplace_back().mutable_result() = std::move(result);
      }
    } else if (message.has_cancel()) {
      link.rank->Cancel(message.cancel().job());
    } else {
      link.told_to_leave = message.shutdown().reason();
      link.planned = message.shutdown().planned();
    }
  }
  // Its next message reaches the coordinator.
  void StepAnswer(Link& link) {
    const wire::WorkerMessage message = std::move(link.outbox.front());
    link.outbox.pop_front();
    core_.OnMessage(link.id, message);
    Collect();
  }
  // Cancels travel beside the queue, as on a real rank, which reads its stream while it computes.
  void DeliverCancels() {
    for (Link& link : links_) {
      for (const wire::CoordinatorMessage& message : link.inbox) {
        if (message.has_cancel()) link.rank->Cancel(message.cancel().job());
      }
    }
  }

  // Until nothing moves any more.
  void Run() {
    Collect();
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t i = 0; i < links_.size(); ++i) {
        if (CanStepRank(links_[i])) {
          StepRank(links_[i]);
          moved = true;
        }
        while (!links_[i].outbox.empty()) {
          StepAnswer(links_[i]);
          moved = true;
        }
      }
    }
  }

  void Advance(double seconds) {
    for (double left = seconds; left > 0; left -= 0.5) {
      now_ += std::min(left, 0.5);
      for (Link& link : links_) {
        if (link.silent || !link.told_to_leave.empty()) continue;
        wire::WorkerMessage beat;
        beat.mutable_heartbeat()->set_progress(link.progress);
        core_.OnMessage(link.id, beat);
      }
      core_.Tick();
      Collect();
    }
  }

  void Kill(int32_t index) {
    const uint64_t id = links_[index].id;
    core_.OnClosed(id, "closed its stream");
    Collect();
  }

  // ---- Requests.
  Status Create(const std::string& id, int64_t tokens, const std::string& request_id = "") {
    api::CreateContextRequest::Header header;
    header.set_context_id(id);
    header.set_request_id(request_id);
    return CreateIds(header, Ids(tokens));
  }
  // All texts begin alike; those with another `fork` differ from token 1500 on.
  static std::vector<int32_t> Ids(int64_t tokens, int32_t fork = 0) {
    std::vector<int32_t> ids(tokens);
    for (int64_t i = 0; i < tokens; ++i) ids[i] = static_cast<int32_t>((i + (i < 1500 ? 0 : fork)) % 200);
    return ids;
  }
  Status CreateIds(const std::string& id, std::vector<int32_t> ids) {
    api::CreateContextRequest::Header header;
    header.set_context_id(id);
    return CreateIds(header, std::move(ids));
  }
  Status CreateIds(const api::CreateContextRequest::Header& header, std::vector<int32_t> ids) {
    const size_t tokens = ids.size();
    REFOCUS_ASSIGN_OR_RETURN(const auto ticket, core_.BeginUpload(header));
    return core_
        .FinishUpload(ticket, header, std::make_shared<const std::vector<int32_t>>(std::move(ids)),
                      "hash" + std::to_string(tokens))
        .status();
  }
  StatusOr<std::shared_ptr<PrefillJob>> Prefill(const std::string& id,
                                                api::OnDisconnect mode = api::ON_DISCONNECT_UNSPECIFIED) {
    api::PrefillContextRequest request;
    request.set_on_disconnect(mode);
    request.set_name("contexts/" + id);
    REFOCUS_ASSIGN_OR_RETURN(const auto start, core_.Prefill(request));
    Collect();
    return start.job;
  }
  void CreateReady(const std::string& id, int64_t tokens) {
    ASSERT_TRUE(Create(id, tokens).ok());
    ASSERT_TRUE(Prefill(id).ok());
    Run();
    ASSERT_EQ(State(id), api::Context::READY);
  }
  static api::AdaptContextRequest AdaptRequest(const std::string& id, int64_t steps) {
    api::AdaptContextRequest request;
    request.set_name("contexts/" + id);
    request.set_steps(steps);
    request.set_span_tokens(5);
    return request;
  }
  StatusOr<std::shared_ptr<AdaptJob>> Adapt(const api::AdaptContextRequest& request) {
    REFOCUS_ASSIGN_OR_RETURN(auto start, core_.Adapt(request));
    if (start.search) {
      REFOCUS_ASSIGN_OR_RETURN(start, core_.Adapt(request, FindRows(*start.search)));
    }
    Collect();
    return start.job;
  }
  StatusOr<std::shared_ptr<GenerateJob>> Generate(const std::string& id, int64_t prompt, int64_t max_tokens,
                                                  const std::string& adapter = "") {
    api::GenerateRequest request;
    request.set_name("contexts/" + id);
    request.set_max_tokens(max_tokens);
    request.set_adapter_id(adapter);
    request.set_ignore_eos(true);
    auto job = core_.Generate(request, std::vector<int32_t>(prompt, 100));
    Collect();
    return job;
  }
  void Stop(Job& job) {
    core_.Stop(job, absl::CancelledError("cancelled"));
    Collect();
  }
  api::Context::State State(const std::string& id) { return core_.GetContext("contexts/" + id)->state(); }
  api::Context Get(const std::string& id) { return *core_.GetContext("contexts/" + id); }

  // Nothing runs, and coordinator and ranks agree about what there is.
  void ExpectConsistent() {
    EXPECT_EQ(core_.jobs(), 0);
    EXPECT_EQ(core_.scheduler().in_flight(), 0u);
    size_t cached = 0, adapters = 0;
    int64_t adapter_bytes = 0;
    for (const auto& [name, session] : core_.catalog().sessions()) {
      EXPECT_FALSE(session->busy()) << name;
      if (!session->has_cache()) continue;
      ++cached;
      const api::Context shown = session->ToProto(0, 0);
      for (const api::Adapter& adapter : shown.adapters()) {
        ++adapters;
        adapter_bytes += core_.group().size() * adapter.memory_bytes();
      }
    }
    const Group& group = core_.group();
    if (group.state() != Group::State::kServing) {
      EXPECT_EQ(cached, 0u);
      EXPECT_EQ(core_.kv_used_bytes(), 0);
      return;
    }
    for (const Link& link : links_) {
      // What contexts share exists once, and as long as one of them does.
      EXPECT_EQ(core_.kv_used_bytes(), link.rank->held_tokens() * kFakeKvBytesPerToken + adapter_bytes);
      EXPECT_EQ(link.rank->contexts.size(), cached);
      EXPECT_EQ(link.rank->adapters.size(), adapters);
      EXPECT_TRUE(link.rank->sequences.empty());
      for (const auto& [uid, adapter] : link.rank->adapters) EXPECT_FALSE(adapter.work.has_value());
      for (size_t i = 0; i < link.rank->executed.size(); ++i)
        EXPECT_EQ(link.rank->executed[i], static_cast<int64_t>(i) + 1);
    }
  }

 private:
  double now_ = 1000;
  SplitMix64 random_;
  Coordinator core_;
  std::vector<Link> links_;
  uint64_t next_link_ = 1;
  int launches_ = 0;
};

inline std::string ReasonOf(const Status& status) { return DetailOf(status).reason; }

inline std::vector<uint32_t> Tokens(GenerateJob& job) {
  std::vector<uint32_t> ids;
  for (const api::GenerateEvent& event : job.TakeEvents()) {
    ids.insert(ids.end(), event.token_ids().begin(), event.token_ids().end());
  }
  return ids;
}

inline std::string Text(GenerateJob& job) {
  std::string text;
  for (const api::GenerateEvent& event : job.TakeEvents()) text += event.text();
  return text;
}

}  // namespace refocus
