"""Tokens of a text, and the tokens under some of its characters, measured with the service's own tokenizer."""
from __future__ import annotations

import bisect
from collections.abc import Callable

Tokenize = Callable[[str], list[int]]
PIECE = 32 << 10  # characters; far below what one Tokenize call takes, also at four bytes each


def pieces(text: str, size: int = PIECE) -> list[int]:
    """Where pieces begin: behind a line break in front of a letter, where tokenizers cut anyway; else anywhere."""
    starts, at = [0], 0
    while len(text) - at > size:
        cut = at + size
        back = text.rfind("\n", at + size // 2, at + size)
        while back > 0 and (text[back + 1:back + 2].isspace() or not text[back + 1:back + 2]):
            back = text.rfind("\n", at + size // 2, back)
        if back > 0:
            cut = back + 1
        starts.append(cut)
        at = cut
    return starts


class Tokens:
    """Of one text. Positions are exact to a token: a token that reaches over an end of a span is counted in."""

    def __init__(self, text: str, tokenize: Tokenize) -> None:
        self._text = text
        self._tokenize = tokenize
        self._starts = pieces(text)
        self._ids = [tokenize(text[begin:end]) for begin, end in
                     zip(self._starts, self._starts[1:] + [len(text)])]
        self._before = [0]
        for ids in self._ids:
            self._before.append(self._before[-1] + len(ids))

    @property
    def count(self) -> int:
        return self._before[-1]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Tokens [first, last) that cover the characters [begin, end)."""
        first = self._at(begin, False)
        return first, max(first + 1, self._at(end, True))

    def _at(self, character: int, end: bool) -> int:
        piece = max(0, (bisect.bisect_left if end else bisect.bisect_right)(self._starts, character) - 1)
        ids = self._ids[piece]
        head = self._tokenize(self._text[self._starts[piece]:character])
        if end:
            return self._before[piece] + min(len(head), len(ids))
        same = 0
        while same < min(len(head), len(ids)) and head[same] == ids[same]:
            same += 1
        return self._before[piece] + same


def count(text: str, tokenize: Tokenize) -> int:
    starts = pieces(text)
    return sum(len(tokenize(text[begin:end])) for begin, end in zip(starts, starts[1:] + [len(text)]))
