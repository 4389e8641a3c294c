"""What people read: a table on the terminal, CSV and JSON for programs, and one page of HTML with plots that needs
nothing but itself."""
from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from refocus.evaluate import journal, page, score, svg
from refocus.evaluate.item import EvalError

Row = dict[str, Any]


def percent(row: Row) -> str:
    return f"{100 * row['score']:.1f} ({100 * row['low']:.0f} to {100 * row['high']:.0f})"


def table(rows: Sequence[Row]) -> str:
    """Shares in percent with 95 % intervals, seconds as means."""
    header = ["task", "tokens", "method", "n", "score, %", "vs in-context", "adapt, s", "answer, s", "on evidence",
              "nats"]
    lines = [header]
    for row in rows:
        versus = row.get("versus")
        seconds = row["seconds"]
        lines.append([
            row["task"], f"{row['context_tokens']:,.0f}", row["method"], str(row["questions"]), percent(row),
            "" if versus is None else f"{100 * versus[0]:+.1f} ({100 * versus[1]:+.0f} to {100 * versus[2]:+.0f})",
            f"{seconds['adapt']:.2f}" if seconds["adapt"] else "", svg.seconds(seconds["wall"]),
            "" if row["mass"] is None else f"{100 * row['mass']:.2f} %",
            "" if row["target_nats"] is None else f"{row['target_nats']:.2f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    left = {0, 2}
    return "\n".join("  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def flat(row: Row) -> Row:
    """Of a CSV: numbers and names only."""
    versus = row.get("versus") or (None, None, None)
    cells: Row = {name: row[name] for name in (
        "task", "length", "method", "texts", "questions", "score", "low", "high", "context_tokens", "generated",
        "budget", "adapt_flops", "answer_flops", "probe_before", "probe_after", "target_nats", "mass", "even")}
    cells |= {"versus": versus[0], "versus_low": versus[1], "versus_high": versus[2]}
    cells |= {f"seconds_{phase}": row["seconds"][phase] for phase in (*score.PHASES, "wall")}
    cells |= {f"rivals_{delta}": value for delta, value in row["rivals"].items()}
    cells |= {f"rivals_best_head_{delta}": value for delta, value in row["rivals_best_head"].items()}
    cells |= {f"score_{name}": value[0] for name, value in row["parts"].items()}
    return cells


def write(folder: str, say: Callable[[str], object]) -> list[Row]:
    """results.csv, summary.jsonl and report.html beside the journal."""
    records = journal.results(os.path.join(folder, "journal.jsonl"))
    rows = score.rows(records)
    if not rows:
        failures = [record for record in records if record["kind"] == "failure"]
        why = f": {failures[0]['why']}" if failures else ""
        raise EvalError(f"{folder}: got no answers yet{why}")
    cells = [flat(row) for row in rows]
    names = list(dict.fromkeys(name for cell in cells for name in cell))
    with open(os.path.join(folder, "results.csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(cells)
    with open(os.path.join(folder, "summary.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    path = os.path.join(folder, "report.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(page.html_page(records, rows))
    say(f"{path}: open it in a browser")
    return rows
