"""Memory against context: one line a cache, and the line of the device that it must stay below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsmith.pipeline.report.style import GRID, INK, frame, pyplot, save
from kvsmith.planner import held
from kvsmith.plans import Option, Plan
from kvsmith.units import show_bytes, show_count

POINTS = 60
MERGE = 0.02  # caches whose bytes differ by less share a line
LEAST = 1024  # tokens at the left end


def plot_plan(plan: Plan, path: Path) -> None:
    """Draw all memory, weights included, against the context of every row.

    Args:
        plan: at least one option.
        path: PNG to write.
    """
    fig, ax = pyplot().subplots(figsize=(10.5, 6.2), layout="constrained")
    lines = merged(plan.options)
    longest = max((o.longest for o in plan.options), default=0)
    right = 3 * max(longest, plan.load.context, 4 * LEAST)
    contexts = [LEAST * (right / LEAST) ** (i / (POINTS - 1)) for i in range(POINTS)]
    count = plan.load.devices
    base, memory = plan.weights + count * (plan.activations + plan.reserve), _memory(plan)
    for i, (names, option) in enumerate(lines):
        sizes = [base + _cache(plan, option, int(t)) for t in contexts]
        colour = pyplot().get_cmap("viridis")(0.92 * i / max(len(lines) - 1, 1))
        dash = "-" if any(n.startswith("nuq") for n in names) else "--"
        ax.plot(contexts, sizes, dash, color=colour, linewidth=1.6, label=_label(names, option))
        if option.longest > LEAST:
            ax.plot([option.longest], [memory], "o", color=colour, markersize=5)
    _device(ax, plan, contexts[0], base)
    ax.axvline(plan.load.context, color=INK, linewidth=0.8, linestyle=":")
    ax.set(xscale="log", yscale="log", xlim=(contexts[0], right))
    ax.set_ylim(base / 1.6, 6 * memory)
    ticker = pyplot().matplotlib.ticker
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: show_count(round(v))))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: show_bytes(v)))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    rows = f", {plan.load.batch} rows" if plan.load.batch > 1 else ""
    ax.set_xlabel(f"tokens of a row{rows}", color=INK)
    ax.set_ylabel("weights, activations, reserve and cache", color=INK)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    frame(ax)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    shared = f", {plan.factor} layers share" if plan.factor > 1 else ""
    save(fig, path, f"{plan.model.name} on {_devices(plan)}{shared}")


def merged(options: Sequence[Option]) -> list[tuple[list[str], Option]]:
    """Options that cost the same, as (their names, one of them), the largest first."""
    lines: list[tuple[list[str], Option]] = []
    for option in sorted(options, key=lambda o: -o.cache):
        if lines and option.cache > (1 - MERGE) * lines[-1][1].cache:
            lines[-1][0].append(option.codec)
        else:
            lines.append(([option.codec], option))
    return lines


def _cache(plan: Plan, option: Option, tokens: int) -> int:
    return held(plan.model, option.spec, plan.load.batch, tokens, plan.load.dtype).total


def _label(names: list[str], option: Option) -> str:
    named = sorted(names, key=lambda n: (not n.startswith("nuq"), len(n), n))
    more = f" and {len(named) - 2} more" if len(named) > 2 else ""
    return f"{option.bits:.2f} bits: {', '.join(named[:2])}{more} (to {show_count(option.longest)})"


def _device(ax: Any, plan: Plan, left: float, base: int) -> None:
    memory = _memory(plan)
    ax.axhspan(base / 1.6, memory, color="#009E73", alpha=0.07, linewidth=0)
    ax.axhline(memory, color=INK, linewidth=1.3)
    text = f" fits here: below the {show_bytes(memory)} of {_devices(plan)}"
    ax.text(left, memory, text, va="bottom", ha="left", fontsize=9.5, color=INK)


def _memory(plan: Plan) -> int:
    return plan.load.devices * plan.device.memory


def _devices(plan: Plan) -> str:
    count = plan.load.devices
    return f"{'one' if count == 1 else f'{count} x'} {plan.device.name}"
