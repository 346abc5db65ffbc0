"""Where figures come from: the command, the commit, the hardware."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvsmith.pipeline.config import repository_root
from kvsmith.pipeline.evaluation.measure import versions


def provenance() -> dict[str, object]:
    """What a reader needs to repeat a run, as plain data."""
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def told(facts: Mapping[str, Any]) -> list[str]:
    """What `provenance` gave, and the seed, a sentence each; what is absent is left
    out.
    """
    names = ("command", "commit", "hardware", "seed")
    lines = [f"{name}: {facts[name]}" for name in names if facts.get(name) is not None]
    if versions := facts.get("versions"):
        lines.append("versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()))
    return lines


def hardware() -> str:
    """Processor, its cores, threads in use, and accelerators."""
    words = [f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        words.append(torch.cuda.get_device_name(i))
    return "; ".join(words)


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The repository's commit, None outside of one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=repository_root(),
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
