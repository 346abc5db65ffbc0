"""Charts as data: `svg.py` draws them into a page, `plots.py` into PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvsmith.devices import DEVICES
from kvsmith.geometry import ModelGeometry
from kvsmith.pipeline.report.table import Row
from kvsmith.planner import readers
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec
from kvsmith.units import show_bytes, show_count

Role = Literal["ours", "others", "full"]
SHOWN = ("l4", "h100", "h200")  # devices that memory is compared with
SPEED = "h200"  # device of the roofline
LEAST = 1024  # tokens at the left end
STEPS = 25  # points of a computed line
FULL = CacheSpec(CodecSpec(TensorCodec(Identity()), TensorCodec(Identity()), key_domain="post"))


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        log: whether it is logarithmic.
        show: a tick as text.
    """

    label: str
    log: bool = True
    show: Callable[[float], str] = "{:g}".format


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: for the label.
        points: (x, y), both finite.
        role: whose they are; sets the colour.
        line: joined by a line; else each point is labelled.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    role: Role = "ours"
    line: bool = True


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: above it.
        x, y: axes.
        series: what is drawn.
        rules: horizontal lines with their names.
    """

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    rules: tuple[tuple[str, float], ...] = ()


def charts(rows: Sequence[Row], shape: ModelGeometry | None, weights: int) -> list[Chart]:
    """All charts of a comparison that have something to show.

    Args:
        rows: by all-in bits.
        shape: the model's; None leaves out what is computed from it.
        weights: bytes of the model's parameters.
    """
    found = [
        front(rows, "KL divergence", "KLD, nats a token", lambda r: r.found.fidelity.kld),
        front(rows, "Perplexity", "increase, %", lambda r: 100 * r.found.fidelity.delta),
        drifts(rows),
    ]
    if shape is not None:
        found += [memory(rows, shape, weights), speed(rows, shape, weights)]
    return [c for c in found if c.series]


def front(rows: Sequence[Row], name: str, label: str, value: Callable[[Row], float]) -> Chart:
    """A loss against all-in bits, and the line of those that no other beats in both.

    Args:
        rows: full precision is left out, and what lost nothing.
        name: for the title.
        label: of the axis.
        value: the loss.
    """
    points = [(r.bits, value(r), r) for r in rows if r.candidate.role != "full" and value(r) > 0]
    dots = tuple(Series(r.name, ((bits, y),), _role(r), line=False) for bits, y, r in points)
    best: list[tuple[float, float]] = []
    for bits, y, _ in sorted(points, key=lambda p: (p[0], p[1])):
        if not best or y < best[-1][1]:
            best.append((bits, y))
    edge = (Series("not beaten in both", tuple(best), "full"),) if len(best) > 1 else ()
    size = Axis("all-in bits per cached element", log=False)
    return Chart(f"{name} against size", size, Axis(label), (*edge, *dots))


def drifts(rows: Sequence[Row]) -> Chart:
    """Divergence within slices of the continuation."""
    lines = []
    for row in rows:
        d = row.found.drift
        points = tuple((float(n), y) for n, y in zip(d.upto, d.curve, strict=True) if y > 0)
        if row.candidate.role != "full" and points:
            lines.append(Series(row.name, points, _role(row)))
    x, y = Axis("generated tokens", log=False), Axis("KLD, nats a token")
    return Chart("Errors over generated tokens", x, y, tuple(lines))


def memory(rows: Sequence[Row], shape: ModelGeometry, weights: int) -> Chart:
    """Weights and one row's cache against its tokens, with devices' memory."""
    most = max(DEVICES[name].memory for name in SHOWN)
    lines = []
    for row in rows:
        spec = row.candidate.spec or FULL
        points = [(float(t), float(weights + _held(spec, shape, t))) for t in _lengths(most, shape)]
        lines.append(Series(row.name, tuple(p for p in points if p[1] <= 2 * most), _role(row)))
    rules = tuple((f"one {name}", float(DEVICES[name].memory)) for name in SHOWN)
    y = Axis("weights and cache", show=show_bytes)
    lines = [line for line in lines if line.points]
    return Chart("Memory against context", _tokens(), y, tuple(lines), rules)


def speed(rows: Sequence[Row], shape: ModelGeometry, weights: int) -> Chart:
    """What a device's bandwidth allows one row at most, computed from the bytes of a step."""
    device, seen, lines = DEVICES[SPEED], readers(shape), []
    for row in rows:
        spec = row.candidate.spec or FULL
        sizes = ((t, weights + _held(spec, seen, t)) for t in _lengths(device.memory, shape))
        points = tuple((float(t), device.bandwidth / n) for t, n in sizes if n <= device.memory)
        if points:
            lines.append(Series(row.name, points, _role(row)))
    y = Axis("tokens/s at most (computed)")
    title = (
        f"Upper bound of tokens/s, not measured: peak bandwidth of one {SPEED} over bytes of a step"
    )
    return Chart(title, _tokens(), y, tuple(lines))


def _held(spec: CacheSpec, shape: ModelGeometry, tokens: int) -> int:
    rotated = int(spec.codec.key_domain == "pre")
    return cache_bytes(spec, shape, 1, tokens, torch.bfloat16, rotated).total


def _lengths(memory: int, shape: ModelGeometry) -> Iterator[int]:
    """Tokens, evenly on a logarithmic axis, up to where two bits an element fill `memory`."""
    right = max(4 * memory / max(shape.elements, 1), 4 * LEAST)
    for i in range(STEPS):
        yield int(LEAST * (right / LEAST) ** (i / (STEPS - 1)))


def _tokens() -> Axis:
    return Axis("tokens of one row", show=lambda v: show_count(round(v)))


def _role(row: Row) -> Role:
    roles: dict[str, Role] = {"bundle": "ours", "baseline": "others", "full": "full"}
    return roles[row.candidate.role]


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between two limits, some four to eight of them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few = math.log10(high / low) < 2.5
        step = max(1, len(decades) // 7)
        found = [m * 10.0**e for e in decades[::step] for m in ((1, 2, 5) if few else (1,))]
    else:
        raw = (high - low) / 6
        unit = 10.0 ** math.floor(math.log10(raw))
        size = unit * next(m for m in (1, 2, 5, 10) if m * unit >= raw)
        found = [i * size for i in range(math.floor(low / size), math.ceil(high / size) + 1)]
    return [round(t, 12) for t in found if low <= t <= high]
