"""Processes of one run, forked from a test that has imported everything; nothing watches them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvsmith.pipeline.config import main_guard

PATIENCE = 60.0  # seconds in which everything here has long ended


def fork(job: Callable[[], Any], rank: int, count: int, port: int, said: Path) -> int:
    """A process of `count`, as a launcher would start it; its output goes to a file."""
    if (pid := os.fork()) != 0:
        return pid
    code: Any = 1
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = main_guard(job)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def together(
    work: Path, *jobs: Callable[[], Any], ask: float | None = None
) -> list[tuple[int, str]]:
    """Run jobs as processes of one run; exit code and output of each, in `PATIENCE` at most.

    Args:
        work: for the outputs.
        jobs: of ranks 0, 1, ...
        ask: seconds after which all get SIGTERM.
    """
    work.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [work / f"output-{rank}" for rank in range(len(jobs))]
    pids = [fork(job, r, len(jobs), port, outputs[r]) for r, job in enumerate(jobs)]
    began, codes = time.monotonic(), dict.fromkeys(pids, -999)
    left = set(pids)
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                codes[pid] = os.waitstatus_to_exitcode(status)
        gone = time.monotonic() - began
        if ask is not None and gone > ask:
            ask = None
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if gone > PATIENCE:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [(codes[pid], said.read_text()) for pid, said in zip(pids, outputs, strict=True)]


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]
