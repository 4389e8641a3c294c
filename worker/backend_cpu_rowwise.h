// The part of the CPU backend that is LibTorch's own operators: matrix products beside the few-rows kernel, row-wise
// steps, sampling. backend_cpu.cc adds attention and Linear.
#pragma once

#include "worker/backend.h"

namespace refocus {

class CpuRowwise : public Backend {
 public:
  CpuRowwise(const ModelConfig& config, KvType kv);

  at::Device device() const override { return at::kCPU; }
  at::ScalarType dtype() const override { return at::kFloat; }
  at::ScalarType kv_dtype() const override { return kv_ == KvType::kInt8 ? at::kByte : at::kFloat; }
  int64_t min_split_rows() const override { return 1; }
  void Bind() override {}
  void Synchronize() override {}
  std::unique_ptr<Repeat> Repeated(std::function<void()> pass) override;
  int64_t Aside(const std::function<void()>& work) override {
    work();
    return 0;
  }
  void Await(int64_t) override {}

  at::Tensor GatedLinear(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up) override {
    return SiluMul(Linear(x, gate), Linear(x, up));
  }
  at::Tensor LinearSum(const at::Tensor& x, const at::Tensor& w, const at::Tensor& delta) override;
  void AddLinears(const std::vector<AddedProduct>& products) override;
  at::Tensor LinearGrad(const at::Tensor& dy, const at::Tensor& w, const at::Tensor& delta) override;
  at::Tensor LinearPairGrad(const at::Tensor& dy, const at::Tensor& one, const at::Tensor& other_dy,
                            const at::Tensor& other, bool wide) override;
  void WeightGrad(const at::Tensor& dy, const at::Tensor& x, bool add, at::Tensor& grad) override;
  int64_t factor_rows() const override { return 128; }
  void FactorNorm(const GradFactors& grad, at::Tensor norm) override;
  void FactorAdamW(const GradFactors& grad, const OptimizerConfig& config, const AdamWStep& step) override;

  at::Tensor Rounded(const at::Tensor& t) override { return t; }
  at::Tensor Embed(const at::Tensor& table, const at::Tensor& ids) override;
  at::Tensor Norm(const at::Tensor& x, const at::Tensor& weight) override;
  Normed AddNorm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight) override;
  at::Tensor Add(const at::Tensor& x, const at::Tensor& y) override;
  Gradient NormGrad(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dh,
                    const at::Tensor& residual) override;

  Rotation RotationAt(const at::Tensor& pos) override;
  at::Tensor Rotate(const at::Tensor& raw, const HeadWeights& weights, const Rotation& rotation) override;
  at::Tensor RotateGrad(const at::Tensor& dq, const at::Tensor& raw, const HeadWeights& weights,
                        const Rotation& rotation) override;
  void Append(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation, const at::Tensor& slots,
              const KvView& extent) override;

  at::Tensor RotateAndAppendRows(const at::Tensor& raw, const HeadWeights& queries, const at::Tensor& h,
                                 const KeyValueWeights& weights, const KeyValueRows& keys, const Rotation& rotation,
                                 const at::Tensor& slots, const at::Tensor& tails, int64_t layer) override;
  Partial AttendRows(const at::Tensor& q, const at::Tensor& pos, const std::vector<RowSweep>& sweeps,
                     const at::Tensor& tails, int64_t layer, const ShardPlan& plan,
                     const kernels::PeerMemory* peers) override;
  int64_t PaddedRows(int64_t rows) const override { return rows; }

  at::Tensor SiluMul(const at::Tensor& gate, const at::Tensor& up) override;
  SiluGrads SiluMulGrad(const at::Tensor& dact, const at::Tensor& gate, const at::Tensor& up) override;
  at::Tensor RowDot(const at::Tensor& dout, const at::Tensor& out) override;
  Losses CrossEntropy(at::Tensor logits, const at::Tensor& targets, bool grad, double grad_scale) override;
  void Sample(const at::Tensor& logits, const at::Tensor& samplers, at::Tensor& tokens, at::Tensor& logprobs) override;

 private:
  struct KeysValues {
    at::Tensor k, v;  // [n, kv_heads, head_dim]
  };
  KeysValues MakeKeysValues(const at::Tensor& h, const KeyValueWeights& weights, const Rotation& rotation);
  // One row of them to a slot of `extent`.
  void Store(const KeysValues& rows, int64_t row, const KvView& extent, int64_t slot) const;
  // What a row of `tails` says of one layer of one extent.
  KvView TailView(const int64_t* words, int64_t layer, const ShardPlan& plan) const;

  const KvType kv_;
  double eps_;
  int64_t kv_heads_;
  int64_t head_dim_;
  std::vector<float> inverse_frequencies_;  // [head_dim / 2]
  double attention_factor_;                 // of sine and cosine
};

}  // namespace refocus
