#include "tests/worker/golden.h"

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include "base/safetensors.h"
#include "tests/worker/engine_harness.h"

namespace refocus {

const Golden& LoadGolden(const std::string& name) {
  static std::map<std::string, Golden> loaded;
  Golden& golden = loaded[name];
  if (golden.json.is_null()) {
    std::ifstream file(GoldenPath(name + ".golden.json"));
    if (!file) {
      std::cerr << GoldenPath(name + ".golden.json") << ": cannot be read" << std::endl;
      std::abort();
    }
    golden.json = nlohmann::json::parse(file);
    golden.tensor_file = GoldenPath(name + ".golden.safetensors");
  }
  return golden;
}

std::vector<int32_t> Golden::context(int64_t tokens) const {
  const std::vector<int32_t> all = context();
  return {all.begin(), all.begin() + tokens};
}

at::Tensor Golden::tensor(const std::string& name) const {
  const StatusOr<TensorTable> table = ReadSafetensorsHeader(tensor_file);
  if (!table.ok() || table->count(name) == 0) {
    std::cerr << tensor_file << " " << name << ": " << table.status() << std::endl;
    std::abort();
  }
  const TensorInfo& info = table->at(name);
  at::Tensor values = at::empty(info.shape, at::kFloat);
  if (info.type != TensorType::kF32 || !ReadTensorBytes(info, values.data_ptr()).ok()) std::abort();
  return values;
}

at::Tensor Golden::layers(const std::string& prefix) const {
  const StatusOr<TensorTable> table = ReadSafetensorsHeader(tensor_file);
  const auto name = [&](size_t layer) { return prefix + "." + std::to_string(layer); };
  std::vector<at::Tensor> all;
  while (table.ok() && table->count(name(all.size())) != 0) all.push_back(tensor(name(all.size())));
  return at::stack(all);
}

std::vector<Span> Golden::spans(const nlohmann::json& pairs) const {
  const std::vector<int32_t> all = context();
  std::vector<Span> spans;
  for (const nlohmann::json& pair : pairs) {
    const int64_t start = pair.at(0);
    const int64_t rows = pair.at(1);
    spans.push_back(Span{start, {all.begin() + start, all.begin() + start + rows + 1}});
  }
  return spans;
}

OptimizerConfig Golden::optimizer() const {
  const nlohmann::json& o = json.at("adapt").at("optimizer");
  OptimizerConfig config;
  config.weight_decay = o.at("weight_decay");
  config.clip_norm = o.at("clip_norm");
  return config;
}

double RelativeError(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor a = actual.to(at::kDouble), e = expected.to(at::kDouble);
  return (at::linalg_vector_norm(a - e, 2) / at::linalg_vector_norm(e, 2)).item<double>();
}

}  // namespace refocus
