"""Commands: run, report, make, list. See docs/evaluation.md of the repository."""
from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines about connections; ours say what matters

import refocus
from refocus.evaluate import journal as journals, methods, report, run, spans, tasks
from refocus.evaluate.formats import benchmarks, files
from refocus.evaluate.item import EvalError, Item, read_items, write_items
from refocus.evaluate.journal import Journal
from refocus.evaluate.tasks import registry

TEMPLATE_TOKENS = 64  # room for what a conversation's format adds to a benchmark's prompt
OK, FAILED, CONFIG, INTERRUPTED = 0, 1, 2, 130
Make = Callable[[], Item]


def _numbers(text: str, name: str) -> list[int]:
    """"1,2,5-7" -> 1 2 5 6 7; "8K" is 8192."""
    found: list[int] = []
    try:
        for part in text.split(","):
            low, dash, high = part.partition("-")
            ends = [int(end[:-1]) * 1024 if end[-1:] in "Kk" else int(end) for end in ((low, high) if dash else (low,))]
            found += range(ends[0], ends[-1] + 1)
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(found) > 10000:
        raise EvalError(f"--{name}: got {text!r}, allowed numbers as in 1000,2000 or 0-3 or 8K")
    return list(dict.fromkeys(found))


def _settings(options: argparse.Namespace, count: tasks.Count) -> tasks.Settings:
    haystack = ""
    if options.haystack:
        try:
            with open(options.haystack, encoding="utf-8") as file:
                haystack = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise EvalError(f"--haystack: cannot read {options.haystack}: {error}") from None
        if len(haystack.split()) < 100:
            raise EvalError(f"--haystack: got {len(haystack.split())} words, allowed at least 100")
    if options.questions < 1:
        raise EvalError(f"--questions: got {options.questions}, allowed at least 1")
    return tasks.Settings(count, options.questions, haystack, tuple(options.code), bug_rate=options.bug_rate,
                          later=options.later)


def _is_file(task: str) -> bool:
    return os.sep in task or task.endswith(".jsonl")


def _formats(options: argparse.Namespace, client: refocus.Client, window: int) -> files.Settings:
    limit = options.limit or window - TEMPLATE_TOKENS
    if not 256 <= limit <= window:
        raise EvalError(f"--limit: got {limit}, allowed 256 to {window}, the window of the model")
    return files.Settings(lambda text: files.encode_pieces(client.tokenize, text),
                          lambda ids: files.decode_pieces(client.detokenize, ids), limit, options.rows, _say)


def _makes(options: argparse.Namespace, settings: tasks.Settings, formats: files.Settings) -> list[Make]:
    """Every text; those of files are read and checked now, generated ones made when their turn comes."""
    lengths, seeds = _numbers(options.lengths, "lengths"), _numbers(options.seeds, "seeds")
    makes: list[Make] = []
    for task in filter(None, options.tasks.split(",")):
        if benchmarks.is_one(task):
            makes += run.each(iter(benchmarks.read(task, formats)))
        elif _is_file(task):
            makes += run.each(read_items(task))
        elif task not in registry.TASKS:
            raise EvalError(f"got the task {task!r}, allowed {', '.join(registry.TASKS)}, or a file of tasks (.jsonl)")
        else:
            tasks.make(task, min(lengths), seeds[0], settings)  # says at once what does not fit
            makes += [functools.partial(tasks.make, task, length, seed, settings)
                      for length in lengths for seed in seeds]
    if not makes:
        raise EvalError(f"--tasks: got none, allowed {', '.join(registry.TASKS)}, or a file of tasks (.jsonl)")
    return makes


def _count(client: refocus.Client) -> tasks.Count:
    return lambda text: spans.count(text, client.tokenize)


def _run(options: argparse.Namespace) -> int:
    chosen = methods.parse_all(options.methods)
    with refocus.Client(options.address) as client:
        model = client.model()
        client.wait_until_serving(options.wait)
        settings = _settings(options, _count(client))
        makes = _makes(options, settings, _formats(options, client, model.max_positions))
        names = [task for task in options.tasks.split(",") if not benchmarks.is_one(task) and not _is_file(task)]
        run.check(model, names, _numbers(options.lengths, "lengths") if names else [], chosen)
        chat = run.settle_chat(model, options.chat)
        cluster = client.cluster()
        journal = Journal(os.path.join(options.out, "journal.jsonl"), {
            "model": model.name, "service": cluster.version,
            "device": ", ".join(f"{rank.device}" for rank in cluster.ranks),
            "started": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
            "settings": {"questions": options.questions, "chat": chat, "limit": options.limit or "",
                         "haystack": _digest(settings.haystack),
                         "code": options.code, "bug rate": options.bug_rate or "",
                         **({"later tokens": options.later} if options.later != tasks.LATER else {})}})
        try:
            work = run.Run(client, model, run.Plan(makes, chosen, chat, options.measure, options.parallel), journal,
                           (lambda line: None) if options.quiet else _say)
            work.go()
        finally:
            journal.close()
    rows = report.write(options.out, _say)
    print(report.table(rows))
    if any(benchmarks.is_one(task) for task in options.tasks.split(",")):
        scores = benchmarks.write([make() for make in makes], journals.results(journal.path), options.out)
        print(f"{options.out}/predictions: official scores\n{json.dumps(scores, indent=1)}")
    return FAILED if work.failures else OK


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""


def _report(options: argparse.Namespace) -> int:
    print(report.table(report.write(options.folder, _say)))
    return OK


def _make(options: argparse.Namespace) -> int:
    with refocus.Client(options.address) as client:
        formats = _formats(options, client, client.model().max_positions)
        items = [make() for make in _makes(options, _settings(options, _count(client)), formats)]
    try:
        write_items(items, options.out)
    except OSError as error:
        raise EvalError(f"--out: cannot write {options.out}: {error.strerror}") from None
    print(f"{options.out}: {len(items)} texts, {sum(len(item.questions) for item in items)} questions")
    return OK


def _list(options: argparse.Namespace) -> int:
    print("tasks")
    for name, about in registry.ABOUT.items():
        print(f"  {name:<18}{about}")
    print("benchmarks in their own files\n  " + "\n  ".join(f"{name}:PATH" for name in benchmarks.BENCHMARKS))
    print("methods\n  " + "\n  ".join(methods.NAMES))
    return OK


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="refocus eval", description="Does adapting help, when, and at what cost?")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="run|report|make|list")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--address", default=os.environ.get("REFOCUS_ADDRESS", "127.0.0.1:7070"), help="host:port")
    source.add_argument("--tasks", required=True, help="with commas: names (see list), files that make "
                        "wrote, and public benchmarks as in longbench:FOLDER")
    source.add_argument("--lengths", default="1000", help="tokens, as in 1000,4000 or 8K [%(default)s]")
    source.add_argument("--limit", type=int, default=0, metavar="TOKENS", help="prompts of benchmarks are cut to so "
                        "many, answer included [the model's window less 64]")
    source.add_argument("--rows", type=int, default=0, help="the first so many of each file of a benchmark [all]")
    source.add_argument("--seeds", default="0", help="as in 0-7; one text each [%(default)s]")
    source.add_argument("--questions", type=int, default=8, help="of a text, where a task has many [%(default)s]")
    source.add_argument("--haystack", default="", metavar="FILE", help="running text for RULER's needles")
    source.add_argument("--code", action="append", default=[], metavar="FOLDER",
                        help="Python sources for bugs [the distribution's standard library]")
    source.add_argument("--later", type=int, default=tasks.LATER, metavar="TOKENS",
                        help="behind the text of symbols-later, read along [%(default)s]")
    source.add_argument("--bug-rate", type=float, default=0.0, help="bugs a token, at least one bug [%(default)s]")
    going = verbs.add_parser("run", parents=[source], help="ask a service; goes on where an earlier run stopped")
    going.add_argument("--methods", default="no-context,in-context,qttt", help="with settings, as in "
                       "in-context,qttt:steps=32,lr=1e-4,thinking:match=flops [%(default)s]")
    going.add_argument("--out", required=True, metavar="FOLDER", help="journal and report")
    going.add_argument("--chat", choices=("auto", "on", "off"), default="auto",
                       help="as a conversation in the model's format [auto: where it has one]")
    going.add_argument("--measure", type=int, default=2, help="questions of a text whose attention is measured "
                       "[%(default)s]")
    going.add_argument("--parallel", type=int, default=1, help="questions in flight; above 1 their latencies are of a "
                       "loaded service [%(default)s]")
    going.add_argument("--wait", type=float, default=60.0, help="seconds for the group to serve [%(default)s]")
    going.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    going.set_defaults(run=_run)
    again = verbs.add_parser("report", help="table, CSV and HTML of what a folder has")
    again.add_argument("folder")
    again.set_defaults(run=_report)
    making = verbs.add_parser("make", parents=[source], help="write tasks to a file")
    making.add_argument("--out", required=True, metavar="FILE")
    making.set_defaults(run=_make)
    verbs.add_parser("list", help="tasks and methods").set_defaults(run=_list)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except EvalError as error:
        _say(f"refocus eval: {error}")
        return CONFIG
    except refocus.RefocusError as error:
        _say(f"refocus eval: {error}; what was answered is kept, the same command goes on from there")
        return FAILED
    except KeyboardInterrupt:
        _say("refocus eval: interrupted; what was answered is kept, the same command goes on from there")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
