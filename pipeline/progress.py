"""The two displays of progress: a rich bar on a terminal, and a line now and then in a file.

Use them through `log.Run.progress`.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0  # between two plain lines


class Progress(Protocol):
    """What `Run.progress` yields."""

    def advance(self, n: int = 1, **metrics: float) -> None:
        """Count `n` more units of work done; `metrics` are shown beside the bar."""


def peak_memory() -> int:
    """Most memory used so far, in bytes: by CUDA tensors once CUDA is in use, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident(peak: bool = False) -> int:
    """Resident bytes of this process now, or the most since `reset_peak` (Linux)."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    """Let `resident(peak=True)` start from now."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")


class Meter:
    """Counts, rates and the text that both displays share."""

    def __init__(self, total: int, start: int) -> None:
        self.total, self.done, self.start = total, start, start
        self.began = time.monotonic()
        self.metrics: dict[str, float] = {}

    def add(self, n: int, metrics: Mapping[str, float]) -> None:
        self.done += n
        self.metrics.update(metrics)

    def facts(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-9)
        parts = [f"{_short((self.done - self.start) / seconds)}/s"]
        parts.append(f"peak {peak_memory() / 2**20:.0f} MiB")
        parts += [f"{name} {_short(value)}" for name, value in self.metrics.items()]
        return "  ".join(parts)

    def seconds_left(self) -> float:
        moved = self.done - self.start
        seconds = time.monotonic() - self.began
        return math.inf if moved == 0 else (self.total - self.done) * seconds / moved


class Bar:
    """Progress on a terminal."""

    def __init__(self, bar: RichProgress, total: int, label: str, start: int) -> None:
        self._bar, self._meter = bar, Meter(total, start)
        self._task = bar.add_task(label, total=total, completed=start, facts="")

    def advance(self, n: int = 1, **metrics: float) -> None:
        self._meter.add(n, metrics)
        self._bar.update(self._task, advance=n, facts=self._meter.facts())


class Lines:
    """Progress in a file: a line now and then, and one at the end."""

    def __init__(self, say: Callable[[str], None], total: int, label: str, start: int) -> None:
        self._write, self._label, self._meter = say, label, Meter(total, start)
        self._said_at, self._said = time.monotonic(), -1

    def advance(self, n: int = 1, **metrics: float) -> None:
        self._meter.add(n, metrics)
        if time.monotonic() - self._said_at >= PLAIN_SECONDS:
            self._say()

    def close(self) -> None:
        if self._said != self._meter.done:
            self._say()

    def _say(self) -> None:
        meter = self._meter
        self._said_at, self._said = time.monotonic(), meter.done
        left = meter.seconds_left()
        known = 0 < left < math.inf
        eta = f"  eta {int(left // 60)}:{int(left % 60):02d}" if known else ""
        share = f"{100 * meter.done / max(meter.total, 1):.0f} %"
        self._write(f"{self._label}  {meter.done}/{meter.total}  {share}{eta}  {meter.facts()}")


def bar(console: Console) -> RichProgress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return RichProgress(*columns, TextColumn("{task.fields[facts]}"), console=console)


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
