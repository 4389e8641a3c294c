"""Plots as SVG text. Colours are classes of the page's style sheet (s0, s1, ... for series), so that they follow light
and dark; every mark has a title that browsers show as a hint."""
from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 42
SERIES = 8  # colours


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None   # of an interval around y
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Series:
    label: str
    color: int
    points: list[Point]
    dashed: bool = False


def text(value: object) -> str:
    return html.escape(str(value), quote=True)


def compact(value: float) -> str:
    """12500 -> 12.5K."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """Two digits behind the point, or of what is short two digits that say something."""
    return f"{value:.2f}" if value >= 0.0995 or value == 0 else f"{value:.2g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10 ** math.floor(math.log10(span / count))
    for factor in (1, 2, 2.5, 5, 10):
        if span / (step * factor) <= count:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def _scale(low: float, high: float, to_low: float, to_high: float, log: bool) -> Callable[[float], float]:
    if log:
        low, high = math.log(low), math.log(high)
    span = (high - low) or 1.0

    def at(value: float) -> float:
        place = math.log(value) if log else value
        return to_low + (place - low) / span * (to_high - to_low)
    return at


def lines(series: Sequence[Series], x_label: str, y_label: str, *, y_range: tuple[float, float] | None = None,
          percent: bool = False, log_x: bool = False, log_y: bool = False, title: str = "",
          y_format: Callable[[float], str] = compact) -> str:
    """Curves with intervals as bars."""
    points = [point for one in series for point in one.points if not log_y or point.y > 0]
    if not points:
        return ""
    xs = sorted({point.x for point in points})
    tops = [value for p in points for value in (p.y, p.low, p.high) if value is not None and (value > 0 or not log_y)]
    low, high = y_range or (min(tops) if log_y else min(0.0, min(tops)), 1.05 * max(tops))
    if log_y:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(max(high, low * 1.01)))
    elif high == low:
        high = low + 1
    x_low, x_high = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] * 0.5 or -0.5, xs[0] * 1.5 or 0.5)
    log_x = log_x and x_low > 0
    x_at = _scale(x_low, x_high, LEFT + 8, WIDTH - RIGHT - 8, log_x)
    y_at = _scale(low, high, HEIGHT - BOTTOM, TOP, log_y)
    y_ticks = ([10.0 ** i for i in range(round(math.log10(low)), round(math.log10(high)) + 1)] if log_y
               else ticks(low, high))
    show = (lambda v: f"{100 * v:.0f}%") if percent else y_format
    out = [_head(title)]
    for tick in y_ticks:
        y = y_at(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                   f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text(show(tick))}</text>')
    for tick in xs if len(xs) <= 8 else ticks(x_low, x_high):
        out.append(f'<text class="tick" x="{x_at(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                   f'{text(compact(tick))}</text>')
    out.append(_axes(x_label, y_label))
    for number, one in enumerate(series):
        out.append(_curve(one, number - (len(series) - 1) / 2, x_at, y_at, show, log_y))
    return "".join(out) + "</svg>"


def _head(title: str, height: int = HEIGHT) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(title)}" '
            'xmlns="http://www.w3.org/2000/svg">')


def _axes(x_label: str, y_label: str) -> str:
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    return (f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            f'{text(x_label)}</text>'
            f'<text class="label" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
            f'{text(y_label)}</text>')


def _curve(one: Series, offset: float, x_at: Callable[[float], float], y_at: Callable[[float], float],
           show: Callable[[float], str], log_y: bool) -> str:
    """Curves stand side by side, so that equal ones can be seen: offset counts them from the middle."""
    color = f"s{one.color % SERIES}"
    points = [point for point in sorted(one.points, key=lambda p: p.x) if not log_y or point.y > 0]
    aside = 0.0 if len(points) > 40 or one.dashed else 2.5 * offset
    path = " ".join(f"{x_at(p.x) + aside:.1f},{y_at(p.y):.1f}" for p in points)
    out = [f'<polyline class="curve {color}{" dashed" if one.dashed else ""}" points="{path}"/>']
    for p in points:
        x, y = x_at(p.x) + aside, y_at(p.y)
        hint = f"{one.label}, {compact(p.x)}: {show(p.y)}"
        if p.low is not None and p.high is not None:
            hint += f" ({show(p.low)} to {show(p.high)})"
            out.append(f'<line class="bar {color}" x1="{x:.1f}" x2="{x:.1f}" y1="{y_at(p.low):.1f}" '
                       f'y2="{y_at(p.high):.1f}"/>')
        if len(points) <= 40 and (not one.dashed or len(points) == 1):
            out.append(f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{text(hint)}</title>'
                       '</circle>')
    return "".join(out)


def bars(rows: Sequence[tuple[str, list[tuple[str, int, float]]]], unit: str, title: str = "") -> str:
    """Horizontal stacked bars: (label, [(phase, colour, value)])."""
    left, step = 170, 24
    height = step * len(rows) + 30
    largest = max((sum(value for _, _, value in parts) for _, parts in rows), default=0.0) or 1.0
    at = _scale(0, largest, left, WIDTH - 58, False)
    out = [_head(title, height)]
    for number, (label, parts) in enumerate(rows):
        y, begin = 6 + step * number, 0.0
        name = label if len(label) <= 24 else label[:23] + "\u2026"
        out.append(f'<text class="tick" x="{left - 8}" y="{y + 12}" text-anchor="end">{text(name)}'
                   f'<title>{text(label)}</title></text>')
        for phase, color, value in parts:
            width = at(begin + value) - at(begin)
            if width > 0:
                out.append(f'<rect class="fill s{color % SERIES}" x="{at(begin):.1f}" y="{y}" width="{width:.1f}" '
                           f'height="15"><title>{text(f"{label}: {phase} {value:.3g} {unit}")}</title></rect>')
            begin += value
        out.append(f'<text class="tick" x="{at(begin) + 5:.1f}" y="{y + 12}">{text(f"{begin:.3g} {unit}")}</text>')
    return "".join(out) + "</svg>"
