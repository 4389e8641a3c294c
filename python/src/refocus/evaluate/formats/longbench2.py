"""LongBench v2 (arXiv 2412.15204; github.com/THUDM/LongBench, pred.py, result.py, prompts/, MIT): one JSON array.

The filled prompt is cut in the middle to the limit; temperature 0.1, 128 new tokens. The no-context floor has its own
prompt, as there.
"""
from __future__ import annotations

import os
import re
from typing import Any

from refocus.evaluate.formats import files
from refocus.evaluate.formats.files import Row, Settings
from refocus.evaluate.item import Item, Question

WHERE = "get data.json of huggingface.co/datasets/THUDM/LongBench-v2 and name it"
FIELDS = ("_id", "domain", "sub_domain", "difficulty", "length", "question", "choice_A", "choice_B", "choice_C",
          "choice_D", "answer", "context")
ANSWER_TOKENS = 128
CHOICES = """What is the correct answer to this question: $Q$
Choices:
(A) $C_A$
(B) $C_B$
(C) $C_C$
(D) $C_D$

"""
FORM = 'Format your response as follows: "The correct answer is (insert answer here)".'
BEFORE = "Please read the following text and answer the question below.\n\n<text>\n"
AFTER = "\n</text>\n\n" + CHOICES + FORM
FLOOR = CHOICES + "What is the single, most likely answer choice? " + FORM


def extract(answer: str) -> str | None:
    answer = answer.replace("*", "")
    found = (re.search(r"The correct answer is \(([A-D])\)", answer)
             or re.search(r"The correct answer is ([A-D])", answer))
    return found.group(1) if found else None


def judge(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    return {"score": float(extract(answer.strip()) == references[0])}


def _fill(template: str, row: Row) -> str:
    """One after the other, as there: a choice that contains a mark of a later one would be filled, too."""
    for mark, field in (("$Q$", "question"), ("$C_A$", "choice_A"), ("$C_B$", "choice_B"), ("$C_C$", "choice_C"),
                        ("$C_D$", "choice_D")):
        template = template.replace(mark, row[field].strip())
    return template


def read(path: str, settings: Settings) -> list[Item]:
    items = []
    limit = settings.limit - ANSWER_TOKENS
    for file in files.find(path, (".json", ".jsonl"), WHERE):
        for row in files.rows(file, FIELDS, settings.rows):
            after = _fill(AFTER, row)
            prompt = files.cut_middle(BEFORE + row["context"].strip() + after, settings, limit, odd=limit % 2)
            preamble, text, question = files.split(prompt, BEFORE, after)
            data = {**{field: row[field] for field in FIELDS}, "context": row["context"][:1000]}
            asked = Question("0", question, [row["answer"]], "longbench2", ANSWER_TOKENS, floor=_fill(FLOOR, row),
                             options={"temperature": 0.1}, data=data)
            items.append(Item(f"longbench2-{row['_id']}", f"longbench2/{row['length']}", 0, 0, preamble, text, [asked]))
    return items


def predictions(items: list[Item], answers: dict[str, str], folder: str) -> dict[str, Any]:
    """results.jsonl as pred.py writes it, and the figures of result.py."""
    lines: list[Row] = []
    for item in items:
        if item.id in answers:
            data, response = item.questions[0].data, answers[item.id].strip()
            found = extract(response)
            lines.append({**{field: data[field] for field in FIELDS}, "response": response, "pred": found,
                          "judge": found == data["answer"]})
    files.write_lines(os.path.join(folder, "results.jsonl"), lines)
    groups = {"Overall": lines, "Easy": [line for line in lines if line["difficulty"] == "easy"],
              "Hard": [line for line in lines if line["difficulty"] != "easy"],
              **{name.capitalize(): [line for line in lines if line["length"] == name]
                 for name in ("short", "medium", "long")}}
    return {name: round(100 * sum(line["judge"] for line in group) / len(group), 1) if group else None
            for name, group in groups.items()}
