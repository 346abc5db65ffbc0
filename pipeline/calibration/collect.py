"""The streaming pass over the calibration tokens, with checkpoints it resumes from to the bit."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.pipeline.calibration.record import RECORD, Record, Source, layer_file
from kvsmith.pipeline.calibration.store import BUDGET, Store
from kvsmith.pipeline.log import Progress, Run
from kvsmith.pipeline.memory import activation_bytes, is_out_of_memory
from kvsmith.pipeline.stage import Stop, digest, write_json, write_safetensors
from kvsmith.pipeline.statistics.plan import TensorName
from kvsmith.pipeline.taps import Taps, frozen
from kvsmith.version import __version__

SHARE = 20  # writing checkpoints takes at most one part in so many of the time
ACTIVATIONS = 2**30  # bytes that may stay for the backward pass; beyond, layers run twice


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
        budget: bytes of statistics in host memory, beside the layer in hand.
        done: finished sequences.
        batch_size: sequences of the next batch; halves when memory runs out.
        loss: sum over finished sequences of their mean loss, nats.
    """

    folder: Path
    source: Source
    model: PreTrainedModel
    tokens: Tensor
    checkpoint_seconds: float
    log: Run
    stop: Stop
    budget: int = BUDGET
    done: int = field(default=0, init=False)
    batch_size: int = field(default=0, init=False)
    loss: float = field(default=0.0, init=False)
    _saved: float = field(default=0.0, init=False)
    _pause: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        base = self.source.base_model
        layers = {i: base.layers[i] for i in base.geometry.owners}
        self.store = Store(self.folder / "checkpoint", self.source.plan, layers, self.budget)
        self.batch_size = self.source.batch_size

    def run(self) -> None:
        """Run to the end, from the last checkpoint if there is one.

        Raises:
            SystemExit: 143 after SIGTERM, with a checkpoint written.
            ValueError: an activation or gradient is not finite, or one sequence is too much for
                the memory there is.
        """
        self._restore()
        self._saved, self._pause = time.monotonic(), self.checkpoint_seconds
        with (
            frozen(self.model),
            self.log.progress(len(self.tokens), "collect", self.done) as bar,
        ):
            while self.done < len(self.tokens):
                self._step(bar)
        self._finish()

    def _step(self, bar: Progress) -> None:
        """One batch, and a checkpoint when it is time or asked for."""
        batch = self.tokens[self.done : self.done + self.batch_size]
        try:
            loss = self._batch(batch)
        except SystemExit:
            self._save()
            raise
        if loss is None:
            return
        self.loss += loss * len(batch)
        self.done += len(batch)
        bar.advance(len(batch), loss=loss)
        due = time.monotonic() - self._saved >= self._pause
        if self.stop.asked or (due and self.done < len(self.tokens)):
            self._save()
        self.stop.leave_if_asked()

    def _batch(self, batch: Tensor) -> float | None:
        """Mean loss of a batch, all layers updated; None if memory ran out and the next is half.

        Layers that were updated before that happened pass over these sequences when they come
        again.
        """
        taken: Counter[tuple[int, str]] = Counter()

        def consume(layer: int, name: TensorName, values: Tensor, fisher: Tensor | None) -> None:
            number = self.done + taken[layer, name]
            taken[layer, name] += 1
            self.store.update(layer, name, number, values, fisher)

        twice = activation_bytes(self.model, batch.numel()) > ACTIVATIONS
        taps = Taps(
            self.model,
            consume,
            self.source.sinks,
            self.source.plan.fisher,
            recompute=twice,
            spill=self.store.folder if twice else None,
            breathe=self.stop.leave_if_asked,
        )
        try:
            return taps.run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._halve(len(batch), error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _halve(self, size: int, error: BaseException) -> None:
        if size == 1:
            length = self.tokens.shape[1]
            remedy = "Use a smaller length, or model.dtype=bfloat16."
            raise ValueError(
                explain("length", "sequence", "small enough for the memory", length, remedy)
            ) from error
        self.batch_size = size // 2
        self.log.say(f"out of memory with batch_size={size}; going on with {self.batch_size}")

    def _save(self) -> None:
        began = time.monotonic()
        facts = {
            "source": digest(self.source),
            "done": self.done,
            "batch_size": self.batch_size,
            "loss": self.loss,
        }
        self.store.save(facts)
        self._saved = time.monotonic()
        self._pause = max(self.checkpoint_seconds, SHARE * (self._saved - began))

    def _restore(self) -> None:
        facts = self.store.restore(digest(self.source))
        if facts is not None:
            self.done, self.batch_size = int(facts["done"]), int(facts["batch_size"])
            self.loss = float(facts["loss"])
            self.log.say(f"resumed after {self.done} sequences")

    def _finish(self) -> None:
        for layer in self.store.layers:
            path = self.folder / "statistics" / f"{layer_file(layer)}.safetensors"
            write_safetensors(path, self.store.load(layer).state_dict())
        loss = self.loss / len(self.tokens)
        program = f"kvsmith {__version__}"
        record = Record("kvsmith-calibration", 1, program, self.source, loss)
        write_json(self.folder / RECORD, record)

    def clear(self) -> None:
        """Remove checkpoints; for after the stage is marked as finished."""
        self.store.clear()
