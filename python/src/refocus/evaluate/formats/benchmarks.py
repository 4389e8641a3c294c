"""Public benchmarks by name: "longbench:PATH" among the tasks of a run."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from refocus.evaluate.formats import babilong, longbench, longbench2, ruler_files, zeroscrolls
from refocus.evaluate.formats.files import Settings
from refocus.evaluate.item import EvalError, Item


class Benchmark(NamedTuple):
    read: Callable[[str, Settings], list[Item]]
    predictions: Callable[[list[Item], dict[str, str], str], dict[str, Any]]  # items, answers by item, folder -> scores


BENCHMARKS = {
    "longbench": Benchmark(longbench.read, longbench.predictions),
    "longbench2": Benchmark(longbench2.read, longbench2.predictions),
    "zeroscrolls": Benchmark(zeroscrolls.read, zeroscrolls.predictions),
    "ruler": Benchmark(ruler_files.read, ruler_files.predictions),
    "babilong": Benchmark(babilong.read, babilong.predictions),
}


def is_one(task: str) -> bool:
    return task.partition(":")[0] in BENCHMARKS


def read(task: str, settings: Settings) -> list[Item]:
    name, _, path = task.partition(":")
    if not path:
        raise EvalError(f"{name}: got no path, allowed {name}:FILE or {name}:FOLDER")
    return BENCHMARKS[name].read(path, settings)


def write(items: list[Item], records: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """predictions/<benchmark>/<method>/ in the benchmarks' own formats, and scores.json of all of them."""
    scores: dict[str, Any] = {}
    methods = dict.fromkeys(record["method"] for record in records if record["kind"] == "answer")
    for name, benchmark in BENCHMARKS.items():
        own = [item for item in items if item.id.startswith(name + "-")]
        for method in methods if own else ():
            answers = {record["item"]: record["answer"] for record in records
                       if record["kind"] == "answer" and record["method"] == method}
            safe = "".join(letter if letter.isalnum() or letter in "-+=." else "_" for letter in method)
            scores.setdefault(name, {})[method] = benchmark.predictions(
                own, answers, os.path.join(folder, "predictions", name, safe))
    if scores:
        with open(os.path.join(folder, "predictions", "scores.json"), "w", encoding="utf-8") as file:
            json.dump(scores, file, indent=1)
            file.write("\n")
    return scores
