"""LongBench (arXiv 2308.14508; github.com/THUDM/LongBench, folder LongBench: pred.py, eval.py, metrics.py, MIT).

Files are <dataset>.jsonl and <dataset>_e.jsonl (LongBench-E). The filled prompt is cut in the middle to the limit,
before it becomes a conversation, which six datasets never do; decoding is greedy.
"""
from __future__ import annotations

import os
from typing import Any

from refocus.evaluate.formats import files, metrics
from refocus.evaluate.formats.files import Row, Settings
from refocus.evaluate.item import EvalError, Item, Question

WHERE = "get data.zip of huggingface.co/datasets/THUDM/LongBench, unpack it, and name the folder with its *.jsonl"
FIELDS = ("context", "answers", "length", "all_classes")
ANSWER_TOKENS = {"narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "multifieldqa_zh": 64, "hotpotqa": 32,
                 "2wikimqa": 32, "musique": 32, "dureader": 128, "gov_report": 512, "qmsum": 512, "multi_news": 512,
                 "vcsum": 512, "trec": 64, "triviaqa": 32, "samsum": 128, "lsht": 64, "passage_count": 32,
                 "passage_retrieval_en": 32, "passage_retrieval_zh": 32, "lcc": 64, "repobench-p": 64}
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")            # of the answer counts
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")
NEEDS_JIEBA = ("multifieldqa_zh", "dureader", "vcsum")


def score_one(dataset: str, answer: str, reference: str, classes: list[str]) -> float:
    if dataset == "multifieldqa_zh":
        return metrics.qa_f1_chinese(answer, reference)
    if dataset in ("dureader", "vcsum"):
        return metrics.rouge_l_chinese(answer, reference)
    if dataset in ("gov_report", "qmsum", "multi_news", "samsum"):
        return metrics.rouge_l(answer, reference)
    if dataset in ("trec", "lsht"):
        return metrics.one_class(answer, reference, classes)
    if dataset == "passage_retrieval_en":
        return metrics.paragraph(answer, reference, "Paragraph ")
    if dataset == "passage_retrieval_zh":
        return metrics.paragraph(answer, reference, "段落")
    if dataset == "passage_count":
        return metrics.numbers(answer, reference)
    if dataset in ("lcc", "repobench-p"):
        return metrics.code_similarity(answer, reference)
    return metrics.qa_f1(answer, reference)


def judge(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    """The best over the references."""
    dataset = data["dataset"]
    if dataset in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    return {"score": max((score_one(dataset, answer, reference, data["all_classes"] or []) for reference in references),
                         default=0.0)}


def read(path: str, settings: Settings) -> list[Item]:
    templates = files.prompts("longbench.json")
    items: list[Item] = []
    for file in files.find(path, (".jsonl",), WHERE):
        name = os.path.basename(file).removesuffix(".jsonl")
        dataset = name.removesuffix("_e")
        if dataset not in templates:
            raise EvalError(f"{file}: got {name!r}, allowed a dataset of LongBench: {', '.join(templates)}")
        if dataset in NEEDS_JIEBA and not metrics.has_jieba():
            settings.say(f"{file}: left out: its score needs the package jieba (pip install jieba)")
            continue
        for number, row in enumerate(files.rows(file, FIELDS, settings.rows)):
            items.append(_item(name, dataset, number, row, templates[dataset], settings))
    return items


def _item(name: str, dataset: str, number: int, row: Row, template: str, settings: Settings) -> Item:
    asked = str(row.get("input", row.get("question", "")))
    before, after = (part.replace("{input}", asked) for part in template.split("{context}"))
    limit = settings.limit - ANSWER_TOKENS[dataset]
    prompt = files.cut_middle(before + row["context"] + after, settings, limit)
    preamble, text, question = files.split(prompt, before, after)
    options: dict[str, Any] = {}
    if dataset == "samsum":  # ends at a line break, but not with nothing
        options = {"stop_token_ids": settings.encode("\n")[-1:], "min_tokens": 1}
    data = {"dataset": dataset, "all_classes": row["all_classes"], "length": row["length"]}
    return Item(f"longbench-{name}-{number}", f"longbench/{name}", 0, 0, preamble, text, [Question(
        "0", question, row["answers"], "longbench", ANSWER_TOKENS[dataset], data=data, options=options)],
        chat=dataset not in NO_CHAT)


def predictions(items: list[Item], answers: dict[str, str], folder: str) -> dict[str, Any]:
    """pred/<dataset>.jsonl and pred_e/<dataset>.jsonl as pred.py writes them, and what eval.py says of them."""
    scores: dict[str, Any] = {}
    for task in dict.fromkeys(item.task for item in items):
        name = task.split("/")[1]
        done = [item for item in items if item.task == task and item.id in answers]
        lines = [{"pred": answers[item.id], "answers": item.questions[0].answers,
                  "all_classes": item.questions[0].data["all_classes"], "length": item.questions[0].data["length"]}
                 for item in done]
        of_e = name.endswith("_e")
        files.write_lines(os.path.join(folder, "pred_e" if of_e else "pred", f"{name.removesuffix('_e')}.jsonl"), lines)
        shares = [(item.questions[0].data["length"], judge(
            answers[item.id], [str(a) for a in item.questions[0].answers], item.questions[0].data)["score"])
            for item in done]
        if of_e:
            groups = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, 1 << 60)}
            scores[name] = {group: _hundred([s for length, s in shares if low <= length < high])
                            for group, (low, high) in groups.items()}
        else:
            scores[name] = _hundred([share for _, share in shares])
    return scores


def _hundred(shares: list[float]) -> float | None:
    return round(100 * sum(shares) / len(shares), 2) if shares else None
