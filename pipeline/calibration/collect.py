"""The streaming pass over one shard of the calibration tokens, with checkpoints it resumes from to
the bit.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.pipeline.calibration.record import Source
from kvsmith.pipeline.calibration.store import BUDGET, Store
from kvsmith.pipeline.log import Progress, Run
from kvsmith.pipeline.memory import activation_bytes, is_out_of_memory
from kvsmith.pipeline.stage import Stop, digest
from kvsmith.pipeline.statistics.plan import TensorName
from kvsmith.pipeline.taps import Taps

SHARE = 20  # writing checkpoints takes at most one part in so many of the time
ACTIVATIONS = 2**30  # bytes that may stay for the backward pass; beyond, layers run twice


@dataclass
class Collect:
    """One shard; `run` leaves a finished checkpoint in the folder.

    Attributes:
        folder: of the shard's checkpoint.
        source: what is collected.
        model: the model, within `frozen`.
        tokens: [N, length] int64 of the shard.
        checkpoint_seconds: time between checkpoints.
        log: tells what happens.
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
        self.store = Store(self.folder, self.source.plan, layers, self.budget)
        self.batch_size = self.source.batch_size

    def restore(self) -> None:
        """Take up the last checkpoint, if there is one.

        Raises:
            ValueError: a file of it was changed.
        """
        facts = self.store.restore(digest(self.source))
        if facts is not None:
            self.done, self.batch_size = int(facts["done"]), int(facts["batch_size"])
            self.loss = float(facts["loss"])

    def run(self, bar: Progress) -> None:
        """Run to the end of the shard, from the checkpoint that was restored.

        Raises:
            SystemExit: 143 after SIGTERM, with a checkpoint written.
            ValueError: an activation or gradient is not finite, or one sequence is too much for
                the memory there is.
        """
        if self.done == len(self.tokens):
            return
        self._saved, self._pause = time.monotonic(), self.checkpoint_seconds
        while self.done < len(self.tokens):
            self._step(bar)
        self._save()
        self.store.forget()

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
