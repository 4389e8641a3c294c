#include "worker/generate.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/max.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "worker/sampler.h"

namespace refocus {
namespace {

constexpr int64_t kLogitRows = 128;  // scored at once: [rows, vocab] is the largest tensor

Status NonFiniteLogits() {
  return Error(
      StatusCode::kInternal, "NON_FINITE_LOGITS",
      "logits: got NaN or infinity, allowed finite values; no token was returned, the context and its adapters are "
      "unchanged: drop the adapter or check the weights with --check-finite");
}

std::vector<int64_t> Iota(int64_t first, int64_t count) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(first + i);
  return values;
}

}  // namespace

Sequence::Sequence(const OpenSequence& open, KvChain context, KvChain shared, std::vector<int32_t> shared_ids,
                   std::shared_ptr<KvExtent> tail, QueryDelta delta)
    : open_(open),
      context_(std::move(context)),
      shared_(std::move(shared)),
      tail_(std::move(tail)),
      delta_(std::move(delta)),
      ids_(std::move(shared_ids)),
      next_position_(tail_->first_position()) {}

KvChain Sequence::Prompt() const {
  KvChain all = shared_;
  all.Add(tail_);
  return all.Below(next_position_);
}

void Sequence::WriteTails(int64_t* words) const {
  tail_->Write(tail_->View(0).length, words);
  for (const KvShare& share : shared_.shares()) share.Write(words += kTailWords);
}

at::Tensor Sequence::Rows(Model& model, const RowPlan& plan, const std::vector<int32_t>& ids) {
  int64_t writing = 0;
  ForwardInput input = model.MakeInput(plan, ids, tail_.get(), &writing);
  input.extents = context_.shares();
  input.extents.insert(input.extents.end(), shared_.shares().begin(), shared_.shares().end());
  input.SetDelta(delta_);
  at::Tensor hidden = model.Forward(input);
  tail_->Advance(writing);
  return hidden;
}

void Sequence::Sample(Model& model, const at::Tensor& hidden, Result& result) {
  const auto on_device = at::TensorOptions(model.backend().device());
  if (!sampler_.defined()) {
    sampler_ = MakeSampler(open_.sampling, model.config().vocab, ids_, model.backend().device());
  }
  at::Tensor token = at::zeros({1}, on_device.dtype(at::kLong));
  at::Tensor logprob = at::zeros({1}, on_device.dtype(at::kFloat));
  at::Tensor logits;
  if (model.collective().rank() == 0) {
    logits = model.Logits(hidden);
    const at::Tensor address = at::full({1}, SamplerAddress(sampler_), token.options());
    model.backend().Sample(logits, address, token, logprob);
  }
  model.collective().Broadcast(token, 0);
  model.collective().Check();
  Take(model, token.item<int64_t>(), logprob.item<float>(), [&] { return logits.select(0, 0); }, result);
}

void Sequence::Advance() {
  if (tail_->SlotOf(next_position_) >= 0) tail_->Advance(1);
  ++next_position_;
  ids_.push_back(last_token_);
  has_pending_ = false;
}

void Sequence::End(SequenceEnd::Why why, Result& result, Status status) {
  left_ = true;
  result.ended.push_back({open_.sequence, why, std::move(status)});
}

void Sequence::Take(const Model& model, int64_t id, float logprob, const std::function<at::Tensor()>& logits,
                    Result& result) {
  if (id < 0) return End(SequenceEnd::Why::kFailed, result, NonFiniteLogits());
  Token token;
  token.sequence = open_.sequence;
  token.id = static_cast<int32_t>(id);
  token.logprob = logprob;
  if (open_.sampling.top_logprobs > 0 && model.collective().rank() == 0) {
    AddTopLogprobs(logits().cpu(), open_.sampling.top_logprobs, token);
  }
  has_pending_ = true;
  last_token_ = token.id;
  result.tokens.push_back(std::move(token));
  const std::vector<int32_t>& stops = open_.sampling.stop_ids;
  if (std::find(stops.begin(), stops.end(), id) != stops.end()) {
    End(SequenceEnd::Why::kFinished, result);
  } else if (next_position_ == end_position()) {
    End(SequenceEnd::Why::kCapacity, result);
  }
}

void Sequence::Extend(Model& model, const ExtendSequence& command, Result& result) {
  const int64_t rows = static_cast<int64_t>(command.ids.size());
  const std::vector<int64_t> positions = Iota(command.first_pos, rows);
  // Few rows lie in one or two blocks, so that splitting by owner would leave the other ranks idle: they compute along
  // instead.
  const RowPlan plan =
      rows > kBlockTokens ? RowPlan::ByOwner(positions, model.plan()) : RowPlan::Replicated(positions, model.plan());
  const at::Tensor hidden = Rows(model, plan, command.ids);
  next_position_ = command.first_pos + rows;
  if (sampler_.defined()) {  // forced tokens of the answer, behind the one that was sampled
    const std::vector<int32_t> forced(command.ids.begin() + (has_pending_ ? 1 : 0), command.ids.end());
    CountTokens(sampler_, open_.sampling, model.config().vocab, forced);
  }
  const int64_t again = std::clamp(first_position() - command.first_pos, int64_t{0}, rows);  // rows of shared keys
  ids_.insert(ids_.end(), command.ids.begin() + again, command.ids.end());
  has_pending_ = false;
  if (!command.score_ids.empty()) Score(model, plan, hidden, command, result);
  if (!command.sample || !result.status.ok()) return;
  const auto [rank, row] = plan.Locate(rows - 1);
  at::Tensor last = at::empty({1, model.config().hidden}, hidden.options());
  if (model.collective().rank() == rank) last.copy_(hidden.narrow(0, row, 1));
  if (plan.split()) model.collective().Broadcast(last, static_cast<int>(rank));
  Sample(model, last, result);
  if (has_pending_) return;
  result.status = result.ended.back().status;
  result.ended.clear();
}

void Sequence::Score(Model& model, const RowPlan& plan, const at::Tensor& hidden, const ExtendSequence& command,
                     Result& result) {
  const int64_t count = static_cast<int64_t>(command.score_ids.size());
  // The row that predicts score_ids[0].
  const int64_t first = static_cast<int64_t>(command.ids.size()) - count - (command.sample ? 1 : 0);
  const int64_t ranks = model.collective().size();
  // Whose output layer computes which score: the owner of the row, or equal shares when every rank has every row.
  std::vector<int64_t> counts(ranks, 0), score_order, own_rows, own_targets;
  for (int64_t rank = 0, row = 0; rank < ranks; ++rank) {
    const int64_t begin = plan.split() ? 0 : first + count * rank / ranks;
    const int64_t end = plan.split() ? plan.counts()[rank] : first + count * (rank + 1) / ranks;
    for (int64_t local = begin; local < end; ++local) {
      const int64_t index = (plan.split() ? plan.order()[row++] : local) - first;
      if (index < 0 || index >= count) continue;
      ++counts[rank];
      score_order.push_back(index);
      if (rank != model.collective().rank()) continue;
      own_rows.push_back(local);
      own_targets.push_back(command.score_ids[index]);
    }
  }
  const int64_t own = counts[model.collective().rank()];
  // Log-probability, 1 when most likely, log-probability and id of the most likely: ids are below 2^24, exact in fp32.
  constexpr int64_t kColumns = 4;
  at::Tensor scores = at::empty({own, kColumns}, hidden.options());
  for (int64_t begin = 0; begin < own; begin += kLogitRows) {
    const int64_t size = std::min(kLogitRows, own - begin);
    const auto part = [&](const std::vector<int64_t>& values) {
      return at::tensor(at::IntArrayRef(values).slice(begin, size), at::kLong).to(hidden.device());
    };
    const at::Tensor logits = model.Logits(at::index_select(hidden, 0, part(own_rows)));
    const at::Tensor targets = part(own_targets);
    const auto [best, best_ids] = at::max(logits, 1);
    const at::Tensor at_target = logits.gather(1, targets.unsqueeze(1)).squeeze(1);
    const Losses losses = model.backend().CrossEntropy(logits, targets, /*grad=*/false, 1.0);
    const at::Tensor slice = scores.narrow(0, begin, size);
    slice.select(1, 0).copy_(losses.loss.neg());
    slice.select(1, 1).copy_(losses.greedy);
    slice.select(1, 2).copy_(best - at_target - losses.loss);
    slice.select(1, 3).copy_(best_ids);
  }
  at::Tensor all = at::empty({count, kColumns}, hidden.options());
  model.collective().AllGatherRows(scores, counts, all);
  model.collective().Check();
  all = all.cpu();
  const float* values = all.const_data_ptr<float>();
  result.score_logprobs.assign(count, 0.0f);
  result.score_greedy.assign(count, false);
  result.score_best_ids.assign(count, 0);
  result.score_best_logprobs.assign(count, 0.0f);
  for (int64_t i = 0; i < count; ++i, values += kColumns) {
    const int64_t at = score_order[i];
    result.score_logprobs[at] = values[0];
    result.score_greedy[at] = values[1] > 0.5f;
    result.score_best_logprobs[at] = values[2];
    result.score_best_ids[at] = static_cast<int32_t>(values[3]);
    if (!std::isfinite(values[0])) result.status = NonFiniteLogits();
  }
}

}  // namespace refocus
