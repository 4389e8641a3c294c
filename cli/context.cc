// context create, list, show, rm; prefill.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <optional>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/interrupt.h"
#include "cli/table.h"

namespace refocus::cli {
namespace {

struct CreateOptions {
  std::string path;
  std::string id;
  bool as_ids = false;
  bool chat = false;
  bool raw = false;
  std::optional<std::string> system;
  std::string intro;
  bool special = false;
  bool no_bos = false;
  bool no_prefill = false;
  bool validate_only = false;
  bool keep_going = false;
  int64_t skip_bytes = 0;
  std::optional<int64_t> max_bytes;
  std::optional<int64_t> max_tokens;
  double ttl_seconds = 0;
  std::vector<std::string> labels;
};

std::string StateName(const v1::Context& context) { return v1::Context::State_Name(context.state()); }

std::string Age(const google::protobuf::Timestamp& from, const google::protobuf::Timestamp& to) {
  return FormatSeconds(static_cast<double>(to.seconds() - from.seconds()));
}

google::protobuf::Timestamp Now() {
  google::protobuf::Timestamp now;
  now.set_seconds(
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count());
  return now;
}

void PrintContext(const v1::Context& context) {
  const auto line = [](const char* key, const std::string& value) {
    std::cout << key << std::string(12 - std::string_view(key).size(), ' ') << value << '\n';
  };
  line("name", context.name());
  line("state", StateName(context) + (context.state_reason().empty() ? "" : ": " + context.state_reason()));
  line("tokens", FormatCount(context.token_count()) + ", " + FormatCount(context.prefilled_tokens()) + " prefilled");
  const int64_t shared = context.shared_tokens();
  line("K/V", FormatBytes(context.kv_bytes()) +
                  (shared > 0 ? ", and " + FormatCount(shared) + " tokens shared with another context" : ""));
  if (!context.chat_format().empty()) line("chat", context.chat_format());
  line("age", Age(context.create_time(), Now()));
  line("expires in", Age(Now(), context.expire_time()) + " unless used");
  for (const auto& [key, value] : context.labels()) line("label", key + "=" + value);
  if (context.adapters().empty()) return;
  Table table({"adapter", "revision", "steps", "probe before", "probe after", "first loss", "last loss", "hash"});
  for (const auto& adapter : context.adapters()) {
    table.Add({adapter.id(), std::to_string(adapter.revision()), FormatCount(adapter.steps()),
               adapter.has_probe_loss_before() ? FormatFixed(adapter.probe_loss_before(), 4) : "-",
               adapter.has_probe_loss_after() ? FormatFixed(adapter.probe_loss_after(), 4) : "-",
               FormatFixed(adapter.first_loss(), 4), FormatFixed(adapter.last_loss(), 4), adapter.delta_hash()});
  }
  std::cout << '\n';
  table.Print(std::cout);
}

StatusOr<v1::CreateContextRequest::Header> MakeHeader(const CreateOptions& options) {
  v1::CreateContextRequest::Header header;
  header.set_context_id(options.id);
  header.set_request_id(NewRequestId());
  header.set_allow_special(options.special);
  header.set_no_bos(options.no_bos);
  header.set_validate_only(options.validate_only);
  if (options.ttl_seconds > 0) header.mutable_ttl()->set_seconds(static_cast<int64_t>(options.ttl_seconds));
  for (const auto& label : options.labels) {
    const size_t equals = label.find('=');
    if (equals == std::string::npos) return FieldError("--label", label, "KEY=VALUE");
    (*header.mutable_labels())[label.substr(0, equals)] = label.substr(equals + 1);
  }
  return header;
}

// What goes up: the text as it is, or ids where the text alone cannot say it (a cut in tokens).
StatusOr<std::vector<uint32_t>> IdsOf(Client& client, const CreateOptions& options, std::string_view text, bool chat) {
  std::vector<uint32_t> ids;
  if (options.as_ids) {
    REFOCUS_ASSIGN_OR_RETURN(ids, ParseIds(text));
  } else {
    REFOCUS_ASSIGN_OR_RETURN(ids, client.TokenizeDocument(text));
  }
  if (options.max_tokens && static_cast<int64_t>(ids.size()) > *options.max_tokens) {
    ids.resize(static_cast<size_t>(*options.max_tokens));
  }
  if (options.as_ids || chat) return ids;  // a conversation's beginning is the server's to write
  REFOCUS_ASSIGN_OR_RETURN(auto all, client.Tokenize("", false, !options.no_bos));
  all.insert(all.end(), ids.begin(), ids.end());
  return all;
}

// A model that holds conversations is given the text in one, unless the caller says otherwise.
StatusOr<bool> OpensConversation(Client& client, const CreateOptions& options) {
  if (options.chat || options.system || !options.intro.empty()) return true;  // or the server says why not
  if (options.raw || options.as_ids || options.special) return false;
  REFOCUS_ASSIGN_OR_RETURN(const v1::Model model, client.GetModel());
  return !model.chat_format().empty();
}

StatusOr<v1::Context> Upload(Client& client, const Settings& settings, const CreateOptions& options) {
  REFOCUS_ASSIGN_OR_RETURN(const std::string input, ReadInput(options.path));
  const std::string_view text = CutLines(input, options.skip_bytes, options.max_bytes);
  REFOCUS_ASSIGN_OR_RETURN(auto header, MakeHeader(options));
  Client::Content content;
  std::vector<uint32_t> ids;
  REFOCUS_ASSIGN_OR_RETURN(const bool chat, OpensConversation(client, options));
  if (chat) {
    header.mutable_prologue()->set_user(options.intro);
    if (options.system) header.mutable_prologue()->set_system(*options.system);
  }
  if (options.as_ids || options.max_tokens) {
    REFOCUS_ASSIGN_OR_RETURN(ids, IdsOf(client, options, text, chat));
    content.ids = &ids;
  } else {
    content.text = text;
  }
  Progress progress(std::cerr, StderrStyle(settings.quiet), "upload", content.ids != nullptr ? "tokens" : "bytes");
  return client.CreateContext(header, content, [&](int64_t sent, int64_t total) {
    if (sent < total) progress.Update(sent, total, 0, -1);  // what goes up at once needs no bar
  });
}

int Create(const Settings& settings, const CreateOptions& options) {
  InstallInterrupt();
  Client client(settings.client);
  auto context = Upload(client, settings, options);
  if (!context.ok()) return Finish("context create", context.status());
  if (options.validate_only) {
    if (settings.json) {
      PrintJson(*context);
    } else {
      std::cout << "would fit: " << FormatCount(context->token_count()) << " tokens" << std::endl;
    }
    return Finish("context create", absl::OkStatus());
  }
  if (options.no_prefill) {
    if (settings.json) {
      PrintJson(*context);
    } else {
      std::cout << context->name() << ": " << FormatCount(context->token_count()) << " tokens uploaded" << std::endl;
    }
    return Finish("context create", absl::OkStatus());
  }
  if (!settings.json)
    std::cout << context->name() << ": " << FormatCount(context->token_count()) << " tokens" << std::endl;
  return Finish("context create", PrefillWithProgress(client, settings, context->name(), options.keep_going),
                options.keep_going);
}

int List(const Settings& settings) {
  InstallInterrupt();
  Client client(settings.client);
  const auto contexts = client.ListContexts();
  if (!contexts.ok()) return Finish("context list", contexts.status());
  Table table({"name", "state", "tokens", "K/V", "adapters", "age", "expires in"});
  for (const auto& context : *contexts) {
    if (settings.json) PrintJson(context);
    table.Add({context.name(), StateName(context), FormatCount(context.token_count()), FormatBytes(context.kv_bytes()),
               std::to_string(context.adapters_size()), Age(context.create_time(), Now()),
               Age(Now(), context.expire_time())});
  }
  if (!settings.json) table.Print(std::cout);
  return kExitOk;
}

int Show(const Settings& settings, const std::string& name) {
  InstallInterrupt();
  Client client(settings.client);
  const auto context = client.GetContext(ContextName(name));
  if (!context.ok()) return Finish("context show", context.status());
  if (settings.json) {
    PrintJson(*context);
  } else {
    PrintContext(*context);
  }
  return kExitOk;
}

int Remove(const Settings& settings, const std::vector<std::string>& names, const std::string& adapter, bool force,
           bool missing_ok) {
  InstallInterrupt();
  Client client(settings.client);
  for (const auto& name : names) {
    Status status;
    if (!adapter.empty()) {
      v1::DeleteAdapterRequest request;
      request.set_name(ContextName(name));
      request.set_adapter_id(adapter);
      status = client.DeleteAdapter(request);
    } else {
      v1::DeleteContextRequest request;
      request.set_name(ContextName(name));
      request.set_force(force);
      request.set_allow_missing(missing_ok);
      status = client.DeleteContext(request);
    }
    if (!status.ok()) return Finish("context rm", status);
    if (!settings.quiet)
      std::cout << "removed " << ContextName(name) << (adapter.empty() ? "" : " adapter " + adapter) << std::endl;
  }
  return Finish("context rm", absl::OkStatus());
}

int Prefill(const Settings& settings, const std::string& name, bool keep_going) {
  InstallInterrupt();
  Client client(settings.client);
  const auto context = client.GetContext(name);
  if (!context.ok()) return Finish("prefill", context.status());
  // Who only watches somebody else's work does not end it with Ctrl-C.
  const bool goes_on = keep_going || context->state() == v1::Context::PREFILLING;
  return Finish("prefill", PrefillWithProgress(client, settings, name, goes_on), goes_on);
}

void AddCreate(CLI::App* parent, Settings* settings, Run* run) {
  auto* verb = parent->add_subcommand("create", "Upload a text (or ids) and compute its K and V");
  const auto options = std::make_shared<CreateOptions>();
  verb->add_option("FILE", options->path, "Text file in UTF-8, '-' for standard input")->required();
  verb->add_option("--id", options->id,
                   "Name of the context: a-z, 0-9 and '-', up to 63 characters (made by the server)");
  const std::string talk = "Conversation";
  auto* raw = verb->add_flag("--raw", options->raw, "The text alone, to be continued; no conversation about it");
  auto* chat = verb->add_flag("--chat", options->chat,
                              "Open a user's turn before the text, so that 'ask' closes it with a question (default if "
                              "the model has a known chat template; not with --ids or --special)");
  chat->excludes(raw)->group(talk);
  raw->group(talk);
  verb->add_option("--system", options->system, "System prompt (the template's own)")->excludes(raw)->group(talk);
  verb->add_option("--intro", options->intro, "What the user says before the text")->excludes(raw)->group(talk);
  verb->add_flag("--no-prefill", options->no_prefill, "Upload only; 'refocus prefill' computes K and V later");
  verb->add_flag("--validate-only", options->validate_only, "Say whether it would fit and store nothing")
      ->excludes("--no-prefill");
  verb->add_option("--ttl", options->ttl_seconds, "Idle life, seconds, 60 to 604800 (server's default: 3600)");
  verb->add_option("--label", options->labels, "Label, repeatable")->type_name("KEY=VALUE");
  const std::string text = "Text";
  verb->add_option("--skip-bytes", options->skip_bytes, "Begin at the first line that starts there or later")
      ->check(CLI::NonNegativeNumber)->capture_default_str()->group(text);
  verb->add_option("--max-bytes", options->max_bytes,
                   "End at the first line that starts so many bytes after --skip-bytes (all)")
      ->check(CLI::NonNegativeNumber)
      ->group(text);
  verb->add_option("--max-tokens", options->max_tokens, "Keep the first tokens only (all)")
      ->check(CLI::PositiveNumber)->group(text);
  verb->add_flag("--ids", options->as_ids, "FILE holds token ids in decimal, not text")->group(text);
  verb->add_flag("--special", options->special, "Special tokens' names in the text mean special tokens")
      ->excludes("--chat")->excludes("--ids")->excludes("--max-tokens")->group(text);
  verb->add_flag("--no-bos", options->no_bos, "Do not begin with the model's begin-of-sequence token")->group(text);
  verb->add_flag("--keep-going", options->keep_going, "Ctrl-C leaves the prefill running on the server");
  AddCommonOptions(verb, settings);
  AddEventOptions(verb, settings);
  verb->callback([=] { *run = [=] { return Create(*settings, *options); }; });
}

}  // namespace

Status PrefillWithProgress(Client& client, const Settings& settings, const std::string& name, bool keep_going) {
  v1::PrefillContextRequest request;
  request.set_name(name);
  request.set_on_disconnect(keep_going ? v1::CONTINUE : v1::CANCEL);
  Progress progress(std::cerr, StderrStyle(settings.quiet), "prefill", "tokens");
  v1::PrefillEvent last;
  REFOCUS_RETURN_IF_ERROR(client.Prefill(request, [&](const v1::PrefillEvent& event) {
    EmitEvent(settings, event);
    const bool known = event.prefilled_tokens() > 0;
    progress.Update(event.prefilled_tokens(), event.total_tokens(), event.tokens_per_second(),
                    known ? event.eta_seconds() : -1);
    last = event;
  }));
  progress.Finish();
  if (settings.json) return absl::OkStatus();
  Table table({"phase", "tokens", "seconds", "tokens/s", "queued s", "memory per rank"});
  std::string memory;
  for (const int64_t bytes : last.usage().rank_memory_bytes())
    memory += (memory.empty() ? "" : ", ") + FormatBytes(bytes);
  table.Add({"prefill", FormatCount(last.usage().tokens()), FormatFixed(last.usage().seconds(), 2),
             FormatRate(last.usage().tokens_per_second()), FormatFixed(last.usage().queue_seconds(), 2),
             memory.empty() ? "-" : memory});
  table.Print(std::cout);
  return absl::OkStatus();
}

void AddContext(CLI::App& app, Settings* settings, Run* run) {
  auto* context = app.add_subcommand("context", "Create, list, show and remove contexts");
  context->require_subcommand(1);
  AddCreate(context, settings, run);

  auto* list = context->add_subcommand("list", "All contexts");
  AddCommonOptions(list, settings);
  list->callback([=] { *run = [=] { return List(*settings); }; });

  auto* show = context->add_subcommand("show", "One context and its adapters");
  const auto name = std::make_shared<std::string>();
  show->add_option("NAME", *name, "Context")->required();
  AddCommonOptions(show, settings);
  show->callback([=] { *run = [=] { return Show(*settings, *name); }; });

  auto* rm = context->add_subcommand("rm", "Free contexts, or one adapter of a context");
  const auto names = std::make_shared<std::vector<std::string>>();
  const auto adapter = std::make_shared<std::string>();
  const auto force = std::make_shared<bool>(false);
  const auto missing_ok = std::make_shared<bool>(false);
  rm->add_option("NAME", *names, "Contexts")->required();
  rm->add_option("--adapter", *adapter, "Remove this adapter alone")->type_name("ID");
  rm->add_flag("--force", *force, "Cancel what runs on it first");
  rm->add_flag("--missing-ok", *missing_ok, "A context that does not exist is no error");
  AddCommonOptions(rm, settings);
  rm->callback([=] { *run = [=] { return Remove(*settings, *names, *adapter, *force, *missing_ok); }; });
}

void AddPrefill(CLI::App& app, Settings* settings, Run* run) {
  auto* verb = app.add_subcommand("prefill", "Compute K and V of an uploaded context, or watch that being done");
  const auto name = std::make_shared<std::string>();
  const auto keep_going = std::make_shared<bool>(false);
  verb->add_option("NAME", *name, "Context")->required();
  verb->add_flag("--keep-going", *keep_going,
                 "Ctrl-C leaves the work running on the server, as it does when another call began it");
  AddCommonOptions(verb, settings);
  AddEventOptions(verb, settings);
  verb->callback([=] {
    *run = [=] { return Prefill(*settings, ContextName(*name), *keep_going); };
  });
}

}  // namespace refocus::cli
