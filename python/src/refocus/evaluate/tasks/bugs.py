"""Bug localisation in real source code: one token of one line is changed so that the program does something else.

Sources are Python files of the distribution (Debian: python3's standard library), or of a folder that the user names.
The line-numbered code is a window that grows around the bug and into the other files; the description says that there
is a bug, never what or where. Strong models know these files, and public bugs, by heart: the no-context floor measures
that. """
from __future__ import annotations

import ast
import dataclasses
import functools
import glob
import io
import keyword
import os
import random
import sysconfig
import tokenize

from refocus.evaluate.item import EvalError, Item, Question
from refocus.evaluate.tasks import Settings, fit, generator, item, join

PREAMBLE = "Below is Python source code. Every line begins with its number in its file.\n\n"
CHANGED = ("One line of this code has been changed so that the program does something wrong.",
           "{} lines of this code have been changed so that the program does something wrong.")
OPERATORS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "+=": "-=",
             "-=": "+=", "and": "or", "or": "and", "min": "max", "max": "min", "True": "False", "False": "True",
             "break": "continue", "any": "all", "all": "any", "is": "is not", "startswith": "endswith",
             "endswith": "startswith", "append": "extend", "*": "+", "//": "%", "%": "//", "&": "|", "|": "&"}
SIZE = (4_000, 200_000)  # bytes of a file that is used


@dataclasses.dataclass(frozen=True)
class Change:
    line: int    # 0-based
    before: str
    after: str


def default_folders() -> tuple[str, ...]:
    """The newest Python that the distribution brings, else the one that runs."""
    for folder in sorted(glob.glob("/usr/lib/python3.[0-9]*"), key=lambda path: (len(path), path), reverse=True):
        if os.path.exists(os.path.join(folder, "argparse.py")):
            return (folder,)
    return (sysconfig.get_paths()["stdlib"],)


@functools.lru_cache(maxsize=8)
def sources(folders: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(name, text) of files that compile, ordered by name."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted(glob.glob(os.path.join(folder, "*.py")) + glob.glob(os.path.join(folder, "*", "*.py"))):
            name = os.path.relpath(path, folder)
            if not SIZE[0] <= os.path.getsize(path) <= SIZE[1] or "test" in name:
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
                ast.parse(text)
            except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
                continue
            found[name] = text
    if not found:
        raise EvalError(f"bugs: got no Python files of {SIZE[0]} to {SIZE[1]} bytes in {', '.join(folders)}: name a "
                        "folder that has some with --code")
    return tuple(found.items())


def changes(text: str) -> list[Change]:
    """Single-line logical changes that still compile to something else."""
    lines = text.splitlines()
    found = []
    depth = 0
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline)
              if t.type not in (tokenize.NL, tokenize.COMMENT)]
    for before, token, after in zip(tokens, tokens[1:], tokens[2:]):
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        replacement = OPERATORS.get(token.string) if token.type in (tokenize.OP, tokenize.NAME) else None
        if token.type == tokenize.NUMBER and token.string in ("0", "1"):
            replacement = "1" if token.string == "0" else "0"
        if replacement is None or not _sensible(before, token, after, depth):
            continue
        row, begin, end = token.start[0] - 1, token.start[1], token.end[1]
        line = lines[row]
        if line.strip().startswith(("import", "from", "@", "assert", "raise")) or "__" in line:
            continue
        found.append(Change(row, line, line[:begin] + replacement + line[end:]))
    return found


def _sensible(before: tokenize.TokenInfo, token: tokenize.TokenInfo, after: tokenize.TokenInfo, depth: int) -> bool:
    """Not signs of numbers, starred arguments, defaults of keywords, names that are only spelled like an operator."""
    text = token.string
    if text in ("+", "-", "*", "//", "%", "&", "|"):
        operand = (tokenize.NAME, tokenize.NUMBER)
        left = before.type in operand and not keyword.iskeyword(before.string) or before.string in (")", "]")
        right = after.type in operand and not keyword.iskeyword(after.string) or after.string == "("
        return left and right
    if text in ("min", "max", "any", "all"):
        return after.string == "(" and before.string != "." and before.string != "def"
    if text in ("startswith", "endswith", "append"):
        return before.string == "." and after.string == "("
    if text == "is":
        return after.string != "not"
    if text in ("0", "1"):
        return before.string in ("[", "+", "-", ":", "==", "<", ">", "<=", ">=", "!=") and before.type == tokenize.OP
    if text in ("True", "False"):
        return before.string in ("=", "return") and depth == 0
    return True


def works(text: str, change: Change) -> bool:
    """It compiles, and to another program."""
    lines = text.splitlines()
    lines[change.line] = change.after
    try:
        return ast.dump(ast.parse("\n".join(lines))) != ast.dump(ast.parse(text))
    except (SyntaxError, ValueError):
        return False


def _buggy_file(rng: random.Random, files: tuple[tuple[str, str], ...], bugs: int) -> tuple[int, list[Change]]:
    for index in rng.sample(range(len(files)), len(files)):
        candidates = changes(files[index][1])
        rng.shuffle(candidates)
        chosen: dict[int, Change] = {}
        for change in candidates:
            if change.line not in chosen and works(files[index][1], change):
                chosen[change.line] = change
                if len(chosen) == bugs:
                    return index, sorted(chosen.values(), key=lambda c: c.line)
    raise EvalError(f"bugs: got no file with {bugs} places for a bug: name a larger folder with --code")


def _rows(files: tuple[tuple[str, str], ...], order: list[int], bugs: list[Change], begin: int,
          size: int) -> list[tuple[str, tuple[str, ...]]]:
    """`size` lines of the files in `order`, from line `begin` of all of them; bugs are in order[len(order) // 2]."""
    rows: list[tuple[str, tuple[str, ...]]] = []
    at, middle = 0, order[len(order) // 2]
    for index in order:
        name, text = files[index]
        lines = text.splitlines()
        first, last = max(0, begin - at), min(len(lines), begin + size - at)
        if first < last:
            rows.append((f"# {name}", ()))
            changed = {change.line: change.after for change in bugs} if index == middle else {}
            rows += [(f"{number + 1:>5} {changed.get(number, lines[number])}",
                      (f"{name}:L{number + 1}", "bug") if number in changed else ())
                     for number in range(first, last)]
        at += len(lines)
    return rows


def localise(length: int, seed: int, settings: Settings) -> Item:
    """One bug, or as many as settings.bug_rate says, all in one file so that they stay when the window grows."""
    files = sources(settings.code_dirs or default_folders())
    rng = generator("bugs", seed)
    bugs = max(1, round(settings.bug_rate * length))
    buggy, chosen = _buggy_file(rng, files, bugs)
    others = [index for index in range(len(files)) if index != buggy]
    rng.shuffle(others)
    order = others[:len(others) // 2] + [buggy] + others[len(others) // 2:]
    before = sum(len(files[index][1].splitlines()) for index in order[:len(order) // 2])
    total = sum(len(text.splitlines()) for _, text in files)
    low, high = before + chosen[0].line, before + chosen[-1].line
    depth = rng.random()

    def rows(size: int) -> list[tuple[str, tuple[str, ...]]]:
        spare = size - (high - low + 1)
        begin = min(max(0, low - int(depth * (spare + 1))), max(0, total - size))
        return _rows(files, order, chosen, begin, size)

    def build(size: int) -> str:
        return PREAMBLE + join(rows(min(size, total))).text

    size = fit("bugs", build, settings.count, length, high - low + 1)
    if size >= total:
        raise EvalError(f"bugs: got a length of {length} tokens, allowed what {len(files)} files have: name a larger "
                        "folder with --code")
    draft = join(rows(size))
    answers = [mark for mark in draft.marks if mark != "bug"]
    what = CHANGED[0] if bugs == 1 else CHANGED[1].format(bugs)
    prompt = (f"\n\n{what} Answer with {'its place' if bugs == 1 else 'their places, separated by commas'}, file and "
              "line, as in file.py:L12, nothing else.\nAnswer:")
    question = Question("bug", prompt, answers, "places", 24 * bugs, draft.marks["bug"], ["\n"],
                        {"changes": [[change.before.strip(), change.after.strip()] for change in chosen]})
    return item("bugs", length, seed, PREAMBLE, draft.text, [question])
