"""`python -m tests.faults.kills PLACE`: kill calibration and export again and again.

A process that has imported everything forks a worker for each kill, so that one costs a fraction
of a second. Half of the kills come at a random moment, half at a chosen call that changes the disk
(before it, after it, or half way through a write). A reader looks at the folders all the while.
Then the same command runs to its end and must leave the bytes of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import safetensors.torch
import torch

import kvsmith
from kvsmith.pipeline import calibrate, export
from kvsmith.pipeline.calibration import collect
from kvsmith.pipeline.config import load, main_guard
from kvsmith.pipeline.stage import read_json
from tests.faults.tripwire import Phase, Tripwire

PHASES: tuple[Phase, ...] = ("before", "half", "after")
CODECS = "[kvquant_nuq3_o1,kvquant_nuq2]"
PAUSE = 0.01  # seconds between two looks


@dataclass(frozen=True)
class Commands:
    """calibrate.py and export.py on the micro model of a place; both write below `work`."""

    calibrate: calibrate.CalibrateConfig
    export: export.ExportConfig
    work: Path

    def run(self) -> None:
        calibrate.run(self.calibrate, self.work / "log")
        export.run(self.export, self.work / "log")


@cache
def composed(place: Path) -> tuple[calibrate.CalibrateConfig, export.ExportConfig]:
    model = f"model.path={place}/micro"
    given = [model, "data=textfile", f"data.path={place}/text.txt", f"codecs={CODECS}"]
    given += ["samples=6", "length=32", "batch_size=2", "checkpoint_seconds=0"]
    return (
        load(calibrate.CalibrateConfig, "calibrate", given),
        load(export.ExportConfig, "export", [model, "codec=kvquant_nuq3_o1"]),
    )


def commands(place: Path, work: Path) -> Commands:
    calibration, exported = composed(place)
    folder, bundles = str(work / "calibration"), str(work / "bundles")
    exported = replace(exported, calibrations=folder, bundles=bundles)
    return Commands(replace(calibration, folder=folder), exported, work)


def worker(job: Commands, wire: Tripwire | None) -> int:
    """Fork a process that runs the commands; its count of calls goes to `work/calls`."""
    job.work.mkdir(parents=True, exist_ok=True)
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        quiet = os.open(job.work / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if wire is not None:
            wire.install()
        code = main_guard(job.run)
        if wire is not None and wire.number is None:
            (job.work / "calls").write_text(str(wire.count))
    finally:
        sys.stdout.flush()
        os._exit(code)


def watch(pid: int, work: Path, seconds: float | None = None) -> int:
    """Wait for a worker, reading what it leaves; kill it after `seconds`. Gives its status."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        look(work)
        if done:
            return status
        if seconds is not None and time.monotonic() - began >= seconds:
            os.kill(pid, signal.SIGKILL)
            seconds = None
        time.sleep(PAUSE)


def look(work: Path) -> None:
    """A reader: every bundle and every file under its own name is whole."""
    bundles = work / "bundles" / "micro"
    for name in os.listdir(bundles) if bundles.is_dir() else ():
        if not name.startswith("."):
            kvsmith.load(bundles / name)
    # os.walk passes over folders that go meanwhile
    for path in [
        Path(at) / name for at, _, names in os.walk(work / "calibration") for name in names
    ]:
        if path.name.startswith("."):
            continue
        try:
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                safetensors.torch.load(path.read_bytes())
        except FileNotFoundError:  # a checkpoint that was replaced meanwhile
            continue


def contents(work: Path) -> dict[str, bytes]:
    """What counts: calibration, parameters, markers and bundle; no locks, no logs."""
    found = [p for part in ("calibration", "bundles") for p in (work / part).rglob("*")]
    return {
        str(p.relative_to(work)): p.read_bytes()
        for p in found
        if p.is_file() and p.name != ".lock" and ".tmp-" not in str(p)
    }


def finish(place: Path, work: Path) -> None:
    """Run the commands to their end.

    Raises:
        AssertionError: they fail; has what they said.
    """
    status = watch(worker(commands(place, work), None), work)
    if status != 0:
        raise AssertionError(f"{work}: exit {status}: {(work / 'output').read_text()}")


def campaign(place: Path, count: int, seed: int) -> dict[str, int]:
    """Kill `count` runs, and give a quarter as many a disk that fills up; how many, by kind.

    Raises:
        AssertionError: a run ended in other bytes, or a reader met something half-written.
    """
    whole, calls, seconds = undisturbed(place)
    tally = {"time": 0, "call": 0, "too late": 0, "full disk": 0}
    for i in range(count):
        rng = random.Random(f"{seed}/{i}")
        work = place / f"case-{i}"
        job = commands(place, work)
        kind = "call" if i % 2 else "time"
        while True:
            if kind == "call":
                wire = Tripwire(rng.randrange(calls), rng.choice(PHASES))
                status = watch(worker(job, wire), work)
            else:
                status = watch(worker(job, None), work, rng.uniform(0, seconds))
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                break
            tally["too late"] += 1
            shutil.rmtree(work)
        tally[kind] += 1
        resume(place, work, whole, f"seed {seed}, number {i}")
    for i in range(count // 4):
        rng = random.Random(f"{seed}/full/{i}")
        work = place / f"full-{i}"
        wire = Tripwire(rng.randrange(calls), full=True)
        status = watch(worker(commands(place, work), wire), work)
        check_full(status, (work / "output").read_text(), work)
        tally["full disk"] += os.waitstatus_to_exitcode(status) == 1
        resume(place, work, whole, f"seed {seed}, full {i}")
    return tally


def check_full(status: int, said: str, work: Path) -> None:
    """A run on a disk that filled up ends with one line that names a file of its own."""
    code = os.waitstatus_to_exitcode(status)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    one = len(errors) == 1 and "No space left" in errors[0] and str(work) in errors[0]
    if code != 0 and not (code == 1 and one and said.endswith(f"{errors[0]}\n")):
        raise AssertionError(f"{work}: exit {code}: {said}")


def resume(place: Path, work: Path, whole: dict[str, bytes], what: str) -> None:
    """The same command again leaves the bytes of an undisturbed run."""
    finish(place, work)
    if contents(work) != whole:
        raise AssertionError(f"{what}: other bytes in {work}")
    shutil.rmtree(work)


def undisturbed(place: Path) -> tuple[dict[str, bytes], int, float]:
    """Bytes, calls and seconds of a run from start to end."""
    collect.SHARE = 0  # a checkpoint after each batch, however slow the disk is
    calibrate.load_codec = cache(calibrate.load_codec)  # hydra takes longer than everything else
    with redirect_stdout(io.StringIO()):
        commands(place, place / "warm").run()  # imports what workers need
    began = time.monotonic()
    finish(place, place / "whole")
    seconds = time.monotonic() - began
    job = commands(place, place / "counted")
    status = watch(worker(job, Tripwire()), job.work)
    assert status == 0, (job.work / "output").read_text()
    whole = contents(place / "whole")
    assert whole and contents(job.work) == whole, "two undisturbed runs differ"
    return whole, int((job.work / "calls").read_text()), seconds


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults.kills", description=__doc__)
    parser.add_argument("place", type=Path, help="folder with micro/ and text.txt")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    tally = campaign(options.place, options.count, options.seed)
    sys.stdout.write(json.dumps({**tally, "seconds": time.monotonic() - began}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
