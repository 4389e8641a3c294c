"""Results of a journal, put together: a row for each task, length and method."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from refocus.evaluate import judges, stats

Record = dict[str, Any]
PHASES = ("prefill", "adapt", "queue", "prompt", "decode")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def scores(record: Record) -> list[float]:
    """Of an answer: one, or one for each of the tokens that were read along."""
    if record["judge"] == judges.TOKENS:
        return judges.right(record["answer"], record["references"])
    return [record["score"]]


def _groups(answers: Sequence[Record], field: str = "score") -> list[list[float]]:
    """Scores by text."""
    by_item: dict[str, list[float]] = {}
    for record in answers:
        values = scores(record) if field == "score" else [record["parts"].get(field)]
        by_item.setdefault(record["item"], []).extend(value for value in values if value is not None)
    return list(by_item.values())


def rows(records: Sequence[Record]) -> list[Record]:
    """In the order in which tasks, lengths and methods first occur, the floor and the plain answers first."""
    answers: dict[tuple[str, int, str], list[Record]] = {}
    adapts: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        key = (record.get("task", ""), record.get("length", 0), record.get("method", ""))
        if record["kind"] == "answer":
            answers.setdefault(key, []).append(record)
            if "adapt" in record:  # to this question
                adapts.setdefault(key, []).append(record["adapt"])
        elif record["kind"] == "adapt":
            adapts.setdefault(key, []).append(record)
    first = ("no-context", "in-context")
    order = {name: i for i, name in enumerate(dict.fromkeys(key[0] for key in answers))}
    methods = {name: first.index(name) if name in first else i
               for i, name in enumerate(dict.fromkeys(key[2] for key in answers), len(first))}
    return [_row(key, answers[key], adapts.get(key, []), answers.get((key[0], key[1], "in-context")))
            for key in sorted(answers, key=lambda key: (order[key[0]], key[1], methods[key[2]]))]


def _row(key: tuple[str, int, str], answers: list[Record], adapts: list[Record],
         base: list[Record] | None) -> Record:
    groups = _groups(answers)
    mean, low, high = stats.interval(groups)
    parts = sorted({name for record in answers for name in record["parts"]})
    row: Record = {
        "task": key[0], "length": key[1], "method": key[2], "texts": len(groups), "questions": sum(map(len, groups)),
        "score": mean, "low": low, "high": high,
        "parts": {name: stats.interval(_groups(answers, name)) for name in parts},
        "context_tokens": _mean(record["tokens"]["context"] for record in answers),
        "generated": _mean(record["tokens"]["generated"] for record in answers),
        "budget": _mean(record["tokens"]["budget"] for record in answers),
        "seconds": {
            "prefill": _mean({record["item"]: record["seconds"]["prefill"] for record in answers}.values()),
            "adapt": _mean(record["seconds"] for record in adapts) or 0.0,
            **{phase: _mean(record["seconds"][phase] for record in answers) for phase in ("queue", "prompt", "decode")},
            "wall": stats.median([record["seconds"]["wall"] for record in answers])},
        "adapt_flops": _mean(record["flops"] for record in adapts) or 0.0,
        "answer_flops": _mean(record["flops"] for record in answers),
        "probe_before": _mean(record["probe_before"] for record in adapts),
        "probe_after": _mean(record["probe_after"] for record in adapts),
        "losses": _columns([record["losses"] for record in adapts]),
        "target_nats": _mean(record.get("target_nats") for record in answers),
        **_attention(answers), **_rivals(answers)}
    if base is not None and key[2] != "in-context":
        row["versus"] = versus(answers, base)
    return row


def _columns(lists: list[list[float]]) -> list[float]:
    """Mean of each place, as far as all lists go."""
    size = min(map(len, lists), default=0)
    return [sum(values[i] for values in lists) / len(lists) for i in range(size)]


def _attention(answers: list[Record]) -> Record:
    looked = [record["attention"] for record in answers if record.get("attention")]
    if not looked:
        return {"mass": None, "even": None, "mass_by_layer": [], "layers": []}
    by_layer = _columns([entry["mass"] for entry in looked])
    return {"mass": sum(by_layer) / len(by_layer), "even": _mean(entry["even"] for entry in looked),
            "mass_by_layer": by_layer, "layers": looked[0]["layers"]}


def _rivals(answers: list[Record]) -> Record:
    looked = [record["rivals"] for record in answers if record.get("rivals")]
    if not looked:
        return {"rivals": {}, "rivals_best_head": {}}
    deltas = [f"{delta:g}" for delta in looked[0]["deltas"]]
    return {"rivals": dict(zip(deltas, _columns([entry["mean"] for entry in looked]))),
            "rivals_best_head": dict(zip(deltas, _columns([entry["best_head"] for entry in looked])))}


def versus(answers: list[Record], base: list[Record]) -> tuple[float, float, float]:
    """Mean difference to the in-context answers of the same questions, with a 95 % interval."""
    known = {(record["item"], record["question"]): scores(record) for record in base}
    by_item: dict[str, list[float]] = {}
    for record in answers:
        if (record["item"], record["question"]) in known:
            by_item.setdefault(record["item"], []).extend(
                mine - other for mine, other in zip(scores(record), known[record["item"], record["question"]]))
    return stats.paired(list(by_item.values()))
