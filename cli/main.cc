// The refocus command: client verbs and the local launcher.
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/rpc_error.h"

namespace refocus::cli {
namespace {

constexpr char kFooter[] = R"(
Exit codes:
  0    done
  1    the call failed; stderr says what, what was got, what is allowed and what to do, with a reason code in brackets
  2    configuration: an unknown or bad option, a file that cannot be read
  3    weights: the model's files are broken (serve)
  4    hardware: memory, devices (serve, plan)
  5    the worker group failed for good (serve)
  130  interrupted: the first Ctrl-C cancels the request, the second ends the program

Environment:
  REFOCUS_ADDRESS  server of the client verbs, host:port
  REFOCUS_LISTEN   public address of 'refocus serve', host:port
  REFOCUS_MODEL    model of 'refocus serve'
  REFOCUS_PYTHON   Python of 'refocus eval', which needs the package refocus
  NO_COLOR         no colour on terminals

Example:
  refocus serve --model SmolLM2.gguf --ranks 2 &
  refocus context create emma.txt --id emma
  refocus adapt emma
  refocus ask emma "Who is Mr. Knightley?"
)";

size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t up = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = up;
    }
  }
  return row[b.size()];
}

void CollectNames(const CLI::App& app, bool with_subcommands, std::vector<std::string>* names) {
  for (const auto* option : app.get_options()) {
    for (const auto& name : option->get_lnames()) names->push_back("--" + name);
  }
  if (!with_subcommands) return;
  for (const auto* sub : app.get_subcommands([](const CLI::App*) { return true; })) names->push_back(sub->get_name());
}

// The verb that was reached before parsing failed.
const CLI::App* DeepestParsed(const CLI::App& app) {
  const CLI::App* at = &app;
  while (!at->get_subcommands().empty()) at = at->get_subcommands().front();
  return at;
}

int UsageError(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* verb = DeepestParsed(app);
  std::string path = "refocus";
  if (verb != &app) {
    const CLI::App* parent = verb->get_parent();
    if (parent != nullptr && parent != &app) path += " " + parent->get_name();
    path += " " + verb->get_name();
  }
  std::string message = error.what();
  if (const auto extras = app.remaining(true); !extras.empty()) {  // says more than "a subcommand is required"
    message = "got '" + extras.front() + "', which is not known here";
    std::vector<std::string> names;
    CollectNames(*verb, true, &names);
    const std::string word = extras.front().substr(0, extras.front().find('='));
    const auto nearest = std::min_element(names.begin(), names.end(), [&](const auto& a, const auto& b) {
      return EditDistance(a, word) < EditDistance(b, word);
    });
    if (nearest != names.end() && EditDistance(*nearest, word) <= 3) message += "; did you mean '" + *nearest + "'?";
  }
  std::cerr << path << ": " << message << " (see '" << path << " --help')" << std::endl;
  return kExitConfig;
}

int Main(int argc, char** argv) {
  CLI::App app{"Refocus: open a long text once, adapt the model's queries to it, ask many questions.", "refocus"};
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  Settings settings;
  Run run;
  AddServe(app, &run);
  AddContext(app, &settings, &run);
  AddPrefill(app, &settings, &run);
  AddAdapt(app, &settings, &run);
  AddAdapter(app, &settings, &run);
  AddAsk(app, &settings, &run);
  AddScore(app, &settings, &run);
  AddProbe(app, &settings, &run);
  AddTokenize(app, &settings, &run);
  AddPlan(app, &run);
  AddEval(app, &run);
  AddStatus(app, &settings, &run);
  AddVersion(app, &run);
  app.footer(kFooter);  // last: verbs would inherit it
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help
    return app.exit(request, std::cout, std::cerr);
  } catch (const CLI::ParseError& error) {
    return UsageError(app, error);
  }
  return run();
}

}  // namespace

void AddCommonOptions(CLI::App* verb, Settings* settings) {
  const std::string group = "Connection and output";
  verb->add_option("--address", settings->client.address, "Server, host:port")
      ->envname("REFOCUS_ADDRESS")->capture_default_str()->group(group);
  verb->add_option("--timeout", settings->client.stream_seconds, "Deadline of the call, seconds")
      ->check(CLI::Range(0.001, 1e6))->capture_default_str()->group(group);
  verb->add_flag("-q,--quiet", settings->quiet, "No progress on stderr")->group(group);
  verb->add_flag("--json", settings->json, "Results as JSON, one object a line, field names as in refocus.v1")
      ->group(group);
}

void AddEventOptions(CLI::App* verb, Settings* settings) {
  const auto open = [settings](const std::string& path) {
    const auto file = std::make_shared<std::ofstream>(path);
    if (!*file) throw CLI::ValidationError("--json-file", path + ": cannot open: " + std::strerror(errno));
    settings->json_file = file;
  };
  verb->add_option_function<std::string>("--json-file", open, "Write what --json prints to this file as well")
      ->type_name("FILE")
      ->group("Connection and output");
}

void AddAdapterOptions(CLI::App* verb, AdapterChoice* choice) {
  auto* adapter =
      verb->add_option("--adapter", choice->adapter,
                       "Adapter whose queries answer (without this and --base: 'default' if the context has it)")
          ->type_name("ID")
          ->group("Queries");
  verb->add_flag("--base", choice->base, "The model's own queries")->excludes(adapter)->group("Queries");
}

std::string ResolveAdapter(const AdapterChoice& choice, const v1::Context& context) {
  if (choice.base || !choice.adapter.empty()) return choice.adapter;
  const bool has_default = std::any_of(context.adapters().begin(), context.adapters().end(),
                                       [](const auto& a) { return a.id() == "default" && a.revision() > 0; });
  return has_default ? "default" : "";
}

std::string AdapterText(const std::string& adapter_id, int64_t revision) {
  if (adapter_id.empty()) return "base queries";
  return "adapter " + adapter_id + ", revision " + std::to_string(revision);
}

int Finish(const std::string& verb, const Status& status, bool goes_on) {
  if (Interrupted()) {
    std::cerr << "refocus " << verb << ": interrupted, "
              << (goes_on ? "the work goes on" : "the request was cancelled") << std::endl;
    return kExitInterrupted;
  }
  if (status.ok()) return kExitOk;
  std::cerr << "refocus " << verb << ": " << Describe(status) << std::endl;
  return ExitCodeOf(status);
}

namespace {

std::string Json(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(message, &text, options);
  if (!status.ok()) std::cerr << "refocus: a message without JSON form: " << status.message() << std::endl;
  return text;
}

}  // namespace

void PrintJson(const google::protobuf::Message& message) { std::cout << Json(message) << std::endl; }

void EmitEvent(const Settings& settings, const google::protobuf::Message& event) {
  if (settings.json) PrintJson(event);
  if (settings.json_file) *settings.json_file << Json(event) << std::endl;
}

}  // namespace refocus::cli

int main(int argc, char** argv) { return refocus::cli::Main(argc, argv); }
