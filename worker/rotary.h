// Rotary position embedding (Su et al., arXiv 2104.09864): the frequencies of a model.
#pragma once

#include <cmath>
#include <vector>

#include "base/model_config.h"

namespace refocus {

// theta^(-2 i / head_dim), i in [0, head_dim / 2), rounded to fp32.
inline std::vector<float> InverseFrequencies(const ModelConfig& config) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < config.head_dim / 2; ++i) {
    frequencies.push_back(static_cast<float>(
        std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim))));
  }
  return frequencies;
}

}  // namespace refocus
