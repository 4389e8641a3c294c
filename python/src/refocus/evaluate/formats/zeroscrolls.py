"""ZeroSCROLLS (arXiv 2305.14196; github.com/tau-nlp/zero_scrolls, experiments/, MIT): <task>/<split>.jsonl.

What stands before the query is cut at its end, so that it, the separator and the query fit. References of the test
split are private: write the predictions and hand them in. The validation split has some, about 20 a task; of those,
questions and rankings are scored by the paper's definitions, summaries (ROUGE) by the official script alone.
"""
from __future__ import annotations

import json
import os
from typing import Any

from refocus.evaluate.formats import files, metrics
from refocus.evaluate.formats.files import Row, Settings
from refocus.evaluate.item import EvalError, Item, Question

WHERE = "get <task>.zip of huggingface.co/datasets/tau/zero_scrolls, unpack it, and name the folder"
FIELDS = ("id", "input", "query_start_index", "query_end_index", "truncation_seperator")
ANSWER_TOKENS = {"gov_report": 1024, "summ_screen_fd": 512, "qmsum": 512, "squality": 512, "qasper": 128,
                 "narrative_qa": 64, "quality": 10, "musique": 32, "space_digest": 36, "book_sum_sort": 256}
SUMMARIES = ("gov_report", "summ_screen_fd", "qmsum", "squality")


def judge(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    task = data["task"]
    if task in SUMMARIES or not data["scored"]:
        return {"score": 0.0}
    one = {"quality": metrics.letter, "space_digest": metrics.exponential_similarity,
           "book_sum_sort": metrics.concordance}.get(task, metrics.qa_f1)
    return {"score": max(one(answer, reference) for reference in references)}


def read(path: str, settings: Settings) -> list[Item]:
    items = []
    for file in files.find(path, (".jsonl",), WHERE):
        folder, name = os.path.split(os.path.abspath(file))
        task = next((part for part in (os.path.basename(folder), name.removesuffix(".jsonl")) if part in ANSWER_TOKENS),
                    None)
        if task is None:
            raise EvalError(f"{file}: got no task of ZeroSCROLLS by folder or file name, allowed "
                            f"{', '.join(ANSWER_TOKENS)}")
        found = files.rows(file, FIELDS, settings.rows)
        for number, row in enumerate(found):
            items.append(_item(task, number, row, settings))
        if task in SUMMARIES or not any(row.get("output") for row in found):
            settings.say(f"{file}: written, not scored here ({'ROUGE' if task in SUMMARIES else 'no references'})")
    return items


def _item(task: str, number: int, row: Row, settings: Settings) -> Item:
    limit = settings.limit - ANSWER_TOKENS[task]
    text, question = row["input"][:row["query_start_index"]], row["input"][row["query_start_index"]:]
    if len(settings.encode(row["input"])) > limit:
        question = row["truncation_seperator"] + question
        text = settings.decode(settings.encode(text)[:max(0, limit - len(settings.encode(question)))])
    outputs = row.get("output") or []
    references = [outputs] if isinstance(outputs, str) else outputs
    return Item(f"zeroscrolls-{task}-{number}", f"zeroscrolls/{task}", 0, 0, "", text, [Question(
        "0", question, references or [""], "zeroscrolls", ANSWER_TOKENS[task],
        data={"task": task, "id": row["id"], "scored": bool(references)})])


def predictions(items: list[Item], answers: dict[str, str], folder: str) -> dict[str, Any]:
    """preds_<task>.json: {id: text}. Scores of what has references and is scored here, times 100."""
    scores: dict[str, Any] = {}
    for task in dict.fromkeys(item.questions[0].data["task"] for item in items):
        done = [item for item in items if item.questions[0].data["task"] == task and item.id in answers]
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"preds_{task}.json"), "w", encoding="utf-8") as file:
            json.dump({item.questions[0].data["id"]: answers[item.id] for item in done}, file, indent=4)
        shares = [judge(answers[item.id], [str(a) for a in item.questions[0].answers], item.questions[0].data)["score"]
                  for item in done if item.questions[0].data["scored"]]
        if shares and task not in SUMMARIES:
            scores[task] = round(100 * sum(shares) / len(shares), 2)
    return scores
