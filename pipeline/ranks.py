"""What a process knows of those that torchrun or `accelerate launch` started with it, before they
meet (`workers.py`): its number, and who speaks when something goes wrong.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from kvsmith.errors import explain

TERMINATED = 128 + signal.SIGTERM
GRACE = 5.0  # seconds; launchers end all processes within one when one has ended
LEADER = "KVSMITH_LEADER"  # process id of the first process, once they have met


def rank() -> int | None:
    """Number of this process; None for one that was started alone."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def world_size() -> int:
    """Processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(script: str, allowed: bool) -> None:
    """Refuse to do the same work in each of several processes.

    Raises:
        ValueError: this process is one of several, and the script or a sweep works in one.
    """
    if (count := world_size()) == 1:
        return
    if not allowed:
        remedy = "Start it without torchrun."
        raise ValueError(explain(script, "processes", "1", count, remedy))
    if {"-m", "--multirun"} & set(sys.argv):
        remedy = "Start a sweep without torchrun."
        raise ValueError(explain(script, "processes", "1 with --multirun", count, remedy))


def end_on_sigterm() -> None:
    """Leave in order when the launcher ends this process because another one has ended."""
    if rank() is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))


def let_the_first_speak() -> None:
    """What all processes find wrong, the first one says; its end then ends the others."""
    if rank():
        time.sleep(GRACE)


def speaks() -> bool:
    """Whether this process says that the run was stopped: the first, or the second without it."""
    return not rank() or (rank() == 1 and not _alive(os.environ.get(LEADER)))


def _alive(process: str | None) -> bool:
    if process is not None:
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
    return True
