// tokenize: text to ids and back.
#include <iostream>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/interrupt.h"

namespace refocus::cli {
namespace {

struct TokenizeOptions {
  std::string text;
  bool special = false;
  bool bos = false;
  bool count = false;
  bool back = false;
};

Status Tokenize(const Settings& settings, const TokenizeOptions& options) {
  Client client(settings.client);
  std::string text = options.text;
  if (text == "-") {
    REFOCUS_ASSIGN_OR_RETURN(text, ReadInput("-"));
  }
  if (options.back) {
    REFOCUS_ASSIGN_OR_RETURN(const auto ids, ParseIds(text));
    REFOCUS_ASSIGN_OR_RETURN(const std::string out, client.Detokenize(ids));
    std::cout << out << std::endl;
    return absl::OkStatus();
  }
  std::vector<uint32_t> ids;
  if (options.special || options.bos) {
    REFOCUS_ASSIGN_OR_RETURN(ids, client.Tokenize(text, options.special, options.bos));
  } else {
    REFOCUS_ASSIGN_OR_RETURN(ids, client.TokenizeDocument(text));
  }
  if (options.count) {
    std::cout << ids.size() << std::endl;
    return absl::OkStatus();
  }
  std::string line;
  for (const uint32_t id : ids) line += (line.empty() ? "" : " ") + std::to_string(id);
  std::cout << line << std::endl;
  return absl::OkStatus();
}

}  // namespace

void AddTokenize(CLI::App& app, Settings* settings, Run* run) {
  auto* verb = app.add_subcommand("tokenize", "Text to token ids, and back");
  const auto o = std::make_shared<TokenizeOptions>();
  verb->add_option("TEXT", o->text, "Text, '-' for standard input")->required();
  verb->add_flag("--count", o->count, "Print how many, not which");
  verb->add_flag("--special", o->special, "Special tokens' names mean special tokens");
  verb->add_flag("--bos", o->bos, "Begin as a context does");
  verb->add_flag("--decode", o->back, "TEXT is ids in decimal; print their text")
      ->excludes("--count")->excludes("--special")->excludes("--bos");
  AddCommonOptions(verb, settings);
  verb->callback([=] {
    *run = [=] {
      InstallInterrupt();
      return Finish("tokenize", Tokenize(*settings, *o));
    };
  });
}

}  // namespace refocus::cli
