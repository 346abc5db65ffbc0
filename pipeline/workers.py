"""The processes of one run, as torchrun or `accelerate launch` start them.

They agree through gloo, on GPUs too: little goes between them, and gloo tells at once when a
process has ended. Nothing waits without end: SIGTERM is looked for all the while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.pipeline.model import ModelConfig, model_device
from kvsmith.pipeline.ranks import LEADER, world_size
from kvsmith.pipeline.stage import Stop

T = TypeVar("T")

PATIENCE = timedelta(days=30)  # that one process may be ahead of another; a dead one is noticed
LOOK = 0.02  # seconds between two looks for SIGTERM


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

    def share(self, items: Sequence[T]) -> tuple[T, ...]:
        """Those of `items` that this process works on."""
        return tuple(items[self.rank :: self.count])

    def gather(
        self,
        own: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        owner: Mapping[str, int],
        stop: Stop | None = None,
    ) -> dict[str, Tensor]:
        """Tensors of all processes, float32 on the CPU.

        Args:
            own: this process's tensors by name.
            shapes: name -> shape of all tensors.
            owner: name -> process that has it.
            stop: asks to leave meanwhile.
        """
        if self.count == 1:
            return dict(own)
        found = {}
        for name in sorted(shapes):
            mine = own.get(name)
            whole = torch.zeros(shapes[name]) if mine is None else mine.to("cpu", copy=True)
            self._broadcast(whole, owner[name], stop)
            found[name] = whole
        return found

    def leaders(self, text: str, stop: Stop | None = None) -> str:
        """What the leading process calls this with."""
        if self.count == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._broadcast(size, 0, stop)
        if not self.leads:
            data = torch.zeros(int(size), dtype=torch.uint8)
        self._broadcast(data, 0, stop)
        return bytes(data.tolist()).decode()

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place.

        Raises:
            ValueError: one of them has ended.
        """
        if self.count > 1:
            with _together():
                dist.all_reduce(tensor)

    def wait(self, stop: Stop | None = None) -> None:
        """Wait for all processes.

        Raises:
            SystemExit: 143 after SIGTERM.
            ValueError: one of them has ended.
        """
        if self.count > 1:
            with _together():
                _finish(dist.barrier(async_op=True), stop)

    def in_turn(self, work: Callable[[], T], stop: Stop | None = None) -> T:
        """What `work` gives, which the processes do one after the other, by number."""
        found: list[T] = []
        for turn in range(self.count):
            if turn == self.rank:
                found.append(work())
            self.wait(stop)
        return found[0]

    def _broadcast(self, tensor: Tensor, source: int, stop: Stop | None) -> None:
        with _together():
            _finish(dist.broadcast(tensor, source, async_op=True), stop)


ALONE = Workers(0, 1, torch.device("cpu"))


def start_workers(cfg: ModelConfig) -> Workers:
    """Join the other processes, if this one was started beside others.

    Args:
        cfg: says where a process that is alone works; several take the GPUs of a machine in turn.

    Raises:
        ValueError: the others do not come, or each would spread its model over all devices.
    """
    device, count = model_device(cfg), world_size()
    if count == 1:
        return Workers(0, 1, device)
    if cfg.device_map is not None:
        remedy = "Start one process, which uses all devices, or load to one with device_map=null."
        expected = f"null with {count} processes"
        raise ValueError(explain("model.device_map", "value", expected, cfg.device_map, remedy))
    if device.type == "cuda":
        place = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        with _together():
            # Gradients on GPUs go through NCCL, everything else through gloo.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
    workers = Workers(dist.get_rank(), dist.get_world_size(), device)
    os.environ[LEADER] = workers.leaders(str(os.getpid()))
    return workers


@contextmanager
def _together() -> Iterator[None]:
    """What gloo says of a process that is gone, as one line."""
    try:
        yield
    except RuntimeError as error:
        remedy = "Start the same command again; it continues."
        text = explain("processes", "all of them", "running", f"one that ended ({error})", remedy)
        raise ValueError(text) from error


def _finish(work: dist.Work | None, stop: Stop | None) -> None:
    assert work is not None
    while not work.is_completed():
        if stop is not None:
            stop.leave_if_asked()
        time.sleep(LOOK)
    work.wait()
