// How `refocus ask` lets tokens be drawn, beside temperature and seed: options, request fields, what the summary says.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "cli/commands.h"

namespace refocus::cli {

struct SamplingOptions {
  std::optional<int32_t> top_k;
  std::optional<double> top_p;
  std::optional<double> min_p;
  std::optional<double> repetition_penalty;
  std::optional<double> presence_penalty;
  std::optional<double> frequency_penalty;
  std::optional<int64_t> min_tokens;
  std::vector<std::string> logit_bias;  // "ID=VALUE"
  std::vector<uint32_t> stop_token_ids;
  bool prompt_logprobs = false;
};

void AddSamplingOptions(CLI::App* verb, const std::string& group, SamplingOptions* options);

// INVALID_ARGUMENT for a bias that is no "ID=VALUE"; ranges are the server's matter.
Status FillSampling(const SamplingOptions& options, v1::GenerateRequest* request);

// "; top-k 40, top-p 0.9" of what was in effect and is not the default, or "".
std::string SamplingText(const v1::GenerateSummary& summary);

}  // namespace refocus::cli
