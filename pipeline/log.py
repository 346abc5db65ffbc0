"""What a run tells while it works: progress, messages, tables, and scalars in files (and in W&B where asked for).

On a terminal progress is a rich bar; elsewhere plain lines, at most one in ten seconds, so that a log file stays short.
Scalars go to `metrics.jsonl` (one object a step) and `metrics.csv` (step, name, value) in the run's folder.
This is the only module that writes to the terminal, and the only one that imports wandb.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from kvsmith.errors import explain
from kvsmith.strict import to_dict

PLAIN_SECONDS = 10.0


@dataclass(frozen=True)
class NoLogger:
    """Scalars stay in the run's folder."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class WandbLogger:
    """Scalars also go to Weights & Biases.

    Args:
        project: W&B project.
        entity: account or team; None is the user's default.
        name: run name; None lets W&B choose.
        tags: labels.
        mode: None leaves it to W&B (its variable WANDB_MODE, else online).
    """

    kind: Literal["wandb"] = "wandb"
    project: str = "kvsmith"
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] | None = None


LoggerConfig = NoLogger | WandbLogger


class Progress(Protocol):
    """What `Run.progress` yields."""

    def advance(self, n: int = 1, **metrics: float) -> None:
        """Count `n` more units of work done; `metrics` are shown beside the bar."""


class Run:
    """The voice and the log files of one run; a context manager.

    Args:
        folder: where `metrics.jsonl` and `metrics.csv` go (appended, so a resumed run continues them); None keeps no files.
        logger: where else scalars go.
        config: the run's configuration (a dataclass), told to W&B.

    Raises:
        ValueError: `logger` needs wandb and it is not installed.
    """

    def __init__(self, folder: Path | None, logger: LoggerConfig | None = None, config: object = None) -> None:
        self._folder = folder
        self._console = Console(soft_wrap=True)
        self._wandb: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        if isinstance(logger, WandbLogger):
            self._wandb = _start_wandb(logger, folder, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    @property
    def interactive(self) -> bool:
        """Whether stdout is a terminal."""
        return self._console.is_terminal

    def say(self, text: str) -> None:
        """Write one line for the reader."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, total: int, label: str, start: int = 0) -> Iterator[Progress]:
        """Show the progress of a loop with rate, time left and peak memory.

        Args:
            total: units of work.
            label: what is being done.
            start: units done before (a resumed run); they do not count into the rate.

        Yields:
            An object with `advance(n=1, **metrics)`.
        """
        if self.interactive:
            with _bar(self._console) as bar:
                yield _Bar(bar, total, label, start)
        else:
            lines = _Lines(self, total, label, start)
            yield lines
            lines.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record named numbers at a step.

        Args:
            step: integer on the run's own axis, not decreasing.
            values: finite or not; names may contain `/`.
        """
        if self._folder is not None:
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            path = self._folder / "metrics.csv"
            new = not path.exists()
            with path.open("a", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if new:
                    writer.writerow(["step", "name", "value"])
                writer.writerows([step, name, repr(value)] for name, value in values.items())
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write a table; numbers are aligned to the right.

        Args:
            title: line above the table.
            columns: headings.
            rows: one sequence of cells a row; cells are shown by `str`.
        """
        if not self.interactive:
            self.say(_plain_table(title, columns, rows))
            return
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(columns):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self._console.print(table)

    def close(self, failed: bool = False) -> None:
        """Finish the W&B run, if there is one."""
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None


def peak_memory() -> int:
    """High-water mark of memory in bytes: of the CUDA allocator once it was used, else of this process's resident set."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Meter:
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
        parts = [f"{_short((self.done - self.start) / seconds)}/s", f"peak {peak_memory() / 2**20:.0f} MiB"]
        return "  ".join(parts + [f"{name} {_short(value)}" for name, value in self.metrics.items()])

    def seconds_left(self) -> float:
        moved = self.done - self.start
        return math.inf if moved == 0 else (self.total - self.done) * (time.monotonic() - self.began) / moved


class _Bar:
    """Progress on a terminal."""

    def __init__(self, bar: RichProgress, total: int, label: str, start: int) -> None:
        self._bar, self._meter = bar, _Meter(total, start)
        self._task = bar.add_task(label, total=total, completed=start, facts="")

    def advance(self, n: int = 1, **metrics: float) -> None:
        self._meter.add(n, metrics)
        self._bar.update(self._task, advance=n, facts=self._meter.facts())


class _Lines:
    """Progress in a file: a line now and then, and one at the end."""

    def __init__(self, run: Run, total: int, label: str, start: int) -> None:
        self._run, self._label, self._meter = run, label, _Meter(total, start)
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
        eta = "" if left <= 0 or math.isinf(left) else f"  eta {int(left // 60)}:{int(left % 60):02d}"
        share = f"{100 * meter.done / max(meter.total, 1):.0f} %"
        self._run.say(f"{self._label}  {meter.done}/{meter.total}  {share}{eta}  {meter.facts()}")


def _bar(console: Console) -> RichProgress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return RichProgress(*columns, TextColumn("{task.fields[facts]}"), console=console)


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in cells]
    rule = "  ".join("-" * w for w in widths)
    return "\n".join([title, lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])])


def _start_wandb(logger: WandbLogger, folder: Path | None, config: object) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        remedy = "Run `pip install kvsmith[wandb]`, or use logger=none."
        raise ValueError(explain("logger", "package wandb", "installed for logger=wandb", "nothing", remedy)) from error
    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        project=logger.project,
        entity=logger.entity,
        name=logger.name,
        tags=list(logger.tags),
        mode=logger.mode,
        dir=None if folder is None else str(folder),
        config=to_dict(config),
    )
