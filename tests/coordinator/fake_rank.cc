#include "tests/coordinator/fake_rank.h"

#include <algorithm>
#include <new>
#include <stdexcept>

#include "base/limits.h"
#include "base/memory_plan.h"

namespace refocus {
namespace {

constexpr std::string_view kSpecials[] = {"<|im_start|>", "<|im_end|>", "<think>", "</think>"};

int32_t SpecialAt(std::string_view text) {
  for (int32_t i = 0; i < 4; ++i) {
    if (text.starts_with(kSpecials[i])) return kFakeSpecial + i;
  }
  return -1;
}

class ByteTokenizer : public Tokenizer {
 public:
  explicit ByteTokenizer(bool adds_bos) : adds_bos_(adds_bos) {}

  StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool allow_special, int64_t max_tokens) const override {
    std::vector<int32_t> ids;
    for (size_t i = 0; i < text.size();) {
      if (static_cast<unsigned char>(text[i]) == 0xff) {
        return Error(StatusCode::kInvalidArgument, "INVALID_UTF8", "text: byte " + std::to_string(i) + " is no UTF-8");
      }
      if (static_cast<unsigned char>(text[i]) == 0xfe) throw std::bad_alloc();
      if (static_cast<unsigned char>(text[i]) == 0xfd) throw std::runtime_error("as the test wants");
      const int32_t special = allow_special ? SpecialAt(text.substr(i)) : -1;
      ids.push_back(special >= 0 ? special : static_cast<unsigned char>(text[i]));
      i += special >= 0 ? kSpecials[special - kFakeSpecial].size() : 1;
      if (static_cast<int64_t>(ids.size()) > max_tokens) {
        return Error(StatusCode::kInvalidArgument, "CONTEXT_TOO_LONG",
                     "text: got more than " + std::to_string(max_tokens) + " tokens");
      }
    }
    return ids;
  }
  std::string TokenBytes(int32_t id, bool keep_special) const override {
    if (id < 256) return std::string(1, static_cast<char>(id));
    return keep_special && id >= kFakeSpecial && id < kFakeSpecial + 4 ? std::string(kSpecials[id - kFakeSpecial]) : "";
  }
  int64_t vocab_size() const override { return kFakeVocab; }
  std::optional<int32_t> bos_token() const override { return kFakeBos; }
  bool adds_bos() const override { return adds_bos_; }
  std::vector<int32_t> eos_tokens() const override { return {kFakeEos}; }
  std::optional<int32_t> FindToken(std::string_view text) const override {
    const int32_t special = SpecialAt(text);
    if (special < 0 || kSpecials[special - kFakeSpecial] != text) return std::nullopt;
    return special;
  }
  std::string chat_template() const override { return ""; }
  std::string Fingerprint() const override { return "fake"; }

 private:
  const bool adds_bos_;
};

void Fail(StatusCode code, const std::string& reason, const std::string& message, wire::Result* result) {
  result->set_code(static_cast<int32_t>(code));
  result->set_reason(reason);
  result->set_message(message);
}

void OutOfPlace(const std::string& message, wire::Result* result) {
  Fail(StatusCode::kFailedPrecondition, "COMMAND_OUT_OF_PLACE", message, result);
}

uint32_t Following(uint32_t last, int64_t revision) {
  return last == 255 ? kFakeEos : (last + 1 + static_cast<uint32_t>(revision)) % 256;
}

}  // namespace

float FakeMass(int32_t layer, int64_t position, int64_t begin, int64_t end, int32_t head, int64_t revision) {
  return static_cast<float>(end - begin) / 16384 + static_cast<float>(position % 8) / 128 +
         static_cast<float>(layer) / 8 + static_cast<float>(head) / 16 + static_cast<float>(revision) / 32;
}

ModelConfig FakeModel(int64_t max_positions) {
  ModelConfig model;
  model.name = "fake";
  model.layers = 2;
  model.hidden = 8;
  model.heads = 2;
  model.kv_heads = 1;
  model.head_dim = 4;
  model.mlp = 16;
  model.vocab = kFakeVocab;
  model.max_positions = max_positions;
  model.eos_tokens = {kFakeEos};
  return model;
}

std::string FakeNumbers(size_t bytes, int64_t steps) {
  std::string numbers(bytes, '\0');
  for (size_t i = 0; i < bytes; ++i)
    numbers[i] = static_cast<char>(i % 4 == 3 ? 0x3f : (i + static_cast<size_t>(steps)) & 0x7f);
  return numbers;
}

std::unique_ptr<Tokenizer> FakeTokenizer(bool adds_bos) { return std::make_unique<ByteTokenizer>(adds_bos); }

wire::Hello FakeRank::Hello(const std::string& nonce, const std::string& fingerprint) const {
  wire::Hello hello;
  hello.set_nonce(nonce);
  hello.set_rank(rank_);
  hello.set_size(size_);
  hello.set_host("fake");
  hello.set_pid(1000 + rank_);
  hello.set_version(kProtocolVersion);
  hello.set_model_fingerprint(fingerprint);
  hello.set_device(device);
  hello.set_kv_capacity_bytes(kv_capacity_bytes);
  hello.set_kv_bytes_per_token(kFakeKvBytesPerToken);
  return hello;
}

std::vector<wire::Result> FakeRank::Execute(const wire::Command& command) {
  executed.push_back(command.seq());
  if (pause) pause(command, -1);
  std::vector<wire::Result> out(1);
  out[0].set_epoch(command.epoch());
  out[0].set_seq(command.seq());
  FakeAgreement::Outcome& agreed = agreement_->by_seq[command.seq()];
  if (rank_ == 0) agreed.cancelled = IsCancelled(command.job());
  if (command.seq() == refuse_seq) {
    Fail(StatusCode::kResourceExhausted, "REFUSED", "as the test wants", &out.back());
  } else if (!agreed.cancelled) {
    Do(command, &out);
  } else if (const auto skipped = sequences.find(command.extend_sequence().sequence()); skipped != sequences.end()) {
    skipped->second.left = true;
  }
  out.back().set_cancelled(agreed.cancelled);
  out.back().set_final(true);
  out.back().set_seconds(command_seconds);
  if (tamper) tamper(command, out.back());
  return out;
}

void FakeRank::Do(const wire::Command& command, std::vector<wire::Result>* out) {
  wire::Result* result = &out->back();
  if (command.has_open_context()) {
    OpenContext(command.open_context(), result);
  } else if (command.has_close_context()) {
    const uint64_t uid = command.close_context().context();
    if (contexts.erase(uid) == 0) return OutOfPlace("no such context", result);
    std::erase_if(adapters, [&](const auto& entry) { return entry.second.context == uid; });
    std::erase_if(sequences, [&](const auto& entry) { return entry.second.context == uid; });
  } else if (command.has_prefill_chunk()) {
    const auto& chunk = command.prefill_chunk();
    const auto found = contexts.find(chunk.context());
    if (found == contexts.end()) return OutOfPlace("no such context", result);
    Context& context = found->second;
    const int64_t done = static_cast<int64_t>(context.tokens.size());
    if (chunk.first_pos() != done || done + chunk.ids_size() > context.capacity || chunk.ids_size() > kMaxChunkRows) {
      return OutOfPlace("chunk", result);
    }
    context.tokens.insert(context.tokens.end(), chunk.ids().begin(), chunk.ids().end());
  } else if (command.has_open_sequence() || command.has_extend_sequence() || command.has_decode_steps() ||
             command.has_close_sequence() || command.has_probe_attention()) {
    DoSequence(command, out);
  } else {
    DoAdapt(command, result);
  }
}

void FakeRank::OpenContext(const wire::OpenContext& open, wire::Result* result) {
  Context context{open.capacity(), {}, {}};
  if (open.prefix_context() != 0) {
    const auto found = contexts.find(open.prefix_context());
    if (found == contexts.end()) return OutOfPlace("no such prefix context", result);
    const Context& parent = found->second;
    const int64_t shared = open.prefix_tokens();
    if (shared < 1 || shared > static_cast<int64_t>(parent.tokens.size()) || shared > open.capacity()) {
      return OutOfPlace("prefix tokens", result);
    }
    context.tokens.assign(parent.tokens.begin(), parent.tokens.begin() + shared);
    for (const auto& extent : parent.extents) {
      if (extent->first_pos < shared) context.extents.push_back(extent);
    }
  }
  if (static_cast<int64_t>(context.extents.size()) >= kMaxContextExtents) return OutOfPlace("extents", result);
  const int64_t own = open.capacity() - static_cast<int64_t>(context.tokens.size());
  context.extents.push_back(std::make_shared<Extent>(open.capacity() - own, own, held_));
  if (!contexts.emplace(open.context(), std::move(context)).second) OutOfPlace("context exists", result);
}

void FakeRank::OpenSequence(const wire::OpenSequence& open, wire::Result* result) {
  const auto context = contexts.find(open.context());
  if (context == contexts.end() || static_cast<int64_t>(context->second.tokens.size()) != context->second.capacity) {
    return OutOfPlace("context", result);
  }
  const auto adapter = adapters.find(open.adapter());
  const bool current = adapter != adapters.end() && adapter->second.revision == open.revision();
  if (open.adapter() != 0 && open.parent() == 0 && !current) return OutOfPlace("adapter", result);
  Sequence sequence;
  if (open.parent() != 0) {
    const auto found = sequences.find(open.parent());
    if (found == sequences.end()) return OutOfPlace("no such parent", result);
    const Sequence& parent = found->second;
    if (parent.context != open.context() || parent.adapter != open.adapter() || parent.revision != open.revision()) {
      return OutOfPlace("parent of another kind", result);
    }
    sequence.rows = parent.rows;
    sequence.extents = parent.extents;
  }
  sequence.context = open.context();
  sequence.adapter = open.adapter();
  sequence.seed = open.temperature() > 0 ? open.seed() : 0;
  sequence.revision = open.revision();
  sequence.capacity = open.capacity();
  sequence.first = sequence.end = context->second.capacity + static_cast<int64_t>(sequence.rows.size());
  sequence.stops = {open.stop_ids().begin(), open.stop_ids().end()};
  sequence.top = open.top_logprobs();
  sequence.job = open.job();
  if (static_cast<int64_t>(sequence.extents.size()) >= kMaxTailExtents) return OutOfPlace("extents", result);
  sequence.extents.push_back(std::make_shared<Extent>(sequence.first, sequence.capacity, held_));
  if (!sequences.emplace(open.sequence(), std::move(sequence)).second) OutOfPlace("sequence exists", result);
}

void FakeRank::DoAdapt(const wire::Command& command, wire::Result* result) {
  const auto check_spans = [&](const Adapter& adapter, const auto& spans) {
    const Context& context = contexts.at(adapter.context);
    for (const wire::Span& span : spans) {
      if (span.start() < 0 || span.ids_size() < 2) return false;
      if (span.start() + span.ids_size() > static_cast<int64_t>(context.tokens.size())) return false;
      if (!std::equal(span.ids().begin(), span.ids().end(), context.tokens.begin() + span.start())) return false;
      if (span.behind() != 0 && span.behind() < static_cast<int64_t>(context.tokens.size())) return false;
    }
    return true;
  };
  if (command.has_begin_adapt()) {
    const auto& begin = command.begin_adapt();
    const auto context = contexts.find(begin.context());
    if (context == contexts.end()) return OutOfPlace("no such context", result);
    Adapter& adapter = adapters[begin.adapter()];
    if (adapter.work) return OutOfPlace("adaptation under way", result);
    adapter.context = begin.context();
    const auto from = adapters.find(begin.from_adapter());
    if (begin.from_adapter() != 0 && (from == adapters.end() || from->second.revision < 1 ||
                                      from->second.lora_rank != begin.lora_rank())) {
      return OutOfPlace("from_adapter", result);
    }
    adapter.begun = begin.from_adapter() != 0 ? from->second.steps : 0;
    adapter.work = adapter.begun;
    adapter.work_rank = begin.lora_rank();
    adapter.kept.reset();
    adapter.incoming.reset();
    return;
  }
  if (command.has_begin_import()) {
    const auto& begin = command.begin_import();
    if (contexts.count(begin.context()) == 0) return OutOfPlace("no such context", result);
    Adapter& adapter = adapters[begin.adapter()];
    if (adapter.work) return OutOfPlace("adaptation under way", result);
    adapter.context = begin.context();
    adapter.work = 0;
    adapter.work_rank = begin.lora_rank();
    adapter.incoming = std::string();
    return;
  }
  if (command.has_write_delta() || command.has_read_delta()) return DoDelta(command, result);
  const uint64_t uid = command.has_adapt_step()   ? command.adapt_step().adapter()
                       : command.has_probe_loss() ? command.probe_loss().adapter()
                       : command.has_end_adapt()  ? command.end_adapt().adapter()
                                                  : command.drop_adapter().adapter();
  const auto found = adapters.find(uid);
  if (found == adapters.end()) return OutOfPlace("no such adapter", result);
  Adapter& adapter = found->second;
  if (command.has_drop_adapter()) {
    adapters.erase(found);
    return;
  }
  if (!adapter.work) return OutOfPlace("no adaptation", result);
  if (command.has_adapt_step()) {
    if (command.adapt_step().spans().empty() || !check_spans(adapter, command.adapt_step().spans())) {
      return OutOfPlace("spans", result);
    }
    const auto& step = command.adapt_step();
    trained.insert(trained.end(), step.spans().begin(), step.spans().end());
    if (step.restart()) adapter.work = adapter.begun;
    if (step.step() != (step.restart() ? 1 : *adapter.work - adapter.begun + 1)) return OutOfPlace("step", result);
    ++*adapter.work;
    adapter.rate = step.learning_rate();
    result->set_loss(1.0 / static_cast<double>(command.adapt_step().step()));
    result->set_grad_norm(0.5);
  } else if (command.has_probe_loss()) {
    if (!check_spans(adapter, command.probe_loss().spans())) return OutOfPlace("spans", result);
    result->set_loss(2.0 - 0.01 * static_cast<double>(*adapter.work));
    if (probe_loss) result->set_loss(probe_loss(*adapter.work, adapter.rate));
    if (span_loss && command.probe_loss().spans_size() == 1) {
      result->set_loss(span_loss(command.probe_loss().spans(0).start()));
    }
    result->set_agree(0x1000 + static_cast<uint64_t>(*adapter.work));
    const double below = command.probe_loss().keep_below();
    if (command.probe_loss().keep_best() && (!adapter.kept || result->loss() < adapter.kept_loss) &&
        (below == 0 || result->loss() < below)) {
      adapter.kept = *adapter.work;
      adapter.kept_loss = result->loss();
    }
  } else {
    const auto& end = command.end_adapt();
    if (end.kept() && !adapter.kept) return OutOfPlace("nothing kept", result);
    if (end.kept()) adapter.work = adapter.kept;
    if (end.commit() && end.revision() != adapter.revision + 1) return OutOfPlace("revision", result);
    const auto bytes = static_cast<size_t>(4 * DeltaNumbers(FakeModel(1), adapter.work_rank));
    if (end.commit() && adapter.incoming && adapter.incoming->size() != bytes) return OutOfPlace("numbers", result);
    if (end.commit()) {
      adapter.revision = end.revision();
      adapter.steps = *adapter.work;
      adapter.lora_rank = adapter.work_rank;
      adapter.numbers = adapter.incoming ? *adapter.incoming : FakeNumbers(bytes, adapter.steps);
    }
    adapter.work.reset();
    adapter.incoming.reset();
    if (adapter.revision == 0) adapters.erase(found);
  }
}

void FakeRank::DoDelta(const wire::Command& command, wire::Result* result) {
  const auto found = adapters.find(command.has_write_delta() ? command.write_delta().adapter()
                                                             : command.read_delta().adapter());
  if (found == adapters.end()) return OutOfPlace("no such adapter", result);
  Adapter& adapter = found->second;
  if (command.has_write_delta()) {
    const auto& write = command.write_delta();
    if (!adapter.incoming || 4 * write.offset() != static_cast<int64_t>(adapter.incoming->size())) {
      return OutOfPlace("numbers", result);
    }
    *adapter.incoming += write.data();
    return;
  }
  const auto& read = command.read_delta();
  if (adapter.revision != read.revision()) {
    return Fail(StatusCode::kAborted, "ADAPTER_CHANGED", "another revision", result);
  }
  if (4 * (read.offset() + read.count()) > static_cast<int64_t>(adapter.numbers.size())) {
    return OutOfPlace("numbers", result);
  }
  if (rank_ == 0) {
    result->set_data(
        adapter.numbers.substr(static_cast<size_t>(4 * read.offset()), static_cast<size_t>(4 * read.count())));
  }
}

void FakeRank::DoSequence(const wire::Command& command, std::vector<wire::Result>* out) {
  wire::Result* result = &out->back();
  if (command.has_open_sequence()) {
    OpenSequence(command.open_sequence(), result);
  } else if (command.has_close_sequence()) {
    if (sequences.erase(command.close_sequence().sequence()) == 0) OutOfPlace("no such sequence", result);
  } else if (command.has_extend_sequence()) {
    Extend(command.extend_sequence(), result);
  } else if (command.has_probe_attention()) {
    Probe(command.probe_attention(), out);
  } else {
    Decode(command, out);
  }
}

uint32_t FakeRank::KeyedToken(const std::vector<uint32_t>& context, int64_t revision, uint64_t seed,
                              const std::vector<uint32_t>& rows) {
  uint64_t hash = 0xcbf29ce484222325u ^ seed;
  const auto mix = [&](uint64_t value) { hash = (hash ^ value) * 0x100000001b3u; };
  mix(static_cast<uint64_t>(revision));
  mix(context.size());
  for (size_t i = 0; i < context.size(); i += 13) mix(context[i]);
  mix(context.back());
  for (const uint32_t id : rows) mix(id);
  hash ^= hash >> 29;
  return hash % 61 == 0 ? kFakeEos : static_cast<uint32_t>(hash % 256);
}

wire::Token FakeRank::NextToken(Sequence& sequence) {
  wire::Token token;
  token.set_id(keyed ? KeyedToken(contexts.at(sequence.context).tokens, sequence.revision, sequence.seed, sequence.rows)
                     : Following(sequence.last, sequence.revision));
  token.set_logprob(-0.25f);
  for (int32_t i = 0; i < sequence.top; ++i) {
    token.add_top_ids((token.id() + static_cast<uint32_t>(i)) % kFakeVocab);
    token.add_top_logprobs(-0.25f - static_cast<float>(i));
  }
  sequence.last = token.id();
  sequence.pending = true;
  return token;
}

void FakeRank::Extend(const wire::ExtendSequence& extend, wire::Result* result) {
  const auto found = sequences.find(extend.sequence());
  if (found == sequences.end()) return OutOfPlace("no such sequence", result);
  Sequence& sequence = found->second;
  const Context& context = contexts.at(sequence.context);
  const auto& before = sequence.rows.empty() ? context.tokens : sequence.rows;
  const bool again = extend.first_pos() == sequence.end - 1 && sequence.end == sequence.first;
  if (!again && extend.first_pos() != sequence.end) return OutOfPlace("first_pos", result);
  if (sequence.left || (sequence.pending && extend.ids(0) != sequence.last)) {
    return OutOfPlace("pending token", result);
  }
  sequence.pending = false;
  if (again && extend.ids(0) != before.back()) return OutOfPlace("the token before the tail", result);
  const int64_t end = extend.first_pos() + extend.ids_size();
  if (end > sequence.first + sequence.capacity || extend.ids_size() > kMaxChunkRows) {
    return OutOfPlace("capacity", result);
  }
  sequence.end = end;
  sequence.rows.insert(sequence.rows.end(), extend.ids().begin() + (again ? 1 : 0), extend.ids().end());
  const int first_scored = extend.ids_size() - extend.score_ids_size() - (extend.sample() ? 1 : 0);
  for (int i = 0; i < extend.score_ids_size(); ++i) {
    result->add_score_logprobs(-static_cast<float>(extend.score_ids(i) % 7) - 0.5f);
    result->add_score_best_ids(Following(extend.ids(first_scored + i), sequence.revision));
    result->add_score_best_logprobs(-0.5f);
    result->add_score_greedy(Following(extend.ids(first_scored + i), sequence.revision) == extend.score_ids(i));
  }
  sequence.last = extend.ids(extend.ids_size() - 1);
  if (extend.sample()) TakeToken(extend.sequence(), result);
}

void FakeRank::End(uint64_t uid, wire::SequenceEnd::Why why, wire::Result* result) {
  sequences.at(uid).left = true;
  wire::SequenceEnd* end = result->add_ended();
  end->set_sequence(uid);
  end->set_why(why);
}

void FakeRank::TakeToken(uint64_t uid, wire::Result* result) {
  Sequence& sequence = sequences.at(uid);
  *result->add_tokens() = NextToken(sequence);
  result->mutable_tokens()->rbegin()->set_sequence(uid);
  if (sequence.stops.count(sequence.last) != 0) {
    End(uid, wire::SequenceEnd::FINISHED, result);
  } else if (sequence.end == sequence.first + sequence.capacity) {
    End(uid, wire::SequenceEnd::CAPACITY, result);
  }
}

void FakeRank::Probe(const wire::ProbeAttention& probe, std::vector<wire::Result>* out) {
  const auto found = sequences.find(probe.sequence());
  if (found == sequences.end()) return OutOfPlace("no such sequence", &out->back());
  const Sequence& sequence = found->second;
  const Context& context = contexts.at(sequence.context);
  if (probe.ids_size() != probe.positions_size() || probe.rows().empty()) return OutOfPlace("rows", &out->back());
  for (int i = 0; i < probe.ids_size(); ++i) {
    const int64_t pos = probe.positions(i);
    if (probe.positions(0) >= context.capacity) {
      if (pos != context.capacity + i || i >= sequence.capacity) return OutOfPlace("prompt", &out->back());
    } else if (pos < 0 || pos >= context.capacity || probe.ids(i) != context.tokens[pos]) {
      return OutOfPlace("context row", &out->back());
    }
  }
  if (rank_ != 0) return;
  std::vector<float> masses;
  for (const int32_t layer : probe.layers()) {
    for (const int64_t row : probe.rows()) {
      for (const auto& range : probe.ranges()) {
        for (const int32_t head : probe.heads()) {
          const int64_t pos = probe.positions(static_cast<int>(row));
          masses.push_back(FakeMass(layer, pos, range.begin(), range.end(), head, sequence.revision));
        }
      }
    }
  }
  // The first half early, cut anywhere; the rest with the final result.
  const auto middle = masses.begin() + static_cast<int64_t>(masses.size()) / 2;
  wire::Result partial = out->back();
  partial.mutable_masses()->Add(masses.begin(), middle);
  out->back().mutable_masses()->Add(middle, masses.end());
  if (emit) {
    emit(partial);
  } else {
    out->insert(out->end() - 1, std::move(partial));
  }
}

void FakeRank::Decode(const wire::Command& command, std::vector<wire::Result>* out) {
  std::vector<uint64_t> rows;
  for (const uint64_t uid : command.decode_steps().sequences()) {
    const auto found = sequences.find(uid);
    if (found == sequences.end()) return OutOfPlace("no such sequence", &out->back());
    if (!found->second.left) rows.push_back(uid);
  }
  FakeAgreement::Outcome& agreed = agreement_->by_seq[command.seq()];
  for (int64_t step = 0; step < command.decode_steps().steps() && !rows.empty(); ++step) {
    if (pause) pause(command, step);
    wire::Result partial = out->back();
    for (const uint64_t uid : rows) {
      const uint64_t job = sequences.at(uid).job;
      if (rank_ == 0 && job != 0 && IsCancelled(job)) agreed.left_at[uid] = step;
      const auto left = agreed.left_at.find(uid);
      if (left != agreed.left_at.end() && left->second == step) {
        End(uid, wire::SequenceEnd::CANCELLED, &partial);
        continue;
      }
      if (not_finite && not_finite(uid, sequences.at(uid).end)) {
        End(uid, wire::SequenceEnd::FAILED, &partial);
        wire::SequenceEnd& end = *partial.mutable_ended()->rbegin();
        end.set_code(static_cast<int32_t>(StatusCode::kInternal));
        end.set_reason("NON_FINITE_LOGITS");
        end.set_message("as the test wants");
        continue;
      }
      ++sequences.at(uid).end;
      sequences.at(uid).rows.push_back(sequences.at(uid).last);
      TakeToken(uid, &partial);
    }
    std::erase_if(rows, [&](uint64_t uid) { return sequences.at(uid).left; });
    if (rank_ != 0) continue;
    if (emit) {
      emit(partial);
    } else {
      out->insert(out->end() - 1, std::move(partial));
    }
  }
}

}  // namespace refocus
