"""Tokens of a text, and the tokens under some of its characters, measured with the service's own tokenizer."""
from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable

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
        first = self._begin(begin)
        return first, max(first + 1, self._end(end))

    def _begin(self, character: int) -> int:
        """Of the token that the character is in. From the text behind it: what stands before a boundary may be cut
        differently when nothing follows it (line breaks at the end are one token, before a word they are two)."""
        piece = bisect.bisect_right(self._starts, character) - 1
        ids = self._ids[piece]
        stop = self._starts[piece + 1] if piece + 1 < len(self._starts) else len(self._text)
        tail = self._tokenize(self._text[character:stop])
        same = _alike(reversed(ids), reversed(tail))
        return self._before[piece] + max(0, len(ids) - same - (same < len(tail)))

    def _end(self, character: int) -> int:
        """Behind the token that the last character before it is in."""
        piece = max(0, bisect.bisect_left(self._starts, character) - 1)
        ids = self._ids[piece]
        head = self._tokenize(self._text[self._starts[piece]:character])
        same = _alike(ids, head)
        return self._before[piece] + min(len(ids), same + (same < len(head)))


def _alike(first: Iterable[int], second: Iterable[int]) -> int:
    """How many ids are the same from the start."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def count(text: str, tokenize: Tokenize) -> int:
    starts = pieces(text)
    return sum(len(tokenize(text[begin:end])) for begin, end in zip(starts, starts[1:] + [len(text)]))
