// Ranks over a prefilled golden context, below the engine's commands.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "tests/worker/engine_harness.h"
#include "tests/worker/golden.h"
#include "worker/adapt.h"
#include "worker/prefill.h"

namespace refocus {

inline constexpr double kLossBound = 1e-5;   // absolute, nats
inline constexpr double kTensorBound = 1e-4;  // norm of the difference over the norm

// What one rank has in a test.
struct Rank {
  Model& model;
  KvChain context;  // the golden context, prefilled
  int index;
};

inline double Cosine(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
  return (x * y).sum().item<double>() / std::sqrt(x.square().sum().item<double>() * y.square().sum().item<double>());
}

class GradientTest : public ::testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  GradientTest()
      : golden_(LoadGolden(std::get<0>(GetParam()))),
        weights_(TestWeights(std::get<0>(GetParam()))),
        ranks_(std::get<1>(GetParam())) {}

  // Runs `body` on every rank in a thread of its own, after prefilling `ids`.
  void OnRanks(const std::vector<int32_t>& ids, const std::function<void(const Rank&)>& body,
               KvType kv = KvType::kDevice) {
    const std::vector<std::shared_ptr<Collective>> collectives = MakeLocalCollectives(ranks_, 30.0);
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks_; ++r) {
      threads.emplace_back([&, r] {
        const c10::InferenceMode inference;
        at::set_num_threads(1);
        std::atomic<int64_t> progress{0};
        const std::unique_ptr<Backend> backend = MakeCpuBackend(weights_->config, kv);
        try {
          Model model(*weights_, *backend, *collectives[r], progress);
          const auto context = std::make_shared<KvExtent>(weights_->config, model.plan(), 0,
                                                          static_cast<int64_t>(ids.size()), backend->kv_dtype(),
                                                          /*poison=*/true);
          PrefillRows(model, KvChain(), *context, 0, ids);
          body(Rank{model, KvChain(context), r});
        } catch (const std::exception& error) {
          collectives[r]->Abort(error.what());
          ADD_FAILURE() << "rank " << r << ": " << error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  at::Tensor NewDelta() const {
    const ModelConfig& c = weights_->config;
    return at::zeros({c.layers, c.q_dim(), c.hidden}, at::kFloat);
  }

  // A LoRA of this rank (of the matrices) with numbers drawn by `seed`; B is not zero.
  QueryDelta DrawnLora(int64_t lora_rank, float alpha, uint64_t seed) const {
    const DeltaConfig config{.lora_rank = lora_rank, .lora_alpha = alpha};
    const std::vector<int64_t> sizes = DeltaSizes(weights_->config, config);
    const at::Tensor numbers = at::randn(sizes, at::make_generator<at::CPUGeneratorImpl>(seed), at::kFloat).mul_(0.05);
    return DeltaOver(weights_->config, config, numbers);
  }

  // Logits of rows of the context, queried again; replicated, so that every rank has them. `adapters` by row.
  at::Tensor LogitsAt(const Rank& rank, const nlohmann::json& rows, const std::vector<AdapterRows>& adapters) {
    const std::vector<int32_t> ids = golden_.context();
    std::vector<int64_t> positions;
    std::vector<int32_t> row_ids;
    for (const nlohmann::json& row : rows) {
      positions.push_back(row.get<int64_t>());
      row_ids.push_back(ids[row.get<int64_t>()]);
    }
    const RowPlan plan = RowPlan::Replicated(positions, rank.model.plan());
    ForwardInput input = rank.model.MakeInput(plan, row_ids);
    input.extents = rank.context.shares();
    input.adapters = adapters;
    return rank.model.Logits(rank.model.Forward(input));
  }

  at::Tensor LogitsAt(const Rank& rank, const nlohmann::json& rows, const QueryDelta& delta) {
    return LogitsAt(rank, rows, std::vector<AdapterRows>{{0, static_cast<int64_t>(rows.size()), delta}});
  }

  const Golden& golden_;
  std::shared_ptr<const Weights> weights_;
  const int ranks_;
};

}  // namespace refocus
