// adapt: gradient steps on the queries of one context, live.
#include <iostream>
#include <optional>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

struct AdaptOptions {
  std::string name;
  std::string adapter = "default";
  std::string request_id;
  std::optional<int64_t> steps, span_tokens, spans_per_step, probe_spans;
  std::optional<double> learning_rate, weight_decay, clip_norm, beta1, beta2, epsilon, max_probe_rise;
  std::optional<uint64_t> seed;
  std::vector<std::string> spans;
  std::optional<int64_t> probe_every, patience;
  bool recall = false;
  std::optional<double> recall_after;
  std::optional<int64_t> behind;
  bool surprisal = false;
  std::optional<int64_t> candidates;
  std::optional<double> surprisal_share, surprisal_skip;
  bool automatic = false;
  bool keep_best = false;
  std::optional<std::string> kind, optimizer, schedule;
  std::optional<int64_t> lora_rank, warmup_steps;
  std::optional<double> lora_alpha, momentum, max_seconds;
  std::string base_adapter;
  bool continue_adapter = false;
  bool validate_only = false;
  bool keep_going = false;
};

StatusOr<v1::AdaptContextRequest> MakeRequest(const AdaptOptions& options) {
  v1::AdaptContextRequest request;
  request.set_name(ContextName(options.name));
  request.set_adapter_id(options.adapter);
  request.set_request_id(options.request_id.empty() ? NewRequestId() : options.request_id);
  request.set_on_disconnect(options.keep_going ? v1::CONTINUE : v1::CANCEL);
  if (options.steps) request.set_steps(*options.steps);
  if (options.span_tokens) request.set_span_tokens(*options.span_tokens);
  if (options.spans_per_step) request.set_spans_per_step(*options.spans_per_step);
  if (options.probe_spans) request.set_probe_spans(*options.probe_spans);
  if (options.learning_rate) request.set_learning_rate(*options.learning_rate);
  if (options.weight_decay) request.set_weight_decay(*options.weight_decay);
  if (options.clip_norm) request.set_clip_norm(*options.clip_norm);
  if (options.beta1) request.set_beta1(*options.beta1);
  if (options.beta2) request.set_beta2(*options.beta2);
  if (options.epsilon) request.set_epsilon(*options.epsilon);
  if (options.max_probe_rise) request.set_max_probe_rise(*options.max_probe_rise);
  if (options.seed) request.set_seed(*options.seed);
  if (options.kind) request.set_kind(*options.kind == "lora" ? v1::LORA : v1::FULL);
  if (options.lora_rank) request.set_lora_rank(*options.lora_rank);
  if (options.lora_alpha) request.set_lora_alpha(*options.lora_alpha);
  if (options.optimizer) request.set_optimizer(*options.optimizer == "sgd" ? v1::SGD : v1::ADAMW);
  if (options.momentum) request.set_momentum(*options.momentum);
  if (options.schedule) {
    request.set_schedule(*options.schedule == "linear"   ? v1::LINEAR
                         : *options.schedule == "cosine" ? v1::COSINE
                                                         : v1::CONSTANT);
  }
  if (options.warmup_steps) request.set_warmup_steps(*options.warmup_steps);
  if (options.max_seconds) request.set_max_seconds(*options.max_seconds);
  if (options.probe_every) request.set_probe_every(*options.probe_every);
  if (options.patience) request.set_patience(*options.patience);
  request.set_keep_best(options.keep_best);
  if (options.recall) request.mutable_recall_rows();
  if (options.behind) request.set_behind(*options.behind);
  if (options.recall_after) request.mutable_recall_rows()->set_after(*options.recall_after);
  if (options.surprisal) request.mutable_surprisal_spans();
  if (options.candidates) request.mutable_surprisal_spans()->set_candidates(*options.candidates);
  if (options.surprisal_share) request.mutable_surprisal_spans()->set_share(*options.surprisal_share);
  if (options.surprisal_skip) request.mutable_surprisal_spans()->set_skip(*options.surprisal_skip);
  if (options.automatic) request.mutable_automatic();
  request.set_base_adapter(options.base_adapter);
  request.set_continue_adapter(options.continue_adapter);
  request.set_validate_only(options.validate_only);
  for (const auto& text : options.spans) {
    long long start = 0;
    long long length = 0;
    int used = 0;
    if (std::sscanf(text.c_str(), "%lld:%lld%n", &start, &length, &used) != 2 ||
        used != static_cast<int>(text.size())) {
      return FieldError("--span", text, "START:LENGTH, two decimal numbers");
    }
    auto* span = request.mutable_explicit_spans()->add_spans();
    span->set_start(start);
    span->set_length(length);
  }
  return request;
}

// Prints what happens and keeps what the closing table needs.
class AdaptView {
 public:
  AdaptView(const Settings& settings, const AdaptOptions& options)
      : settings_(settings), options_(options), progress_(std::cerr, StderrStyle(settings.quiet), "adapt", "steps") {}

  void OnEvent(const v1::AdaptEvent& event) {
    EmitEvent(settings_, event);
    switch (event.event_case()) {
      case v1::AdaptEvent::kEffective:
        OnEffective(event.effective());
        if (event.has_forecast()) OnForecast(event.forecast());
        break;
      case v1::AdaptEvent::kProbeLossBefore:
        progress_.Line("held-out spans before: " + FormatFixed(event.probe_loss_before(), 4) + " nats per token");
        break;
      case v1::AdaptEvent::kCandidates: OnCandidates(event.candidates()); break;
      case v1::AdaptEvent::kStep: OnStep(event.step()); break;
      case v1::AdaptEvent::kProbe:
        progress_.Line(std::string("held-out spans behind ") + (event.probe().trial() ? "trial " : "step ") +
                       std::to_string(event.probe().step()) + ": " +
                       FormatFixed(event.probe().loss(), 4) + (event.probe().best() ? ", the best so far" : ""));
        break;
      case v1::AdaptEvent::kProbeLossAfter:
        progress_.Line("held-out spans after:  " + FormatFixed(event.probe_loss_after(), 4) + " nats per token");
        break;
      case v1::AdaptEvent::kAdapter:
        adapter_ = event.adapter();
        usage_ = event.usage();
        if (event.out_of_time()) progress_.Line("--max-seconds passed: committed what there was");
        if (event.out_of_patience()) progress_.Line("--patience: no better probe, so the steps ended");
        break;
      case v1::AdaptEvent::EVENT_NOT_SET: break;
    }
  }

  void PrintResult() {
    progress_.Finish();
    if (settings_.json || options_.validate_only) return;
    Table losses({"nats per token", "before", "after"});
    if (adapter_.has_probe_loss_before()) {
      losses.Add({"held-out spans", FormatFixed(adapter_.probe_loss_before(), 4),
                  FormatFixed(adapter_.probe_loss_after(), 4)});
    }
    if (seen_ > 0) {
      losses.Add({"first and last step", FormatFixed(adapter_.first_loss(), 4), FormatFixed(adapter_.last_loss(), 4)});
    }
    losses.Print(std::cout);
    std::cout << '\n';
    Table table({"phase", "tokens", "seconds", "tokens/s", "queued s", "memory per rank"});
    std::string memory;
    for (const int64_t bytes : usage_.rank_memory_bytes()) memory += (memory.empty() ? "" : ", ") + FormatBytes(bytes);
    table.Add({"adapt", FormatCount(usage_.tokens()), FormatFixed(usage_.seconds(), 2),
               FormatRate(usage_.tokens_per_second()), FormatFixed(usage_.queue_seconds(), 2),
               memory.empty() ? "-" : memory});
    table.Print(std::cout);
    std::cout << AdapterText(adapter_.id(), adapter_.revision()) << ", " << FormatCount(adapter_.steps())
              << " steps, hash " << adapter_.delta_hash() << std::endl;
  }

  // The server has taken the request.
  bool begun() const { return steps_ > 0; }

 private:
  void OnEffective(const v1::AdaptEvent::Effective& effective) {
    steps_ = effective.steps();
    char text[256];
    std::snprintf(text, sizeof(text),
                  "adapt: %lld steps of %lld x %lld tokens, learning rate %g, decay %g, clip %g, seed %llu",
                  static_cast<long long>(effective.steps()), static_cast<long long>(effective.spans_per_step()),
                  static_cast<long long>(effective.span_tokens()), effective.learning_rate(), effective.weight_decay(),
                  effective.clip_norm(), static_cast<unsigned long long>(effective.seed()));
    std::string line = text;
    if (effective.kind() == v1::LORA) {
      std::snprintf(text, sizeof(text), ", LoRA of rank %lld, alpha %g", static_cast<long long>(effective.lora_rank()),
                    effective.lora_alpha());
      line += text;
    }
    if (effective.optimizer() == v1::SGD) line += ", SGD";
    if (effective.recall_rows() > 0) line += ", of " + FormatCount(effective.recall_rows()) + " rows that recall";
    if (effective.behind() > 0) line += ", read within " + FormatCount(effective.behind()) + " tokens behind the text";
    if (effective.candidates() > 0) line += ", by surprisal among " + FormatCount(effective.candidates()) + " spans";
    if (effective.keep_best()) {
      line += ", keeping the best of a probe every " + std::to_string(effective.probe_every()) + " steps";
    }
    if (effective.schedule() != v1::CONSTANT) line += effective.schedule() == v1::LINEAR ? ", linear" : ", cosine";
    if (effective.warmup_steps() > 0) line += ", " + std::to_string(effective.warmup_steps()) + " warm-up steps";
    progress_.Line(line);
  }

  void OnCandidates(const v1::AdaptEvent::Candidates& candidates) {
    double all = 0, of_chosen = 0;
    int chosen = 0;
    for (int i = 0; i < candidates.losses_size(); ++i) {
      all += candidates.losses(i);
      if (!candidates.chosen(i)) continue;
      of_chosen += candidates.losses(i);
      ++chosen;
    }
    const int measured = candidates.losses_size();
    progress_.Line("spans by surprisal: " + FormatCount(chosen) + " of " + FormatCount(measured) + ", " +
                   FormatFixed(of_chosen / std::max(1, chosen), 4) + " nats per token against " +
                   FormatFixed(all / std::max(1, measured), 4) + " of all");
  }

  void OnForecast(const v1::AdaptEvent::Forecast& forecast) {
    if (settings_.json) return;
    std::cout << "would take " << FormatBytes(forecast.adapting_bytes()) << " a rank while adapting and keep "
              << FormatBytes(forecast.adapter_bytes()) << ", free " << FormatBytes(forecast.free_bytes());
    if (forecast.has_seconds()) std::cout << "; about " << FormatFixed(forecast.seconds(), 1) << " s";
    std::cout << std::endl;
  }

  void OnStep(const v1::AdaptEvent::Step& step) {
    seconds_ += step.step_seconds();
    const double per_step = seconds_ / static_cast<double>(++seen_);
    const std::string total = std::to_string(steps_);
    std::string number = std::to_string(step.step());
    number.insert(0, total.size() - std::min(total.size(), number.size()), ' ');
    // Up to 64 lines in all.
    if (steps_ <= 64 || step.step() % ((steps_ + 63) / 64) == 0 || step.step() == 1 || step.step() == steps_) {
      progress_.Line("step " + number + "/" + total + "  loss " + FormatFixed(step.loss(), 4) + "  gradient norm " +
                     FormatFixed(step.grad_norm(), 4) + "  " + FormatFixed(step.step_seconds(), 3) + " s");
    }
    if (StderrStyle(settings_.quiet).terminal) {
      progress_.Update(step.step(), steps_, 0, per_step * static_cast<double>(steps_ - step.step()),
                       "loss " + FormatFixed(step.loss(), 4));
    }
  }

  const Settings& settings_;
  const AdaptOptions& options_;
  Progress progress_;
  int64_t steps_ = 0;
  int64_t seen_ = 0;
  double seconds_ = 0;
  v1::Adapter adapter_;
  v1::PhaseUsage usage_;
};

int Adapt(const Settings& settings, const AdaptOptions& options) {
  InstallInterrupt();
  const auto request = MakeRequest(options);
  if (!request.ok()) {
    Finish("adapt", request.status());
    return kExitConfig;
  }
  Client client(settings.client);
  AdaptView view(settings, options);
  const Status status = client.Adapt(*request, [&](const v1::AdaptEvent& event) { view.OnEvent(event); });
  if (status.ok()) view.PrintResult();
  const bool goes_on = !status.ok() && Interrupted() && options.keep_going && view.begun();
  const int code = Finish("adapt", status, goes_on);
  if (goes_on) {
    std::cerr << "refocus adapt: to attach to it, give the same command again with --request-id "
              << request->request_id() << std::endl;
  }
  return code;
}

}  // namespace

void AddAdapt(CLI::App& app, Settings* settings, Run* run) {
  auto* verb = app.add_subcommand("adapt", "Fit the queries to a context by a few gradient steps; all or nothing");
  const auto o = std::make_shared<AdaptOptions>();
  verb->add_option("NAME", o->name, "Context")->required();
  verb->add_option("--adapter", o->adapter, "Adapter to make or replace")->capture_default_str()->type_name("ID");
  verb->add_flag("--continue", o->continue_adapter, "Start from the adapter's present state instead of zero");
  verb->add_option("--from", o->base_adapter, "Start from another adapter's state, which stays as it is")
      ->type_name("ID")->excludes("--continue");
  verb->add_flag("--validate-only", o->validate_only,
                 "Check the settings, print the effective ones, memory and time; change nothing");
  const std::string kind = "What is learned";
  verb->add_option("--kind", o->kind, "(full; above 14 billion parameters lora)")
      ->check(CLI::IsMember({"full", "lora"}))->group(kind);
  verb->add_option("--lora-rank", o->lora_rank, "(16)")->group(kind);
  verb->add_option("--lora-alpha", o->lora_alpha, "(twice the rank)")->group(kind);
  verb->add_flag("--keep-going", o->keep_going, "Ctrl-C leaves the adaptation running on the server");
  verb->add_option(
          "--request-id", o->request_id,
          "With the other options unchanged, attaches to the call that had this id, or returns its result (new)")
      ->type_name("ID");
  const std::string optimizer = "Optimizer (defaults are the server's)";
  verb->add_option("--steps", o->steps, "Gradient steps (32)")->group(optimizer);
  verb->add_option("--learning-rate", o->learning_rate,
                   "(1e-5, which suits billions of parameters; about 1e-4 suits 100 million)")->group(optimizer);
  verb->add_option("--optimizer", o->optimizer, "(adamw)")->check(CLI::IsMember({"adamw", "sgd"}))->group(optimizer);
  verb->add_option("--momentum", o->momentum, "Of sgd (0)")->group(optimizer);
  verb->add_option("--schedule", o->schedule, "Of the learning rate over the steps (constant)")
      ->check(CLI::IsMember({"constant", "linear", "cosine"}))->group(optimizer);
  verb->add_option("--warmup-steps", o->warmup_steps, "First steps with a rising rate (0)")->group(optimizer);
  verb->add_option("--max-seconds", o->max_seconds, "End early, after the step that passes them, and commit (no limit)")
      ->group(optimizer);
  verb->add_option("--weight-decay", o->weight_decay, "Decay of the learned change (0.01)")->group(optimizer);
  verb->add_option("--clip-norm", o->clip_norm, "Largest norm of the whole gradient (1)")->group(optimizer);
  verb->add_option("--beta1", o->beta1, "(0.9)")->group(optimizer);
  verb->add_option("--beta2", o->beta2, "(0.999)")->group(optimizer);
  verb->add_option("--epsilon", o->epsilon, "(1e-8)")->group(optimizer);
  const std::string spans = "Spans";
  verb->add_option("--span-tokens", o->span_tokens, "Tokens of a span (128)")->group(spans);
  verb->add_option("--spans-per-step", o->spans_per_step, "Spans of a step (1)")->group(spans);
  verb->add_option("--seed", o->seed, "Of the drawing of spans (drawn and printed)")->group(spans);
  verb->add_option("--span", o->spans, "Use these spans in turn instead of drawing, repeatable")
      ->type_name("START:LENGTH")->group(spans);
  verb->add_flag("--recall", o->recall, "Train on single tokens that can be looked up in what stands before them")
      ->excludes("--span")->group(spans);
  verb->add_option("--recall-after", o->recall_after, "With --recall: only behind this share of the text (0.5; 0 with --behind)")
      ->needs("--recall")->group(spans);
  verb->add_option("--behind", o->behind, "Read spans again where questions stand: within so many tokens behind the text (0)")
      ->group(spans);
  verb->add_flag("--surprisal", o->surprisal, "Train on the spans predicted worst, of candidates measured first")
      ->excludes("--span")->excludes("--recall")->group(spans);
  verb->add_option("--candidates", o->candidates, "With --surprisal: so many (4 times the steps' spans)")
      ->needs("--surprisal")->group(spans);
  verb->add_option("--surprisal-share", o->surprisal_share, "With --surprisal: of the candidates, trained on (0.25)")
      ->needs("--surprisal")->group(spans);
  verb->add_option("--surprisal-skip", o->surprisal_skip, "With --surprisal: of the candidates, left out as noise (0)")
      ->needs("--surprisal")->group(spans);
  verb->add_flag("--automatic", o->automatic,
                 "Find out by trials on held-out spans whether, on what, at which rate and how long to train")
      ->excludes("--span")->excludes("--recall")->excludes("--surprisal")->group(spans);
  const std::string probe = "Held-out spans";
  verb->add_option("--probe-spans", o->probe_spans, "How many are measured before and after (2)")->group(probe);
  verb->add_option("--probe-every", o->probe_every, "Measure them also behind every so many steps (never)")->group(probe);
  verb->add_flag("--keep-best", o->keep_best, "Keep the state with the lowest loss of a probe, the start's included")
      ->group(probe);
  verb->add_option("--patience", o->patience,
                   "With --keep-best or --automatic: end when so many probes brought nothing better (never; 3)")
      ->group(probe);
  verb->add_option("--max-probe-rise", o->max_probe_rise, "Roll back when their loss rises by more, nats (0.1)")
      ->group(probe);
  AddCommonOptions(verb, settings);
  AddEventOptions(verb, settings);
  verb->callback([=] { *run = [=] { return Adapt(*settings, *o); }; });
}

}  // namespace refocus::cli
