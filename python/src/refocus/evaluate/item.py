"""What is asked: a long text, questions about it, exact answers and where the evidence stands."""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from refocus.options import GenerateOptions

FORMAT = "refocus-task-1"  # first line of a task file


class EvalError(Exception):
    """Something the user can mend: one line."""


@dataclasses.dataclass(frozen=True)
class Question:
    id: str                                 # unique within its item
    prompt: str | list[int]                 # follows the context; token ids where the context is token ids
    answers: list[str] | list[int]          # references; a judge knows what they mean
    judge: str                              # name of a function of judges.py
    max_tokens: int
    evidence: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # [begin, end) in characters of the
                                            # text, or in its tokens where it is token ids; empty: not known
    stop: list[str] = dataclasses.field(default_factory=list)  # of direct answers
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the judge, and for people
    floor: str = ""                         # asked instead, and without the preamble, where there is no text
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of GenerateRequest; methods that draw go first


@dataclasses.dataclass(frozen=True)
class Item:
    id: str                                 # unique within a run
    task: str
    length: int                             # tokens that were asked for; 0: the text is as it is
    seed: int
    preamble: str                           # instructions before the text; all that the no-context floor sees
    text: str | list[int]
    questions: list[Question]
    chat: bool = True                       # False: never as a conversation

    @property
    def symbolic(self) -> bool:
        """Token ids, for models without a tokenizer."""
        return isinstance(self.text, list)


def to_json(item: Item) -> str:
    return json.dumps(dataclasses.asdict(item), ensure_ascii=False, separators=(",", ":"))


def write_items(items: list[Item], path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT}) + "\n")
        file.writelines(to_json(item) + "\n" for item in items)


def read_items(path: str | os.PathLike[str]) -> Iterator[Item]:
    """Of a file that write_items wrote, or that a user did by hand; EvalError names file, line and field."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot read: {error}") from None
    if not lines or _object(lines[0], f"{path}:1").get("format") != FORMAT:
        raise EvalError(f'{path}:1: got no task file, allowed one that begins with {{"format": "{FORMAT}"}}')
    seen: set[str] = set()
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            item = from_json(_object(line, f"{path}:{number}"), f"{path}:{number}")
            if item.id in seen:
                raise EvalError(f"{path}:{number}: got the id {item.id!r} again, allowed each once")
            seen.add(item.id)
            yield item
    if not seen:
        raise EvalError(f"{path}: got no items, allowed at least one")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvalError(f"{where}: got no JSON: {error}") from None
    if not isinstance(value, dict):
        raise EvalError(f"{where}: got {type(value).__name__}, allowed a JSON object")
    return value


def from_json(value: dict[str, Any], where: str) -> Item:
    text = _field(value, "text", where, (str, list))
    if isinstance(text, list):
        _check_ids(text, f"{where}: text")
    questions = [_question(q, text, f"{where}: questions[{i}]")
                 for i, q in enumerate(_field(value, "questions", where, (list,)))]
    if not questions:
        raise EvalError(f"{where}: questions: got none, allowed at least one")
    if len({question.id for question in questions}) != len(questions):
        raise EvalError(f"{where}: questions: got an id twice, allowed each once")
    return Item(_field(value, "id", where, (str,)), _field(value, "task", where, (str,)),
                _field(value, "length", where, (int,), 0), _field(value, "seed", where, (int,), 0),
                _field(value, "preamble", where, (str,), ""), text, questions, value.get("chat", True) is not False)


def _question(value: Any, text: str | list[int], where: str) -> Question:
    from refocus.evaluate.judges import JUDGES, TOKENS
    if not isinstance(value, dict):
        raise EvalError(f"{where}: got {type(value).__name__}, allowed a JSON object")
    prompt = _field(value, "prompt", where, (type(text),))
    answers = _field(value, "answers", where, (list,))
    judge = _field(value, "judge", where, (str,))
    if judge not in JUDGES:
        raise EvalError(f"{where}.judge: got {judge!r}, allowed {', '.join(sorted(JUDGES))}")
    max_tokens = _field(value, "max_tokens", where, (int,))
    if not 1 <= max_tokens <= 65536:
        raise EvalError(f"{where}.max_tokens: got {max_tokens}, allowed 1 to 65536")
    evidence = []
    for span in _field(value, "evidence", where, (list,), []):
        if (not isinstance(span, list) or len(span) != 2 or not all(isinstance(i, int) for i in span)
                or not 0 <= span[0] < span[1] <= len(text)):
            raise EvalError(f"{where}.evidence: got {span!r}, allowed [begin, end] in 0 to {len(text)}")
        evidence.append((span[0], span[1]))
    if not answers or any(not isinstance(answer, int if isinstance(text, list) else str) for answer in answers):
        raise EvalError(f"{where}.answers: got {answers!r}, allowed a list of "
                        f"{'token ids' if isinstance(text, list) else 'strings'}")
    data = _field(value, "data", where, (dict,), {})
    if judge == TOKENS:
        _check_rows(data.get("rows"), prompt, answers, where)
    return Question(_field(value, "id", where, (str,)), prompt, answers, judge, max_tokens, evidence,
                    _field(value, "stop", where, (list,), []), data,
                    _field(value, "floor", where, (str,), ""), _options(value, where))


def _check_rows(rows: Any, prompt: str | list[int], answers: list[Any], where: str) -> None:
    size = len(prompt) if isinstance(prompt, list) else 0
    if (not isinstance(rows, list) or len(rows) != len(answers)
            or any(not isinstance(row, int) or not 0 <= row < size for row in rows)):
        raise EvalError(f"{where}.data.rows: got {str(rows)[:60]}, allowed for the judge tokens: the place of every "
                        f"answer in a prompt of token ids, 0 to {size - 1}")


def _options(value: dict[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = _field(value, "options", where, (dict,), {})
    allowed = GenerateOptions.__annotations__
    unknown = next((name for name in found if name not in allowed), None)
    if unknown is not None:
        raise EvalError(f"{where}.options: got {unknown!r}, allowed {', '.join(allowed)}")
    return found


def _field(value: dict[str, Any], name: str, where: str, kinds: tuple[type, ...], default: Any = None) -> Any:
    got = value.get(name, default)
    if not isinstance(got, kinds) or isinstance(got, bool):
        missing = "nothing" if name not in value else type(got).__name__
        raise EvalError(f"{where}.{name}: got {missing}, allowed {' or '.join(kind.__name__ for kind in kinds)}")
    return got


def _check_ids(ids: list[Any], where: str) -> None:
    if any(not isinstance(id, int) or not 0 <= id < 1 << 32 for id in ids):
        raise EvalError(f"{where}: got something that is no token id, allowed 0 to 4294967295")
