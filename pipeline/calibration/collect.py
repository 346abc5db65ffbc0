"""The streaming pass over the calibration tokens, with checkpoints it resumes from to the bit."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.pipeline.calibration.record import RECORD, Record, Source, layer_file
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device
from kvsmith.pipeline.stage import (
    Stop,
    digest,
    file_hash,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from kvsmith.pipeline.statistics import LayerStatistics
from kvsmith.pipeline.statistics.plan import TensorName
from kvsmith.pipeline.taps import Taps, frozen
from kvsmith.version import __version__

SHARE = 20  # writing checkpoints takes at most one part in so many of the time


@dataclass
class Progress:
    """How far a pass has come.

    Attributes:
        batches: finished.
        loss: sum over these of their mean loss times their sequences, nats.
        layers: statistics by layer that owns its tokens.
    """

    batches: int
    loss: float
    layers: dict[int, LayerStatistics]


@dataclass
class Collect:
    """One pass; `run` leaves statistics and calibration.json in the folder.

    Attributes:
        folder: of this calibration.
        source: what is collected.
        model: the model.
        tokens: [samples, length] int64.
        checkpoint_seconds: time between checkpoints.
        log: tells the progress.
        stop: asks to leave.
    """

    folder: Path
    source: Source
    model: PreTrainedModel
    tokens: Tensor
    checkpoint_seconds: float
    log: Run
    stop: Stop
    _saved: float = field(default=0.0, init=False)
    _pause: float = field(default=0.0, init=False)

    def run(self) -> None:
        """Run to the end, from the last checkpoint if there is one.

        Raises:
            SystemExit: 143 after SIGTERM, with a checkpoint written.
            ValueError: an activation or gradient is not finite.
        """
        progress, device = self._restore(), input_device(self.model)
        batches = self.tokens.split(self.source.batch_size)

        def consume(layer: int, name: TensorName, values: Tensor, fisher: Tensor | None) -> None:
            # A model may lie on several devices; the statistics lie on one.
            values, fisher = values.to(device), None if fisher is None else fisher.to(device)
            progress.layers[layer].update(name, values, fisher)

        taps = Taps(self.model, consume, self.source.sinks, self.source.plan.fisher)
        self._saved, self._pause = time.monotonic(), self.checkpoint_seconds
        with (
            frozen(self.model),
            self.log.progress(len(batches), "collect", progress.batches) as bar,
        ):
            for batch in batches[progress.batches :]:
                loss = taps.run(batch)
                progress.loss += loss * len(batch)
                progress.batches += 1
                bar.advance(1, loss=loss)
                self._between(progress, len(batches))
        self._finish(progress)

    def _between(self, progress: Progress, total: int) -> None:
        """What is done after a batch: a checkpoint when it is time, or asked for."""
        due = time.monotonic() - self._saved >= self._pause
        if self.stop.asked or (due and progress.batches < total):
            self._save(progress)
        self.stop.leave_if_asked()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def _save(self, progress: Progress) -> None:
        began = time.monotonic()
        name = f"batch-{progress.batches:06d}.safetensors"
        tensors = {
            f"{layer}/{key}": tensor
            for layer, stats in progress.layers.items()
            for key, tensor in stats.state_dict().items()
        }
        write_safetensors(self._checkpoint / name, tensors)
        facts = {
            "source": digest(self.source),
            "file": name,
            "sha256": file_hash(self._checkpoint / name),
            "batches": progress.batches,
            "loss": progress.loss,
        }
        write_json(self._checkpoint / "checkpoint.json", facts)
        for old in self._checkpoint.glob("batch-*.safetensors"):
            if old.name != name:
                old.unlink()
        self._saved = time.monotonic()
        self._pause = max(self.checkpoint_seconds, SHARE * (self._saved - began))

    def _restore(self) -> Progress:
        base, plan = self.source.base_model, self.source.plan
        device = input_device(self.model)
        layers = {i: LayerStatistics(plan, base.layers[i], device) for i in base.geometry.owners}
        found = self._checkpoint / "checkpoint.json"
        if not found.is_file():
            return Progress(0, 0.0, layers)
        facts = read_json(found)
        path = self._checkpoint / str(facts.get("file"))
        if facts.get("source") != digest(self.source) or not path.is_file():
            return Progress(0, 0.0, layers)
        if file_hash(path) != facts.get("sha256"):
            remedy = f"Delete {self._checkpoint} to start again."
            raise ValueError(explain(str(path), "checkpoint", "as written", "changed", remedy))
        tensors = read_safetensors(path)
        for layer, stats in layers.items():
            prefix = f"{layer}/"
            own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            stats.load_state_dict(own)
        self.log.say(f"resumed after batch {facts['batches']}")
        return Progress(int(facts["batches"]), float(facts["loss"]), layers)

    def _finish(self, progress: Progress) -> None:
        for layer, stats in progress.layers.items():
            path = self.folder / "statistics" / f"{layer_file(layer)}.safetensors"
            write_safetensors(path, stats.state_dict())
        loss = progress.loss / len(self.tokens)
        program = f"kvsmith {__version__}"
        record = Record("kvsmith-calibration", 1, program, self.source, loss)
        write_json(self.folder / RECORD, record)

    def clear(self) -> None:
        """Remove checkpoints; for after the stage is marked as finished."""
        shutil.rmtree(self._checkpoint, ignore_errors=True)
