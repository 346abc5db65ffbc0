"""Loss against all-in bits: perplexity and KL divergence, one curve a family of codecs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from kvsmith.pipeline.report.chart import Chart
from kvsmith.pipeline.report.style import GRID, INK, OTHERS, OURS, frame, pyplot, save
from kvsmith.pipeline.report.table import Row

MARKERS = ("o", "s", "^", "D", "v", "P")
# Where a label may stand beside its point, in points: right, above, below, left, and further out.
PLACES = (
    *((7, -3), (0, 8), (0, -14), (-7, -3), (7, 7), (7, -13), (-7, 7), (-7, -13)),
    *((0, 18), (0, -24), (14, 14), (-14, 14), (14, -20), (-14, -20)),
)


@dataclass(frozen=True)
class Point:
    """One candidate in one panel.

    Attributes:
        name: the label.
        ours: whether it is a bundle.
        bits: all-in bits an element.
        value: height; what is not positive is drawn hollow at the panel's floor.
        spread: standard error of the height.
    """

    name: str
    ours: bool
    bits: float
    value: float
    spread: float


def plot_losses(rows: Sequence[Row], path: Path, title: str, long: bool = False) -> None:
    """Perplexity increase and divergence against all-in bits, both on a logarithmic axis.

    Args:
        rows: at least one besides full precision.
        path: PNG to write.
        title: above the figure.
        long: bits at 32,768 tokens, where dense windows weigh little, in place of those of the
            measured windows.
    """
    shown = [(row, row.found.fidelity) for row in rows if row.candidate.role != "full"]
    perplexity = [_point(r, 100 * f.delta, 100 * (f.delta_se or 0), long) for r, f in shown]
    divergence = [_point(r, f.kld, f.kld_se or 0, long) for r, f in shown]
    fig, axes = pyplot().subplots(1, 2, figsize=(12.5, 5.4), layout="constrained")
    _panel(axes[0], perplexity, "perplexity increase over full precision, %")
    _panel(axes[1], divergence, "mean KL divergence from full precision, nats a token")
    if long:
        for ax in axes:
            ax.set_xlabel(f"{ax.get_xlabel()} at 32,768 tokens")
    save(fig, path, title)


def plot_chart(chart: Chart, path: Path) -> None:
    """Draw one chart of a page as PNG.

    Args:
        chart: with lines, not with points of their own.
        path: PNG to write.
    """
    fig, ax = pyplot().subplots(figsize=(9.5, 5.4), layout="constrained")
    for i, series in enumerate(chart.series):
        colour = [*OURS, *OTHERS][i % (len(OURS) + len(OTHERS))]
        style = "-" if series.role == "ours" else "--"
        ax.plot(*zip(*series.points, strict=True), style, color=colour, label=series.name)
    for name, height in chart.rules:
        ax.axhline(height, color=INK, linewidth=1)
        ax.annotate(name, (0.01, height), (0, 3), xycoords=("axes fraction", "data"),
                    textcoords="offset points", fontsize=9, color=INK)  # fmt: skip
    formatter = pyplot().matplotlib.ticker.FuncFormatter
    for axis, side, set_scale in (
        (chart.x, ax.xaxis, ax.set_xscale),
        (chart.y, ax.yaxis, ax.set_yscale),
    ):
        set_scale("log" if axis.log else "linear")
        side.set_major_formatter(formatter(lambda v, _, show=axis.show: show(v)))
        side.set_minor_formatter(pyplot().matplotlib.ticker.NullFormatter())
        side.set_label_text(axis.label, color=INK)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    frame(ax)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(fig, path, chart.title)


def family(name: str) -> str:
    """What candidates of different widths share: kvquant_nuq3_o1 -> kvquant_nuq*_o1."""
    return re.sub(r"(?<=[a-z])\d", "*", name, count=1)


def _point(row: Row, value: float, spread: float, long: bool) -> Point:
    bits = row.found.long_bits if long else row.bits
    return Point(row.name, row.candidate.role == "bundle", bits, value, spread)


def _panel(ax: Any, points: Sequence[Point], label: str) -> None:
    positive = [p.value for p in points if p.value > 0]
    floor = min(positive) / 3 if positive else 1e-6
    ax.set_yscale("log")
    ticker = pyplot().matplotlib.ticker
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    families = list(dict.fromkeys((p.ours, family(p.name)) for p in points))
    for ours, colours in ((True, OURS), (False, OTHERS)):
        names = [name for mine, name in families if mine == ours]
        for i, name in enumerate(names):
            members = sorted((p for p in points if family(p.name) == name), key=lambda p: p.bits)
            _curve(ax, members, floor, colours[i % len(colours)], MARKERS[i % len(MARKERS)])
    ax.set_xlabel("all-in bits per cached element")
    ax.set_ylabel(label)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    heights = [max(p.value, floor) for p in points]
    if len(set(heights)) == 1:  # a logarithmic axis needs some height
        ax.set_ylim(heights[0] / 10, heights[0] * 10)
    ax.margins(x=0.14, y=0.1)
    frame(ax)
    _label(ax, points, floor)


def _curve(ax: Any, members: Sequence[Point], floor: float, colour: str, marker: str) -> None:
    """One family: points joined by a line, with bars of one standard error."""
    bits = [p.bits for p in members]
    heights = [max(p.value, floor) for p in members]
    # A bar that would reach zero stops a little above it, since the axis is logarithmic.
    spread = [p.spread if p.value > 0 else 0.0 for p in members]
    below = [min(s, 0.9 * y) for s, y in zip(spread, heights, strict=True)]
    line = "-" if members[0].ours else "--"
    ax.errorbar(bits, heights, yerr=[below, spread], color=colour, linestyle=line, capsize=2)
    for x, y, p in zip(bits, heights, members, strict=True):
        fill = colour if p.value > 0 else "white"
        size = 8 if p.ours else 6.5
        ax.plot(x, y, marker=marker, markersize=size, color=colour, markerfacecolor=fill)


def _label(ax: Any, points: Sequence[Point], floor: float) -> None:
    """Write each name beside its point, at the first place free of other names and points."""
    canvas = ax.figure.canvas
    canvas.draw()
    spots = [(p.bits, max(p.value, floor)) for p in points]
    pixels = [ax.transData.transform(spot) for spot in spots]
    for _, members in groupby(sorted(points, key=_order), key=lambda p: family(p.name)):
        ends = [ax.transData.transform((p.bits, max(p.value, floor))) for p in members]
        for a, b in pairwise(ends):
            pixels += [a + (b - a) * i / 20 for i in range(1, 20)]
    for p in points:
        bar = [p.value - p.spread, p.value - p.spread / 2, p.value + p.spread]
        pixels += [ax.transData.transform((p.bits, y)) for y in bar if 0 < y != p.value > 0]
    taken: list[Any] = []
    for point, spot in zip(points, spots, strict=True):
        name = point.name if point.value > 0 else f"{point.name} (not above 0)"
        texts: list[tuple[int, int, Any, Any]] = []
        for dx, dy in PLACES:
            side = "left" if dx > 0 else "right" if dx < 0 else "center"
            style = {"textcoords": "offset points", "ha": side, "fontsize": 8.5, "color": INK}
            text = ax.annotate(name, spot, (dx, dy), **style)
            box = text.get_window_extent(canvas.get_renderer())
            texts.append((_clashes(box, taken, pixels, ax.bbox), len(texts), text, box))
            if texts[-1][0] == 0:
                break
        best = min(texts, key=lambda t: t[:2])
        taken.append(best[3])
        for _, _, text, _ in texts:
            if text is not best[2]:
                text.remove()


def _order(point: Point) -> tuple[str, float]:
    return family(point.name), point.bits


def _clashes(box: Any, taken: Sequence[Any], pixels: Sequence[Any], panel: Any) -> int:
    """How many names, points and bits of line a label would cover, and corners outside."""
    corners = ((box.x0, box.y0), (box.x1, box.y1))
    outside = sum(not panel.contains(*corner) for corner in corners)
    return outside + sum(box.overlaps(t) for t in taken) + sum(box.contains(*p) for p in pixels)
