"""How the batch of a step is divided: among processes, and in pieces one after another.

Every process holds the whole model and optimizer, computes its rows, and adds up gradients with the
others; so all take the same step. Or weights and moments are spread over the processes, see
`sharding.py`. Either way the sum differs from one process's in its rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.pipeline.log import LoggerConfig, Run
from kvsmith.pipeline.training.launch import Sharding
from kvsmith.pipeline.training.sharding import shard
from kvsmith.pipeline.workers import ALONE, Workers


@dataclass(frozen=True)
class Division:
    """Parts of a batch.

    Args:
        workers: the processes.
        pieces: that a process computes its rows in, to need less memory (gradient accumulation).
        sharding: what is spread over the processes, see `asked_sharding`.
    """

    workers: Workers = ALONE
    pieces: int = 1
    sharding: Sharding = "none"

    def __post_init__(self) -> None:
        if self.pieces < 1:
            raise ValueError(explain("pieces", "value", "at least 1", self.pieces))

    @property
    def sharded(self) -> bool:
        """Whether anything is spread over the processes."""
        return self.sharding != "none"

    @property
    def parts(self) -> int:
        """Of a batch in all."""
        return self.workers.count * self.pieces

    def voice(self, folder: Path, logger: LoggerConfig, config: object) -> Run:
        """The run of all processes; only the leading one is heard and writes."""
        return Run(folder, logger, config) if self.workers.leads else Run(None, quiet=True)

    def check(self, rows: int, length: int) -> None:
        """Refuse a batch that cannot be divided evenly.

        Args:
            rows: sequences of a batch.
            length: of a sequence.

        Raises:
            ValueError: says what would fit.
        """
        if rows % self.parts:
            what = f"sequences of {length} tokens in a batch"
            parts = f"{self.workers.count} processes x {self.pieces} pieces"
            remedy = "Change optim.batch_tokens, pieces, or the number of processes."
            raise ValueError(explain("train", what, f"a multiple of {parts}", rows, remedy))

    def shard(self, model: PreTrainedModel) -> None:
        """Spread a model over the processes, where that is asked for."""
        if self.sharded:
            shard(model, self.workers.count, keep=self.sharding == "gradients")

    @property
    def scale(self) -> int:
        """What a piece's loss is divided by; sharded gradients are averaged over processes."""
        return self.pieces if self.sharded else self.parts

    def rows(self, batch: int) -> list[slice]:
        """Rows of each piece of this process."""
        size, first = batch // self.parts, self.workers.rank * self.pieces
        return [slice((first + i) * size, (first + i + 1) * size) for i in range(self.pieces)]

    def add(self, loss: Tensor, weights: Iterable[Tensor]) -> float:
        """Add up the loss, and gradients in place, over all processes; returns the loss."""
        if self.workers.count == 1:
            return loss.item()
        grads = [] if self.sharded else [w.grad for w in weights if w.grad is not None]
        flat = torch.cat([loss.detach().float().view(1), *(g.flatten() for g in grads)])
        self.workers.add(flat)
        for grad, part in zip(grads, flat[1:].split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return flat[0].item()

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says yes."""
        votes = torch.tensor(float(flag))
        self.workers.add(votes)
        return votes.item() > 0
