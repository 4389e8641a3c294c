#include "worker/engine.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <functional>
#include <map>
#include <optional>

#include "base/check.h"
#include "base/limits.h"
#include "base/memory_plan.h"
#include "worker/adapt.h"
#include "worker/agreement.h"
#include "worker/hash.h"
#include "worker/kv_memory.h"
#include "worker/prefill.h"
#include "worker/sequences.h"

namespace refocus {
namespace {

constexpr size_t kRememberedCancels = 4096;

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
        model_(*weights_, *backend_, collective, engine.progress_),
        memory_(model_, options.poison_memory),
        sequences_(model_, memory_) {}

  void Bind() { backend_->Bind(); }

  // Runs one command to its final result. Throws CollectiveError and whatever only this rank ran into.
  Result Execute(const Command& command) {
    Result result;
    result.epoch = command.epoch;
    result.seq = command.seq;
    result.cancelled = command.job != 0 && LeaveTogether(collective_, engine_.IsCancelled(command.job));
    if (result.cancelled) {
      if (const auto* extend = std::get_if<ExtendSequence>(&command.body)) sequences_.Skip(extend->sequence);
    } else {
      const Status status = std::visit([&](const auto& body) { return Do(body, result); }, command.body);
      if (!status.ok()) result.status = status;
    }
    collective_.Check();  // before a wait that a lost peer could prolong
    backend_->Synchronize();
    result.kv_used_bytes = memory_.used_bytes();
    if (collective_.rank() != 0) {  // rank 0 speaks for all
      result.tokens.clear();
      result.ended.clear();
      result.score_logprobs.clear();
      result.score_greedy.clear();
      result.score_best_ids.clear();
      result.score_best_logprobs.clear();
      result.data.clear();
    }
    return result;
  }

 private:
  struct Context {
    KvChain prefix;                 // shared with other contexts
    std::shared_ptr<KvExtent> own;  // the tokens behind it
    int64_t prefilled = 0;
    int64_t capacity = 0;

    KvChain All() const {
      KvChain all = prefix;
      all.Add(own);
      return all;
    }
  };

  // What K/V, deltas and their optimizer state may still take on this rank.
  int64_t FreeBytes() const { return options_.kv_capacity_bytes - memory_.used_bytes() - adapter_bytes_; }
  DeviceKind device_kind() const { return backend_->device().is_cpu() ? DeviceKind::kCpu : DeviceKind::kCuda; }
  Status CheckSpans(const std::vector<Span>& spans, int64_t tokens) const {
    for (const Span& span : spans) {
      if (span.rows() < 1 || span.start < 0 || span.start >= tokens - span.rows()) {
        return FieldError("span", std::to_string(span.start) + " + " + std::to_string(span.rows()),
                          "start >= 0, rows >= 1, start + rows < " + std::to_string(tokens));
      }
      if (span.behind != 0 && span.behind < tokens)
        return FieldError("span.behind", std::to_string(span.behind), "0, or " + std::to_string(tokens) + " and more");
      REFOCUS_RETURN_IF_ERROR(CheckTokenIds(span.ids, model_.config().vocab));
    }
    return {};
  }

  Status FindReady(uint64_t uid, Context** context) {
    const auto found = contexts_.find(uid);
    if (found == contexts_.end()) return Absent("context", uid);
    if (found->second.prefilled < found->second.capacity) {
      return Precondition("context " + std::to_string(uid) + " prefilled tokens",
                          std::to_string(found->second.prefilled), std::to_string(found->second.capacity));
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
    if (open.prefix_context != 0) REFOCUS_RETURN_IF_ERROR(SharePrefix(open, &context));
    context.capacity = open.capacity;
    context.prefilled = context.prefix.end();
    REFOCUS_RETURN_IF_ERROR(
        memory_.Reserve(context.prefilled, open.capacity - context.prefilled, FreeBytes(), &context.own));
    if (options_.synthetic_cache) {
      context.own->FillRandom();
      context.prefilled = open.capacity;
    }
    contexts_.emplace(open.context, std::move(context));
    return {};
  }

  Status SharePrefix(const OpenContext& open, Context* context) {
    const auto found = contexts_.find(open.prefix_context);
    if (found == contexts_.end()) return Absent("prefix_context", open.prefix_context);
    const int64_t most = std::min(found->second.prefilled, open.capacity);
    if (open.prefix_tokens < 1 || open.prefix_tokens > most) {
      return FieldError("prefix_tokens", std::to_string(open.prefix_tokens), "1 to " + std::to_string(most));
    }
    context->prefix = found->second.All().Below(open.prefix_tokens);
    const int64_t extents = static_cast<int64_t>(context->prefix.shares().size());
    if (open.capacity > open.prefix_tokens && extents >= kMaxContextExtents) {
      return Precondition("extents of the shared prefix", std::to_string(extents),
                          "fewer than " + std::to_string(kMaxContextExtents) + ", share a shorter one");
    }
    return {};
  }

  Status Do(const CloseContext& close, Result&) {
    const auto found = contexts_.find(close.context);
    if (found == contexts_.end()) return Absent("context", close.context);
    sequences_.CloseContext(close.context);
    std::erase_if(adapters_, [&](const auto& entry) {
      if (entry.second.context() != close.context) return false;
      adapter_bytes_ -= entry.second.bytes();
      return true;
    });
    contexts_.erase(found);
    return {};
  }

  Status Do(const PrefillChunk& chunk, Result&) {
    const auto found = contexts_.find(chunk.context);
    if (found == contexts_.end()) return Absent("context", chunk.context);
    Context& context = found->second;
    const int64_t rows = static_cast<int64_t>(chunk.ids.size());
    const int64_t left = context.capacity - context.prefilled;
    if (chunk.first_pos != context.prefilled) {
      return Precondition("first_pos", std::to_string(chunk.first_pos), std::to_string(context.prefilled));
    }
    if (rows < 1 || rows > kMaxChunkRows || rows > left) {
      return FieldError("ids", std::to_string(rows), "1 to " + std::to_string(std::min(left, kMaxChunkRows)));
    }
    REFOCUS_RETURN_IF_ERROR(CheckTokenIds(chunk.ids, model_.config().vocab));
    PrefillRows(model_, context.prefix, *context.own, chunk.first_pos, chunk.ids);
    context.prefilled += rows;
    return {};
  }

  // Makes room for `need` bytes in an adapter of this context, on every rank or on none; `start` allocates them.
  Status BeginWork(uint64_t context_uid, uint64_t uid, int64_t need, const std::function<void(Adapter&)>& start) {
    const int64_t free = FreeBytes();
    Adapter& adapter = adapters_.try_emplace(uid, context_uid).first->second;
    Status status;
    const auto refuse = [&](const std::string& why) {
      return Error(StatusCode::kResourceExhausted, "ADAPT_OUT_OF_MEMORY",
                   "adapter memory of rank " + std::to_string(collective_.rank()) + ": need " + std::to_string(need) +
                       " bytes, free " + std::to_string(free) + why +
                       "; delete an adapter or a context, or raise --kv-memory",
                   {{"need_bytes", std::to_string(need)}, {"free_bytes", std::to_string(free)}});
    };
    if (need > free) status = refuse("");
    if (status.ok()) {
      try {
        start(adapter);
      } catch (const std::exception& error) {
        status = refuse(" but the allocation failed");
      }
    }
    status = AllOrNone(collective_, status, "ADAPT_OUT_OF_MEMORY");
    if (status.ok()) {
      adapter_bytes_ += need;
    } else {
      adapter.Rollback();
      if (adapter.revision() == 0) adapters_.erase(uid);
    }
    return status;
  }

  // The adapter may take up work: it is new, or of this context and idle.
  Status CheckIdle(uint64_t context_uid, uint64_t uid) {
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindReady(context_uid, &context));
    const auto found = adapters_.find(uid);
    if (found != adapters_.end() && found->second.context() != context_uid) {
      return FieldError("adapter", std::to_string(uid), "an adapter of context " + std::to_string(context_uid));
    }
    if (found != adapters_.end() && found->second.adapting()) {
      return Precondition("adapter " + std::to_string(uid), "an adaptation under way", "none");
    }
    return {};
  }

  Status CheckDelta(const DeltaConfig& delta) const {
    if (delta.lora_rank >= 0 && delta.lora_rank <= kMaxLoraRank) return {};
    return FieldError("lora_rank", std::to_string(delta.lora_rank), "0 to " + std::to_string(kMaxLoraRank));
  }

  Status Do(const BeginAdapt& begin, Result&) {
    REFOCUS_RETURN_IF_ERROR(CheckIdle(begin.context, begin.adapter));
    REFOCUS_RETURN_IF_ERROR(CheckDelta(begin.delta));
    const Adapter* from = nullptr;
    if (begin.from_adapter != 0) {
      const auto source = adapters_.find(begin.from_adapter);
      if (source == adapters_.end()) return Absent("adapter", begin.from_adapter);
      from = &source->second;
      if (from->context() != begin.context || from->revision() < 1 || !(from->committed_config() == begin.delta)) {
        return FieldError("from_adapter", std::to_string(begin.from_adapter),
                          "a committed adapter of this context, of the same kind, rank and alpha");
      }
    }
    const AdaptationShape shape{begin.delta.lora_rank, begin.optimizer.moments(), begin.keep_best};
    return BeginWork(begin.context, begin.adapter, AdaptationBytes(model_.config(), device_kind(), shape),
                     [&](Adapter& a) {
                       a.Begin(model_, begin.delta, begin.optimizer, begin.seed, from, begin.keep_best);
                     });
  }

  Status Do(const BeginImport& begin, Result&) {
    REFOCUS_RETURN_IF_ERROR(CheckIdle(begin.context, begin.adapter));
    REFOCUS_RETURN_IF_ERROR(CheckDelta(begin.delta));
    return BeginWork(begin.context, begin.adapter,
                     AdapterBytes(model_.config(), device_kind(), begin.delta.lora_rank),
                     [&](Adapter& a) { a.BeginImport(model_, begin.delta); });
  }

  Status Do(const WriteDelta& write, Result&) {
    const auto found = adapters_.find(write.adapter);
    if (found == adapters_.end()) return Absent("adapter", write.adapter);
    if (!found->second.importing())
      return Precondition("adapter " + std::to_string(write.adapter), "no import begun", "one begun");
    return found->second.Write(write.offset, write.data);
  }

  Status Do(const ReadDelta& read, Result& result) {
    const auto found = adapters_.find(read.adapter);
    if (found == adapters_.end()) return Absent("adapter", read.adapter);
    const int64_t revision = found->second.revision();
    if (revision != read.revision || revision < 1) {
      return Error(StatusCode::kAborted, "ADAPTER_CHANGED",
                   "the adapter got revision " + std::to_string(revision) + " while revision " +
                       std::to_string(read.revision) + " was read; export it again",
                   {{"revision", std::to_string(revision)}});
    }
    return found->second.Read(read.offset, read.count, &result.data);
  }

  Status Do(const AdaptStep& step, Result& result) {
    Adapter* adapter = nullptr;
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindAdapting(step.adapter, &adapter, &context));
    const int64_t next = step.restart ? 1 : adapter->steps() + 1;
    if (step.step != next) return Precondition("step", std::to_string(step.step), std::to_string(next));
    if (step.spans.empty()) return FieldError("spans", "0", "at least 1");
    REFOCUS_RETURN_IF_ERROR(CheckSpans(step.spans, context->capacity));
    if (adapter->importing())
      return Precondition("adapter " + std::to_string(step.adapter), "an import", "an adaptation");
    if (step.restart) adapter->Restart(model_);
    const Adapter::StepResult done = adapter->Step(model_, context->All(), step.spans, step.learning_rate);
    result.loss = done.loss;
    result.grad_norm = done.grad_norm;
    return {};
  }

  Status Do(const ProbeLoss& probe, Result& result) {
    Adapter* adapter = nullptr;
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindAdapting(probe.adapter, &adapter, &context));
    REFOCUS_RETURN_IF_ERROR(CheckSpans(probe.spans, context->capacity));
    if (!probe.spans.empty()) result.loss = SpanLoss(model_, context->All(), adapter->working_rounded(), probe.spans);
    if (probe.keep_best) {
      if (!adapter->may_keep()) return FieldError("keep_best", "true", "false: the adaptation was begun without it");
      if (probe.keep_below == 0.0 || result.loss < probe.keep_below) adapter->Keep(result.loss);
    }
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
    if (end.commit && adapter.importing() && !adapter.complete()) {
      return Precondition("adapter " + std::to_string(end.adapter), "a part of its numbers", "all");
    }
    if (end.commit && end.kept && !adapter.has_kept()) {
      return Precondition("adapter " + std::to_string(end.adapter), "no kept delta", "one that a probe kept");
    }
    adapter_bytes_ -= adapter.bytes();
    const QueryDelta before = adapter.committed();
    end.commit ? adapter.Commit(end.revision, end.kept) : adapter.Rollback();
    if (end.commit) sequences_.Retire(before);
    adapter_bytes_ += adapter.bytes();
    if (adapter.revision() == 0) adapters_.erase(found);
    return {};
  }

  Status Do(const DropAdapter& drop, Result&) {
    const auto found = adapters_.find(drop.adapter);
    if (found == adapters_.end()) return Absent("adapter", drop.adapter);
    adapter_bytes_ -= found->second.bytes();
    const QueryDelta delta = found->second.committed();
    adapters_.erase(found);
    sequences_.Retire(delta);
    return {};
  }

  Status Do(const OpenSequence& open, Result&) {
    Context* context = nullptr;
    REFOCUS_RETURN_IF_ERROR(FindReady(open.context, &context));
    if (open.parent != 0) return sequences_.Fork(open, FreeBytes());
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
    return sequences_.Open(open, context->All(), delta, FreeBytes());
  }

  Status Do(const ExtendSequence& extend, Result& result) { return sequences_.Extend(extend, result); }

  Status Do(const DecodeSteps& decode, Result& result) {
    const auto emit = [&](std::vector<Token> tokens, std::vector<SequenceEnd> ended) {
      Result partial;
      partial.epoch = result.epoch;
      partial.seq = result.seq;
      partial.final = false;
      partial.tokens = std::move(tokens);
      partial.ended = std::move(ended);
      engine_.emit_(std::move(partial));
    };
    return sequences_.Decode(decode, [&](uint64_t job) { return engine_.IsCancelled(job); }, emit);
  }

  Status Do(const ProbeAttention& probe, Result& result) {
    return sequences_.Probe(probe, [&](std::vector<float> masses) {
      Result partial;
      partial.epoch = result.epoch;
      partial.seq = result.seq;
      partial.final = false;
      partial.masses = std::move(masses);
      engine_.emit_(std::move(partial));
    });
  }

  Status Do(const CloseSequence& close, Result&) { return sequences_.Close(close.sequence); }

  Engine& engine_;
  const EngineOptions options_;
  std::shared_ptr<const Weights> weights_;
  std::unique_ptr<Backend> backend_;
  Collective& collective_;
  Model model_;
  KvMemory memory_;  // outlives every extent
  std::map<uint64_t, Context> contexts_;
  std::map<uint64_t, Adapter> adapters_;
  Sequences sequences_;
  int64_t adapter_bytes_ = 0;
};

Engine::Engine(const EngineOptions& options, std::shared_ptr<const Weights> weights, std::unique_ptr<Backend> backend,
               std::shared_ptr<Collective> collective, Emit emit)
    : emit_(std::move(emit)), collective_(std::move(collective)) {
  state_ = std::make_unique<EngineState>(*this, options, std::move(weights), std::move(backend), *collective_);
}

Engine::~Engine() { state_.reset(); }  // recorded passes go before the collective that they use

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
