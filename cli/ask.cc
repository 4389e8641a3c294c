// ask: answers from a context, streamed.
#include <unistd.h>

#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <sstream>

#include <nlohmann/json.hpp>

#include "base/input_file.h"
#include "cli/ask_sampling.h"
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
  bool raw = false;
  std::string thinking;
  std::optional<int64_t> thinking_budget;
  std::string conversation;
  bool as_ids = false;
  bool special = false;
  bool ignore_eos = false;
  std::optional<int64_t> max_tokens;
  std::optional<double> temperature;
  std::optional<uint64_t> seed;
  std::optional<int32_t> samples;
  std::optional<int32_t> logprobs;
  std::vector<std::string> stops;
  SamplingOptions sampling;
};

using Json = nlohmann::json;

constexpr int64_t kMaxConversationBytes = int64_t{16} << 20;

Status BadConversation(const std::string& path, size_t line) {
  return FieldError("--conversation", path + " line " + std::to_string(line),
                    "lines such as {\"question\": \"...\", \"answer\": \"...\"}");
}

// What was said before: one exchange a line, oldest first. A file that is not there is a conversation that begins.
Status ReadConversation(const std::string& path, v1::Chat* chat) {
  if (path.empty() || ::access(path.c_str(), F_OK) != 0) return absl::OkStatus();
  REFOCUS_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, "CONFIG_INVALID", kMaxConversationBytes));
  std::istringstream lines(text);
  std::string line;
  for (size_t number = 1; std::getline(lines, line); ++number) {
    const Json exchange = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!exchange.is_object() || !exchange.contains("question") || !exchange["question"].is_string() ||
        !exchange.contains("answer") || !exchange["answer"].is_string()) {
      return BadConversation(path, number);
    }
    v1::Chat::Exchange* out = chat->add_earlier();
    out->set_question((chat->earlier_size() == 1 ? kQuestionGap : "") + exchange["question"].get<std::string>());
    out->set_answer(exchange["answer"].get<std::string>());
  }
  return absl::OkStatus();
}

Status AppendConversation(const std::string& path, const std::string& question, const std::string& answer) {
  std::ofstream out(path, std::ios::app);
  // Text that the model did not end may stop within a character only on the server's side; what came is UTF-8.
  out << Json{{"question", question}, {"answer", answer}}.dump(-1, ' ', false, Json::error_handler_t::replace) << '\n';
  out.flush();
  return out ? absl::OkStatus() : FieldError("--conversation", path, "a file that can be written");
}

Status FillQuestion(const AskOptions& options, const std::string& question, v1::Chat* chat) {
  REFOCUS_RETURN_IF_ERROR(ReadConversation(options.conversation, chat));
  chat->set_question((chat->earlier().empty() ? kQuestionGap : "") + question);
  chat->set_allow_special(options.special);
  if (!options.thinking.empty()) chat->set_thinking(options.thinking == "on");
  if (options.thinking_budget) chat->set_thinking_budget(*options.thinking_budget);
  return absl::OkStatus();
}

Status FillPrompt(const AskOptions& options, const std::string& question, v1::Prompt* prompt) {
  if (options.as_ids) {
    REFOCUS_ASSIGN_OR_RETURN(const auto ids, ParseIds(question));
    prompt->mutable_ids()->mutable_ids()->Add(ids.begin(), ids.end());
    return absl::OkStatus();
  }
  prompt->set_text(question);
  prompt->set_allow_special(options.special);
  return absl::OkStatus();
}

StatusOr<std::string> QuestionOf(const AskOptions& options) {
  return options.question == "-" ? ReadInput("-") : StatusOr<std::string>(options.question);
}

StatusOr<v1::GenerateRequest> MakeRequest(Client& client, const AskOptions& options, const std::string& question) {
  REFOCUS_ASSIGN_OR_RETURN(const v1::Context context, client.GetContext(ContextName(options.name)));
  v1::GenerateRequest request;
  request.set_name(context.name());
  request.set_adapter_id(ResolveAdapter(options.adapter, context));
  request.set_request_id(NewRequestId());
  const bool talks =
      options.chat || !options.thinking.empty() || options.thinking_budget || !options.conversation.empty();
  if (talks || (!options.raw && !options.as_ids && !context.chat_format().empty())) {
    REFOCUS_RETURN_IF_ERROR(FillQuestion(options, question, request.mutable_chat()));
  } else {
    REFOCUS_RETURN_IF_ERROR(FillPrompt(options, question, request.mutable_prompt()));
  }
  if (options.max_tokens) request.set_max_tokens(*options.max_tokens);
  if (options.temperature) request.set_temperature(*options.temperature);
  if (options.seed) request.set_seed(*options.seed);
  if (options.samples) request.set_n(*options.samples);
  if (options.logprobs) request.set_logprobs(*options.logprobs);
  request.set_ignore_eos(options.ignore_eos);
  for (const auto& stop : options.stops) request.add_stop(stop);
  REFOCUS_RETURN_IF_ERROR(FillSampling(options.sampling, &request));
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
            << (summary.reasoning_tokens() > 0 ? FormatCount(summary.reasoning_tokens()) + " of reasoning" : "")
            << (summary.thinking_cut() ? ", which was cut" : "") << (summary.reasoning_tokens() > 0 ? "; " : "")
            << AdapterText(adapter_id, summary.adapter_revision()) << "; " << FormatCount(summary.context_tokens())
            << " + " << FormatCount(summary.prompt_tokens()) << " tokens read, first token after "
            << FormatSeconds(summary.queue_seconds() + summary.prompt_seconds()) << ", then "
            << FormatRate(summary.tokens_per_second()) << " tokens/s";
  if (summary.temperature() > 0) std::cerr << "; temperature " << summary.temperature() << ", seed " << summary.seed();
  std::cerr << SamplingText(summary) << "]" << std::endl;
}

// Prints answers as they come. Of several samples, which come side by side, one follows the other: each streams once
// those before it are whole, and waits here until then.
class Answers {
 public:
  Answers(Client& client, const Settings& settings, const v1::GenerateRequest& request)
      : client_(client), settings_(settings), request_(request) {}

  void Add(const v1::GenerateEvent& event) {
    received_ += event.token_ids_size();
    EmitEvent(settings_, event);
    waiting_[event.sample()].push_back(event);
    for (auto at = waiting_.find(turn_); at != waiting_.end(); at = waiting_.find(turn_)) {
      const std::vector<v1::GenerateEvent> events = std::move(at->second);
      waiting_.erase(at);
      for (const v1::GenerateEvent& next : events) Print(next);
    }
  }
  // The stream broke off: what waits is printed as far as it came.
  void Break() {
    if (!settings_.json) std::cout << std::endl;
    for (const auto& [sample, events] : waiting_) {
      turn_ = sample;
      begun_ = false;
      for (const v1::GenerateEvent& event : events) Print(event);
      if (!settings_.json && !events.back().has_summary()) std::cout << std::endl;
    }
    if (received_ > 0) std::cerr << "[stopped after " << FormatCount(received_) << " tokens]" << std::endl;
  }
  const std::string& text() const { return text_; }

 private:
  void Print(const v1::GenerateEvent& event) {
    text_ += event.text();
    logprobs_.insert(logprobs_.end(), event.logprobs().begin(), event.logprobs().end());
    if (!settings_.json) PrintText(event);
    begun_ = true;
    if (!event.has_summary()) return;
    if (!settings_.json) std::cout << std::endl;
    if (request_.has_logprobs() && !settings_.json) PrintLogprobs(client_, logprobs_);
    if (!settings_.quiet) PrintSummary(event.summary(), request_.adapter_id());
    logprobs_.clear();
    begun_ = thought_ = false;
    ++turn_;
  }
  void PrintText(const v1::GenerateEvent& event) {
    if (request_.n() > 1 && !begun_) std::cout << (turn_ > 0 ? "\n" : "") << "Sample " << turn_ << ":\n" << std::flush;
    if (!settings_.quiet && !event.reasoning().empty()) {
      std::cerr << event.reasoning() << std::flush;
      thought_ = true;
    }
    if (thought_ && !event.text().empty()) {
      std::cerr << "\n\n" << std::flush;
      thought_ = false;
    }
    std::cout << event.text() << std::flush;
  }

  Client& client_;
  const Settings& settings_;
  const v1::GenerateRequest& request_;
  std::map<int32_t, std::vector<v1::GenerateEvent>> waiting_;  // by sample
  int32_t turn_ = 0;      // the sample that streams
  bool begun_ = false;    // something of it was printed
  bool thought_ = false;  // the reasoning, on stderr, has no end yet
  int64_t received_ = 0;
  std::string text_;
  std::vector<v1::TokenLogprob> logprobs_;
};

int Ask(const Settings& settings, const AskOptions& options) {
  InstallInterrupt();
  Client client(settings.client);
  const auto question = QuestionOf(options);
  if (!question.ok()) return Finish("ask", question.status());
  const auto request = MakeRequest(client, options, *question);
  if (!request.ok()) return Finish("ask", request.status());
  Answers answers(client, settings, *request);
  const Status status = client.Generate(*request, [&](const v1::GenerateEvent& event) { answers.Add(event); });
  if (!status.ok()) {
    answers.Break();
    return Finish("ask", status);
  }
  if (!options.conversation.empty()) {
    return Finish("ask", AppendConversation(options.conversation, *question, answers.text()));
  }
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
  auto* chat = verb->add_flag("--chat", o->chat,
                              "Close the user's turn with the question (default for contexts that opened one)");
  auto* raw = verb->add_flag("--raw", o->raw, "QUESTION is continued as it is, whatever the context is");
  auto* ids = verb->add_flag("--ids", o->as_ids, "QUESTION is token ids in decimal, to be continued");
  chat->excludes(raw)->excludes(ids)->group(prompt);
  raw->group(prompt);
  ids->group(prompt);
  verb->add_flag("--special", o->special, "Special tokens' names in the question mean special tokens")->group(prompt);
  auto* conversation = verb->add_option(
      "--conversation", o->conversation,
      "File with what was asked and answered before, one JSON object a line; this exchange is added to it");
  conversation->type_name("FILE")->excludes(raw)->excludes(ids)->group(prompt);
  const std::string thinking = "Reasoning (goes to stderr; the answer to stdout)";
  verb->add_option("--thinking", o->thinking, "on or off, for models that can (as their template does)")
      ->check(CLI::IsMember({"on", "off"}))->excludes(raw)->excludes(ids)->group(thinking);
  verb->add_option("--thinking-budget", o->thinking_budget, "Tokens of reasoning at most, 1 to 65536; then it is ended")
      ->excludes(raw)->excludes(ids)->group(thinking);
  const std::string sampling = "Sampling (defaults are the server's)";
  verb->add_option("--max-tokens", o->max_tokens, "Length of the answer at most, 1 to 65536 (256)")->group(sampling);
  verb->add_option("--temperature", o->temperature, "0: always the most likely token; or 0.01 to 100 (0)")
      ->group(sampling);
  verb->add_option("--seed", o->seed, "Of the sampling (drawn and printed)")->group(sampling);
  verb->add_option("--samples", o->samples,
                   "Answers drawn side by side, 1 to 64, printed one after the other; needs a temperature (1)")
      ->type_name("N")->excludes(conversation)->group(sampling);
  verb->add_option("--stop", o->stops, "End before this text, repeatable")->group(sampling);
  verb->add_flag("--ignore-eos", o->ignore_eos, "Go on after the model's end tokens")->group(sampling);
  verb->add_option("--logprobs", o->logprobs, "Log-probabilities of the tokens and of the N most likely ones, 0 to 20")
      ->type_name("N")->group(sampling);
  AddSamplingOptions(verb, sampling, &o->sampling);
  AddCommonOptions(verb, settings);
  AddEventOptions(verb, settings);
  verb->callback([=] { *run = [=] { return Ask(*settings, *o); }; });
}

}  // namespace refocus::cli
