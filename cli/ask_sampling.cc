#include "cli/ask_sampling.h"

#include <charconv>
#include <cmath>
#include <sstream>

namespace refocus::cli {

void AddSamplingOptions(CLI::App* verb, const std::string& group, SamplingOptions* options) {
  verb->add_option("--top-k", options->top_k, "Draw from the K most likely tokens; 0: from all (0)")
      ->type_name("K")->group(group);
  verb->add_option("--top-p", options->top_p, "From the fewest tokens that have this probability together (1)")
      ->group(group);
  verb->add_option("--min-p", options->min_p, "From tokens this many times as likely as the likeliest, 0 to 1 (0)")
      ->group(group);
  verb->add_option("--repetition-penalty", options->repetition_penalty,
                   "Above 1: make tokens of the prompt and the answer less likely (1)")->group(group);
  verb->add_option("--presence-penalty", options->presence_penalty,
                   "Off the logits of tokens in the answer, -10 to 10 (0)")->group(group);
  verb->add_option("--frequency-penalty", options->frequency_penalty,
                   "The same for every time that they occur (0)")->group(group);
  verb->add_option("--logit-bias", options->logit_bias, "Add VALUE to a token's logit, repeatable")
      ->type_name("ID=VALUE")->allow_extra_args(false)->group(group);
  verb->add_option("--min-tokens", options->min_tokens, "Draw no end token before as many tokens (0)")->group(group);
  verb->add_option("--stop-token-id", options->stop_token_ids, "End at this token, repeatable")
      ->type_name("ID")->allow_extra_args(false)->group(group);
  verb->add_flag("--prompt-logprobs", options->prompt_logprobs,
                 "Log-probabilities of the question's tokens (in --json)")->group(group);
}

Status FillSampling(const SamplingOptions& options, v1::GenerateRequest* request) {
  if (options.top_k) request->set_top_k(*options.top_k);
  if (options.top_p) request->set_top_p(*options.top_p);
  if (options.min_p) request->set_min_p(*options.min_p);
  if (options.repetition_penalty) request->set_repetition_penalty(*options.repetition_penalty);
  if (options.presence_penalty) request->set_presence_penalty(*options.presence_penalty);
  if (options.frequency_penalty) request->set_frequency_penalty(*options.frequency_penalty);
  if (options.min_tokens) request->set_min_tokens(*options.min_tokens);
  request->set_prompt_logprobs(options.prompt_logprobs);
  for (const uint32_t id : options.stop_token_ids) request->add_stop_token_ids(id);
  for (const std::string& text : options.logit_bias) {
    const size_t equals = text.find('=');
    const bool has_both = equals != std::string::npos && equals > 0 && equals + 1 < text.size();
    const char *const split = text.data() + (has_both ? equals : 0), *const end = text.data() + text.size();
    uint32_t id = 0;
    float value = 0;
    if (!has_both || std::from_chars(text.data(), split, id).ptr != split ||
        std::from_chars(split + 1, end, value).ptr != end) {
      return FieldError("--logit-bias", "'" + text + "'", "ID=VALUE, such as 42=-5");
    }
    if (!request->mutable_logit_bias()->insert({id, value}).second) {
      return FieldError("--logit-bias", "'" + text + "'", "every token id once");
    }
  }
  return absl::OkStatus();
}

std::string SamplingText(const v1::GenerateSummary& summary) {
  std::ostringstream out;
  const auto add = [&](const char* name, double value, double unless) {
    if (value != unless) out << (out.tellp() > 0 ? ", " : "; ") << name << ' ' << value;
  };
  add("top-k", summary.top_k(), 0);
  add("top-p", summary.top_p(), 1);
  add("min-p", summary.min_p(), 0);
  add("repetition penalty", summary.repetition_penalty(), 1);
  add("presence penalty", summary.presence_penalty(), 0);
  add("frequency penalty", summary.frequency_penalty(), 0);
  add("min-tokens", static_cast<double>(summary.min_tokens()), 0);
  add("biased tokens", summary.logit_bias_size(), 0);
  return out.str();
}

}  // namespace refocus::cli
