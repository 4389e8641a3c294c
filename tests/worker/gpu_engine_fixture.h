// Groups on GPUs, one thread and one GPU a rank, of random models, and their comparison with the fp64 oracle: our error
// is at most twice that of plain torch in bf16 on the same GPU.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "base/memory_plan.h"
#include "base/model_config.h"
#include "tests/worker/engine_harness.h"
#include "tests/worker/torch_oracle.h"

namespace refocus {

inline constexpr uint64_t kContext = 1;
inline constexpr uint64_t kAdapter = 2;

struct GpuCase {
  std::string name;
  ModelConfig config;
};

// Awkward and real shapes, at reduced depth.
std::vector<GpuCase> GpuCases();

// The same weights on every call.
std::shared_ptr<const Weights> RandomWeights(const ModelConfig& config, at::Device device);
std::unique_ptr<Group> GpuGroup(const ModelConfig& config, int ranks, KvType kv = KvType::kDevice,
                                bool peer_memory = true);

std::vector<int32_t> RandomIds(int64_t count, int64_t vocab, uint64_t seed);
Span SpanAt(const std::vector<int32_t>& ids, int64_t start, int64_t rows);

// Of a case's number and ranks; skipped without as many GPUs.
class GpuEngineTest : public ::testing::TestWithParam<std::tuple<int, int>> {
 protected:
  void SetUp() override;

  const std::string& name() const { return case_.name; }

  // Both prefilled with the context.
  template <typename Oracle = TorchOracle>
  void MakeOracles() {
    const at::Device device(at::kCUDA, 0);
    const std::shared_ptr<const Weights> weights = RandomWeights(config_, device);
    oracle_ = std::make_unique<Oracle>(*weights, device, at::kDouble);
    plain_ = std::make_unique<Oracle>(*weights, device, at::kBFloat16);
    oracle_->Prefill(ids_);
    plain_->Prefill(ids_);
  }

  // Log-probabilities of a text behind the context: ours, and the largest errors of both.
  void CompareScores(Group& group, const at::Tensor& delta, uint64_t adapter, int64_t revision);

  // AdamW steps on an adapter that begins here and is committed as revision 1; the oracles take theirs from the same
  // start with autograd. The delta that fp64 comes to.
  at::Tensor CompareSteps(Group& group, int64_t steps);

  // Greedy tokens, recorded as a graph from the second step on: every one must be what scoring says of it.
  void CompareDecoding(Group& group, int tokens);

  const GpuCase case_ = GpuCases()[static_cast<size_t>(std::get<0>(GetParam()))];
  const ModelConfig& config_ = case_.config;
  const int ranks_ = std::get<1>(GetParam());
  const int64_t tokens_ = 2600;
  std::vector<int32_t> ids_;
  std::unique_ptr<TorchOracle> oracle_, plain_;
};

std::string GpuTestName(const ::testing::TestParamInfo<std::tuple<int, int>>& info);

}  // namespace refocus
