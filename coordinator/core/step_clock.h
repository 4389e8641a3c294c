// How long gradient steps take, from those that ran: seconds for each floating-point operation of the arithmetic below.
#pragma once

#include <cstdint>

#include "base/model_config.h"

namespace refocus {

class StepClock {
 public:
  void Measured(double flops, double seconds) {
    constexpr double kKept = 0.9;  // old steps fade
    flops_ = kKept * flops_ + flops;
    seconds_ = kKept * seconds_ + seconds;
  }
  // 0 before anything was measured.
  double Seconds(double flops) const { return flops_ > 0 ? flops * seconds_ / flops_ : 0; }

 private:
  double flops_ = 0, seconds_ = 0;
};

// Of one row: the linear layers' products, and attention over `keys` keys.
inline double ForwardRowFlops(const ModelConfig& c, double keys) {
  const double linear =
      static_cast<double>(c.layers) *
      (static_cast<double>(c.hidden) * static_cast<double>(2 * c.q_dim() + 2 * c.kv_dim() + 3 * c.mlp));
  return 2 * linear + 4 * keys * static_cast<double>(c.q_dim() * c.layers);
}

// Forward, gradients of the activations as much again, 1.5 times the attention, and the gradient of W_Q.
inline double StepRowFlops(const ModelConfig& c, double keys) {
  return 2 * ForwardRowFlops(c, keys) + 2 * keys * static_cast<double>(c.q_dim() * c.layers) +
         2 * static_cast<double>(c.query_parameters());
}

inline double PrefillFlops(const ModelConfig& c, int64_t tokens) {
  const auto rows = static_cast<double>(tokens);
  return rows * ForwardRowFlops(c, rows / 2);
}

}  // namespace refocus
