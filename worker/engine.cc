#include "worker/engine.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <map>
#include <optional>

#include "base/check.h"
#include "base/limits.h"
#include "worker/adapt.h"
#include "worker/generate.h"
#include "worker/hash.h"
#include "worker/prefill.h"

namespace refocus {
namespace {

constexpr size_t kRememberedCancels = 4096;

Status Precondition(const std::string& what, const std::string& got, const std::string& allowed) {
  return Error(StatusCode::kFailedPrecondition, "COMMAND_OUT_OF_PLACE", what + ": got " + got + ", allowed " + allowed,
               {{"got", got}, {"allowed", allowed}});
}

Status Absent(const std::string& what, uint64_t uid) {
  return Error(StatusCode::kNotFound, "UNKNOWN_UID", what + " " + std::to_string(uid) + " does not exist on this rank");
}

}  // namespace

// What a rank holds, and one method a command. Every check that comes before the first collective of a command depends
// only on state that is equal on all ranks, so that all ranks refuse alike.
class EngineState {
 public:
  EngineState(Engine& engine, const EngineOptions& options, std::shared_ptr<const Weights> weights,
              std::unique_ptr<Backend> backend, Collective& collective)
      : engine_(engine),
        options_(options),
        weights_(std::move(weights)),
        backend_(std::move(backend)),
        collective_(collective),
        model_(*weights_, *backend_, collective, engine.progress_) {}

  void Bind() { backend_->Bind(); }

  // Runs one command to its final result. Throws CollectiveError and whatever only this rank ran into.
  Result Execute(const Command& command) {
    Result result;
    result.epoch = command.epoch;
    result.seq = command.seq;
    result.cancelled = command.job != 0 && LeaveTogether(engine_.IsCancelled(command.job));
    if (!result.cancelled) {
      command_ = &command;
      const Status status = std::visit([&](const auto& body) { return Do(body, result); }, command.body);
      if (!status.ok()) result.status = status;
    }
    collective_.Check();  // before a wait that a lost peer could prolong
    backend_->Synchronize();
    result.kv_used_bytes = kv_used_bytes_;
    if (collective_.rank() != 0) {  // rank 0 speaks for all
      result.tokens.clear();
      result.score_logprobs.clear();
      result.score_greedy.clear();
    }
    return result;
  }

 private:
  struct Context {
    std::unique_ptr<KvExtent> extent;
    int64_t prefilled = 0;
  };

  // Rank 0's word, on all ranks.
  bool LeaveTogether(bool leave) {
    if (collective_.size() == 1) return leave;
    at::Tensor word = at::tensor({static_cast<int64_t>(leave)}, at::kLong);
    collective_.Broadcast(word, 0);
    return word.item<int64_t>() != 0;
  }

  // OK only when every rank's `status` is: what one rank cannot do, none does. `reason` is that of a refusal by another
  // rank.
  Status AllOrNone(Status status, const std::string& reason) {
    const at::Tensor own = at::tensor({static_cast<int64_t>(status.code())}, at::kLong);
    at::Tensor all = at::empty({collective_.size()}, at::kLong);
    collective_.AllGatherRows(own, std::vector<int64_t>(collective_.size(), 1), all);
    for (int rank = 0; rank < collective_.size() && status.ok(); ++rank) {
      const auto code = static_cast<StatusCode>(all.const_data_ptr<int64_t>()[rank]);
      if (code != StatusCode::kOk) {
        status = Error(code, reason,
                       "rank " + std::to_string(rank) + " refused the command; nothing was changed on any rank",
                       {{"rank", std::to_string(rank)}});
      }
    }
    return status;
  }

  // What K/V, deltas and their optimizer state may still take on this rank.
  int64_t FreeBytes() const { return options_.kv_capacity_bytes - kv_used_bytes_ - adapter_bytes_; }
  // What an adapter holds: its committed delta, and one under adaptation.
  int64_t Held(const Adapter& adapter) const {
    return (adapter.revision() > 0 ? Adapter::CommittedBytes(model_.config(), backend_->dtype()) : 0) +
           (adapter.adapting() ? Adapter::AdaptingBytes(model_.config(), backend_->dtype()) : 0);
  }
  at::TensorOptions KvOptions() const { return at::TensorOptions(backend_->device()).dtype(backend_->dtype()); }

  // Reserves an extent on every rank or on none.
  Status Reserve(int64_t first_position, int64_t capacity, std::unique_ptr<KvExtent>* extent) {
    const int64_t need = KvExtent::Bytes(model_.config(), model_.plan(), first_position, capacity,
                                         static_cast<int64_t>(c10::elementSize(backend_->dtype())));
    const int64_t free = FreeBytes();
    Status status;
    const auto refuse = [&](const std::string& why) {
      return Error(StatusCode::kResourceExhausted, "KV_CAPACITY",
                   "K/V memory of rank " + std::to_string(collective_.rank()) + ": need " + std::to_string(need) +
                       " bytes, free " + std::to_string(free) + why + "; delete a context or raise --kv-memory",
                   {{"need_bytes", std::to_string(need)}, {"free_bytes", std::to_string(free)}});
    };
    if (need > free) status = refuse("");
    if (status.ok()) {
      try {
        *extent = std::make_unique<KvExtent>(model_.config(), model_.plan(), first_position, capacity, KvOptions(),
                                             options_.poison_memory);
      } catch (const std::exception& error) {  // LibTorch reports a failed allocation as c10::Error
        status = refuse(" but the allocation failed");
      }
    }
    status = AllOrNone(status, "KV_CAPACITY");
    if (status.ok()) {
      kv_used_bytes_ += need;
    } else {
      extent->reset();
    }
    return status;
  }

  Status CheckIds(const std::vector<int32_t>& ids) const {
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= model_.config().vocab) {
        return Error(StatusCode::kInvalidArgument, "TOKEN_ID_OUT_OF_RANGE",
                     "token id at index " + std::to_string(i) + ": got " + std::to_string(ids[i]) + ", allowed 0 to " +
                         std::to_string(model_.config().vocab - 1));
      }
    }
    return {};
  }

  Status CheckSpans(const std::vector<Span>& spans, int64_t tokens) const {
    for (const Span& span : spans) {
      if (span.rows() < 1 || span.start < 0 || span.start >= tokens - span.rows()) {
        return FieldError("span", std::to_string(span.start) + " + " + std::to_string(span.rows()),
                          "start >= 0, rows >= 1, start + rows < " + std::to_string(tokens));
      }
      REFOCUS_RETURN_IF_ERROR(CheckIds(span.ids));
    }
    return {};
  }

  Status FindReady(uint64_t uid, Context** context) {
    const auto found = contexts_.find(uid);
    if (found == contexts_.end()) return Absent("context", uid);
    if (found->second.prefilled < found->second.extent->capacity()) {
      return Precondition("context " + std::to_string(uid) + " prefilled tokens",
                          std::to_string(found->second.prefilled), std::to_string(found->second.extent->capacity()));
    }
    *context = &found->second;
    return {};
  }

  Status FindAdapting(uint64_t uid, Adapter** adapter, Context** context) {
    const auto found = adapters_.find(uid);
    if (found == adapters_.end()) return Absent("adapter", uid);
    if (!found->second.adapting())
      return Precondition("adapter " + std::to_string(uid), "no adaptation begun", "one begun");
    *adapter = &found->second;
    return FindReady(found->second.context(), context);
  }

  Status Do(const OpenContext& open, Result&) {
    if (contexts_.count(open.context) != 0)
      return Precondition("context uid", std::to_string(open.context), "a new one");
    if (open.capacity < 1 || open.capacity > kMaxContextTokens) {
      return FieldError("capacity", std::to_string(open.capacity), "1 to " + std::to_string(kMaxContextTokens));
    }
    Context context;
    REFOCUS_RETURN_IF_ERROR(Reserve(0, open.capacity, &context.extent));
    if (options_.synthetic_cache) {
      context.extent->FillRandom();
      context.prefilled = open.capacity;
    }
    contexts_.emplace(open.context, std::move(context));
    return {};
  }

  Status Do(const CloseContext& close, Result&) {
    const auto found = contexts_.find(close.context);
    if (found == contexts_.end()) return Absent("context", close.context);
    for (auto it = sequences_.begin(); it != sequences_.end();) {
      if (it->second.context_id() == close.context) {
        kv_used_bytes_ -= it->second.bytes();
        it = sequences_.erase(it);
      } else {
        ++it;
      }
    }
    std::erase_if(adapters_, [&](const auto& entry) {
      if (entry.second.context() != close.context) return false;
      adapter_bytes_ -= Held(entry.second);
      return true;
    });
    kv_used_bytes_ -= found->second.extent->bytes();
    contexts_.erase(found);
    return {};
  }

  Status Do(const PrefillChunk& chunk, Result&) {
    const auto found = contexts_.find(chunk.context);
    if (found == contexts_.end()) return Absent("context", chunk.context);
    Context& context = found->second;
    const int64_t rows = static_cast<int64_t>(chunk.ids.size());
    const int64_t left = context.extent->capacity() - context.prefilled;
    if (chunk.first_pos != context.prefilled) {
      return Precondition("first_pos", std::to_string(chunk.first_pos), std::to_string(context.prefilled));
    }
    if (rows < 1 || rows > kMaxChunkRows || rows > left) {
      return FieldError("ids", std::to_string(rows), "1 to " + std::to_string(std::min(left, kMaxChunkRows)));
    }
    REFOCUS_RETURN_IF_ERROR(CheckIds(chunk.ids));
    PrefillRows(model_, *context.extent, chunk.first_pos, chunk.ids);
    context.prefilled += rows;
    return {};
  }

  Status Do(const BeginAdapt& begin, Result&) {
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindReady(begin.context, &context));
    const auto found = adapters_.find(begin.adapter);
    if (found != adapters_.end() && found->second.context() != begin.context) {
      return FieldError("adapter", std::to_string(begin.adapter),
                        "an adapter of context " + std::to_string(begin.context));
    }
    if (found != adapters_.end() && found->second.adapting()) {
      return Precondition("adapter " + std::to_string(begin.adapter), "an adaptation under way", "none");
    }
    const int64_t need = Adapter::AdaptingBytes(model_.config(), backend_->dtype());
    const int64_t free = FreeBytes();
    Adapter& adapter = adapters_.try_emplace(begin.adapter, begin.context).first->second;
    Status status;
    const auto refuse = [&](const std::string& why) {
      return Error(StatusCode::kResourceExhausted, "ADAPT_OUT_OF_MEMORY",
                   "delta, gradient and moments on rank " + std::to_string(collective_.rank()) + ": need " +
                       std::to_string(need) + " bytes, free " + std::to_string(free) + why +
                       "; delete an adapter or a context, or raise --kv-memory",
                   {{"need_bytes", std::to_string(need)}, {"free_bytes", std::to_string(free)}});
    };
    if (need > free) status = refuse("");
    if (status.ok()) {
      try {
        adapter.Begin(model_, begin.optimizer, begin.from_committed);
      } catch (const std::exception& error) {
        status = refuse(" but the allocation failed");
      }
    }
    status = AllOrNone(status, "ADAPT_OUT_OF_MEMORY");
    if (status.ok()) {
      adapter_bytes_ += need;
    } else {
      adapter.Rollback();
      if (adapter.revision() == 0) adapters_.erase(begin.adapter);
    }
    return status;
  }

  Status Do(const AdaptStep& step, Result& result) {
    Adapter* adapter = nullptr;
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindAdapting(step.adapter, &adapter, &context));
    if (step.step != adapter->steps() + 1) {
      return Precondition("step", std::to_string(step.step), std::to_string(adapter->steps() + 1));
    }
    if (step.spans.empty()) return FieldError("spans", "0", "at least 1");
    REFOCUS_RETURN_IF_ERROR(CheckSpans(step.spans, context->extent->capacity()));
    const Adapter::StepResult done = adapter->Step(model_, *context->extent, step.spans);
    result.loss = done.loss;
    result.grad_norm = done.grad_norm;
    return {};
  }

  Status Do(const ProbeLoss& probe, Result& result) {
    Adapter* adapter = nullptr;
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindAdapting(probe.adapter, &adapter, &context));
    REFOCUS_RETURN_IF_ERROR(CheckSpans(probe.spans, context->extent->capacity()));
    if (!probe.spans.empty()) result.loss = SpanLoss(model_, *context->extent, adapter->working_rounded(), probe.spans);
    result.agree = HashTensor(adapter->working());
    return {};
  }

  Status Do(const EndAdapt& end, Result&) {
    const auto found = adapters_.find(end.adapter);
    if (found == adapters_.end()) return Absent("adapter", end.adapter);
    Adapter& adapter = found->second;
    if (!adapter.adapting())
      return Precondition("adapter " + std::to_string(end.adapter), "no adaptation begun", "one begun");
    if (end.commit && end.revision != adapter.revision() + 1) {
      return Precondition("revision", std::to_string(end.revision), std::to_string(adapter.revision() + 1));
    }
    adapter_bytes_ -= Held(adapter);
    end.commit ? adapter.Commit(end.revision) : adapter.Rollback();
    adapter_bytes_ += Held(adapter);
    if (adapter.revision() == 0) adapters_.erase(found);
    return {};
  }

  Status Do(const DropAdapter& drop, Result&) {
    const auto found = adapters_.find(drop.adapter);
    if (found == adapters_.end()) return Absent("adapter", drop.adapter);
    adapter_bytes_ -= Held(found->second);
    adapters_.erase(found);
    return {};
  }

  Status Do(const OpenSequence& open, Result&) {
    if (sequences_.count(open.sequence) != 0)
      return Precondition("sequence uid", std::to_string(open.sequence), "a new one");
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindReady(open.context, &context));
    QueryDelta delta;
    if (open.adapter != 0) {
      const auto found = adapters_.find(open.adapter);
      if (found == adapters_.end()) return Absent("adapter", open.adapter);
      if (found->second.context() != open.context || found->second.revision() != open.revision || open.revision < 1) {
        return Precondition("adapter revision", std::to_string(open.revision),
                            std::to_string(found->second.revision()));
      }
      delta = found->second.committed();
    }
    if (open.capacity < 0 || open.capacity > kMaxContextTokens) {
      return FieldError("capacity", std::to_string(open.capacity), "0 to " + std::to_string(kMaxContextTokens));
    }
    std::unique_ptr<KvExtent> tail;
    REFOCUS_RETURN_IF_ERROR(Reserve(context->extent->capacity(), open.capacity, &tail));
    sequences_.try_emplace(open.sequence, open, *context->extent, std::move(tail), delta);
    return {};
  }

  Status Do(const ExtendSequence& extend, Result& result) {
    const auto found = sequences_.find(extend.sequence);
    if (found == sequences_.end()) return Absent("sequence", extend.sequence);
    Sequence& sequence = found->second;
    const int64_t rows = static_cast<int64_t>(extend.ids.size());
    const int64_t context_end = contexts_.at(sequence.context_id()).extent->capacity();
    const bool starts_inside = sequence.next_position() == context_end && extend.first_pos < context_end;
    if (sequence.has_pending_token()) return Precondition("sequence", "a sampled token", "none before ExtendSequence");
    if (extend.first_pos < 0 ||
        !(extend.first_pos == sequence.next_position() || (starts_inside && extend.first_pos >= context_end - rows))) {
      return Precondition("first_pos", std::to_string(extend.first_pos), std::to_string(sequence.next_position()));
    }
    if (rows < 1 || rows > kMaxChunkRows || extend.first_pos > sequence.end_position() - rows) {
      return FieldError("ids", std::to_string(rows),
                        "1 to " + std::to_string(kMaxChunkRows) + " within the sequence's capacity");
    }
    if (static_cast<int64_t>(extend.score_ids.size()) > rows) {
      return FieldError("score_ids", std::to_string(extend.score_ids.size()), "at most " + std::to_string(rows));
    }
    REFOCUS_RETURN_IF_ERROR(CheckIds(extend.ids));
    REFOCUS_RETURN_IF_ERROR(CheckIds(extend.score_ids));
    sequence.Extend(model_, extend, result);
    return {};
  }

  Status Do(const DecodeSteps& decode, Result& result) {
    const auto found = sequences_.find(decode.sequence);
    if (found == sequences_.end()) return Absent("sequence", decode.sequence);
    if (!found->second.has_pending_token() && !found->second.finished()) {
      return Precondition("sequence", "no sampled token", "ExtendSequence with sample first");
    }
    const auto emit = [&](const Token& token) {
      Result partial;
      partial.epoch = result.epoch;
      partial.seq = result.seq;
      partial.final = false;
      partial.tokens.push_back(token);
      engine_.emit_(std::move(partial));
    };
    const uint64_t job = command_->job;
    result.cancelled = found->second.Decode(
        model_, decode.steps, [&] { return job != 0 && engine_.IsCancelled(job); }, emit, result);
    result.finished = found->second.finished();
    result.tokens.clear();  // each was sent as it came
    return {};
  }

  Status Do(const CloseSequence& close, Result&) {
    const auto found = sequences_.find(close.sequence);
    if (found == sequences_.end()) return Absent("sequence", close.sequence);
    kv_used_bytes_ -= found->second.bytes();
    sequences_.erase(found);
    return {};
  }

  Engine& engine_;
  const EngineOptions options_;
  std::shared_ptr<const Weights> weights_;
  std::unique_ptr<Backend> backend_;
  Collective& collective_;
  Model model_;
  const Command* command_ = nullptr;
  std::map<uint64_t, Context> contexts_;
  std::map<uint64_t, Adapter> adapters_;
  std::map<uint64_t, Sequence> sequences_;
  int64_t kv_used_bytes_ = 0;
  int64_t adapter_bytes_ = 0;
};

Engine::Engine(const EngineOptions& options, std::shared_ptr<const Weights> weights, std::unique_ptr<Backend> backend,
               std::shared_ptr<Collective> collective, Emit emit)
    : emit_(std::move(emit)), collective_(std::move(collective)) {
  state_ = std::make_unique<EngineState>(*this, options, std::move(weights), std::move(backend), *collective_);
}

Engine::~Engine() = default;

void Engine::Submit(Command command) {
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(command));
  wake_.notify_one();
}

void Engine::Cancel(uint64_t job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_.insert(job);
  if (cancelled_.size() > kRememberedCancels) cancelled_.erase(cancelled_.begin());  // job numbers rise: the oldest
}

void Engine::Stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  stop_ = true;
  wake_.notify_one();
}

bool Engine::NextCommand(Command* command) {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait(lock, [&] { return stop_ || !queue_.empty(); });
  if (stop_) return false;
  *command = std::move(queue_.front());
  queue_.pop_front();
  return true;
}

bool Engine::IsCancelled(uint64_t job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cancelled_.count(job) != 0;
}

Status Engine::Run() {
  const c10::InferenceMode inference;
  state_->Bind();
  int64_t last_seq = 0;
  Command command;
  while (NextCommand(&command)) {
    if (command.seq != last_seq + 1) {
      collective_->Abort("commands out of order");
      return Precondition("command number", std::to_string(command.seq), std::to_string(last_seq + 1));
    }
    last_seq = command.seq;
    running_seq_ = command.seq;
    const auto begin = std::chrono::steady_clock::now();
    try {
      Result result = state_->Execute(command);
      result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      ++progress_;
      running_seq_ = 0;
      emit_(std::move(result));
    } catch (const CollectiveError& error) {
      return Error(StatusCode::kUnavailable, "WORKER_LOST",
                   "command " + std::to_string(command.seq) + ": " + error.what());
    } catch (const std::exception& error) {
      // The other ranks may be inside a collective that this one will never join.
      collective_->Abort(error.what());
      return Error(StatusCode::kInternal, "COMMAND_FAILED",
                   "command " + std::to_string(command.seq) + ": " + error.what());
    }
  }
  return {};
}

}  // namespace refocus
