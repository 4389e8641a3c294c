#include "worker/generate.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/tensor.h>

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

Sequence::Sequence(const OpenSequence& open, const KvExtent& context, std::unique_ptr<KvExtent> tail, at::Tensor delta)
    : open_(open),
      context_(context),
      tail_(std::move(tail)),
      delta_(std::move(delta)),
      next_position_(context.capacity()) {}

at::Tensor Sequence::Rows(Model& model, const RowPlan& plan, const std::vector<int32_t>& ids) {
  std::vector<int64_t> own_ids;
  for (const int64_t index : plan.own_order()) own_ids.push_back(ids[index]);
  ForwardInput input;
  input.rows = &plan;
  input.ids = at::tensor(own_ids, at::kLong);
  input.extents = {&context_};
  input.append = tail_.get();
  input.delta = delta_;
  return model.Forward(input);
}

bool Sequence::SampleNext(Model& model, const at::Tensor& hidden, bool leave, Result& result) {
  constexpr int64_t kLeave = -2;
  at::Tensor word = at::empty({1}, at::kLong);
  Token token;
  if (model.collective().rank() == 0) {
    token.id = -1;
    if (!leave) token = SampleToken(model.Logits(hidden).view({-1}), open_.sampling, sampled_);
    word.fill_(leave ? kLeave : static_cast<int64_t>(token.id));
  }
  model.collective().Broadcast(word, 0);
  const int64_t id = word.item<int64_t>();
  if (id == kLeave) return false;
  if (id < 0) {
    result.status = NonFiniteLogits();
    return false;
  }
  token.id = static_cast<int32_t>(id);
  ++sampled_;
  pending_token_ = token.id;
  has_pending_ = true;
  for (const int32_t stop : open_.sampling.stop_ids) finished_ = finished_ || stop == token.id;
  result.tokens.push_back(std::move(token));
  result.finished = finished_;
  return true;
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
  if (!command.score_ids.empty()) Score(model, plan, hidden, command, result);
  if (!command.sample || !result.status.ok()) return;
  const auto [rank, row] = plan.Locate(rows - 1);
  at::Tensor last = at::empty({1, model.config().hidden}, at::kFloat);
  if (model.collective().rank() == rank) last.copy_(hidden.narrow(0, row, 1));
  if (plan.split()) model.collective().Broadcast(last, static_cast<int>(rank));
  SampleNext(model, last, /*leave=*/false, result);
}

bool Sequence::Decode(Model& model, int64_t steps, const std::function<bool()>& cancelled,
                      const std::function<void(const Token&)>& emit, Result& result) {
  for (int64_t step = 0; step < steps && has_pending_ && !finished_ && next_position_ < end_position(); ++step) {
    const RowPlan plan = RowPlan::Replicated({next_position_}, model.plan());
    const at::Tensor hidden = Rows(model, plan, {pending_token_});
    ++next_position_;
    has_pending_ = false;
    const bool leave = model.collective().rank() == 0 && cancelled();
    if (!SampleNext(model, hidden, leave, result)) return result.status.ok();
    if (model.collective().rank() == 0) emit(result.tokens.back());
  }
  return false;
}

void Sequence::Score(Model& model, const RowPlan& plan, const at::Tensor& hidden, const ExtendSequence& command,
                     Result& result) {
  const int64_t count = static_cast<int64_t>(command.score_ids.size());
  const int64_t first = static_cast<int64_t>(command.ids.size()) - count;  // the row that predicts score_ids[0]
  const int64_t ranks = model.collective().size();
  // Whose output layer computes which score: the owner of the row, or equal shares when every rank has every row.
  std::vector<int64_t> counts(ranks, 0), score_order, own_rows, own_targets;
  for (int64_t rank = 0, row = 0; rank < ranks; ++rank) {
    const int64_t begin = plan.split() ? 0 : first + count * rank / ranks;
    const int64_t end = plan.split() ? plan.counts()[rank] : first + count * (rank + 1) / ranks;
    for (int64_t local = begin; local < end; ++local) {
      const int64_t index = (plan.split() ? plan.order()[row++] : local) - first;
      if (index < 0) continue;
      ++counts[rank];
      score_order.push_back(index);
      if (rank != model.collective().rank()) continue;
      own_rows.push_back(local);
      own_targets.push_back(command.score_ids[index]);
    }
  }
  const int64_t own = counts[model.collective().rank()];
  at::Tensor scores = at::empty({own, 2}, at::kFloat);  // log-probability, 1 when most likely
  for (int64_t begin = 0; begin < own; begin += kLogitRows) {
    const int64_t size = std::min(kLogitRows, own - begin);
    const at::Tensor rows = at::tensor(at::IntArrayRef(own_rows).slice(begin, size), at::kLong);
    const at::Tensor targets = at::tensor(at::IntArrayRef(own_targets).slice(begin, size), at::kLong).unsqueeze(1);
    const at::Tensor logits = model.Logits(at::index_select(hidden, 0, rows));
    const at::Tensor slice = scores.narrow(0, begin, size);
    slice.select(1, 0).copy_((logits.gather(1, targets) - at::logsumexp(logits, {1}, /*keepdim=*/true)).squeeze(1));
    slice.select(1, 1).copy_(at::argmax(logits, 1).eq(targets.squeeze(1)));
  }
  at::Tensor all = at::empty({count, 2}, at::kFloat);
  model.collective().AllGatherRows(scores, counts, all);
  const float* values = all.const_data_ptr<float>();
  result.score_logprobs.assign(count, 0.0f);
  result.score_greedy.assign(count, false);
  for (int64_t i = 0; i < count; ++i) {
    result.score_logprobs[score_order[i]] = values[2 * i];
    result.score_greedy[score_order[i]] = values[2 * i + 1] > 0.5f;
    if (!std::isfinite(values[2 * i])) result.status = NonFiniteLogits();
  }
}

}  // namespace refocus
