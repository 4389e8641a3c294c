#!/usr/bin/env python3
"""The demo's table, from the journal of `refocus eval`: recall before and after adapting, and what it took.

Usage: demo_summary.py FOLDER, with the package refocus
"""
import os
import sys

from refocus.evaluate import journal, score
from refocus.evaluate.item import EvalError

HEADS = ("tokens", "in context, %", "adapted, %", "difference", "prefill, s", "adapt, s", "questions, s")


def share(row):
    return f"{100 * row['score']:.1f} ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def asking(records, row):
    """Seconds of all questions of the row, from asking to the answer."""
    return sum(record["seconds"]["wall"] for record in records if record["kind"] == "answer" and
               (record["length"], record["method"]) == (row["length"], row["method"]))


def cells(records, base, adapted):
    change, low, high = (100 * value for value in adapted["versus"])
    return (f"{base['context_tokens']:,.0f}", share(base), share(adapted), f"{change:+.1f} ({low:+.0f} to {high:+.0f})",
            f"{base['seconds']['prefill']:.2f}", f"{adapted['seconds']['adapt']:.2f}",
            f"{asking(records, base):.2f} + {asking(records, adapted):.2f}")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        records = journal.results(os.path.join(sys.argv[1], "journal.jsonl"))
    except EvalError as error:
        sys.exit(f"demo: {error}")
    rows = score.rows(records)
    pairs = [(base, next((row for row in rows if row["length"] == base["length"] and "versus" in row), None))
             for base in rows if base["method"] == "in-context"]
    if not pairs or any(adapted is None for _, adapted in pairs):
        sys.exit(f"demo: {sys.argv[1]}/journal.jsonl: got a run that did not end, allowed one with every answer")
    lines = [HEADS, *(cells(records, base, adapted) for base, adapted in pairs)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    base, adapted = pairs[0]
    print(f"{base['questions']} questions each, right answers with 95 % intervals; adapted: {adapted['method']}")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


if __name__ == "__main__":
    main()
