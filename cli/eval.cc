// eval: hands over to the Python package's evaluation bench.
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "cli/commands.h"

namespace refocus::cli {
namespace {

// One process for both: whether the package is there, and the bench itself.
constexpr char kStart[] = R"(import sys
try:
    from refocus.evaluate.__main__ import main
except ImportError as error:
    sys.exit(print(f"refocus eval: {sys.executable} has no package refocus ({error}): pip install ./python from the "
                   "repository, or name another Python in REFOCUS_PYTHON", file=sys.stderr) or 2)
sys.exit(main())
)";

// Returns only when it failed.
int RunBench(const std::vector<std::string>& arguments) {
  const char* named = std::getenv("REFOCUS_PYTHON");
  const std::string python = named != nullptr && *named != '\0' ? named : "python3";
  std::vector<std::string> command = {python, "-c", kStart};
  command.insert(command.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& argument : command) argv.push_back(argument.data());
  argv.push_back(nullptr);
  execvp(python.c_str(), argv.data());
  std::cerr << "refocus eval: cannot start " << python << ": " << std::strerror(errno)
            << "; install Python 3.11 or newer, or name it in REFOCUS_PYTHON" << std::endl;
  return kExitConfig;
}

}  // namespace

void AddEval(CLI::App& app, Run* run) {
  auto* verb = app.add_subcommand("eval", "Whether adapting helps: tasks x methods against a service (Python)");
  verb->prefix_command();
  verb->footer("Everything behind 'eval' goes to the Python package: 'refocus eval list', 'refocus eval run --help'.\n"
               "docs/evaluation.md describes tasks, methods and scores.");
  verb->callback([=] {
    *run = [=] { return RunBench(verb->remaining()); };
  });
}

}  // namespace refocus::cli
