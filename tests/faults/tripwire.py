"""Counts calls that change the disk, and kills the process, or lets the disk be full, at one."""

from __future__ import annotations

import errno
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
        full: instead of dying, this and every later write and fsync find the disk full.
        count: calls so far.
    """

    number: int | None = None
    phase: Phase = "before"
    full: bool = False
    count: int = 0

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._watched(getattr(os, name), name))
        opened = io.open

        def watched(*args: Any, **kwargs: Any) -> Any:
            file = opened(*args, **kwargs)
            return Watched(file, self) if isinstance(file, io.BufferedWriter) else file

        io.open = watched  # type: ignore[assignment]

    def reached(self, growing: bool = True, path: object = None) -> bool:
        """Count one call; whether to die at it.

        Raises:
            OSError: the disk is full, and the call would make it fuller.
        """
        self.count += 1
        if self.number is None or self.count <= self.number:
            return False
        if not self.full:
            return self.count - 1 == self.number
        if growing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return False

    def _watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.reached(name in ("fsync", "mkdir"), args[0] if name == "mkdir" else None):
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
