"""Counts the calls that change the disk, and kills the process at one of them."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["before", "half", "after"]
CALLS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")


@dataclass
class Tripwire:
    """Works in the process that installs it, for good.

    Attributes:
        number: the call to die at, counted from 0; None only counts.
        phase: before it, after it, or (of a write) when half of it is done.
        count: calls so far.
    """

    number: int | None = None
    phase: Phase = "before"
    count: int = 0

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._watched(getattr(os, name)))
        opened = io.open

        def watched(*args: Any, **kwargs: Any) -> Any:
            file = opened(*args, **kwargs)
            return Watched(file, self) if isinstance(file, io.BufferedWriter) else file

        io.open = watched  # type: ignore[assignment]

    def reached(self) -> bool:
        """Count one call; whether it is the one."""
        self.count += 1
        return self.count - 1 == self.number

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.reached():
                return call(*args, **kwargs)
            try:
                return None if self.phase == "before" else call(*args, **kwargs)
            finally:
                die()

        return watched


class Watched:
    """A file open for writing whose writes count."""

    def __init__(self, file: Any, wire: Tripwire) -> None:
        self._file, self._wire = file, wire

    def write(self, data: Any) -> int:
        if self._wire.reached():
            end = {"before": 0, "half": len(data) // 2, "after": len(data)}[self._wire.phase]
            self._file.write(data[:end])
            self._file.flush()
            die()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def die() -> None:
    """As an outsider's `kill -9`: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)
