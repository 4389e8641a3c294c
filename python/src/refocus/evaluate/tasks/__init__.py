"""Sandbox tasks: texts of any length with exact answers and known evidence, made offline from a seed."""
from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from refocus.evaluate.item import EvalError, Item, Question

LATER = 1536
Count = Callable[[str], int]  # tokens of a text


@dataclasses.dataclass(frozen=True)
class Settings:
    """What generators may need beside length and seed."""

    count: Count
    questions: int = 8                      # of one text, where a task has that many
    haystack: str = ""                      # running text; empty: sentences made up here
    code_dirs: tuple[str, ...] = ()         # Python sources for bugs; empty: those of the interpreter's distribution
    # Of the symbolic ledger: [begin, end). As bench/recall_model/tokenizer.py numbers them.
    account_ids: tuple[int, int] = (257, 4353)
    value_ids: tuple[int, int] = (4353, 4609)
    bug_rate: float = 0.0                   # bugs a token; at least one bug
    later: int = LATER                      # tokens behind the symbolic ledger that symbols-later reads along


@dataclasses.dataclass
class Draft:
    """A text under construction that keeps track of where things stand."""

    text: str = ""
    marks: dict[str, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)

    def add(self, piece: str, *marks: str) -> None:
        begin = len(self.text)
        self.text += piece
        for mark in marks:
            self.marks.setdefault(mark, []).append((begin, len(self.text)))


def join(lines: list[tuple[str, tuple[str, ...]]], between: str = "\n") -> Draft:
    """Lines with their marks; what stands between lines belongs to no mark. Linear in the text's length."""
    draft, at, pieces = Draft(), 0, []
    for line, marks in lines:
        for mark in marks:
            draft.marks.setdefault(mark, []).append((at, at + len(line)))
        pieces.append(line)
        at += len(line) + len(between)
    draft.text = between.join(pieces)
    return draft


def generator(task: str, seed: int, *more: object) -> random.Random:
    """Equal on every machine and Python version; independent between tasks and seeds."""
    return random.Random("/".join(map(str, (task, seed, *more))))


def fit(task: str, build: Callable[[int], str], count: Count, length: int, least: int = 1, spare: int = 0) -> int:
    """The largest size whose text has at most `length` less `spare` tokens, to within one percent; build(size) must grow
    with it."""
    tokens = length - spare
    low, low_count = least, count(build(least))
    if low_count > tokens:
        raise EvalError(f"{task}: got a length of {length} tokens, allowed at least {low_count + spare}: raise --lengths")
    high, high_count = 0, 0  # not known yet
    while high == 0 or high - low > 1:
        if high == 0:
            size = max(low + 1, min(low * 16, int(low * tokens / max(1, low_count) * 1.02) + 1))
        else:  # where a straight line would meet `tokens`, kept inside of the bracket
            guess = low + (high - low) * (tokens - low_count) / max(1, high_count - low_count)
            size = min(high - 1, max(low + 1, int(guess)))
        got = count(build(size))
        if got <= tokens:
            low, low_count = size, got
            if got >= tokens * 0.99:
                break
        else:
            high, high_count = size, got
    return low


def make(task: str, length: int, seed: int, settings: Settings) -> Item:
    from refocus.evaluate.tasks import registry
    if task not in registry.TASKS:
        raise EvalError(f"got the task {task!r}, allowed {', '.join(registry.TASKS)}, or a task file")
    return registry.TASKS[task](length, seed, settings)


def item(task: str, length: int, seed: int, preamble: str, text: str | list[int],
         questions: list[Question]) -> Item:
    return Item(f"{task}-{length}-{seed}", task, length, seed, preamble, text, questions)


def shuffled(rng: random.Random, values: list[Any]) -> list[Any]:
    copy = list(values)
    rng.shuffle(copy)
    return copy
