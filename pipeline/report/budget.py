"""What each layer's keys and values need, what they got, and the front against uniform caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsmith.pipeline.budget.make import Point, Problem
from kvsmith.pipeline.report.style import GRID, INK, OTHERS, OURS, frame, pyplot, save


def plot_budget(
    problem: Problem, chosen: Sequence[Point], rivals: Sequence[Point], path: Path
) -> None:
    """Sensitivity, the levels of the first choice or of all on a curve, and the front.

    Args:
        problem: what was measured.
        chosen: one choice, or those of a curve.
        rivals: uniform caches.
        path: PNG to write.
    """
    layers = len(problem.loss)
    size = (13.5, 0.3 * layers + 3.4)
    fig, (left, middle, right) = pyplot().subplots(
        1, 3, figsize=size, layout="constrained", width_ratios=(1.2, 1, 1.5)
    )
    _sensitivity(fig, left, problem)
    _levels(middle, problem, chosen[len(chosen) // 2])
    _front(right, chosen, rivals)
    save(fig, path, f"{problem.record.source.base_model.id}: bits where they count")


def _sensitivity(fig: Any, ax: Any, problem: Problem) -> None:
    """Loss of every level of one side alone, darker where it hurts."""
    rows = problem.loss.flatten(0, 1)
    shown = ax.imshow(rows.clamp(min=1e-9).log10().tolist(), aspect="auto", cmap="viridis_r")
    fig.colorbar(shown, ax=ax, label="log10 of KLD, nats a token", shrink=0.8)
    small = 10 if rows.shape[1] < 20 else 6
    ax.set_xticks(range(rows.shape[1]), problem.levels.names, rotation=90, fontsize=small)
    ax.set_yticks(range(len(rows)), _sides(problem), fontsize=8)
    ax.set_title("loss of a side alone", loc="left", fontsize=10, color=INK)


def _sides(problem: Problem) -> list[str]:
    owners = problem.record.source.base_model.geometry.owners
    return [f"{i} {side}" for i in owners for side in ("K", "V")]


def _levels(ax: Any, problem: Problem, point: Point) -> None:
    """The level of each layer's keys (blue) and values (orange), and its dense window if chosen."""
    picks = [level for pair in point.found.picks for level in pair]
    places, groups = range(len(picks)), problem.price.groups()
    colours = [OURS[0] if i % 2 == 0 else OTHERS[0] for i in places]
    longs = [next(g.index(level) + 1 for g in groups if level in g) for level in picks]
    ax.barh(list(places), longs, color=colours, height=0.75)
    ax.set_yticks(list(places), _sides(problem), fontsize=8)
    names = list(problem.levels.names[: len(groups[0])])
    if len(groups) > 1:  # the same names, once; windows stand at the bars
        names = [name.rpartition(" ")[0] for name in names]
        for place, level, long in zip(places, picks, longs, strict=True):
            word = f" w{problem.levels.windows[level]}"
            ax.text(long, place, word, va="center", fontsize=7, color=INK)
    ax.set_xticks(range(1, len(names) + 1), names, rotation=90)
    ax.invert_yaxis()
    ax.set_title(f"chosen at {point.bits:.2f} bits", loc="left", fontsize=10, color=INK)
    frame(ax)


def _front(ax: Any, chosen: Sequence[Point], rivals: Sequence[Point]) -> None:
    for points, colour, style, name in (
        (sorted(rivals, key=lambda p: p.bits), OTHERS[0], "s", "the same everywhere"),
        (chosen, OURS[0], "o-", "chosen by layer and side"),
    ):
        heights = [p.mean if p.kld else p.found.loss for p in points]
        ax.plot([p.bits for p in points], heights, style, color=colour, label=name, markersize=6)
    for p in rivals:
        height = p.mean if p.kld else p.found.loss
        if not math.isnan(height) and height > 0:
            near = {"textcoords": "offset points", "fontsize": 8, "color": INK}
            ax.annotate(p.name, (p.bits, height), (6, 3), **near)
    measured = all(p.kld for p in (*chosen, *rivals))
    ax.set_yscale("log")
    ax.set_xlabel("all-in bits per element", color=INK)
    ax.set_ylabel(f"KLD, nats a token, {'held out' if measured else 'predicted'}", color=INK)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, fontsize=9)
    frame(ax)
