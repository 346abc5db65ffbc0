"""The processes of one training, as torchrun or `accelerate launch` start them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """This process among its likes.

    Attributes:
        rank: number of this process.
        count: of all processes.
        device: to work on.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process speaks and writes results."""
        return self.rank == 0

    def share(self, items: Sequence[int]) -> tuple[int, ...]:
        """Those of `items` that this process works on."""
        return tuple(items[self.rank :: self.count])

    def gather(
        self,
        own: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        owner: Mapping[str, int],
    ) -> dict[str, Tensor]:
        """Tensors of all processes.

        Args:
            own: this process's tensors by name.
            shapes: name -> shape of all tensors.
            owner: name -> process that has it.
        """
        if self.count == 1:
            return dict(own)
        found = {}
        for name in sorted(shapes):
            mine = own.get(name)
            whole = torch.zeros(shapes[name]) if mine is None else mine.clone()
            whole = whole.to(self.device)
            torch.distributed.broadcast(whole, owner[name])
            found[name] = whole.cpu()
        return found

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over all processes, in place."""
        for tensor in tensors if self.count > 1 else ():
            torch.distributed.all_reduce(tensor)
            tensor /= self.count

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            torch.distributed.barrier()


def start_workers(device: torch.device) -> Workers:
    """Join the other processes, if this one was started beside others.

    Args:
        device: where a process that is alone works.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers(0, 1, device)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Workers(state.process_index, state.num_processes, state.device)
