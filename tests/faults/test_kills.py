"""Killed anywhere, the same command ends in the same bytes; `make faults` kills 200 times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.micro_model import write_model, write_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_anywhere_the_same_command_ends_in_the_same_bytes(
    tmp_path: Path, micro_llama: Callable[..., Any], pytestconfig: pytest.Config
) -> None:
    count = pytestconfig.getoption("--kills")
    write_model(tmp_path / "micro", micro_llama)
    write_text(tmp_path / "text.txt", 20_000)
    command = [sys.executable, "-m", "tests.faults.kills", str(tmp_path), f"--count={count}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * count)
    assert done.returncode == 0, done.stderr[-3000:]
    tally = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{tally}\n")
    assert tally["call"] == count // 2 and tally["call"] + tally["time"] == count
    assert tally["full disk"] >= count // 4 - count // 16
