"""The calibration tokens in shards, which processes divide among them.

Sums of floats depend on their order, so the order is fixed: a shard is collected from nothing,
batch after batch, and shards are merged by number. What is in a shard follows from the
configuration alone; who collected it does not matter, and one process gives the bytes of many.
Shards lie in `checkpoint/shard-000`, ... until the last one is there, so a run continues with any
number of processes.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.pipeline.calibration.collect import Collect
from kvsmith.pipeline.calibration.record import RECORD, Record, Source, layer_file
from kvsmith.pipeline.calibration.store import BUDGET
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.stage import Stop, write_json, write_safetensors
from kvsmith.pipeline.statistics import LayerStatistics
from kvsmith.pipeline.taps import frozen
from kvsmith.pipeline.workers import Workers
from kvsmith.version import __version__


@dataclass(frozen=True)
class Shards:
    """One pass over all tokens; `run` leaves statistics and calibration.json in the folder.

    Attributes:
        folder: of this calibration; all processes see it.
        source: what is collected.
        model: the model.
        tokens: [samples, length] int64.
        checkpoint_seconds: time between checkpoints.
        log: tells the progress.
        stop: asks to leave.
        workers: the processes.
        budget: bytes of statistics in host memory, beside the layer in hand.
    """

    folder: Path
    source: Source
    model: PreTrainedModel
    tokens: Tensor
    checkpoint_seconds: float
    log: Run
    stop: Stop
    workers: Workers
    budget: int = BUDGET

    def run(self) -> None:
        """Run to the end, from the last checkpoints if there are any.

        Raises:
            SystemExit: 143 after SIGTERM, with a checkpoint written.
            ValueError: see `Collect.run`, or another process has ended.
        """
        self._collect()
        self.workers.wait(self.stop)
        self._read()
        for layer in self.workers.share(self.source.base_model.geometry.owners):
            self._merge(layer)
            self.stop.leave_if_asked()
        self.workers.wait(self.stop)
        if self.workers.leads:
            loss = sum(shard.loss for shard in self._all) / len(self.tokens)
            program = f"kvsmith {__version__}"
            record = Record("kvsmith-calibration", 1, program, self.source, loss)
            write_json(self.folder / RECORD, record)

    def clear(self) -> None:
        """Remove checkpoints; for after the stage is marked as finished."""
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)

    @cached_property
    def _all(self) -> tuple[Collect, ...]:
        parts = enumerate(self.tokens.split(list(sizes(self.source))))
        return tuple(
            Collect(
                self.folder / "checkpoint" / f"shard-{number:03d}",
                self.source,
                self.model,
                tokens,
                self.checkpoint_seconds,
                self.log,
                self.stop,
                self.budget,
            )
            for number, tokens in parts
        )

    def _collect(self) -> None:
        """The shards of this process."""
        own, count = self.workers.share(self._all), self.workers.count
        for shard in own:
            shard.restore()
        done = sum(shard.done for shard in own)
        if done:
            self.log.say(f"resumed after {done} sequences")
        label = "collect" if count == 1 else f"collect, 1 of {count} processes"
        total = sum(len(shard.tokens) for shard in own)
        size = self.source.batch_size
        with frozen(self.model), self.log.progress(total, label, done) as bar:
            for shard in own:
                shard.batch_size = size = min(size, shard.batch_size)
                shard.run(bar)
                size = shard.batch_size

    def _read(self) -> None:
        """What all processes have left.

        Raises:
            ValueError: the processes see different folders.
        """
        for shard in self._all:
            shard.restore()
            if shard.done < len(shard.tokens):
                expected = "there for all processes, in a folder that they share"
                got = f"{shard.done} of {len(shard.tokens)} sequences"
                raise ValueError(explain(str(shard.folder), "shard", expected, got))

    def _merge(self, layer: int) -> None:
        base = self.source.base_model
        total = LayerStatistics(self.source.plan, base.layers[layer])
        for shard in self._all:
            total.merge(shard.store.read(layer))
        path = self.folder / "statistics" / f"{layer_file(layer)}.safetensors"
        write_safetensors(path, total.state_dict())


def sizes(source: Source) -> tuple[int, ...]:
    """Sequences of each shard: whole batches, spread evenly."""
    batches = -(-source.samples // source.batch_size)
    count = min(source.shards, batches)
    ends = [min(i * batches // count * source.batch_size, source.samples) for i in range(count + 1)]
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
