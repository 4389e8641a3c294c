"""What a run has done, one JSON object a line: nothing finished is lost or done twice.

"run" begins the file and says what it belongs to; "adapt" and "answer" are results; "failure" tells of a question that
could not be answered, which a later run tries again. A last line that was cut off by a crash is dropped.
"""
from __future__ import annotations

import json
import os
from typing import Any, TextIO

from refocus.evaluate.item import EvalError

VERSION = 1
Key = tuple[str, str, str]  # item, method, question; an adaptation has an empty question


def key_of(record: dict[str, Any]) -> Key:
    return record["item"], record["method"], record.get("question", "")


class Journal:
    def __init__(self, path: str, header: dict[str, Any]) -> None:
        """Opens or begins it; EvalError where it belongs to something else."""
        self.path = path
        self.header = {"kind": "run", "version": VERSION, **header}
        self.done: dict[Key, dict[str, Any]] = {}
        records, whole = read(path) if os.path.exists(path) else ([], 0)
        if records:
            self._check(records[0])
        for record in records:
            if record["kind"] in ("answer", "adapt"):
                self.done[key_of(record)] = record
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._file: TextIO = open(path, "a", encoding="utf-8")
            if os.path.getsize(path) > whole:
                self._file.truncate(whole)
        except OSError as error:
            raise EvalError(f"{path}: cannot write: {error.strerror}") from None
        if not records:
            self.add(self.header)

    def _check(self, first: dict[str, Any]) -> None:
        for field in ("version", "model", "settings"):
            if first.get(field) != self.header[field]:
                raise EvalError(f"{self.path}: got results of {field} {first.get(field)}, allowed {self.header[field]}"
                                ": name another folder with --out")

    def add(self, record: dict[str, Any]) -> None:
        """On disk when it returns."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if record["kind"] in ("answer", "adapt"):
            self.done[key_of(record)] = record

    def close(self) -> None:
        self._file.close()


def read(path: str) -> tuple[list[dict[str, Any]], int]:
    """Records and the bytes that hold them, without a last line that is cut off."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise EvalError(f"{path}: cannot read: {error.strerror}") from None
    whole = data.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "kind" not in record or (number == 1) != (record["kind"] == "run"):
                raise ValueError
        except ValueError:
            raise EvalError(f"{path}:{number}: got no record of a run: name another folder with --out") from None
        records.append(record)
    return records, whole


def results(path: str) -> list[dict[str, Any]]:
    """What a report is made of: the header and, of each key, the last record."""
    records, _ = read(path)
    if not records:
        raise EvalError(f"{path}: got no results, allowed a folder in which a run has begun")
    latest = {key_of(record): record for record in records[1:] if record["kind"] in ("answer", "adapt")}
    failures = [record for record in records[1:] if record["kind"] == "failure" and key_of(record) not in latest]
    return [records[0], *latest.values(), *{key_of(record): record for record in failures}.values()]
