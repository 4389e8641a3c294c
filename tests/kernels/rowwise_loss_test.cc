#include <algorithm>
#include <limits>

#include "kernels/rowwise.h"
#include "tests/kernels/rowwise_support.h"

namespace refocus::kernels {
namespace {

using LossTest = RowwiseTest;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Row {
  double loss;
  bool greedy;
  std::vector<double> gradient;
};

Row Reference(const float* logits, int64_t vocab, int64_t target, double scale) {
  int64_t best = 0;
  for (int64_t i = 1; i < vocab; ++i) best = logits[i] > logits[best] ? i : best;
  const double max = logits[best];
  double sum = 0.0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - max);
  Row row{max + std::log(sum) - logits[target], best == target, {}};
  for (int64_t i = 0; i < vocab; ++i)
    row.gradient.push_back((std::exp(logits[i] - max) / sum - (i == target ? 1.0 : 0.0)) * scale);
  return row;
}

// Rows: any target; the arg max; a tie that the target wins; one that it loses; a sharp peak; many -inf.
std::vector<float> MakeLogits(int64_t vocab, std::vector<int64_t>& targets) {
  Random random(static_cast<uint64_t>(vocab));
  std::vector<float> logits = random.Floats(6 * vocab, 3.0f);
  targets.clear();
  for (int64_t row = 0; row < 6; ++row) {
    float* values = &logits[row * vocab];
    const int64_t target = random.Below(vocab), other = random.Below(vocab);
    targets.push_back(target);
    if (row == 1) values[target] = 30.0f;
    if (row == 2) values[target] = values[std::max(target, other)] = 25.0f;
    if (row == 3) values[target] = values[std::min(target, other)] = 25.0f;
    if (row == 4) values[other] = 200.0f;
    for (int64_t i = 0; row == 5 && i < vocab; ++i) values[i] = i % 3 == target % 3 ? values[i] : -kInfinity;
  }
  return logits;
}

TEST_F(LossTest, LossGreedyAndGradient) {
  for (const int64_t vocab : {1, 2, 7, 31, 1001, 1024, 8191, 8192, 49152, 50257, 151936}) {
    std::vector<int64_t> targets;
    const std::vector<float> logits = MakeLogits(vocab, targets);
    for (const int64_t rows : {0, 1, 6}) {
      const double scale = 0.25;
      std::vector<double> loss, greedy, gradient;
      for (int64_t row = 0; row < rows; ++row) {
        const Row want = Reference(&logits[row * vocab], vocab, targets[row], scale);
        loss.push_back(want.loss);
        greedy.push_back(want.greedy ? 1.0 : 0.0);
        gradient.insert(gradient.end(), want.gradient.begin(), want.gradient.end());
      }
      DeviceArray<float> device_logits(logits), device_loss(rows), device_greedy(rows), again(rows);
      DeviceArray<int64_t> device_targets(targets);
      DeviceArray<Bits> dlogits(rows * vocab);
      CrossEntropyParams params{rows,
                                vocab,
                                device_logits.get(),
                                device_targets.get(),
                                device_loss.get(),
                                device_greedy.get(),
                                dlogits.get(),
                                static_cast<float>(scale)};
      REFOCUS_CUDA(CrossEntropy(params, nullptr));
      const std::string name = " vocab " + std::to_string(vocab) + " rows " + std::to_string(rows);
      ExpectNear("loss" + name, device_loss.Download(), loss, 2e-6, 1e-5);
      ExpectNear("greedy" + name, device_greedy.Download(), greedy, 0.0, 1e-9);
      ExpectNear("dlogits" + name, dlogits.Download(), gradient, kBf16 + 2e-5, 5e-7 * scale);
      params.loss = again.get();
      params.greedy = nullptr;
      params.dlogits = nullptr;
      REFOCUS_CUDA(CrossEntropy(params, nullptr));
      EXPECT_TRUE(SameBits(again.Download(), device_loss.Download()));
    }
  }
}

TEST_F(LossTest, UnalignedLogits) {
  const int64_t vocab = 1024;
  std::vector<int64_t> targets;
  const std::vector<float> logits = MakeLogits(vocab, targets);
  DeviceArray<float> device_logits(logits, 1), loss(6);
  DeviceArray<int64_t> device_targets(targets);
  REFOCUS_CUDA(
      CrossEntropy({6, vocab, device_logits.get(), device_targets.get(), loss.get(), nullptr, nullptr, 1.0f}, nullptr));
  std::vector<double> want;
  for (int64_t row = 0; row < 6; ++row) want.push_back(Reference(&logits[row * vocab], vocab, targets[row], 1.0).loss);
  ExpectNear("loss unaligned", loss.Download(), want, 2e-6, 1e-5);
}

TEST_F(LossTest, NonFiniteLogitsShowInTheirRowAlone) {
  const int64_t vocab = 9000;
  Random random(9);
  std::vector<float> logits = random.Floats(4 * vocab);
  logits[0 * vocab + 8999] = std::nanf("");
  logits[1 * vocab + 17] = kInfinity;
  for (int64_t i = 0; i < vocab; ++i) logits[2 * vocab + i] = -kInfinity;
  DeviceArray<float> device_logits(logits), loss(4), greedy(4);
  DeviceArray<int64_t> targets(std::vector<int64_t>{5, 17, 0, 4});
  DeviceArray<Bits> dlogits(4 * vocab);
  REFOCUS_CUDA(CrossEntropy(
      {4, vocab, device_logits.get(), targets.get(), loss.get(), greedy.get(), dlogits.get(), 1.0f}, nullptr));
  const std::vector<float> got = loss.Download();
  for (int row = 0; row < 3; ++row) {
    EXPECT_FALSE(std::isfinite(got[row])) << "row " << row << ": " << got[row];
    EXPECT_EQ(greedy.Download()[row], 0.0f);
  }
  EXPECT_NEAR(got[3], Reference(&logits[3 * vocab], vocab, 4, 1.0).loss, 1e-5);
}

// More than 2^31 elements: the last rows lie behind what 32 bits can address.
TEST_F(LossTest, OffsetsAre64Bit) {
  const int64_t vocab = 151936, rows = (int64_t{1} << 31) / vocab + 3;
  size_t free_bytes = 0, total_bytes = 0;
  REFOCUS_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (free_bytes < static_cast<size_t>(rows * vocab) * 7) GTEST_SKIP() << "needs 15 GB of free device memory";
  float* logits = nullptr;
  Bits* dlogits = nullptr;
  REFOCUS_CUDA(cudaMalloc(reinterpret_cast<void**>(&logits), static_cast<size_t>(rows * vocab) * sizeof(float)));
  REFOCUS_CUDA(cudaMalloc(reinterpret_cast<void**>(&dlogits), static_cast<size_t>(rows * vocab) * sizeof(Bits)));
  REFOCUS_CUDA(cudaMemset(logits, 0, static_cast<size_t>(rows * vocab) * sizeof(float)));
  Random random(10);
  const std::vector<float> last = random.Floats(vocab, 3.0f);
  REFOCUS_CUDA(
      cudaMemcpy(logits + (rows - 1) * vocab, last.data(), last.size() * sizeof(float), cudaMemcpyHostToDevice));
  DeviceArray<int64_t> targets(std::vector<int64_t>(rows, 77));
  DeviceArray<float> loss(rows);
  REFOCUS_CUDA(CrossEntropy({rows, vocab, logits, targets.get(), loss.get(), nullptr, dlogits, 1.0f}, nullptr));
  const Row want = Reference(last.data(), vocab, 77, 1.0);
  const std::vector<float> got = loss.Download();
  EXPECT_NEAR(got[0], std::log(static_cast<double>(vocab)), 1e-5);
  EXPECT_NEAR(got[rows - 1], want.loss, 1e-5);
  std::vector<Bits> gradient(vocab);
  REFOCUS_CUDA(cudaMemcpy(gradient.data(), dlogits + (rows - 1) * vocab, gradient.size() * sizeof(Bits),
                          cudaMemcpyDeviceToHost));
  ExpectNear("dlogits of the last row", gradient, want.gradient, kBf16 + 2e-5, 5e-7);
  cudaFree(logits);
  cudaFree(dlogits);
}

}  // namespace
}  // namespace refocus::kernels
