"""BABILong (arXiv 2406.10149; github.com/booydar/babilong, babilong/prompts.py, metrics.py, Apache-2.0): rows of input,
question and target, as JSON array or lines, in files whose path names the task (.../qa1/0k.json, qa1_4k.jsonl).

Prompts have instruction, examples and post-prompt; greedy, 20 new tokens.
"""
from __future__ import annotations

import csv
import os
import re
from typing import Any

from refocus.evaluate.formats import files
from refocus.evaluate.formats.files import Settings
from refocus.evaluate.item import EvalError, Item, Question

WHERE = "get the files of huggingface.co/datasets/RMT-team/babilong (data/qa1/...) and name their folder"
FIELDS = ("input", "question", "target")
ANSWER_TOKENS = 20
PLACES = ["bathroom", "bedroom", "garden", "hallway", "kitchen", "office"]
LABELS = {**{f"qa{i}": PLACES for i in (1, 2, 3, 4, 11, 12, 13)},
          "qa5": ["Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"],
          **{f"qa{i}": ["no", "yes"] for i in (6, 9, 17, 18)}, "qa7": ["none", "one", "three", "two"],
          "qa8": ["apple", "football", "milk", "nothing"], "qa10": ["maybe", "no", "yes"],
          "qa14": ["bedroom", "cinema", "kitchen", "office", "park", "school"],
          "qa15": ["cat", "mouse", "sheep", "wolf"], "qa16": ["gray", "green", "white", "yellow"],
          "qa19": ["e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"],
          "qa20": ["bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"]}


def right(target: str, answer: str, question: str, task: str) -> bool:
    """compare_answers: the target is the only label in the answer's first sentence that the question has not. The cut
    at "Question" never happens, as there: the answer is in lower case by then."""
    said = answer.lower().split(".")[0].split("<context>")[0].split("<example>")[0].split("Question")[0]
    target = target.lower()
    labels = {label.lower() for label in LABELS[task]}
    found = {label for label in labels if label in said} - {label for label in labels if label in question.lower()}
    wanted = target.split(",") if "," in target and len(target) > 3 else [target]
    return all(one in found for one in wanted) and len(found) == len(wanted)


def judge(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    return {"score": float(right(references[0], answer, data["question"], data["task"]))}


def read(path: str, settings: Settings) -> list[Item]:
    prompts = files.prompts("babilong.json")
    items = []
    for file in files.find(path, (".json", ".jsonl"), WHERE):
        names = re.findall(r"(qa\d+)(?!\d)", os.path.abspath(file))
        if not names or names[-1] not in prompts:
            raise EvalError(f"{file}: got no task of BABILong in its path, allowed qa1 to qa20")
        task, stem = names[-1], os.path.basename(file).rpartition(".")[0]
        size = stem.removeprefix(task).strip("_") or "all"
        parts = prompts[task]
        before = f"{parts['instruction']}\n\n{parts['examples']}\n\n{parts['post_prompt']}\n\n<context>\n".lstrip()
        for number, row in enumerate(files.rows(file, FIELDS, settings.rows)):
            after = f"\n</context>\n\nQuestion: {row['question']}".rstrip()
            items.append(Item(f"babilong-{task}-{size}-{number}", f"babilong/{task}_{size}", 0, 0, before,
                              row["input"].strip(), [Question("0", after, [row["target"]], "babilong", ANSWER_TOKENS,
                                                              data={"task": task, "size": size,
                                                                    "question": row["question"]})]))
    return items


def predictions(items: list[Item], answers: dict[str, str], folder: str) -> dict[str, Any]:
    """<task>_<size>_instruction_yes_examples_yes_post_prompt_yes_chat_template_*.csv: target, output, question, from
    which collect_results.py computes accuracy."""
    scores: dict[str, Any] = {}
    os.makedirs(folder, exist_ok=True)
    for name in dict.fromkeys(item.task for item in items):
        done = [item for item in items if item.task == name and item.id in answers]
        stem = f"{name.split('/')[1]}_instruction_yes_examples_yes_post_prompt_yes_chat_template_no"
        with open(os.path.join(folder, f"{stem}.csv"), "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", "target", "output", "question"])
            for number, item in enumerate(done):
                question = item.questions[0]
                writer.writerow([number, question.answers[0], answers[item.id].strip(), question.data["question"]])
        shares = [judge(answers[item.id].strip(), [str(item.questions[0].answers[0])], item.questions[0].data)["score"]
                  for item in done]
        scores[name.split("/")[1]] = round(100 * sum(shares) / len(shares), 2) if shares else None
    return scores
