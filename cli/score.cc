// score: how likely given continuations of a context are.
#include <cmath>
#include <iostream>
#include <optional>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/interrupt.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

struct ScoreOptions {
  std::string name;
  std::vector<std::string> targets;
  std::string target_file;
  int64_t skip_bytes = 0;
  std::optional<int64_t> max_bytes;
  int64_t parts = 1;
  std::string prompt;
  std::string question;
  std::string thinking;
  AdapterChoice adapter;
  bool as_ids = false;
  bool token_logprobs = false;
};

Status Fill(const ScoreOptions& options, const std::string& text, v1::Prompt* prompt) {
  if (!options.as_ids) {
    prompt->set_text(text);
    return absl::OkStatus();
  }
  REFOCUS_ASSIGN_OR_RETURN(const auto ids, ParseIds(text));
  prompt->mutable_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  return absl::OkStatus();
}

StatusOr<std::vector<v1::ScoreRequest>> MakeRequests(Client& client, const ScoreOptions& options) {
  std::vector<std::string> targets = options.targets;
  if (!options.target_file.empty()) {
    REFOCUS_ASSIGN_OR_RETURN(const std::string text, ReadInput(options.target_file));
    targets.emplace_back(CutLines(text, options.skip_bytes, options.max_bytes));
  }
  REFOCUS_ASSIGN_OR_RETURN(const v1::Context context, client.GetContext(ContextName(options.name)));
  const std::string adapter = ResolveAdapter(options.adapter, context);
  std::vector<v1::ScoreRequest> requests;
  for (const auto& target : targets) {
    auto& request = requests.emplace_back();
    request.set_name(context.name());
    request.set_adapter_id(adapter);
    if (!options.question.empty()) {
      request.mutable_chat()->set_question(kQuestionGap + options.question);
      if (!options.thinking.empty()) request.mutable_chat()->set_thinking(options.thinking == "on");
    }
    if (!options.prompt.empty()) REFOCUS_RETURN_IF_ERROR(Fill(options, options.prompt, request.mutable_prompt()));
    REFOCUS_RETURN_IF_ERROR(Fill(options, target, request.mutable_target()));
    request.set_token_logprobs(options.token_logprobs || options.parts > 1);
    request.set_target_id(std::to_string(requests.size()));
  }
  return requests;
}

void AddRow(Table* table, const std::string& target, int64_t tokens, double sum, const std::string& greedy,
            const std::string& seconds) {
  const double loss = -sum / static_cast<double>(tokens);
  table->Add({target, FormatCount(tokens), FormatFixed(loss, 4), FormatFixed(std::exp(loss), 2), FormatFixed(sum, 3),
              greedy, seconds});
}

int Score(const Settings& settings, const ScoreOptions& options) {
  InstallInterrupt();
  Client client(settings.client);
  const auto requests = MakeRequests(client, options);
  if (!requests.ok()) return Finish("score", requests.status());
  if (requests->empty()) {
    return Finish("score", Error(StatusCode::kInvalidArgument, "CONFIG_INVALID",
                                 "targets: got none, allowed --target TEXT or --target-file FILE"));
  }
  Table table({"target", "tokens", "nats/token", "perplexity", "sum, nats", "greedy", "seconds"});
  Progress progress(std::cerr, StderrStyle(settings.quiet), "score", "targets");
  int64_t done = 0, tokens = 0, revision = 0;
  double sum = 0, seconds = 0;
  const Status status = client.Score(*requests, [&](const v1::ScoreEvent& event) {
    ++done;
    if (requests->size() > 1) progress.Update(done, static_cast<int64_t>(requests->size()), 0, -1);
    EmitEvent(settings, event);
    const int64_t count = event.token_count();
    for (int64_t part = 0; options.parts > 1 && part < options.parts; ++part) {
      const int64_t begin = count * part / options.parts;
      const int64_t end = count * (part + 1) / options.parts;
      double part_sum = 0;
      for (int64_t i = begin; i < end && i < event.token_logprobs_size(); ++i)
        part_sum += event.token_logprobs(static_cast<int>(i));
      if (end > begin) {
        AddRow(&table, "  tokens " + FormatCount(begin) + " to " + FormatCount(end), end - begin, part_sum, "-", "-");
      }
    }
    AddRow(&table, event.target_id(), count, event.sum_logprob(), event.is_greedy() ? "yes" : "no",
           FormatFixed(event.seconds(), 2));
    if (options.token_logprobs && !settings.json) {
      for (const float logprob : event.token_logprobs()) std::cout << FormatFixed(logprob, 4) << '\n';
    }
    tokens += count;
    sum += event.sum_logprob();
    seconds += event.seconds();
    revision = event.adapter_revision();
  });
  progress.Finish();
  if (!status.ok() || settings.json) return Finish("score", status);
  if (done > 1) AddRow(&table, "all", tokens, sum, "-", FormatFixed(seconds, 2));
  table.Print(std::cout);
  if (!settings.quiet) std::cerr << "[" << AdapterText(requests->front().adapter_id(), revision) << "]" << std::endl;
  return Finish("score", status);
}

}  // namespace

void AddScore(CLI::App& app, Settings* settings, Run* run) {
  auto* verb = app.add_subcommand("score", "Log-probability of given continuations of a context");
  const auto o = std::make_shared<ScoreOptions>();
  verb->add_option("NAME", o->name, "Context")->required();
  AddAdapterOptions(verb, &o->adapter);
  const std::string targets = "Targets";
  verb->add_option("--target", o->targets, "Text to score, repeatable")->group(targets);
  verb->add_option("--target-file", o->target_file, "File to score, '-' for standard input")->group(targets);
  verb->add_option("--skip-bytes", o->skip_bytes, "Of the file: begin at the first line that starts there or later")
      ->check(CLI::NonNegativeNumber)->capture_default_str()->group(targets);
  verb->add_option("--max-bytes", o->max_bytes,
                   "Of the file: end at the first line that starts so many bytes later (all)")
      ->check(CLI::NonNegativeNumber)
      ->group(targets);
  auto* prompt = verb->add_option("--prompt", o->prompt, "Text between the context and the target, not scored");
  prompt->group(targets);
  auto* question = verb->add_option("--question", o->question,
                                    "Score the targets as answers to it, in a context that opened a conversation");
  question->excludes(prompt)->group(targets);
  verb->add_option("--thinking", o->thinking, "on or off: whether a model that reasons would do so before them")
      ->check(CLI::IsMember({"on", "off"}))->needs(question)->group(targets);
  verb->add_flag("--ids", o->as_ids, "Targets and prompt are token ids in decimal")->group(targets);
  const std::string output = "Output";
  verb->add_option("--parts", o->parts, "Rows in the table for so many equal parts of a target")
      ->check(CLI::Range(1, 1000))->capture_default_str()->group(output);
  verb->add_flag("--token-logprobs", o->token_logprobs, "Print every token's log-probability")->group(output);
  AddCommonOptions(verb, settings);
  AddEventOptions(verb, settings);
  verb->callback([=] { *run = [=] { return Score(*settings, *o); }; });
}

}  // namespace refocus::cli
