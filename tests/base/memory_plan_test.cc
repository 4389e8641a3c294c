#include "base/memory_plan.h"

#include "base/shard_plan.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

constexpr int64_t kGb = 1'000'000'000;

ModelConfig Qwen3() {  // 4B
  ModelConfig c;
  c.family = Family::kQwen3;
  c.layers = 36;
  c.hidden = 2560;
  c.heads = 32;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.mlp = 9728;
  c.vocab = 151936;
  c.max_positions = 40960;
  c.qk_norm = c.tied_embeddings = true;
  return c;
}

ModelConfig Llama70() {
  ModelConfig c;
  c.layers = 80;
  c.hidden = 8192;
  c.heads = 64;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.mlp = 28672;
  c.vocab = 128256;
  c.max_positions = 131072;
  return c;
}

MemoryQuestion Gpus(int64_t ranks, int64_t memory, int64_t tokens) {
  MemoryQuestion q;
  q.device = DeviceKind::kCuda;
  q.ranks = ranks;
  q.memory_bytes = memory;
  q.tokens = tokens;
  return q;
}

MemoryPlan Planned(const ModelConfig& config, const MemoryQuestion& question) {
  const auto plan = PlanMemory(config, question);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return plan.ok() ? *plan : MemoryPlan();
}

TEST(MemoryPlanTest, PublishedModels) {
  const ModelConfig qwen = Qwen3();
  EXPECT_EQ(qwen.query_parameters(), 377'487'360);
  EXPECT_EQ(WeightBytes(qwen, DeviceKind::kCuda), 2 * int64_t{4'022'468'096});  // 8.04 GB
  EXPECT_EQ(KvBytesPerToken(qwen, DeviceKind::kCuda), 147'456);
  EXPECT_EQ(AdapterBytes(qwen, DeviceKind::kCuda), 6 * int64_t{377'487'360});
  EXPECT_EQ(AdaptationBytes(qwen, DeviceKind::kCuda), 18 * int64_t{377'487'360});
  // A LoRA of rank 16: 36 layers of 16 x (2560 + 4096) numbers; SGD keeps no moments, with momentum one.
  const int64_t numbers = 36 * 16 * (2560 + 4096);
  EXPECT_EQ(DeltaNumbers(qwen, 16), numbers);
  EXPECT_EQ(AdapterBytes(qwen, DeviceKind::kCuda, 16), 6 * numbers);
  EXPECT_EQ(AdaptationBytes(qwen, DeviceKind::kCuda, {16, 2}), 18 * numbers);
  EXPECT_EQ(AdaptationBytes(qwen, DeviceKind::kCuda, {16, 1}), 14 * numbers);
  EXPECT_EQ(AdaptationBytes(qwen, DeviceKind::kCpu, {16, 0}), 8 * numbers);
  const MemoryPlan million = Planned(qwen, Gpus(2, 150 * kGb, int64_t{1} << 20));
  EXPECT_EQ(million.kv_all_ranks, int64_t{154'618'822'656});
  EXPECT_EQ(million.kv, int64_t{77'309'411'328});
  EXPECT_TRUE(million.fits);

  const ModelConfig llama = Llama70();
  EXPECT_EQ(WeightBytes(llama, DeviceKind::kCuda), 2 * int64_t{70'553'706'496});  // 141.1 GB
  EXPECT_EQ(KvBytesPerToken(llama, DeviceKind::kCuda), 327'680);
  EXPECT_EQ(Planned(llama, Gpus(8, 150 * kGb, int64_t{1} << 20)).kv_all_ranks, int64_t{343'597'383'680});
}

// A byte a number and two a scale: 36 layers of 8 heads, K and V, 128 numbers each.
TEST(MemoryPlanTest, KeysAndValuesInEightBits) {
  const ModelConfig qwen = Qwen3();
  for (const DeviceKind device : {DeviceKind::kCpu, DeviceKind::kCuda}) {
    EXPECT_EQ(KvBytesPerToken(qwen, device, KvType::kInt8), 36 * 2 * 8 * (128 + 2));
    EXPECT_EQ(KvTypeName(KvType::kInt8, device), "int8");
  }
  MemoryQuestion question = Gpus(1, 141 * kGb, int64_t{1} << 20);
  const MemoryPlan plain = Planned(qwen, question);
  EXPECT_FALSE(plain.fits);
  EXPECT_NE(plain.advice.find("--kv-dtype int8"), std::string::npos) << plain.advice;
  question.kv = KvType::kInt8;
  const MemoryPlan small = Planned(qwen, question);  // a million tokens of a 4B model on one H200
  EXPECT_TRUE(small.fits);
  EXPECT_EQ(small.kv, int64_t{78'517'370'880});
  EXPECT_GT(small.largest_context, int64_t{1} << 20);
  question.tokens *= 2;
  EXPECT_EQ(Planned(qwen, question).advice.find("--kv-dtype"), std::string::npos);
}

TEST(MemoryPlanTest, NamesOfKvTypes) {
  EXPECT_EQ(*ParseKvType("", DeviceKind::kCpu), KvType::kDevice);
  EXPECT_EQ(*ParseKvType("fp32", DeviceKind::kCpu), KvType::kDevice);
  EXPECT_EQ(*ParseKvType("bf16", DeviceKind::kCuda), KvType::kDevice);
  EXPECT_EQ(*ParseKvType("int8", DeviceKind::kCuda), KvType::kInt8);
  for (const auto& [name, device] : {std::pair("bf16", DeviceKind::kCpu), std::pair("fp32", DeviceKind::kCuda),
                                     std::pair("fp8", DeviceKind::kCuda)}) {
    const Status status = ParseKvType(name, device).status();
    EXPECT_EQ(DetailOf(status).reason, "CONFIG_INVALID");
    EXPECT_NE(std::string(status.message()).find("got " + std::string(name)), std::string::npos) << status;
  }
}

// The rules that CPU ranks and the coordinator's ledger follow: fp32, four copies while adapting, half of what is left.
TEST(MemoryPlanTest, CpuRules) {
  const ModelConfig c = Qwen3();
  EXPECT_EQ(WeightBytes(c, DeviceKind::kCpu), 4 * c.parameters());
  EXPECT_EQ(KvBytesPerToken(c, DeviceKind::kCpu), c.kv_bytes_per_token(4));
  EXPECT_EQ(AdapterBytes(c, DeviceKind::kCpu), 4 * c.query_parameters());
  EXPECT_EQ(AdaptationBytes(c, DeviceKind::kCpu), 16 * c.query_parameters());
  MemoryQuestion q;
  q.memory_bytes = WeightBytes(c, DeviceKind::kCpu) + 1001;
  MemoryPlan plan = Planned(c, q);
  EXPECT_EQ(plan.limit, 1001);
  EXPECT_EQ(plan.pool, 500);
  EXPECT_EQ(plan.runtime, 0);
  EXPECT_EQ(plan.free, 500);
  q.memory_bytes = WeightBytes(c, DeviceKind::kCpu) - 7;
  plan = Planned(c, q);
  EXPECT_EQ(plan.limit, -7);
  EXPECT_EQ(plan.pool, 0);
  EXPECT_EQ(plan.free, -7);
  EXPECT_FALSE(plan.fits);
}

TEST(MemoryPlanTest, PartsAddUpAndTheRankWithMostBlocksCounts) {
  const ModelConfig c = Qwen3();
  MemoryQuestion q = Gpus(3, 80 * kGb, 1000);  // blocks 0 to 2 and 232 tokens of block 3, which is rank 0's
  q.adapting = 1;
  q.committed = 2;
  const MemoryPlan plan = Planned(c, q);
  EXPECT_EQ(plan.kv, (256 + 232) * 147'456);
  EXPECT_EQ(plan.kv_all_ranks, 1000 * 147'456);
  EXPECT_EQ(plan.adaptation, AdaptationBytes(c, q.device));
  EXPECT_EQ(plan.adapters, 2 * AdapterBytes(c, q.device));
  EXPECT_EQ(plan.total,
            plan.weights + plan.workspace + plan.runtime + plan.kv + plan.adaptation + plan.adapters);
  EXPECT_EQ(plan.free, 80 * kGb - plan.total);
  EXPECT_EQ(plan.pool, plan.free + plan.kv + plan.adaptation + plan.adapters);
  EXPECT_TRUE(plan.fits);
  EXPECT_EQ(plan.advice, "");
}

TEST(MemoryPlanTest, WorkspaceFollowsWhatPassesTheModelAtOnce) {
  const ModelConfig c = Qwen3();
  const auto workspace = [&](int64_t ranks, int64_t chunk, int64_t span) {
    MemoryQuestion q = Gpus(ranks, 80 * kGb, 0);
    q.chunk_rows = chunk;
    q.span_rows = span;
    return Planned(c, q).workspace;
  };
  const int64_t one = workspace(1, 16384, 512);
  // At least residual stream, queries, partials and the three MLP tensors of a chunk; below three times that.
  const int64_t least = 16384 * (2 * 4 * c.hidden + 6 * c.q_dim() + 4 * c.q_dim() + 6 * c.mlp);
  EXPECT_GT(one, least);
  EXPECT_LT(one, 3 * least);
  EXPECT_GE(workspace(1, 16384, 1024), workspace(1, 256, 1024));
  EXPECT_GT(workspace(1, 256, 1024), workspace(1, 256, 512));  // now the spans decide
  EXPECT_GT(workspace(1, 8192, 1), workspace(1, 4096, 1));     // now the chunk
  EXPECT_LT(workspace(2, 16384, 512), one);                    // rows are split
  // Logits of 128 rows, fp32 and bf16.
  EXPECT_EQ(workspace(1, 16384, 128) - workspace(1, 16384, 127), 6 * c.vocab);
  EXPECT_EQ(workspace(1, 16384, 129), workspace(1, 16384, 128));
  // A decode batch's rows by the vocabulary: logits, adjusted ones, counts for the penalties. The layers do not change.
  ModelConfig twice = c;
  twice.vocab *= 2;
  EXPECT_EQ(Planned(twice, Gpus(1, 80 * kGb, 0)).workspace - one, (128 * 6 + kMaxDecodeRows * 12) * c.vocab);
}

// By brute force: the largest T whose share of rank 0 fits.
TEST(MemoryPlanTest, LargestContextIsTheLargest) {
  for (const int64_t ranks : {1, 2, 3, 7}) {
    for (const int64_t own : {0, 1, 255, 256, 257, 511, 512, 1000, 4096}) {
      for (const int64_t rest : {0, 9}) {
        const int64_t most = LargestContext(own * 10 + rest, 10, ranks);
        EXPECT_LE((ShardPlan{ranks, 0}.CountBelow(most)), own) << ranks << " " << own;
        EXPECT_GT((ShardPlan{ranks, 0}.CountBelow(most + 1)), own) << ranks << " " << own;
      }
    }
    EXPECT_EQ(LargestContext(INT64_MAX, 1, ranks), kMaxContextTokens);
    EXPECT_EQ(LargestContext(-1, 10, ranks), 0);
    const int64_t all = ShardPlan{ranks, 0}.CountBelow(kMaxContextTokens);
    EXPECT_EQ(LargestContext(all, 1, ranks), kMaxContextTokens);
    EXPECT_LT(LargestContext(all - 1, 1, ranks), kMaxContextTokens);
  }
}

TEST(MemoryPlanTest, TheLargestContextFitsAndOneTokenMoreDoesNot) {
  for (const DeviceKind device : {DeviceKind::kCpu, DeviceKind::kCuda}) {
    for (const int64_t ranks : {1, 2, 5}) {
      for (const int64_t adapting : {0, 1}) {
        MemoryQuestion q = Gpus(ranks, 80 * kGb, 0);
        q.device = device;
        q.adapting = q.committed = adapting;
        q.tokens = Planned(Qwen3(), q).largest_context;
        ASSERT_GT(q.tokens, 0);
        ASSERT_LT(q.tokens, kMaxContextTokens);
        EXPECT_TRUE(Planned(Qwen3(), q).fits);
        q.tokens += 1;
        const MemoryPlan plan = Planned(Qwen3(), q);
        EXPECT_FALSE(plan.fits);
        EXPECT_NE(plan.advice.find("at most " + std::to_string(q.tokens - 1) + " tokens"), std::string::npos)
            << plan.advice;
        EXPECT_EQ(plan.advice.find("no adaptation") != std::string::npos, adapting == 1) << plan.advice;
      }
    }
  }
}

TEST(MemoryPlanTest, AdvisedRanksAreEnoughAndOneFewerIsNot) {
  MemoryQuestion q = Gpus(1, 80 * kGb, int64_t{1} << 20);
  const MemoryPlan plan = Planned(Qwen3(), q);
  ASSERT_FALSE(plan.fits);
  ASSERT_EQ(plan.advice.find("short by "), 0u);
  const std::string before = "use at least ";
  const size_t at = plan.advice.find(before);
  ASSERT_NE(at, std::string::npos) << plan.advice;
  q.ranks = std::stoll(plan.advice.substr(at + before.size()));
  EXPECT_TRUE(Planned(Qwen3(), q).fits);
  q.ranks -= 1;
  EXPECT_FALSE(Planned(Qwen3(), q).fits);
  // Weights that fit no rank: neither ranks nor tokens help.
  const std::string advice = Planned(Llama70(), Gpus(2, 141 * kGb, 1000)).advice;
  EXPECT_NE(advice.find("a smaller model"), std::string::npos) << advice;
  EXPECT_EQ(advice.find("at least"), std::string::npos) << advice;
  EXPECT_EQ(advice.find("tokens"), std::string::npos) << advice;
}

TEST(MemoryPlanTest, QuestionsOutsideTheLimits) {
  const auto refused = [](auto edit, const std::string& part) {
    MemoryQuestion q = Gpus(1, 80 * kGb, 1);
    edit(q);
    return FailsWith(PlanMemory(Qwen3(), q).status(), "FIELD_OUT_OF_RANGE", part);
  };
  EXPECT_TRUE(refused([](auto& q) { q.ranks = 0; }, "ranks: got 0"));
  EXPECT_TRUE(refused([](auto& q) { q.ranks = 5000; }, "ranks: got 5000"));
  EXPECT_TRUE(refused([](auto& q) { q.memory_bytes = -1; }, "memory: got -1"));
  EXPECT_TRUE(refused([](auto& q) { q.chunk_rows = 0; }, "chunk rows"));
  EXPECT_TRUE(refused([](auto& q) { q.span_rows = kMaxStepRows + 1; }, "span rows"));
  EXPECT_TRUE(refused([](auto& q) { q.tokens = kMaxContextTokens + 1; }, "tokens"));
  EXPECT_TRUE(refused([](auto& q) { q.adapting = -1; }, "adapting"));
  MemoryQuestion q = Gpus(1, 80 * kGb, 1);
  q.committed = int64_t{1} << 40;
  EXPECT_TRUE(FailsWith(PlanMemory(Qwen3(), q).status(), "HARDWARE", "2^63"));
}

// Every limit of ModelConfig and of the question at once.
TEST(MemoryPlanTest, LargestModelDoesNotOverflow) {
  ModelConfig c;
  c.layers = 1024;
  c.hidden = 1 << 17;
  c.heads = c.kv_heads = 1024;
  c.head_dim = 1024;
  c.mlp = 1 << 20;
  c.vocab = 1 << 22;
  c.max_positions = int64_t{1} << 31;
  ASSERT_TRUE(c.Validate("here").ok());
  MemoryQuestion q = Gpus(4096, INT64_MAX, kMaxContextTokens);
  q.span_rows = kMaxStepRows;
  q.adapting = q.committed = 16;
  for (const DeviceKind device : {DeviceKind::kCpu, DeviceKind::kCuda}) {
    q.device = device;
    const MemoryPlan plan = Planned(c, q);
    EXPECT_TRUE(plan.fits);
    EXPECT_GT(plan.weights, 0);
    EXPECT_EQ(plan.kv_all_ranks, kMaxContextTokens * plan.kv_per_token);
  }
}

TEST(ParseDeviceTest, Names) {
  EXPECT_EQ(*ParseDevice("cpu"), DeviceKind::kCpu);
  EXPECT_EQ(*ParseDevice("cuda"), DeviceKind::kCuda);
  for (const DeviceKind device : {DeviceKind::kCpu, DeviceKind::kCuda}) {
    EXPECT_EQ(*ParseDevice(DeviceName(device)), device);
  }
  EXPECT_TRUE(FailsWith(ParseDevice("CUDA").status(), "CONFIG_INVALID", "device: got 'CUDA', allowed cpu, cuda"));
}

}  // namespace
}  // namespace refocus
