"""RULER's own files (arXiv 2404.06654; github.com/NVIDIA/RULER, scripts/pred/call_api.py, scripts/eval/evaluate.py,
Apache-2.0): <task>/validation.jsonl or <task>.jsonl, as its prepare.py writes them.

The prompt is input and answer_prefix. `index` is a place in the text for some tasks: never a key.
"""
from __future__ import annotations

import os
from typing import Any

from refocus.evaluate.formats import files, metrics
from refocus.evaluate.formats.files import Settings
from refocus.evaluate.item import EvalError, Item, Question

WHERE = "make the files with scripts/data/prepare.py of github.com/NVIDIA/RULER and name their folder"
FIELDS = ("index", "input", "outputs")
ANSWER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def read(path: str, settings: Settings) -> list[Item]:
    items = []
    for file in files.find(path, (".jsonl",), WHERE):
        folder, name = os.path.split(os.path.abspath(file))
        names = (name.removesuffix(".jsonl"), os.path.basename(folder))
        task = next((name for name in names if name.split("_")[0] in ANSWER_TOKENS), None)
        if task is None:
            raise EvalError(f"{file}: got no task of RULER by file or folder name, allowed niah_*, vt, cwe, fwe, qa_*")
        base = task.split("_")[0]
        for number, row in enumerate(files.rows(file, FIELDS, settings.rows)):
            text, line, asked = row["input"].rpartition("\n")
            prefix = row.get("answer_prefix", "")
            items.append(Item(f"ruler-{task}-{number}", f"ruler/{task}", 0, 0, "", text, [Question(
                "0", line + asked + prefix, row["outputs"], "ruler_part" if base == "qa" else "ruler_all",
                ANSWER_TOKENS[base], data={"task": task, "index": row["index"], "others": row.get("others", {}),
                                           "truncation": row.get("truncation", -1), "length": row.get("length", -1)})]))
    return items


def predictions(items: list[Item], answers: dict[str, str], folder: str) -> dict[str, Any]:
    """<task>.jsonl as call_api.py writes it, and the scores of evaluate.py."""
    scores: dict[str, Any] = {}
    for task in dict.fromkeys(item.questions[0].data["task"] for item in items):
        done = [item for item in items if item.questions[0].data["task"] == task and item.id in answers]
        lines, shares = [], []
        for item in done:
            question = item.questions[0]
            references = [str(reference) for reference in question.answers]
            one = metrics.string_match_part if question.judge == "ruler_part" else metrics.string_match_all
            shares.append(one(answers[item.id], references))
            lines.append({"index": question.data["index"], "pred": answers[item.id],
                          "input": f"{item.text}{question.prompt}", "outputs": question.answers,
                          **{field: question.data[field] for field in ("others", "truncation", "length")}})
        files.write_lines(os.path.join(folder, f"{task}.jsonl"), lines)
        scores[task] = round(100 * sum(shares) / len(shares), 2) if shares else None
    return scores
