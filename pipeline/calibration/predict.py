"""What a calibration will take, from one sample that goes the whole way.

The sample runs twice: the first time has costs of its own (memory is fetched, code is loaded), the
second tells the time of one more. Fits, files and hashes are as in the full run. Memory is the peak
so far, and what larger batches and more tokens add to it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from pathlib import Path

from transformers import PreTrainedModel

from kvsmith.pipeline.calibration.collect import ACTIVATIONS
from kvsmith.pipeline.calibration.record import Source
from kvsmith.pipeline.calibration.shards import sizes as shards
from kvsmith.pipeline.calibration.store import BUDGET
from kvsmith.pipeline.log import Progress, Run, peak_memory
from kvsmith.pipeline.memory import activation_bytes

COPIES = 2


@dataclass(frozen=True)
class Prediction:
    """Of the full run.

    Attributes:
        seconds: from start to end, without the imports.
        memory: peak bytes, of the device where there is one, else resident on the host.
        disk: bytes that stay.
        disk_peak: bytes while it runs, with checkpoints.
    """

    seconds: float
    memory: int
    disk: int
    disk_peak: int

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        memory, disk, peak = (n / 2**20 for n in (self.memory, self.disk, self.disk_peak))
        return (
            f"predicted: {minutes}:{seconds:02d} min, {memory:,.0f} MiB of memory, "
            f"{disk:,.1f} MiB on disk ({peak:,.1f} while it runs)"
        )


class Quiet(Run):
    """Says nothing and notes when the units of one loop were done.

    Args:
        label: of the loop.
        folder: for scalars, which are kept; None keeps none.
        times: to add to.
    """

    def __init__(
        self, label: str, folder: Path | None = None, times: list[float] | None = None
    ) -> None:
        super().__init__(folder, quiet=True)
        self.label, self.times = label, [] if times is None else times

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def progress(self, total: int, label: str, start: int = 0) -> Iterator[Progress]:
        yield Clock(self.times if label == self.label else [])


@dataclass
class Clock:
    """Notes the time of each advance."""

    times: list[float]

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.times.append(time.monotonic())


def predict(
    one: Callable[[Path, Run], Path],
    source: Source,
    model: PreTrainedModel,
    loading: float,
    processes: int = 1,
) -> Prediction:
    """Predict a calibration.

    Args:
        one: calibrates `COPIES` of one sample below a folder, telling what it does to a Run.
        source: of the full run.
        model: the model.
        loading: seconds it took to load model and tokens.
        processes: that divide the shards; memory is that of each.

    Returns:
        The prediction; nothing is left on disk.
    """
    log, began = Quiet("collect"), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        one(Path(place), log)
        seconds = time.monotonic() - began
        sizes = {p: p.stat().st_size for p in Path(place).rglob("*") if p.is_file()}
    statistics = sum(size for p, size in sizes.items() if p.parent.name == "statistics")
    more = _growth(source, COPIES * (source.length - source.sinks))
    each = log.times[1] - log.times[0]
    batch = min(source.batch_size, source.samples)
    activations = _activations(model, batch * source.length) - _activations(model, source.length)
    return Prediction(
        loading + seconds + (_most(source, processes) - COPIES) * each,
        peak_memory() + max(0, activations) + min(more, BUDGET),
        sum(sizes.values()) + more,
        sum(sizes.values()) + more + (len(shards(source)) + 1) * (statistics + more),
    )


def _most(source: Source, processes: int) -> int:
    """Sequences of the process that has the most of them."""
    return max(sum(shards(source)[rank::processes]) for rank in range(processes))


def _growth(source: Source, seen: int) -> int:
    """Bytes by which statistics of all tokens exceed those of `seen`: more values at the ends."""
    plan, base = source.plan, source.base_model
    kept = [min(n, floor(n * plan.max_fraction / 2) + 2) for n in (plan.total, seen)]
    channels = 0
    for layer in (base.layers[i] for i in base.geometry.owners):
        channels += layer.kv_heads * layer.k_dim * plan.k.channels
        channels += layer.kv_heads * layer.v_dim * plan.v.channels
    return channels * 2 * 4 * (kept[0] - kept[1])


def _activations(model: PreTrainedModel, tokens: int) -> int:
    """What stays for the backward pass: all layers, or one where layers run twice."""
    whole = activation_bytes(model, tokens)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return whole if whole <= ACTIVATIONS else whole // int(layers)
