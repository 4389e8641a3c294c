"""The report as one page of HTML."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from refocus.evaluate import score, svg
from refocus.evaluate.svg import Point, Series, text

Row = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; --ink:#1d2530; --soft:#5d6875; --line:#dfe4ea; --back:#ffffff; --card:#f7f8fa;
 --c0:#2563c9; --c1:#d9620f; --c2:#128a5c; --c3:#9441b8; --c4:#b3862b; --c5:#c2344f; --c6:#1690a6; --c7:#6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6eaf0; --soft:#9aa5b3; --line:#313a46; --back:#12161c;
 --card:#1a2028; --c0:#6ea2f7; --c1:#f2955a; --c2:#4cc795; --c3:#c78ae3; --c4:#dcb55f; --c5:#f0788f; --c6:#56c3d6;
 --c7:#a3adba; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1020px; padding: 32px 20px 64px; background: var(--back); color: var(--ink);
 font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 6px; }
p { max-width: 74ch; margin: 6px 0 12px; } .soft, figcaption { color: var(--soft); } .small { font-size: 13px; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
figcaption { font-size: 13px; margin-bottom: 6px; } figcaption b { color: var(--ink); }
svg { width: 100%; height: auto; display: block; } svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--soft); } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .label { fill: var(--ink); } svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 4; } svg .bar { stroke-width: 1.4; opacity: .65; }
svg .dot { stroke: var(--card); stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 4px 0 12px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
 vertical-align: -1px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; width: 100%;
 font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; border-bottom: 1.5px solid var(--soft); padding: 5px 8px;
 vertical-align: bottom; }
td { text-align: right; padding: 3px 8px; white-space: nowrap; }
th.left, td.left { text-align: left; } tr.first td { border-top: 1px solid var(--line); }
@media (max-width: 520px) { svg text { font-size: 13px; } }
.up { color: var(--c2); } .down { color: var(--c5); }
""" + "\n".join(f"svg .curve.s{i}, svg .bar.s{i} {{ stroke: var(--c{i}); }} svg .dot.s{i}, svg .fill.s{i} "
                f"{{ fill: var(--c{i}); }} .legend i.s{i} {{ background: var(--c{i}); }}" for i in range(svg.SERIES))


def html_page(records: Sequence[Row], rows: Sequence[Row]) -> str:
    header, failures = records[0], [record for record in records if record["kind"] == "failure"]
    colors = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    body = [f"<h1>Does adapting help? {text(header['model'])}</h1>", _facts(header, rows),
            _scores(rows, colors), _time(rows), _inside(rows, colors), _losses(rows, colors), _table(rows),
            _failures(failures), _notes(rows)]
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>Refocus evaluation: {text(header['model'])}</title><style>{STYLE}</style></head>\n<body>\n"
            + "\n".join(filter(None, body)) + "\n</body></html>\n")


def _facts(header: Row, rows: Sequence[Row]) -> str:
    facts = [f"{sum(row['questions'] for row in rows):,} answers", header.get("started", ""),
             header.get("device", ""), f"Refocus {header['service']}" if header.get("service") else ""]
    settings = ", ".join(f"{name} {value}" for name, value in header.get("settings", {}).items()
                         if value not in ("", []))
    joined = " \u00b7 ".join(filter(None, facts))
    return (f'<p class="soft">{text(joined)}<br>'
            f'<span class="small">{text(settings)}</span></p>')


def _legend(entries: Sequence[tuple[str, int]]) -> str:
    return '<div class="legend">' + "".join(
        f'<span><i class="s{color % svg.SERIES}"></i>{text(label)}</span>' for label, color in entries) + "</div>"


def _figure(caption: str, plot: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{plot}</figure>" if plot else ""


def _of(rows: Sequence[Row], task: str, method: str = "") -> list[Row]:
    return [row for row in rows if row["task"] == task and (not method or row["method"] == method)]


def _series(rows: Sequence[Row], task: str, colors: dict[str, int], y: Callable[[Row], float | None],
            interval: bool = False) -> list[Series]:
    found = []
    for method, color in colors.items():
        points = [Point(row["context_tokens"], value, *((row["low"], row["high"]) if interval else ()))
                  for row in _of(rows, task, method) if (value := y(row)) is not None and row["context_tokens"]]
        if points:
            found.append(Series(method, color, points))
    return found


def _x(row: Row, rows: Sequence[Row]) -> float:
    """Methods of one length stand above each other, whatever the floor's own context has."""
    return max(float(other["context_tokens"]) for other in rows
               if other["task"] == row["task"] and other["length"] == row["length"])


def _scores(rows: Sequence[Row], colors: dict[str, int]) -> str:
    placed = [{**row, "context_tokens": _x(row, rows)} for row in rows]
    figures = []
    for task in dict.fromkeys(row["task"] for row in rows):
        series = _series(placed, task, colors, lambda row: row["score"], interval=True)
        questions = sum(row["questions"] for row in _of(rows, task))
        figures.append(_figure(f"<b>{text(task)}</b>, {questions} answers", svg.lines(
            series, "tokens of context", "right answers", y_range=(0, 1), percent=True, log_x=True,
            title=f"{task}: share of right answers by length")))
    return ("<h2>Right answers</h2>" + _legend(list(colors.items())) + '<div class="grid2">' + "".join(figures)
            + "</div>")


def _table(rows: Sequence[Row]) -> str:
    parts = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    head = ["task", "tokens", "method", "texts", "questions", "score", "95 %", "vs in-context", *parts, "adapt, s",
            "answer, s", "thinking", "TFLOP adapt", "TFLOP answer"]
    lines, before = [], None
    for row in rows:
        group = (row["task"], row["length"])
        versus = row.get("versus")
        change = "" if versus is None else \
            f"{100 * versus[0]:+.1f} ({100 * versus[1]:+.0f} to {100 * versus[2]:+.0f})"
        tone = "" if versus is None or versus[1] <= 0 <= versus[2] else (" up" if versus[0] > 0 else " down")
        new = group != before
        cells = [row["task"] if new else "", f"{_x(row, rows):,.0f}" if new else "", row["method"], row["texts"],
                 row["questions"],
                 f"{100 * row['score']:.1f}", f"{100 * row['low']:.0f} to {100 * row['high']:.0f}", change,
                 *(f"{100 * row['parts'][name][0]:.1f}" if name in row["parts"] else "" for name in parts),
                 f"{row['seconds']['adapt']:.2f}" if row["seconds"]["adapt"] else "", svg.seconds(row["seconds"]["wall"]),
                 f"{row['budget']:,.0f}" if row["budget"] else "",
                 f"{row['adapt_flops'] / 1e12:,.3g}" if row["adapt_flops"] else "",
                 f"{row['answer_flops'] / 1e12:,.3g}"]
        classes = ["left" if i in (0, 2) else tone.strip() if i == 7 else "" for i in range(len(cells))]
        lines.append(f'<tr{" class=first" if new else ""}>' + "".join(
            f'<td class="{kind}">{text(cell)}</td>' for kind, cell in zip(classes, cells)) + "</tr>")
        before = group
    heads = "".join(f'<th class="{"left" if i in (0, 2) else ""}">{text(name)}</th>' for i, name in enumerate(head))
    return (f'<h2>All numbers</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>'
            f'{"".join(lines)}</tbody></table></div>')


PHASES = {"prefill": ("prefill, once a text", 7), "adapt": ("adapt, once a text or question", 1),
          "queue": ("waiting", 5), "prompt": ("question and first token", 0), "decode": ("further tokens", 2)}


def _time(rows: Sequence[Row]) -> str:
    figures = []
    for length in dict.fromkeys(row["length"] for row in rows):
        chosen = [row for row in rows if row["length"] == length]
        several = len({row["task"] for row in chosen}) > 1
        stacks = [(f"{row['task']}, {row['method']}" if several else row["method"],
                   [(PHASES[phase][0], PHASES[phase][1], row["seconds"][phase] or 0.0) for phase in score.PHASES])
                  for row in chosen]
        tokens = f"{max(_x(row, rows) for row in chosen):,.0f} tokens" if length else "texts as they are"
        figures.append(_figure(f"<b>{text(tokens)}</b>", svg.bars(stacks, "s", f"seconds by phase, {tokens}")))
    legend = _legend([(label, color) for label, color in PHASES.values()])
    return ('<h2>Where the time goes</h2><p>Means, as the service measured them. Prefill and adaptation are paid once '
            'for a text (adaptation with rows=quoted for every question, quoting included), the rest for every '
            f'question.</p>{legend}<div class="grid2">{"".join(figures)}</div>')


def _inside(rows: Sequence[Row], colors: dict[str, int]) -> str:
    figures = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mass = _series(rows, task, colors, lambda row: row["mass"])
        if not mass:
            continue
        even = [Point(row["context_tokens"], row["even"]) for row in _of(rows, task) if row["even"]]
        mass.append(Series("even spread", 7, list({point.x: point for point in even}.values()), dashed=True))
        figures.append(_figure(f"<b>{text(task)}</b>: attention on the evidence, mean over layers and heads", svg.lines(
            mass, "tokens of context", "share", log_x=True, y_format=lambda v: f"{100 * v:.3g}%",
            title=f"{task}: attention on the evidence by length")))
        longest = max(row["length"] for row in _of(rows, task) if row["mass"] is not None)
        layers = [Series(row["method"], colors[row["method"]],
                         [Point(layer, value) for layer, value in zip(row["layers"], row["mass_by_layer"])])
                  for row in _of(rows, task) if row["length"] == longest and row["mass_by_layer"]]
        figures.append(_figure(f"<b>{text(task)}</b>: attention on the evidence by layer, longest texts", svg.lines(
            layers, "layer", "share", y_format=lambda v: f"{100 * v:.3g}%", title=f"{task}: attention by layer")))
        rivals = _series(rows, task, colors, lambda row: row["rivals_best_head"].get("2"))
        figures.append(_figure(
            f"<b>{text(task)}</b>: distractors, keys within 2 nats of the best evidence key, in the head that looks "
            "at it most", svg.lines(rivals, "tokens of context", "keys", log_x=True, title=f"{task}: distractors")))
        nats = _series(rows, task, colors, lambda row: row["target_nats"])
        figures.append(_figure(f"<b>{text(task)}</b>: the reference answer, nats per token", svg.lines(
            nats, "tokens of context", "nats", log_x=True, title=f"{task}: nats of the reference answer")))
    if not figures:
        return ""
    return ("<h2>Where the attention goes</h2><p>Attention of the rows that predict the reference answer, measured "
            "with the queries that answered. The dashed line is an even spread over all keys.</p>"
            + _legend(list(colors.items())) + '<div class="grid2">' + "".join(figures) + "</div>")


def _losses(rows: Sequence[Row], colors: dict[str, int]) -> str:
    figures, lines = [], []
    for row in rows:
        if row["probe_before"] is not None and row["probe_after"] is not None:
            change = row["probe_after"] - row["probe_before"]
            lines.append(f'<tr><td class="left">{text(row["task"])}</td><td>{_x(row, rows):,.0f}</td>'
                         f'<td class="left">{text(row["method"])}</td><td>{row["probe_before"]:.4f}</td>'
                         f'<td>{row["probe_after"]:.4f}</td><td class="{"up" if change < 0 else "down"}">{change:+.4f}'
                         "</td></tr>")
    for task in dict.fromkeys(row["task"] for row in rows):
        longest = max((row["length"] for row in _of(rows, task) if row["losses"]), default=None)
        series = [Series(row["method"], colors[row["method"]],
                         [Point(step + 1, loss) for step, loss in enumerate(row["losses"])])
                  for row in _of(rows, task) if row["losses"] and row["length"] == longest]
        figures.append(_figure(f"<b>{text(task)}</b>: loss of each step, longest texts", svg.lines(
            series, "step", "nats per token", title=f"{task}: loss by step")))
    if not lines and not any(figures):
        return ""
    table = ('<div class="scroll"><table><thead><tr><th class="left">task</th><th>tokens</th><th class="left">method'
             "</th><th>before</th><th>after</th><th>change</th></tr></thead><tbody>" + "".join(lines)
             + "</tbody></table></div>") if lines else ""
    return ("<h2>Loss</h2><p>Nats per token on held-out spans of the text, before and after adapting. A lower loss "
            f'alone is no sign that more is recalled.</p>{table}<div class="grid2" style="margin-top:16px">'
            f'{"".join(figures)}</div>')


def _failures(failures: Sequence[Row]) -> str:
    if not failures:
        return ""
    rows = "".join(f"<li>{text(f['item'])}, {text(f['method'])}: {text(f['why'])}</li>" for f in failures)
    return f"<h2>Not answered</h2><ul>{rows}</ul>"


def _notes(rows: Sequence[Row]) -> str:
    few = min(row["questions"] for row in rows)
    warn = f" The smallest group here has {few} questions: its interval is wide, read it first." if few < 50 else ""
    return ('<h2>How to read this</h2><p class="small soft">Intervals are 95 %: the wider of Wilson over questions '
            "and, from five texts on, bootstrap over texts, since questions about one text are not independent. "
            "Differences are paired by question; coloured where the interval leaves out zero. Several comparisons at "
            f"once will show one by chance.{warn} Operations are counted from the model's shapes; seconds are the "
            "service's own."
            "</p>")
