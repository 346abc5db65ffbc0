"""What a run tells while it works: progress, messages, tables, and scalars in files and W&B.

On a terminal progress is a rich bar; elsewhere plain lines, at most one in ten seconds, so that a
log file stays short. Scalars and tables go to files in the run's folder (`metrics.py`) and, with
figures and bundles, to W&B. This is the only module that writes to the terminal, and the only one
that imports wandb.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.table import Table

from kvsmith.errors import explain
from kvsmith.pipeline.metrics import Metrics
from kvsmith.pipeline.progress import Bar, Lines, Progress, bar, peak_memory
from kvsmith.strict import to_dict

__all__ = ["LoggerConfig", "NoLogger", "Progress", "Run", "WandbLogger", "peak_memory"]


@dataclass(frozen=True)
class NoLogger:
    """Scalars stay in the run's folder."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class WandbLogger:
    """Scalars, tables, figures and bundles also go to Weights & Biases.

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


class Run:
    """The voice and the log files of one run; a context manager.

    Args:
        folder: where files of scalars and tables go; None keeps none.
        logger: where else they go.
        config: the run's configuration (a dataclass), told to W&B.
        quiet: say nothing.

    Raises:
        ValueError: `logger` needs wandb and it is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        logger: LoggerConfig | None = None,
        config: object = None,
        quiet: bool = False,
    ) -> None:
        self._metrics = None if folder is None else Metrics(folder)
        self._console = Console(soft_wrap=True, quiet=quiet)
        self._wandb: Any = None
        if isinstance(logger, WandbLogger):
            self._wandb = _start_wandb(logger, folder, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            with bar(self._console) as display:
                yield Bar(display, total, label, start)
        else:
            lines = Lines(self.say, total, label, start)
            yield lines
            lines.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record named numbers at a step.

        Args:
            step: integer on the run's own axis, not decreasing.
            values: finite or not; names may contain `/`.
        """
        if self._metrics is not None:
            self._metrics.add(step, values)
        if self._wandb is not None:
            # A column of its own: W&B's counter would drop what is behind it.
            self._wandb.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        """Forget scalars after `step`, which a run resumed there writes again.

        Args:
            step: last step to keep.
        """
        if self._metrics is not None:
            self._metrics.rewind(step)

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        name: str | None = None,
    ) -> None:
        """Write a table; numbers are aligned to the right.

        Args:
            title: line above the table.
            columns: headings.
            rows: one sequence of cells a row; cells are shown by `str`.
            name: word under which it is kept as `<name>.csv`, and in W&B; None only shows it.
        """
        if name is not None:
            self.record(name, columns, rows)
        if not self.interactive:
            self.say(_plain_table(title, columns, rows))
            return
        table = Table(title=title, title_justify="left")
        for i, heading in enumerate(columns):
            table.add_column(heading, justify="right" if i else "left")
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self._console.print(table)

    def record(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Keep a table without showing it: `<name>.csv` in the run's folder, and W&B.

        Args:
            name: word for files.
            columns: headings.
            rows: one sequence of cells a row; None is an empty cell.
        """
        if self._metrics is not None:
            self._metrics.table(name, columns, rows)
        if self._wandb is not None:
            cells = [list(row) for row in rows]
            made = _wandb().Table(columns=list(columns), data=cells, allow_mixed_types=True)
            self._wandb.log({name: made})

    def image(self, path: Path) -> None:
        """Send a figure to W&B, under its file's name.

        Args:
            path: PNG that the run has written.
        """
        if self._wandb is not None:
            self._wandb.log({path.stem: _wandb().Image(str(path))})

    def artifact(self, folder: Path, kind: str, facts: Mapping[str, Any] | None = None) -> None:
        """Send a folder to W&B as an artifact, under its own name.

        Args:
            folder: its files.
            kind: what it is, for example "bundle".
            facts: plain data that is shown with it.
        """
        if self._wandb is not None:
            made = _wandb().Artifact(folder.name, kind, metadata=dict(facts or {}))
            made.add_dir(str(folder))
            self._wandb.log_artifact(made)

    def close(self, failed: bool = False) -> None:
        """Finish the W&B run, if there is one."""
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    rule = "  ".join("-" * w for w in widths)
    return "\n".join([title, lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])])


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        remedy = "Run `pip install kvsmith[wandb]`, or use logger=none."
        raise ValueError(
            explain("logger", "package wandb", "installed for logger=wandb", "nothing", remedy)
        ) from error


def _start_wandb(logger: WandbLogger, folder: Path | None, config: object) -> Any:
    wandb = _wandb()
    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(
        project=logger.project,
        entity=logger.entity,
        name=logger.name,
        tags=list(logger.tags),
        mode=logger.mode,
        dir=None if folder is None else str(folder),
        config=to_dict(config),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
