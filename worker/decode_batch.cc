#include "worker/decode_batch.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "base/limits.h"
#include "worker/sampler.h"

namespace refocus {
namespace {

constexpr size_t kMostPasses = 8;  // each keeps the activations of its recording
constexpr int64_t kLeave = -2;     // instead of a token: rank 0 wants the row to leave

// Where the table has what, [kFields, rows] int64, and behind that the tails [rows, kMaxTailExtents, kTailWords].
enum Field { kIds, kPositions, kSlots, kSamplers, kLeaves, kFields };
constexpr int64_t kTailsOfRow = kMaxTailExtents * kTailWords;

auto OrderOf(const Sequence& sequence) {
  const OpenSequence& open = sequence.open();
  return std::tuple(open.context, open.adapter, open.revision, open.sequence);
}

}  // namespace

// Rows that share context and delta.
struct DecodeBatches::Group {
  uint64_t context = 0;
  const void* delta = nullptr;
  int64_t first = 0;
  int64_t rows = 0;  // with those that are nobody's

  bool operator==(const Group&) const = default;
};

// What is done in every step of batches of one kind.
class DecodeBatches::Pass {
 public:
  // One sequence of each group, for its context and delta.
  Pass(Model& model, std::vector<Group> groups, const std::vector<const Sequence*>& members);

  const std::vector<Group>& groups() const { return groups_; }
  // Row `index` of the next run.
  void Put(int64_t index, const BatchRow& row);
  void Run();
  // What the last run drew.
  int64_t token(int64_t index) const { return host_tokens_.const_data_ptr<int64_t>()[index]; }
  float logprob(int64_t index) const { return host_logprobs_.const_data_ptr<float>()[index]; }
  at::Tensor logits(int64_t index) const { return logits_.select(0, index); }

 private:
  void Enqueue();
  int64_t* Host(Field field) { return host_.data_ptr<int64_t>() + field * rows_; }
  void Clear();

  Model& model_;
  const std::vector<Group> groups_;
  int64_t rows_ = 0;
  at::Tensor host_, table_;  // page-locked for a GPU; on the device
  at::Tensor leaves_, samplers_;
  at::Tensor tokens_, logprobs_, host_tokens_, host_logprobs_;
  at::Tensor logits_;  // [rows, vocab] fp32, on rank 0
  RowPlan plan_;
  ForwardInput input_;
  std::unique_ptr<Repeat> repeat_;
};

DecodeBatches::Pass::Pass(Model& model, std::vector<Group> groups, const std::vector<const Sequence*>& members)
    : model_(model), groups_(std::move(groups)) {
  for (const Group& group : groups_) rows_ += group.rows;
  const at::Device device = model.backend().device();
  const auto on_device = at::TensorOptions(device);
  const auto on_host = at::TensorOptions().pinned_memory(!device.is_cpu());
  host_ = at::empty({rows_ * (kFields + kTailsOfRow)}, on_host.dtype(at::kLong));
  table_ = at::zeros(host_.sizes(), on_device.dtype(at::kLong));
  tokens_ = at::zeros({rows_}, on_device.dtype(at::kLong));
  logprobs_ = at::zeros({rows_}, on_device.dtype(at::kFloat));
  host_tokens_ = at::empty({rows_}, on_host.dtype(at::kLong));
  host_logprobs_ = at::empty({rows_}, on_host.dtype(at::kFloat));
  const auto field = [&](Field which) { return table_.narrow(0, which * rows_, rows_); };
  plan_ = RowPlan::Replicated(std::vector<int64_t>(rows_, 0), model.plan());
  leaves_ = field(kLeaves);
  samplers_ = field(kSamplers);
  input_.rows = &plan_;
  input_.ids = field(kIds);
  input_.own_pos = input_.pos = field(kPositions);
  input_.slots = field(kSlots);
  input_.tails = table_.narrow(0, kFields * rows_, rows_ * kTailsOfRow).view({rows_, kMaxTailExtents, kTailWords});
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    const Sequence& member = *members[i];
    if (member.delta().defined()) input_.adapters.push_back({group.first, group.rows, member.delta()});
    if (i > 0 && groups_[i - 1].context == group.context) {
      input_.sweeps.back().rows += group.rows;
    } else {
      input_.sweeps.push_back({group.first, group.rows, member.context().shares()});
    }
  }
  Clear();
  repeat_ = model.backend().Repeated([this] { Enqueue(); });
}

// Nobody's rows: no key is visible at position -1, nothing is written to slot -1, and there is no sampler.
void DecodeBatches::Pass::Clear() {
  host_.zero_();
  std::fill_n(Host(kPositions), rows_, -1);
  std::fill_n(Host(kSlots), rows_, -1);
}

void DecodeBatches::Pass::Put(int64_t index, const BatchRow& row) {
  const Sequence& sequence = *row.sequence;
  Host(kIds)[index] = sequence.last_token();
  Host(kPositions)[index] = sequence.next_position();
  Host(kSlots)[index] = sequence.tail().SlotOf(sequence.next_position());
  Host(kSamplers)[index] = SamplerAddress(sequence.sampler());
  Host(kLeaves)[index] = row.leave ? 1 : 0;
  sequence.WriteTails(host_.data_ptr<int64_t>() + kFields * rows_ + index * kTailsOfRow);
}

void DecodeBatches::Pass::Enqueue() {
  table_.copy_(host_, /*non_blocking=*/true);
  const at::Tensor hidden = model_.Forward(input_);
  Collective& collective = model_.collective();
  logits_ = model_.LogitsTogether(hidden);
  if (collective.rank() == 0) {
    model_.backend().Sample(logits_, samplers_, tokens_, logprobs_);
    tokens_.masked_fill_(leaves_.ne(0), kLeave);
  }
  collective.Broadcast(tokens_, 0);
  host_tokens_.copy_(tokens_, /*non_blocking=*/true);
  host_logprobs_.copy_(logprobs_, /*non_blocking=*/true);
}

void DecodeBatches::Pass::Run() {
  model_.collective().BeforeReplay();
  repeat_->Run();
  model_.collective().Check();
  model_.backend().Synchronize();
  Clear();
}

DecodeBatches::DecodeBatches(Model& model) : model_(model) {}
DecodeBatches::~DecodeBatches() = default;

DecodeBatches::Pass& DecodeBatches::PassFor(const std::vector<BatchRow>& rows) {
  std::vector<Group> groups;
  std::vector<const Sequence*> members;
  for (const BatchRow& row : rows) {
    const Sequence& sequence = *row.sequence;
    const uint64_t context = sequence.open().context;
    const void* const delta = sequence.delta().identity();
    if (groups.empty() || groups.back().context != context || groups.back().delta != delta) {
      groups.push_back({context, delta, 0, 0});
      members.push_back(&sequence);
    }
    ++groups.back().rows;
  }
  int64_t first = 0;
  for (Group& group : groups) {
    group.first = first;
    group.rows = model_.backend().PaddedRows(group.rows);
    first += group.rows;
  }
  const auto same = [&](const std::unique_ptr<Pass>& pass) { return pass->groups() == groups; };
  const auto found = std::find_if(passes_.begin(), passes_.end(), same);
  if (found != passes_.end()) {
    passes_.splice(passes_.begin(), passes_, found);
  } else {
    if (passes_.size() == kMostPasses) passes_.pop_back();
    passes_.push_front(std::make_unique<Pass>(model_, std::move(groups), members));
  }
  return *passes_.front();
}

void DecodeBatches::Step(std::vector<BatchRow> rows, Result& result) {
  std::sort(rows.begin(), rows.end(), [](const BatchRow& a, const BatchRow& b) {
    return OrderOf(*a.sequence) < OrderOf(*b.sequence);
  });
  Pass& pass = PassFor(rows);
  std::vector<int64_t> places;
  for (const Group& group : pass.groups()) {
    for (int64_t i = 0; i < group.rows && places.size() < rows.size(); ++i) {
      const Sequence& sequence = *rows[places.size()].sequence;
      if (sequence.open().context != group.context || sequence.delta().identity() != group.delta) break;
      pass.Put(group.first + i, rows[places.size()]);
      places.push_back(group.first + i);
    }
  }
  pass.Run();
  for (size_t i = 0; i < rows.size(); ++i) {
    Sequence& sequence = *rows[i].sequence;
    sequence.Advance();
    const int64_t id = pass.token(places[i]);
    if (id == kLeave) {
      sequence.End(SequenceEnd::Why::kCancelled, result);
    } else {
      sequence.Take(model_, id, pass.logprob(places[i]), [&] { return pass.logits(places[i]); }, result);
    }
  }
}

void DecodeBatches::ForgetContext(uint64_t context) {
  passes_.remove_if([&](const std::unique_ptr<Pass>& pass) {
    const auto& groups = pass->groups();
    return std::any_of(groups.begin(), groups.end(), [&](const Group& group) { return group.context == context; });
  });
}

void DecodeBatches::ForgetDelta(const QueryDelta& delta) {
  passes_.remove_if([&](const std::unique_ptr<Pass>& pass) {
    const auto& groups = pass->groups();
    return std::any_of(groups.begin(), groups.end(),
                       [&](const Group& group) { return group.delta == delta.identity(); });
  });
}

}  // namespace refocus
