// ask: one answer from a context, streamed.
#include <iostream>
#include <map>
#include <optional>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/interrupt.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

struct AskOptions {
  std::string name;
  std::string question;
  AdapterChoice adapter;
  bool chat = false;
  bool no_chat = false;
  bool as_ids = false;
  bool special = false;
  bool ignore_eos = false;
  std::optional<int64_t> max_tokens;
  std::optional<double> temperature;
  std::optional<uint64_t> seed;
  std::optional<int32_t> logprobs;
  std::vector<std::string> stops;
};

// In a conversation the question's own text stays plain and only the markers become special tokens, so the
// prompt goes as ids.
Status FillPrompt(Client& client, const AskOptions& options, bool chat, const std::string& question,
                  v1::Prompt* prompt) {
  if (options.as_ids) {
    REFOCUS_ASSIGN_OR_RETURN(const auto ids, ParseIds(question));
    prompt->mutable_ids()->mutable_ids()->Add(ids.begin(), ids.end());
    return absl::OkStatus();
  }
  if (!chat) {
    prompt->set_text(question);
    prompt->set_allow_special(options.special);
    return absl::OkStatus();
  }
  REFOCUS_ASSIGN_OR_RETURN(const ChatMarkers markers, FindChatMarkers(client));
  REFOCUS_ASSIGN_OR_RETURN(auto ids, client.Tokenize("\n\n" + question, false, false));
  REFOCUS_ASSIGN_OR_RETURN(const auto closing, client.Tokenize(markers.close_user, true, false));
  ids.insert(ids.end(), closing.begin(), closing.end());
  prompt->mutable_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  return absl::OkStatus();
}

StatusOr<v1::GenerateRequest> MakeRequest(Client& client, const AskOptions& options) {
  std::string question = options.question;
  if (question == "-") {
    REFOCUS_ASSIGN_OR_RETURN(question, ReadInput("-"));
  }
  REFOCUS_ASSIGN_OR_RETURN(const v1::Context context, client.GetContext(ContextName(options.name)));
  v1::GenerateRequest request;
  request.set_name(context.name());
  request.set_adapter_id(ResolveAdapter(options.adapter, context));
  request.set_request_id(NewRequestId());
  const bool chat = options.chat || (!options.no_chat && !options.as_ids && context.labels().count(kChatLabel) > 0);
  REFOCUS_RETURN_IF_ERROR(FillPrompt(client, options, chat, question, request.mutable_prompt()));
  if (options.max_tokens) request.set_max_tokens(*options.max_tokens);
  if (options.temperature) request.set_temperature(*options.temperature);
  if (options.seed) request.set_seed(*options.seed);
  if (options.logprobs) request.set_logprobs(*options.logprobs);
  request.set_ignore_eos(options.ignore_eos);
  for (const auto& stop : options.stops) request.add_stop(stop);
  return request;
}

void PrintLogprobs(Client& client, const std::vector<v1::TokenLogprob>& tokens) {
  std::map<uint32_t, std::string> known;
  const auto text = [&](uint32_t id) {
    auto [at, is_new] = known.try_emplace(id);
    if (is_new) {
      const auto piece = client.Detokenize({id});
      at->second = piece.ok() ? *piece : "?";
      for (size_t i = 0; (i = at->second.find('\n', i)) != std::string::npos; i += 2) at->second.replace(i, 1, "\\n");
    }
    return "'" + at->second + "'";
  };
  Table table({"token", "id", "log-probability", "most likely"});
  for (const auto& token : tokens) {
    std::string top;
    for (const auto& other : token.top()) {
      top.append(top.empty() ? "" : "  ").append(text(other.id())).append(" ").append(FormatFixed(other.logprob(), 3));
    }
    table.Add({text(token.id()), std::to_string(token.id()), FormatFixed(token.logprob(), 4), top});
  }
  table.Print(std::cout);
}

std::string FinishText(const v1::GenerateSummary& summary) {
  switch (summary.finish_reason()) {
    case v1::FINISH_EOS: return "the model ended";
    case v1::FINISH_STOP: return summary.stop().empty() ? "stop token" : "stop '" + summary.stop() + "'";
    case v1::FINISH_LENGTH: return "max-tokens reached";
    default: return "ended";
  }
}

void PrintSummary(const v1::GenerateSummary& summary, const std::string& adapter_id) {
  std::cerr << "[" << FormatCount(summary.generated_tokens()) << " tokens, " << FinishText(summary) << "; "
            << AdapterText(adapter_id, summary.adapter_revision()) << "; " << FormatCount(summary.context_tokens())
            << " + " << FormatCount(summary.prompt_tokens()) << " tokens read, first token after "
            << FormatSeconds(summary.queue_seconds() + summary.prompt_seconds()) << ", then "
            << FormatRate(summary.tokens_per_second()) << " tokens/s";
  if (summary.temperature() > 0) std::cerr << "; temperature " << summary.temperature() << ", seed " << summary.seed();
  std::cerr << "]" << std::endl;
}

int Ask(const Settings& settings, const AskOptions& options) {
  InstallInterrupt();
  Client client(settings.client);
  const auto request = MakeRequest(client, options);
  if (!request.ok()) return Finish("ask", request.status());
  int64_t received = 0;
  std::vector<v1::TokenLogprob> logprobs;
  v1::GenerateSummary summary;
  const Status status = client.Generate(*request, [&](const v1::GenerateEvent& event) {
    received += event.token_ids_size();
    logprobs.insert(logprobs.end(), event.logprobs().begin(), event.logprobs().end());
    if (event.has_summary()) summary = event.summary();
    EmitEvent(settings, event);
    if (!settings.json) std::cout << event.text() << std::flush;
  });
  if (!settings.json) std::cout << std::endl;
  if (!status.ok()) {
    if (received > 0) std::cerr << "[stopped after " << FormatCount(received) << " tokens]" << std::endl;
    return Finish("ask", status);
  }
  if (options.logprobs && !settings.json) PrintLogprobs(client, logprobs);
  if (!settings.quiet) PrintSummary(summary, request->adapter_id());
  return Finish("ask", status);
}

}  // namespace

void AddAsk(CLI::App& app, Settings* settings, Run* run) {
  auto* verb = app.add_subcommand("ask", "Answer a question from a context; the answer streams to stdout");
  const auto o = std::make_shared<AskOptions>();
  verb->add_option("NAME", o->name, "Context")->required();
  verb->add_option("QUESTION", o->question, "Text that follows the context, '-' for standard input")->required();
  AddAdapterOptions(verb, &o->adapter);
  const std::string prompt = "Prompt";
  auto* chat =
      verb->add_flag("--chat", o->chat, "Close the user's turn with the question (default for contexts created so)");
  verb->add_flag("--no-chat", o->no_chat, "Plain continuation, whatever the context is")->excludes(chat)->group(prompt);
  chat->group(prompt);
  verb->add_flag("--ids", o->as_ids, "QUESTION is token ids in decimal")->excludes(chat)->group(prompt);
  verb->add_flag("--special", o->special, "Special tokens' names in the question mean special tokens (not with --chat)")
      ->excludes(chat)->group(prompt);
  const std::string sampling = "Sampling (defaults are the server's)";
  verb->add_option("--max-tokens", o->max_tokens, "Length of the answer at most, 1 to 65536 (256)")->group(sampling);
  verb->add_option("--temperature", o->temperature, "0: always the most likely token; or 0.01 to 100 (0)")
      ->group(sampling);
  verb->add_option("--seed", o->seed, "Of the sampling (drawn and printed)")->group(sampling);
  verb->add_option("--stop", o->stops, "End before this text, repeatable")->group(sampling);
  verb->add_flag("--ignore-eos", o->ignore_eos, "Go on after the model's end tokens")->group(sampling);
  verb->add_option("--logprobs", o->logprobs, "Log-probabilities of the tokens and of the N most likely ones, 0 to 20")
      ->type_name("N")->group(sampling);
  AddCommonOptions(verb, settings);
  AddEventOptions(verb, settings);
  verb->callback([=] { *run = [=] { return Ask(*settings, *o); }; });
}

}  // namespace refocus::cli
