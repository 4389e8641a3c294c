#include "base/rope.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <optional>
#include <string_view>

#include "base/config_sources.h"
#include "base/input_file.h"
#include "base/limits.h"

namespace refocus {
namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kMaxFactor = 1e6;
constexpr double kMaxAttentionFactor = 1e3;
constexpr char kRequestAllowed[] =
    "none, or TYPE:FACTOR or TYPE:FACTOR:WINDOW with linear, llama3 or yarn, as yarn:4:32768";

std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

const char* TypeName(RopeType type) {
  switch (type) {
    case RopeType::kDefault: return "none";
    case RopeType::kLinear: return "linear";
    case RopeType::kLlama3: return "llama3";
    case RopeType::kYarn: return "yarn";
    case RopeType::kFactors: return "factors";
  }
  return "?";
}

double Llama3(double frequency, const RopeScaling& s) {
  const double wavelength = 2.0 * kPi / frequency;
  const double original = static_cast<double>(s.original_positions);
  if (wavelength < original / s.high_factor) return frequency;
  if (wavelength > original / s.low_factor) return frequency / s.factor;
  const double kept = (original / wavelength - s.low_factor) / (s.high_factor - s.low_factor);
  return (1.0 - kept) * frequency / s.factor + kept * frequency;
}

// Share of dimension i that is divided by the factor.
class YarnRamp {
 public:
  YarnRamp(double theta, int64_t head_dim, const RopeScaling& s) {
    const double dim = static_cast<double>(head_dim);
    const auto dimension_of = [&](double turns) {  // that turns so often over the original window
      return dim * std::log(static_cast<double>(s.original_positions) / (turns * 2.0 * kPi)) / (2.0 * std::log(theta));
    };
    begin_ = dimension_of(s.beta_fast);
    end_ = dimension_of(s.beta_slow);
    if (s.truncate) {
      begin_ = std::floor(begin_);
      end_ = std::ceil(end_);
    }
    begin_ = std::max(begin_, 0.0);
    end_ = std::min(end_, dim - 1.0);
    if (begin_ == end_) end_ += 0.001;
  }
  double At(int64_t i) const { return std::clamp((static_cast<double>(i) - begin_) / (end_ - begin_), 0.0, 1.0); }

 private:
  double begin_, end_;
};

bool ParseNumber(std::string_view text, double* out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  return error == std::errc() && end == text.data() + text.size() && std::isfinite(*out);
}

bool ParseNumber(std::string_view text, int64_t* out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

std::string RopeScaling::Text() const {
  std::string text = TypeName(type);
  if (type == RopeType::kDefault || type == RopeType::kFactors) return text;
  text += ":" + Number(factor);
  return original_positions > 0 ? text + ":" + std::to_string(original_positions) : text;
}

std::string RopeScaling::ExactText() const {
  std::string text = TypeName(type);
  const auto add = [&text](double value) {
    char number[40];
    std::snprintf(number, sizeof(number), " %a", value);
    text += number;
  };
  switch (type) {
    case RopeType::kDefault: break;
    case RopeType::kLinear: add(factor); break;
    case RopeType::kLlama3:
      for (const double value : {factor, static_cast<double>(original_positions), low_factor, high_factor}) add(value);
      break;
    case RopeType::kYarn:
      for (const double value : {factor, static_cast<double>(original_positions), beta_fast, beta_slow,
                                 truncate ? 1.0 : 0.0, attention_factor}) {
        add(value);
      }
      break;
    case RopeType::kFactors:
      for (const float value : factors) add(static_cast<double>(value));
      break;
  }
  return text;
}

Status RopeScaling::Validate(const std::string& source, double theta, int64_t head_dim) const {
  const auto refuse = [&](const char* field, double got, const std::string& allowed) {
    return ConfigError(source, std::string("rope scaling ") + TypeName(type) + ": " + field, Number(got), allowed);
  };
  const auto in = [](double value, double least, double most) { return value >= least && value <= most; };  // no NaN
  if (!in(factor, 1.0, kMaxFactor)) return refuse("factor", factor, "1 to 1e6");
  if (!in(attention_factor, 1.0 / kMaxAttentionFactor, kMaxAttentionFactor)) {
    return refuse("attention_factor", attention_factor, "0.001 to 1000");
  }
  const bool windowed = type == RopeType::kLlama3 || type == RopeType::kYarn;
  if (original_positions < (windowed ? 1 : 0) || original_positions > kMaxContextTokens) {
    return refuse("original window", static_cast<double>(original_positions),
                  "1 to " + std::to_string(kMaxContextTokens));
  }
  if (type == RopeType::kLlama3) {
    if (!in(low_factor, 1e-6, 1e6)) return refuse("low_freq_factor", low_factor, "1e-6 to 1e6");
    if (!(in(high_factor, 1e-6, 1e6) && high_factor > low_factor)) {
      return refuse("high_freq_factor", high_factor, "above low_freq_factor (" + Number(low_factor) + "), at most 1e6");
    }
  }
  if (type == RopeType::kYarn) {
    if (theta <= 1.0) return refuse("rope_theta", theta, "above 1");
    if (!in(beta_slow, 1e-6, 1e6)) return refuse("beta_slow", beta_slow, "1e-6 to 1e6");
    if (!(in(beta_fast, 1e-6, 1e6) && beta_fast > beta_slow)) {
      return refuse("beta_fast", beta_fast, "above beta_slow (" + Number(beta_slow) + "), at most 1e6");
    }
  }
  if (type == RopeType::kFactors) {
    if (static_cast<int64_t>(factors.size()) != head_dim / 2) {
      return refuse("numbers", static_cast<double>(factors.size()), std::to_string(head_dim / 2) + " (half a head)");
    }
    for (const float value : factors) {
      if (!in(static_cast<double>(value), 1e-6, kMaxFactor)) {
        return refuse("factor", static_cast<double>(value), "1e-6 to 1e6");
      }
    }
  }
  return absl::OkStatus();
}

double YarnAttentionFactor(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

std::vector<float> InverseFrequencies(double theta, int64_t head_dim, const RopeScaling& scaling) {
  std::vector<float> frequencies;
  std::optional<YarnRamp> ramp;
  if (scaling.type == RopeType::kYarn) ramp.emplace(theta, head_dim, scaling);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    double frequency = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    switch (scaling.type) {
      case RopeType::kDefault: break;
      case RopeType::kLinear: frequency /= scaling.factor; break;
      case RopeType::kLlama3: frequency = Llama3(frequency, scaling); break;
      case RopeType::kYarn: frequency *= ramp->At(i) / scaling.factor + (1.0 - ramp->At(i)); break;
      case RopeType::kFactors: frequency /= static_cast<double>(scaling.factors[static_cast<size_t>(i)]); break;
    }
    frequencies.push_back(static_cast<float>(frequency));
  }
  return frequencies;
}

StatusOr<RopeScaling> ParseRopeScaling(const std::string& text) {
  RopeScaling scaling;
  if (text.empty() || text == "none") return scaling;
  const Status refused = ConfigError("--rope-scaling", "value", Quoted(text), kRequestAllowed);
  const size_t first = text.find(':');
  if (first == std::string::npos) return refused;
  const std::string_view type = std::string_view(text).substr(0, first);
  std::string_view factor = std::string_view(text).substr(first + 1), window;
  if (const size_t second = factor.find(':'); second != std::string_view::npos) {
    window = factor.substr(second + 1);
    factor = factor.substr(0, second);
    if (!ParseNumber(window, &scaling.original_positions) || scaling.original_positions < 1) return refused;
  }
  if (type == "linear") {
    scaling.type = RopeType::kLinear;
  } else if (type == "llama3") {
    scaling.type = RopeType::kLlama3;
  } else if (type == "yarn") {
    scaling.type = RopeType::kYarn;
  } else {
    return refused;
  }
  if (!ParseNumber(factor, &scaling.factor) || scaling.factor < 1.0 || scaling.factor > kMaxFactor) return refused;
  if (scaling.type == RopeType::kYarn) scaling.attention_factor = YarnAttentionFactor(scaling.factor);
  return scaling;
}

}  // namespace refocus
