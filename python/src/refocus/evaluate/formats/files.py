"""What the readers share: paths, lines, and texts that are cut to fit."""
from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from refocus.evaluate import spans
from refocus.evaluate.item import EvalError

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    encode: Callable[[str], list[int]]       # of a text of any length
    decode: Callable[[Sequence[int]], str]   # special tokens of its own are none in these texts
    limit: int                               # tokens of a prompt; longer ones are cut as the benchmark says
    rows: int = 0                            # of a file, the first ones; 0: all
    say: Callable[[str], object] = print     # remarks


def prompts(name: str) -> dict[str, Any]:
    data = importlib.resources.files("refocus.evaluate.formats").joinpath("prompts", name).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(data)
    return found


def find(path: str, endings: tuple[str, ...], where: str) -> list[str]:
    """Files of a folder and its subfolders, or the one that is named; EvalError says where to get them."""
    if os.path.isfile(path):
        return [path]
    found = [os.path.join(folder, name) for folder, _, names in sorted(os.walk(path)) for name in sorted(names)
             if name.endswith(endings)]
    if not found:
        raise EvalError(f"{path}: got no {' or '.join(endings)} there: {where}")
    return found


def rows(path: str, fields: Sequence[str], limit: int) -> list[Row]:
    """Of a JSON array, or of JSON objects, one a line; every one has `fields`."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        found = json.loads(text) if text.lstrip().startswith("[") else \
            [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot read: {error}") from None
    except json.JSONDecodeError as error:
        raise EvalError(f"{path}: got no JSON: {error}") from None
    for number, row in enumerate(found, 1):
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise EvalError(f"{path}: item {number}: got no {missing[0]!r}, allowed the benchmark's own fields: "
                            f"{', '.join(fields)}")
    if not found:
        raise EvalError(f"{path}: got no items, allowed at least one")
    return found[:limit] if limit else found


def cut_middle(prompt: str, settings: Settings, limit: int, odd: int = 0) -> str:
    """The first and the last half of `limit` tokens. odd: further tokens of the last half."""
    ids = settings.encode(prompt)
    if len(ids) <= limit:
        return prompt
    half = limit // 2
    return settings.decode(ids[:half]) + settings.decode(ids[-(half + odd):])


def split(prompt: str, before: str, after: str) -> tuple[str, str, str]:
    """A prompt, perhaps cut, as instructions, text and question. What was cut into goes to the text."""
    if not (after and prompt.endswith(after)):
        after = ""
    body = prompt[:len(prompt) - len(after)] if after else prompt
    if not body.startswith(before):
        before = ""
    return before, body[len(before):], after


def encode_pieces(tokenize: Callable[[str], list[int]], text: str) -> list[int]:
    starts = spans.pieces(text)
    return [id for begin, end in zip(starts, [*starts[1:], len(text)]) for id in tokenize(text[begin:end])]


def decode_pieces(detokenize: Callable[[Sequence[int]], str], ids: Sequence[int], size: int = 60_000) -> str:
    return "".join(detokenize(ids[i:i + size]) for i in range(0, len(ids), size))


def write_lines(path: str, lines: Sequence[Row]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
