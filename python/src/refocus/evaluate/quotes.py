"""Spans that the model itself names: it quotes what a question needs, and the quotes are looked up in the text.

As arXiv 2607.09415 chooses its spans; there K and V of the spans move along, here they are frozen.
"""
from __future__ import annotations

import difflib
import random
import re

MOST = 8  # quotes of a question
ALIKE = 0.75  # of two words in four: less is another place, or none
FEWEST = 3  # words of a quote; fewer say little about where they stand
PROMPT = ("\n\nCopy, word for word, the sentences of the text above that are needed to answer the question below: at "
          f"most {MOST}, each on a line of its own. Do not answer the question.\nQuestion: ")
ASK = "\nSentences:\n"
MARK = re.compile(r"^(?:[-*\u2022]|\(?\d{1,2}[.):])\s+")
WORD = re.compile(r"\w+")


def prompt(question: str) -> str:
    """question: as it is asked otherwise."""
    asked = (question.rpartition("\nAnswer:")[0] or question).strip()
    return PROMPT + asked.removeprefix("Question:").lstrip() + ASK


def lines(reply: str) -> list[str]:
    """Quotes in a reply, each once, without marks of a list."""
    said = (MARK.sub("", line.strip()).strip() for line in reply.splitlines())
    return [line for line in dict.fromkeys(said) if len(WORD.findall(line)) >= FEWEST][:MOST]


class Places:
    """Of a text, by words: case, blanks and punctuation do not count."""

    def __init__(self, text: str) -> None:
        words = list(WORD.finditer(text))
        self._words = [word.group().casefold() for word in words]  # one by one: it may lengthen them
        self._at = [word.span() for word in words]

    def find(self, quote: str) -> tuple[int, int] | None:
        """Characters [begin, end) of what is most like it around the longest run of its words; None: not there."""
        wanted = [word.casefold() for word in WORD.findall(quote)]
        match = difflib.SequenceMatcher(None, self._words, wanted, autojunk=False).find_longest_match()
        if not wanted or match.size == 0:
            return None
        first = max(0, match.a - match.b)
        last = min(len(self._words), match.a - match.b + len(wanted))
        there = difflib.SequenceMatcher(None, self._words[first:last], wanted, autojunk=False)
        if there.ratio() >= ALIKE:
            same = [block for block in there.get_matching_blocks() if block.size > 0]
            return self._at[first + same[0].a][0], self._at[first + same[-1].a + same[-1].size - 1][1]
        if match.size >= FEWEST and 2 * match.size >= len(wanted):  # with made-up words around it
            return self._at[match.a][0], self._at[match.a + match.size - 1][1]
        return None


def spans(found: list[tuple[int, int]], tokens: int, rows: int, cycle: int, seed: int) -> list[tuple[int, int]]:
    """Start and rows of what the steps train on in turn: around every place of tokens [first, last) that was found, in
    order, and then with uniform starts, until there are `cycle`. A place longer than a span has several."""
    rows = min(rows, max(1, tokens - 1))
    free = max(0, tokens - 1 - rows)  # the last start
    starts: list[int] = []
    for first, last in found:
        count = max(1, -(-(last - first) // rows))
        begin = (first + last) // 2 - count * rows // 2 - 1  # a row predicts the token behind it
        starts += [min(max(0, begin + i * rows), free) for i in range(count)]
    starts = list(dict.fromkeys(starts))
    drawn = random.Random(seed)
    starts += [drawn.randint(0, free) for _ in range(cycle - len(starts))]
    return [(start, rows) for start in starts]
