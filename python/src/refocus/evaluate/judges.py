"""Whether an answer is right. A judge takes an answer, the references and the question's data, and returns shares of 0
to 1 by name; "score" is the one that counts."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from refocus.evaluate.formats import babilong, longbench, longbench2, metrics, zeroscrolls

TOKENS = "tokens"  # of questions whose tokens are read along, not written: question.data["rows"] says which count
Judge = Callable[[str, list[str], dict[str, Any]], dict[str, float]]


def first_line(answer: str) -> str:
    return next((line.strip() for line in answer.splitlines() if line.strip()), "")


def _words(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.lower())


def word(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    """The first line has the reference as a word of its own, before any other word that could be an answer."""
    found = _words(first_line(answer))
    wanted = references[0].lower()
    choices = {choice.lower() for choice in data.get("choices", [])} | {wanted}
    first = next((token for token in found if token in choices), "")
    return {"score": float(first == wanted)}


def token(answer: str, references: list[Any], data: dict[str, Any]) -> dict[str, float]:
    """Of token ids, written as numbers with blanks between: the first one is the reference."""
    return {"score": float(answer.split()[:1] == [str(references[0])])}


def tokens(answer: str, references: list[Any], data: dict[str, Any]) -> dict[str, float]:
    """Of token ids, one for each reference: the share that are right."""
    found = right(answer, references)
    return {"score": sum(found) / len(found)}


def right(answer: str, references: list[Any]) -> list[float]:
    """1 for each token of `references` that the answer has in its place, else 0."""
    got = answer.split()
    return [float(i < len(got) and got[i] == str(reference)) for i, reference in enumerate(references)]


def bank(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    """Kind and place, jointly (the score) and apart. The first kind and the first id that the answer names count."""
    kind, place = references
    kinds = re.findall(r"CALC_ERROR|NEGATIVE_BAL|LOST_UPDATE|DUPLICATE_TXN", answer.upper())
    places = re.findall(r"TX0*(\d+)", answer.upper())
    right_kind = float(kinds[:1] == [kind])
    right_place = float([int(p) for p in places[:1]] == [int(place[2:])])
    return {"score": right_kind * right_place, "type": right_kind, "location": right_place}


def places(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    """Found places among all that were named or wanted; "file" is the share of right files."""
    found = {(name, int(line)) for name, line in re.findall(r"([\w./-]+\.\w+)\s*:\s*[Ll]?(?:ine\s*)?(\d+)", answer)}
    wanted = {(name, int(line)) for name, line in (reference.rsplit(":L", 1) for reference in references)}
    right = len(found & wanted) / len(found | wanted)
    files, wanted_files = {name for name, _ in found}, {name for name, _ in wanted}
    return {"score": right, "file": len(files & wanted_files) / max(1, len(files | wanted_files))}


def ruler_all(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    """RULER's string_match_all: the share of references that the answer contains."""
    return {"score": metrics.string_match_all(answer, references)}


def ruler_part(answer: str, references: list[str], data: dict[str, Any]) -> dict[str, float]:
    """RULER's string_match_part: any reference is contained."""
    return {"score": metrics.string_match_part(answer, references)}


JUDGES: dict[str, Judge] = {"word": word, "token": token, TOKENS: tokens, "bank": bank,
                            "places": places, "ruler_all": ruler_all, "ruler_part": ruler_part,
                            "longbench": longbench.judge, "longbench2": longbench2.judge,
                            "zeroscrolls": zeroscrolls.judge, "babilong": babilong.judge}


def normal(answer: str, judge: str) -> str:
    """What self-consistency counts as the same answer."""
    if judge == "bank":
        kinds = re.findall(r"CALC_ERROR|NEGATIVE_BAL|LOST_UPDATE|DUPLICATE_TXN", answer.upper())
        places = re.findall(r"TX0*(\d+)", answer.upper())
        return " ".join(kinds[:1] + places[:1])
    if judge == "longbench2":
        return longbench2.extract(answer) or ""
    if judge == "token":
        return " ".join(answer.split()[:1])
    return " ".join(_words(first_line(answer)))
