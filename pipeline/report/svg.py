"""Charts as SVG inside a page; colours are the page's own, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from kvsmith.pipeline.report.chart import Axis, Chart, Series, ticks

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 76, 12, 14, 46
LETTER = 6.3  # width of a letter at 11 pixels, about
PALETTE = 8  # colours of lines in the page's style
# Where a label may stand beside its point.
PLACES = ((8, 4), (8, -8), (8, 15), (-8, 4), (-8, -8), (-8, 15), (0, -10), (0, 19))
Scale = Callable[[float], float]


def render(chart: Chart) -> str:
    """The chart as an SVG element, with a legend where it has lines."""
    points = [p for s in chart.series for p in s.points]
    xs = [p[0] for p in points]
    ys = [p[1] for p in points] + [y for _, y in chart.rules]
    x = _scale(chart.x, xs, LEFT, WIDTH - RIGHT)
    y = _scale(chart.y, ys, HEIGHT - BOTTOM, TOP)
    marks = [*_grid(chart, x, y, xs, ys)]
    for name, height in chart.rules:
        marks.append(_line(LEFT, y(height), WIDTH - RIGHT, y(height), "var(--ink)"))
        marks.append(_text(LEFT + 6, y(height) - 5, name))
    # Full precision has a colour of its own; last, it leaves the others the same in all charts.
    lines = sorted((s for s in chart.series if s.line), key=lambda s: s.role == "full")
    for i, series in enumerate(lines):
        marks.append(_path(series, x, y, _colour(series, i)))
    marks += _dots([s for s in chart.series if not s.line], x, y)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    label = escape(chart.title, quote=True)
    drawn = f'<svg {size} role="img" aria-label="{label}">{"".join(marks)}</svg>'
    keys = (
        f'<li><i style="background: {_colour(s, i)}"></i>{escape(s.name)}</li>'
        for i, s in enumerate(lines)
    )
    legend = f'<ul class="key">{"".join(keys)}</ul>' if lines else ""
    return f"<figure><figcaption>{escape(chart.title)}</figcaption>{drawn}{legend}</figure>"


def _limits(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """A little beyond the values, so that nothing lies on the frame."""
    low, high = min(values), max(values)
    if axis.log:
        room = max((high / low) ** 0.06, 1.2)
        return low / room, high * room
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _scale(axis: Axis, values: Sequence[float], start: float, stop: float) -> Scale:
    low, high = _limits(axis, values)
    to = math.log10 if axis.log else float
    first, last = to(low), to(high)
    return lambda v: start + (stop - start) * (to(v) - first) / (last - first)


def _grid(chart: Chart, x: Scale, y: Scale, xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    marks = []
    for t in ticks(*_limits(chart.y, ys), chart.y.log):
        marks.append(_line(LEFT, y(t), WIDTH - RIGHT, y(t), "var(--line)"))
        marks.append(_text(LEFT - 6, y(t) + 4, chart.y.show(t), "end"))
    for t in ticks(*_limits(chart.x, xs), chart.x.log):
        marks.append(_line(x(t), TOP, x(t), HEIGHT - BOTTOM, "var(--line)"))
        marks.append(_text(x(t), HEIGHT - BOTTOM + 15, chart.x.show(t), "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(_text(middle, HEIGHT - 8, chart.x.label, "middle"))
    turn = f'transform="rotate(-90 14 {HEIGHT / 2:.0f})"'
    marks.append(_text(14, HEIGHT / 2, chart.y.label, "middle", turn))
    return marks


def _path(series: Series, x: Scale, y: Scale, colour: str) -> str:
    steps = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in series.points)
    dash = "" if series.role == "ours" else ' stroke-dasharray="5 3"'
    style = f'fill="none" stroke="{colour}" stroke-width="1.8"{dash}'
    return f'<polyline points="{steps}" {style}><title>{escape(series.name)}</title></polyline>'


def _dots(series: Sequence[Series], x: Scale, y: Scale) -> list[str]:
    """Points with their names, each at the first place that is free."""
    spots = [(x(a), y(b), s) for s in series for a, b in s.points]
    taken = [(a - 5, b - 5, a + 5, b + 5) for a, b, _ in spots]
    marks = []
    for a, b, s in spots:
        name, colour = escape(s.name), f"var(--{s.role})"
        marks.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4.5" fill="{colour}">'
            f"<title>{name}</title></circle>"
        )
        dx, dy, box = _place(a, b, len(s.name) * LETTER, taken)
        taken.append(box)
        anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
        marks.append(_text(a + dx, b + dy, s.name, anchor))
    return marks


Box = tuple[float, float, float, float]


def _place(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[int, int, Box]:
    """The place whose box covers the fewest others."""
    found: list[tuple[int, int, tuple[int, int, Box]]] = []
    for dx, dy in PLACES:
        left = x + dx - (0 if dx > 0 else width if dx < 0 else width / 2)
        box = (left, y + dy - 10, left + width, y + dy + 2)
        hits = sum(
            box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
        )
        outside = 9 * (left < LEFT or left + width > WIDTH)
        found.append((hits + outside, len(found), (dx, dy, box)))
    return min(found)[2]


def _colour(series: Series, index: int) -> str:
    return "var(--full)" if series.role == "full" else f"var(--c{index % PALETTE})"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(text)}</text>"
