// Every command as the coordinator sends it, and every way in which one can be wrong.
#include "worker/link_messages.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "base/limits.h"

namespace refocus {
namespace {

namespace pb = internal::v1;

constexpr int64_t kVocab = 100;
using Fill = std::function<void(pb::Command&)>;

StatusOr<Command> Read(const Fill& fill) {
  pb::Command message;
  message.set_epoch(2);
  message.set_seq(6);
  message.set_job(77);
  fill(message);
  return ReadCommand(message, kVocab);
}

template <typename Body>
Body Good(const Fill& fill) {
  const StatusOr<Command> command = Read(fill);
  EXPECT_TRUE(command.ok()) << command.status();
  if (!command.ok()) return {};
  EXPECT_EQ(command->epoch, 2);
  EXPECT_EQ(command->seq, 6);
  EXPECT_EQ(command->job, 77U);
  EXPECT_TRUE(std::holds_alternative<Body>(command->body));
  return std::get<Body>(command->body);
}

// The good command of each kind; bad ones change one thing.
void FillOpenContext(pb::Command& c) {
  c.mutable_open_context()->set_context(3);
  c.mutable_open_context()->set_capacity(1000);
}
void FillPrefill(pb::Command& c) {
  c.mutable_prefill_chunk()->set_context(3);
  c.mutable_prefill_chunk()->set_first_pos(int64_t{1} << 20);
  for (const uint32_t id : {0, 5, 99}) c.mutable_prefill_chunk()->add_ids(id);
}
void FillBegin(pb::Command& c) {
  pb::BeginAdapt& begin = *c.mutable_begin_adapt();
  begin.set_context(3);
  begin.set_adapter(4);
  begin.set_from_adapter(4);
  begin.set_momentum(0.5f);
  begin.set_sgd(true);
  begin.set_lora_rank(8);
  begin.set_lora_alpha(16.0f);
  begin.set_seed(77);
  begin.set_weight_decay(0.25f);
  begin.set_clip_norm(2.0f);
  begin.set_beta1(0.75f);
  begin.set_beta2(0.875f);
  begin.set_epsilon(1e-6f);
}
void FillStep(pb::Command& c) {
  pb::AdaptStep& step = *c.mutable_adapt_step();
  step.set_adapter(4);
  step.set_step(1);
  for (const int64_t start : {7, 300}) {
    pb::Span& span = *step.add_spans();
    span.set_start(start);
    for (const uint32_t id : {1, 2, 3}) span.add_ids(id);
  }
}
void FillImport(pb::Command& c) {
  c.mutable_begin_import()->set_context(3);
  c.mutable_begin_import()->set_adapter(4);
  c.mutable_begin_import()->set_lora_rank(2);
  c.mutable_begin_import()->set_lora_alpha(4.0f);
}
void FillWrite(pb::Command& c) {
  c.mutable_write_delta()->set_adapter(4);
  c.mutable_write_delta()->set_offset(12);
  c.mutable_write_delta()->set_data("12345678");
}
void FillRead(pb::Command& c) {
  c.mutable_read_delta()->set_adapter(4);
  c.mutable_read_delta()->set_revision(2);
  c.mutable_read_delta()->set_offset(12);
  c.mutable_read_delta()->set_count(100);
}
void FillOpenSequence(pb::Command& c) {
  pb::OpenSequence& open = *c.mutable_open_sequence();
  open.set_sequence(9);
  open.set_context(3);
  open.set_adapter(4);
  open.set_revision(2);
  open.set_capacity(50);
  open.set_temperature(0.5);
  open.set_seed(0xffff'ffff'ffff'fff0);
  open.add_stop_ids(2);
  open.set_top_logprobs(3);
  open.set_job(7);
  open.set_parent(8);
  open.set_top_k(40);
  open.set_top_p(0.75);
  open.set_min_p(0.125);
  open.set_repetition_penalty(1.25);
  open.set_presence_penalty(-0.5);
  open.set_frequency_penalty(0.25);
  open.set_min_tokens(4);
  for (const uint32_t id : {5, 1}) {
    open.add_bias_ids(id);
    open.add_bias_values(0.5f * static_cast<float>(id));
  }
}
void FillExtend(pb::Command& c) {
  pb::ExtendSequence& extend = *c.mutable_extend_sequence();
  extend.set_sequence(9);
  extend.set_first_pos(999);
  for (const uint32_t id : {1, 2, 3}) extend.add_ids(id);
  extend.set_sample(true);
  extend.add_score_ids(3);
}
void FillDecode(pb::Command& c) {
  c.mutable_decode_steps()->add_sequences(9);
  c.mutable_decode_steps()->add_sequences(12);
  c.mutable_decode_steps()->set_steps(16);
}

void FillProbe(pb::Command& c) {
  pb::ProbeAttention& probe = *c.mutable_probe_attention();
  probe.set_sequence(9);
  for (const int64_t pos : {1000, 1001}) probe.add_positions(pos);
  for (const uint32_t id : {1, 2}) probe.add_ids(id);
  probe.add_rows(1);
  for (const int64_t begin : {7, 0}) {
    probe.add_ranges()->set_begin(begin);
    probe.mutable_ranges()->rbegin()->set_end(8);
  }
  for (const int32_t layer : {0, 3}) probe.add_layers(layer);
  probe.add_heads(5);
}

TEST(LinkMessagesTest, ContextCommands) {
  const auto open = Good<OpenContext>(FillOpenContext);
  EXPECT_EQ(open.context, 3U);
  EXPECT_EQ(open.capacity, 1000);
  EXPECT_EQ(open.prefix_context, 0U);
  const auto sharing = Good<OpenContext>([](pb::Command& c) {
    FillOpenContext(c);
    c.mutable_open_context()->set_prefix_context(2);
    c.mutable_open_context()->set_prefix_tokens(1000);
  });
  EXPECT_EQ(sharing.prefix_context, 2U);
  EXPECT_EQ(sharing.prefix_tokens, 1000);
  EXPECT_EQ(Good<CloseContext>([](pb::Command& c) { c.mutable_close_context()->set_context(3); }).context, 3U);
  const auto chunk = Good<PrefillChunk>(FillPrefill);
  EXPECT_EQ(chunk.context, 3U);
  EXPECT_EQ(chunk.first_pos, int64_t{1} << 20);
  EXPECT_EQ(chunk.ids, (std::vector<int32_t>{0, 5, 99}));
}

TEST(LinkMessagesTest, ProbeCommands) {
  const auto probe = Good<ProbeAttention>(FillProbe);
  EXPECT_EQ(probe.sequence, 9U);
  EXPECT_EQ(probe.positions, (std::vector<int64_t>{1000, 1001}));
  EXPECT_EQ(probe.ids, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(probe.rows, std::vector<int64_t>{1});
  ASSERT_EQ(probe.ranges.size(), 2U);
  EXPECT_EQ(probe.ranges[0].begin, 7);
  EXPECT_EQ(probe.ranges[1].end, 8);
  EXPECT_EQ(probe.layers, (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(probe.heads, std::vector<int64_t>{5});
}

TEST(LinkMessagesTest, AdaptCommands) {
  const auto begin = Good<BeginAdapt>(FillBegin);
  EXPECT_EQ(begin.context, 3U);
  EXPECT_EQ(begin.adapter, 4U);
  EXPECT_EQ(begin.from_adapter, 4U);
  EXPECT_EQ(begin.optimizer.momentum, 0.5f);
  EXPECT_TRUE(begin.optimizer.sgd);
  EXPECT_EQ(begin.delta.lora_rank, 8);
  EXPECT_EQ(begin.delta.lora_alpha, 16.0f);
  EXPECT_EQ(begin.seed, 77U);
  EXPECT_EQ(begin.optimizer.weight_decay, 0.25f);
  EXPECT_EQ(begin.optimizer.clip_norm, 2.0f);
  EXPECT_EQ(begin.optimizer.beta1, 0.75f);
  EXPECT_EQ(begin.optimizer.beta2, 0.875f);
  EXPECT_EQ(begin.optimizer.epsilon, 1e-6f);
  const auto import = Good<BeginImport>(FillImport);
  EXPECT_EQ(import.context, 3U);
  EXPECT_EQ(import.adapter, 4U);
  EXPECT_EQ(import.delta, (DeltaConfig{2, 4.0f}));
  const auto write = Good<WriteDelta>(FillWrite);
  EXPECT_EQ(write.adapter, 4U);
  EXPECT_EQ(write.offset, 12);
  EXPECT_EQ(write.data, "12345678");
  const auto read = Good<ReadDelta>(FillRead);
  EXPECT_EQ(read.adapter, 4U);
  EXPECT_EQ(read.revision, 2);
  EXPECT_EQ(read.offset, 12);
  EXPECT_EQ(read.count, 100);
  const auto step = Good<AdaptStep>(FillStep);
  EXPECT_EQ(step.adapter, 4U);
  EXPECT_EQ(step.step, 1);
  ASSERT_EQ(step.spans.size(), 2U);
  EXPECT_EQ(step.spans[1].start, 300);
  EXPECT_EQ(step.spans[1].ids, (std::vector<int32_t>{1, 2, 3}));
  const auto probe = Good<ProbeLoss>([](pb::Command& c) { c.mutable_probe_loss()->set_adapter(4); });
  EXPECT_EQ(probe.adapter, 4U);
  EXPECT_TRUE(probe.spans.empty());
  const auto end = Good<EndAdapt>([](pb::Command& c) {
    c.mutable_end_adapt()->set_adapter(4);
    c.mutable_end_adapt()->set_commit(true);
    c.mutable_end_adapt()->set_revision(3);
  });
  EXPECT_TRUE(end.commit);
  EXPECT_EQ(end.revision, 3);
  EXPECT_EQ(Good<DropAdapter>([](pb::Command& c) { c.mutable_drop_adapter()->set_adapter(4); }).adapter, 4U);
}

TEST(LinkMessagesTest, SequenceCommands) {
  const auto open = Good<OpenSequence>(FillOpenSequence);
  EXPECT_EQ(open.sequence, 9U);
  EXPECT_EQ(open.context, 3U);
  EXPECT_EQ(open.adapter, 4U);
  EXPECT_EQ(open.revision, 2);
  EXPECT_EQ(open.capacity, 50);
  EXPECT_EQ(open.sampling.temperature, 0.5f);
  EXPECT_EQ(open.sampling.seed, 0xffff'ffff'ffff'fff0);
  EXPECT_EQ(open.sampling.stop_ids, std::vector<int32_t>{2});
  EXPECT_EQ(open.sampling.top_logprobs, 3);
  EXPECT_EQ(open.sampling.top_k, 40);
  EXPECT_EQ(open.sampling.top_p, 0.75);
  EXPECT_EQ(open.sampling.min_p, 0.125);
  EXPECT_EQ(open.sampling.repetition_penalty, 1.25);
  EXPECT_EQ(open.sampling.presence_penalty, -0.5);
  EXPECT_EQ(open.sampling.frequency_penalty, 0.25);
  EXPECT_EQ(open.sampling.min_tokens, 4);
  EXPECT_EQ(open.sampling.bias_ids, (std::vector<int32_t>{5, 1}));
  EXPECT_EQ(open.sampling.bias_values, (std::vector<float>{2.5f, 0.5f}));
  const auto plain = Good<OpenSequence>([](pb::Command& c) {
    c.mutable_open_sequence()->set_sequence(9);
    c.mutable_open_sequence()->set_context(3);
  });
  EXPECT_EQ(plain.sampling.top_p, 1.0);
  EXPECT_EQ(plain.sampling.repetition_penalty, 1.0);
  const auto extend = Good<ExtendSequence>(FillExtend);
  EXPECT_EQ(extend.first_pos, 999);
  EXPECT_EQ(extend.ids, (std::vector<int32_t>{1, 2, 3}));
  EXPECT_TRUE(extend.sample);
  EXPECT_EQ(extend.score_ids, std::vector<int32_t>{3});
  EXPECT_EQ(open.job, 7U);
  EXPECT_EQ(open.parent, 8U);
  EXPECT_EQ(Good<DecodeSteps>(FillDecode).steps, 16);
  EXPECT_EQ(Good<DecodeSteps>(FillDecode).sequences, (std::vector<uint64_t>{9, 12}));
  EXPECT_EQ(Good<CloseSequence>([](pb::Command& c) { c.mutable_close_sequence()->set_sequence(9); }).sequence, 9U);
}

struct Bad {
  const char* field;  // must be named
  Fill base;
  Fill change;
};

TEST(LinkMessagesTest, EveryFaultIsRefusedByName) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  const Fill nothing = [](pb::Command&) {};
  const auto begin = [](auto set) { return [set](pb::Command& c) { set(*c.mutable_begin_adapt()); }; };
  const auto probe = [](auto set) { return [set](pb::Command& c) { set(*c.mutable_probe_attention()); }; };
  const std::vector<Bad> cases = {
      {"command", nothing, nothing},
      {"context", FillOpenContext, [](pb::Command& c) { c.mutable_open_context()->set_context(0); }},
      {"capacity", FillOpenContext, [](pb::Command& c) { c.mutable_open_context()->set_capacity(0); }},
      {"capacity", FillOpenContext,
       [](pb::Command& c) { c.mutable_open_context()->set_capacity(kMaxContextTokens + 1); }},
      {"capacity", FillOpenContext, [](pb::Command& c) { c.mutable_open_context()->set_capacity(INT64_MIN); }},
      {"prefix_tokens", FillOpenContext, [](pb::Command& c) { c.mutable_open_context()->set_prefix_tokens(1); }},
      {"prefix_tokens", FillOpenContext, [](pb::Command& c) { c.mutable_open_context()->set_prefix_context(2); }},
      {"prefix_tokens", FillOpenContext,
       [](pb::Command& c) {
         c.mutable_open_context()->set_prefix_context(2);
         c.mutable_open_context()->set_prefix_tokens(1001);
       }},
      {"first_pos", FillPrefill, [](pb::Command& c) { c.mutable_prefill_chunk()->set_first_pos(-1); }},
      {"ids (count)", FillPrefill, [](pb::Command& c) { c.mutable_prefill_chunk()->clear_ids(); }},
      {"ids (count)", FillPrefill,
       [](pb::Command& c) { c.mutable_prefill_chunk()->mutable_ids()->Resize(kMaxChunkRows + 1, 1); }},
      {"ids[2]", FillPrefill, [](pb::Command& c) { c.mutable_prefill_chunk()->set_ids(2, kVocab); }},
      {"ids[0]", FillPrefill, [](pb::Command& c) { c.mutable_prefill_chunk()->set_ids(0, 0xffff'ffff); }},
      {"learning_rate", FillStep, [nan](pb::Command& c) { c.mutable_adapt_step()->set_learning_rate(nan); }},
      {"learning_rate", FillStep, [](pb::Command& c) { c.mutable_adapt_step()->set_learning_rate(-1.0f); }},
      {"learning_rate", FillStep, [](pb::Command& c) { c.mutable_adapt_step()->set_learning_rate(1e38f); }},
      {"momentum", FillBegin, begin([](auto& b) { b.set_momentum(1.0f); })},
      {"lora_rank", FillBegin, begin([](auto& b) { b.set_lora_rank(-1); })},
      {"lora_rank", FillBegin, begin([](auto& b) { b.set_lora_rank(kMaxLoraRank + 1); })},
      {"lora_alpha", FillBegin, begin([](auto& b) { b.set_lora_alpha(0.0f); })},
      {"lora_alpha", FillBegin, begin([nan](auto& b) { b.set_lora_alpha(nan); })},
      {"context", FillImport, [](pb::Command& c) { c.mutable_begin_import()->set_context(0); }},
      {"lora_rank", FillImport, [](pb::Command& c) { c.mutable_begin_import()->set_lora_rank(INT64_MAX); }},
      {"offset", FillWrite, [](pb::Command& c) { c.mutable_write_delta()->set_offset(-1); }},
      {"data (bytes)", FillWrite, [](pb::Command& c) { c.mutable_write_delta()->clear_data(); }},
      {"data (bytes)", FillWrite,
       [](pb::Command& c) { c.mutable_write_delta()->set_data(std::string(4 * kDeltaPieceNumbers + 4, '\0')); }},
      {"data (bytes beyond whole numbers)", FillWrite, [](pb::Command& c) { c.mutable_write_delta()->set_data("12345"); }},
      {"revision", FillRead, [](pb::Command& c) { c.mutable_read_delta()->set_revision(0); }},
      {"count", FillRead, [](pb::Command& c) { c.mutable_read_delta()->set_count(kDeltaPieceNumbers + 1); }},
      {"offset", FillRead, [](pb::Command& c) { c.mutable_read_delta()->set_offset(INT64_MAX); }},
      {"weight_decay", FillBegin, begin([inf](auto& b) { b.set_weight_decay(inf); })},
      {"clip_norm", FillBegin, begin([](auto& b) { b.set_clip_norm(0.0f); })},
      {"beta1", FillBegin, begin([](auto& b) { b.set_beta1(1.0f); })},
      {"beta2", FillBegin, begin([nan](auto& b) { b.set_beta2(nan); })},
      {"epsilon", FillBegin, begin([](auto& b) { b.set_epsilon(0.0f); })},
      {"adapter", FillBegin, begin([](auto& b) { b.set_adapter(0); })},
      {"step", FillStep, [](pb::Command& c) { c.mutable_adapt_step()->set_step(0); }},
      {"spans (rows)", FillStep, [](pb::Command& c) { c.mutable_adapt_step()->clear_spans(); }},
      {"spans (rows)", FillStep,
       [](pb::Command& c) {
         pb::AdaptStep& step = *c.mutable_adapt_step();
         const int64_t rows = step.spans(0).ids_size() - 1;
         while (step.spans_size() * rows <= kMaxStepRows) *step.add_spans() = step.spans(0);
       }},
      {"spans.ids (count)", FillStep, [](pb::Command& c) { c.mutable_adapt_step()->mutable_spans(1)->clear_ids(); }},
      {"spans.ids (count)", FillStep,
       [](pb::Command& c) { c.mutable_adapt_step()->mutable_spans(1)->mutable_ids()->Truncate(1); }},
      {"spans.ids (count)", FillStep,
       [](pb::Command& c) { c.mutable_adapt_step()->mutable_spans(0)->mutable_ids()->Resize(kMaxSpanTokens + 2, 1); }},
      {"spans.ids[1]", FillStep, [](pb::Command& c) { c.mutable_adapt_step()->mutable_spans(1)->set_ids(1, kVocab); }},
      {"spans.start", FillStep, [](pb::Command& c) { c.mutable_adapt_step()->mutable_spans(0)->set_start(-1); }},
      {"revision", nothing,
       [](pb::Command& c) {
         c.mutable_end_adapt()->set_adapter(1);
         c.mutable_end_adapt()->set_commit(true);
       }},
      {"adapter", nothing, [](pb::Command& c) { c.mutable_drop_adapter(); }},
      {"sequence", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_sequence(0); }},
      {"capacity", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_capacity(-1); }},
      {"revision", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_revision(-1); }},
      {"temperature", FillOpenSequence, [nan](pb::Command& c) { c.mutable_open_sequence()->set_temperature(nan); }},
      {"temperature", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_temperature(-0.1); }},
      {"temperature", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_temperature(1e300); }},
      {"top_logprobs", FillOpenSequence,
       [](pb::Command& c) { c.mutable_open_sequence()->set_top_logprobs(kMaxTopLogprobs + 1); }},
      {"top_k", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_top_k(-1); }},
      {"top_p", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_top_p(1.5); }},
      {"min_p", FillOpenSequence, [nan](pb::Command& c) { c.mutable_open_sequence()->set_min_p(nan); }},
      {"repetition_penalty", FillOpenSequence,
       [](pb::Command& c) { c.mutable_open_sequence()->set_repetition_penalty(-1); }},
      {"presence_penalty", FillOpenSequence,
       [nan](pb::Command& c) { c.mutable_open_sequence()->set_presence_penalty(nan); }},
      {"frequency_penalty", FillOpenSequence,
       [](pb::Command& c) { c.mutable_open_sequence()->set_frequency_penalty(1e30); }},
      {"min_tokens", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_min_tokens(-1); }},
      {"bias_ids[1]", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_bias_ids(1, kVocab); }},
      {"bias_ids (distinct)", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_bias_ids(1, 5); }},
      {"bias_values (count)", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->add_bias_values(1); }},
      {"bias_values", FillOpenSequence,
       [nan](pb::Command& c) { c.mutable_open_sequence()->set_bias_values(0, static_cast<float>(nan)); }},
      {"stop_ids[0]", FillOpenSequence, [](pb::Command& c) { c.mutable_open_sequence()->set_stop_ids(0, kVocab); }},
      {"ids (count)", FillExtend, [](pb::Command& c) { c.mutable_extend_sequence()->clear_ids(); }},
      {"score_ids (count)", FillExtend,
       [](pb::Command& c) { c.mutable_extend_sequence()->mutable_score_ids()->Resize(4, 1); }},
      {"score_ids[0]", FillExtend, [](pb::Command& c) { c.mutable_extend_sequence()->set_score_ids(0, kVocab); }},
      {"first_pos", FillExtend, [](pb::Command& c) { c.mutable_extend_sequence()->set_first_pos(INT64_MAX); }},
      {"steps", FillDecode, [](pb::Command& c) { c.mutable_decode_steps()->set_steps(0); }},
      {"steps", FillDecode, [](pb::Command& c) { c.mutable_decode_steps()->set_steps(INT32_MAX); }},
      {"sequences (count)", FillDecode, [](pb::Command& c) { c.mutable_decode_steps()->clear_sequences(); }},
      {"sequences (count)", FillDecode,
       [](pb::Command& c) { c.mutable_decode_steps()->mutable_sequences()->Resize(kMaxDecodeRows + 1, 3); }},
      {"sequences", FillDecode, [](pb::Command& c) { c.mutable_decode_steps()->add_sequences(0); }},
      {"sequence", nothing, [](pb::Command& c) { c.mutable_close_sequence(); }},
      {"sequence", FillProbe, probe([](auto& p) { p.set_sequence(0); })},
      {"ids (count)", FillProbe, probe([](auto& p) { p.clear_ids(); })},
      {"ids[1]", FillProbe, probe([](auto& p) { p.set_ids(1, kVocab); })},
      {"positions (count)", FillProbe, probe([](auto& p) { p.add_positions(3); })},
      {"positions", FillProbe, probe([](auto& p) { p.set_positions(0, -1); })},
      {"rows (count)", FillProbe, probe([](auto& p) { p.clear_rows(); })},
      {"rows", FillProbe, probe([](auto& p) { p.set_rows(0, 2); })},
      {"ranges (count)", FillProbe, probe([](auto& p) { p.clear_ranges(); })},
      {"ranges (count)", FillProbe,
       probe([](auto& p) {
         while (p.ranges_size() <= kMaxKeyRanges) p.add_ranges();
       })},
      {"ranges.begin", FillProbe, probe([](auto& p) { p.mutable_ranges(0)->set_begin(-1); })},
      {"ranges.end", FillProbe, probe([](auto& p) { p.mutable_ranges(0)->set_end(6); })},
      {"layers", FillProbe, probe([](auto& p) { p.set_layers(1, 0); })},
      {"heads (count)", FillProbe, probe([](auto& p) { p.clear_heads(); })},
      {"heads", FillProbe, probe([](auto& p) { p.set_heads(0, -1); })},
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    const StatusOr<Command> command = Read([&](pb::Command& c) {
      cases[i].base(c);
      cases[i].change(c);
    });
    ASSERT_FALSE(command.ok()) << "case " << i << ", " << cases[i].field;
    EXPECT_EQ(command.status().code(), StatusCode::kInvalidArgument) << command.status();
    EXPECT_EQ(command.status().message().find(std::string(cases[i].field) + ":"), 0U)
        << "case " << i << ": " << command.status();
    EXPECT_FALSE(DetailOf(command.status()).reason.empty());
  }
}

TEST(LinkMessagesTest, ResultKeepsEveryField) {
  Result result;
  result.epoch = 3;
  result.seq = 4;
  result.final = false;
  result.status = Error(StatusCode::kResourceExhausted, "KV_CAPACITY", "caf\xc3\xa9", {{"need_bytes", "12"}});
  result.cancelled = true;
  result.seconds = 0.25;
  result.agree = 0xffff'ffff'ffff'fff1;
  result.kv_used_bytes = int64_t{1} << 40;
  result.loss = 2.5;
  result.grad_norm = 0.125;
  result.tokens = {{5, 9, -0.5f, {9, 8}, {-0.5f, -1.5f}}, {6, 2, -0.25f, {}, {}}};
  result.ended = {{6, SequenceEnd::Why::kFinished, {}},
                  {7, SequenceEnd::Why::kFailed, Error(StatusCode::kInternal, "NON_FINITE_LOGITS", "na\xc3\xafve")}};
  result.score_logprobs = {-1.0f, -2.0f};
  result.score_greedy = {true, false};
  result.score_best_ids = {7, 8};
  result.score_best_logprobs = {-1.0f, -0.5f};
  result.masses = {0.25f, 0.5f};
  const pb::Result m = WriteResult(result);
  EXPECT_EQ(m.epoch(), 3);
  EXPECT_EQ(m.seq(), 4);
  EXPECT_FALSE(m.final());
  EXPECT_EQ(m.code(), 8);
  EXPECT_EQ(m.reason(), "KV_CAPACITY");
  EXPECT_EQ(m.message(), "caf??");
  EXPECT_EQ(m.metadata().at("need_bytes"), "12");
  EXPECT_TRUE(m.cancelled());
  EXPECT_EQ(m.seconds(), 0.25);
  EXPECT_EQ(m.agree(), 0xffff'ffff'ffff'fff1);
  EXPECT_EQ(m.kv_used_bytes(), int64_t{1} << 40);
  EXPECT_EQ(m.loss(), 2.5);
  EXPECT_EQ(m.grad_norm(), 0.125);
  ASSERT_EQ(m.tokens_size(), 2);
  EXPECT_EQ(m.tokens(0).id(), 9U);
  EXPECT_EQ(m.tokens(0).top_ids(1), 8U);
  EXPECT_EQ(m.tokens(0).top_logprobs(1), -1.5f);
  EXPECT_EQ(m.tokens(1).logprob(), -0.25f);
  EXPECT_EQ(m.tokens(1).sequence(), 6U);
  ASSERT_EQ(m.ended_size(), 2);
  EXPECT_EQ(m.ended(0).sequence(), 6U);
  EXPECT_EQ(m.ended(0).why(), pb::SequenceEnd::FINISHED);
  EXPECT_EQ(m.ended(0).code(), 0);
  EXPECT_EQ(m.ended(1).why(), pb::SequenceEnd::FAILED);
  EXPECT_EQ(m.ended(1).code(), static_cast<int>(StatusCode::kInternal));
  EXPECT_EQ(m.ended(1).reason(), "NON_FINITE_LOGITS");
  EXPECT_EQ(m.ended(1).message(), "na??ve");
  EXPECT_EQ(m.score_logprobs(1), -2.0f);
  EXPECT_TRUE(m.score_greedy(0));
  EXPECT_FALSE(m.score_greedy(1));
  EXPECT_EQ(m.score_best_ids(1), 8u);
  EXPECT_EQ(m.score_best_logprobs(1), -0.5f);
  EXPECT_EQ(std::vector<float>(m.masses().begin(), m.masses().end()), result.masses);
}

}  // namespace
}  // namespace refocus
