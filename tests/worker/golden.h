// The outputs that tests/golden/make_golden.py stored; its README describes every entry.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "worker/command.h"

namespace refocus {

struct Golden {
  nlohmann::json json;
  std::string tensor_file;

  std::vector<int32_t> context() const { return json.at("context").get<std::vector<int32_t>>(); }
  // The first `tokens` of it.
  std::vector<int32_t> context(int64_t tokens) const;
  at::Tensor tensor(const std::string& name) const;  // fp32
  // [per-layer tensors `prefix`.0, `prefix`.1, ...] -> [layers, ...]
  at::Tensor layers(const std::string& prefix) const;
  // [[start, rows], ...] with the context's ids.
  std::vector<Span> spans(const nlohmann::json& pairs) const;
  OptimizerConfig optimizer() const;
  float learning_rate() const { return json.at("adapt").at("optimizer").at("lr"); }
};

// Aborts the test program when a file is missing. "llama", "qwen3".
const Golden& LoadGolden(const std::string& name);

// Norm of the difference over the norm of `expected`, in fp64.
double RelativeError(const at::Tensor& actual, const at::Tensor& expected);

}  // namespace refocus
