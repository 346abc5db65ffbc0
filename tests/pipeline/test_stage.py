"""Stages: done once, done again when anything they depend on changes, whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvsmith.pipeline.stage import (
    Stage,
    Stop,
    atomic_write,
    digest,
    locked,
    read_json,
    read_safetensors,
    run_stage,
    write_json,
    write_safetensors,
)


class Copier:
    """A stage that copies a file and counts its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source, self.runs = folder, folder / "source.txt", 0
        self.source.write_text("one")

    def stage(self, factor: int = 2) -> Stage:
        return Stage("copy", (self.source,), ("out/copy.txt",), self._run, {"factor": factor})

    def _run(self) -> None:
        self.runs += 1
        atomic_write(self.folder / "out" / "copy.txt", self.source.read_bytes() * 2)


def test_a_finished_stage_is_skipped(tmp_path: Path) -> None:
    copier = Copier(tmp_path)
    assert run_stage(copier.stage(), tmp_path) and not run_stage(copier.stage(), tmp_path)
    assert copier.runs == 1 and (tmp_path / "out" / "copy.txt").read_text() == "oneone"


@pytest.mark.parametrize("change", ["input", "config", "output", "removed", "marker"])
def test_any_change_runs_it_again(tmp_path: Path, change: str) -> None:
    copier = Copier(tmp_path)
    run_stage(copier.stage(), tmp_path)
    factor = 2
    match change:
        case "input":
            copier.source.write_text("two")
        case "config":
            factor = 3
        case "output":
            (tmp_path / "out" / "copy.txt").write_text("oneonf")
        case "removed":
            (tmp_path / "out" / "copy.txt").unlink()
        case "marker":
            (tmp_path / ".stages" / "copy.json").write_text('{"key": ')
    assert run_stage(copier.stage(factor), tmp_path) and copier.runs == 2
    assert not run_stage(copier.stage(factor), tmp_path)


def test_a_failed_stage_leaves_no_marker(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no")

    stage = Stage("fail", (), ("never.txt",), fail)
    with pytest.raises(ValueError, match="no"):
        run_stage(stage, tmp_path)
    assert not (tmp_path / ".stages").exists()


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file.bin"
    atomic_write(target, b"old")

    def interrupt(_handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, b"new and longer")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([1, 2])
    write_safetensors(tmp_path / "1", {"a": a, "b": b})
    write_safetensors(tmp_path / "2", {"b": b, "a": a.t().contiguous().t()})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert torch.equal(read_safetensors(tmp_path / "1")["a"], a)
    write_json(tmp_path / "3", {"x": 1, "a": [0.1]})
    write_json(tmp_path / "4", {"a": [0.1], "x": 1})
    assert (tmp_path / "3").read_bytes() == (tmp_path / "4").read_bytes()
    assert digest({"x": 1, "y": 2}) == digest({"y": 2, "x": 1}) != digest({"x": 1, "y": 3})


def test_damaged_files_are_named_in_one_line(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "t", {"a": torch.zeros(100)})
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"t: file must be whole safetensors, got \(.*\)\. Delete"):
        read_safetensors(tmp_path / "t")
    (tmp_path / "j").write_text('{"a": 1')
    with pytest.raises(ValueError, match="j: file must be JSON, got broken"):
        read_json(tmp_path / "j")
    with pytest.raises(FileNotFoundError, match="absent: file must be present"):
        read_safetensors(tmp_path / "absent")


def test_two_runs_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kvsmith.pipeline.stage import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with (
            pytest.raises(ValueError, match="folder must be free, got in use by another run"),
            locked(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".file.json.123.tmp").write_text("left behind")
    with locked(tmp_path):  # the killed process holds it no longer
        assert not list((tmp_path / "deep").iterdir())


def test_sigterm_waits_for_a_safe_point() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        stop.leave_if_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(SystemExit) as leaving:
            stop.leave_if_asked()
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
