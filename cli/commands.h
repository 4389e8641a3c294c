// The verbs. Each Add function registers one subcommand (with its options and help) whose callback sets `run`; main.cc
// parses and then calls it. `run` returns the exit code.
#pragma once

#include <functional>
#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "CLI/App.hpp"
#include "CLI/Config.hpp"
#include "CLI/Formatter.hpp"
#include "base/status.h"
#include "cli/client.h"
#include "cli/progress.h"

namespace refocus::cli {

struct Settings {  // options of every client verb
  ClientOptions client;
  bool quiet = false;
  bool json = false;  // one JSON object an event or result on stdout, nothing else there
  std::shared_ptr<std::ostream> json_file;  // or null; gets the same objects beside the output for people
};

using Run = std::function<int()>;

void AddServe(CLI::App& app, Run* run);
void AddContext(CLI::App& app, Settings* settings, Run* run);
void AddPrefill(CLI::App& app, Settings* settings, Run* run);
void AddAdapt(CLI::App& app, Settings* settings, Run* run);
void AddAdapter(CLI::App& app, Settings* settings, Run* run);
void AddAsk(CLI::App& app, Settings* settings, Run* run);
void AddScore(CLI::App& app, Settings* settings, Run* run);
void AddProbe(CLI::App& app, Settings* settings, Run* run);
void AddTokenize(CLI::App& app, Settings* settings, Run* run);
void AddPlan(CLI::App& app, Run* run);
void AddEval(CLI::App& app, Run* run);
void AddStatus(CLI::App& app, Settings* settings, Run* run);
void AddVersion(CLI::App& app, Run* run);

// --address, --timeout, --quiet, --json, as the help group "Connection and output".
void AddCommonOptions(CLI::App* verb, Settings* settings);

// --json-file, for verbs whose events go through EmitEvent.
void AddEventOptions(CLI::App* verb, Settings* settings);

// Between the text of a context and the first question of a conversation, in the same turn.
inline constexpr char kQuestionGap[] = "\n\n";

// Which queries answer: --adapter ID, --base, or neither: "default" if the context has it, else the base queries.
struct AdapterChoice {
  std::string adapter;
  bool base = false;
};
void AddAdapterOptions(CLI::App* verb, AdapterChoice* choice);
std::string ResolveAdapter(const AdapterChoice& choice, const v1::Context& context);
// "base queries", "adapter default, revision 2".
std::string AdapterText(const std::string& adapter_id, int64_t revision);

// Prints "refocus VERB: ..." on stderr unless OK, and gives the exit code: 130 after Ctrl-C. `goes_on`: what was asked
// for goes on without this caller.
int Finish(const std::string& verb, const Status& status, bool goes_on = false);

// One line of JSON on stdout, field names as in the proto.
void PrintJson(const google::protobuf::Message& message);

// The event as JSON to where the settings want it: stdout (--json), a file (--json-file), both or neither.
void EmitEvent(const Settings& settings, const google::protobuf::Message& event);

// Prefills with a progress bar; used by `context create` and `prefill`.
Status PrefillWithProgress(Client& client, const Settings& settings, const std::string& name, bool keep_going);

}  // namespace refocus::cli
