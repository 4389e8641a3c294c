// Rotary position embedding (Su et al., arXiv 2104.09864): the frequencies of a model, and the ways to stretch them over
// a longer window, as transformers computes them.
//
//   linear  every frequency divided by `factor` (Chen et al., arXiv 2306.15595)
//   llama3  wavelengths above original / low_factor divided by `factor`, those below original / high_factor kept, a
//           smooth transition between (Llama 3.1; Grattafiori et al., arXiv 2407.21783)
//   yarn    dimensions that turn less than beta_slow times over the original window divided by `factor`, those that turn
//           more than beta_fast times kept, a ramp between; sine and cosine times attention_factor (Peng et al.,
//           arXiv 2309.00071)
//   factors every frequency divided by its own number (GGUF's tensor rope_freqs.weight, which carries llama3 there)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace refocus {

enum class RopeType { kDefault, kLinear, kLlama3, kYarn, kFactors };

struct RopeScaling {
  RopeType type = RopeType::kDefault;
  double factor = 1.0;             // from 1; of linear, llama3, yarn
  int64_t original_positions = 0;  // the window before stretching: of llama3 and yarn; else 0 where not known
  double low_factor = 1.0;         // llama3
  double high_factor = 4.0;
  double beta_fast = 32.0;         // yarn
  double beta_slow = 1.0;
  bool truncate = true;            // yarn: the ramp begins and ends at whole dimensions
  double attention_factor = 1.0;   // of sine and cosine, hence squared of the scores; yarn
  std::vector<float> factors;      // [head_dim / 2]

  // "none", "yarn:4:32768", "linear:2", "factors": for people, and what --rope-scaling takes but for "factors".
  std::string Text() const;
  // All fields that InverseFrequencies reads and attention_factor, exactly; of equal text, equal rotations.
  std::string ExactText() const;
  // `source` begins the message. CONFIG_INVALID.
  Status Validate(const std::string& source, double theta, int64_t head_dim) const;
};

// 0.1 * mscale * ln(factor) + 1 for factors above 1 (arXiv 2309.00071, section 3.4, with mscale 1).
double YarnAttentionFactor(double factor, double mscale = 1.0);

// theta^(-2 i / head_dim), i in [0, head_dim / 2), stretched, rounded to fp32 at the end.
std::vector<float> InverseFrequencies(double theta, int64_t head_dim, const RopeScaling& scaling);

// --rope-scaling: "none" or "", or TYPE:FACTOR or TYPE:FACTOR:WINDOW with TYPE linear, llama3 or yarn; WINDOW goes to
// original_positions (0: not given). CONFIG_INVALID.
StatusOr<RopeScaling> ParseRopeScaling(const std::string& text);

}  // namespace refocus
