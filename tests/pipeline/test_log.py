"""What a run says and writes."""

from __future__ import annotations

import csv
import importlib
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from kvsmith.pipeline import progress
from kvsmith.pipeline.log import NoLogger, Run, WandbLogger, peak_memory


def test_scalars_go_to_both_files_and_are_continued(tmp_path: Path) -> None:
    with Run(tmp_path, NoLogger()) as run:
        run.scalars(1, {"loss": 2.5, "a/b": 1e-9})
    with Run(tmp_path) as run:
        run.scalars(2, {"loss": 0.1})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.5, "a/b": 1e-9}, {"step": 2, "loss": 0.1}]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["step", "name", "value"]
    assert [(int(s), n, float(v)) for s, n, v in table[1:]] == [
        (1, "loss", 2.5),
        (1, "a/b", 1e-9),
        (2, "loss", 0.1),
    ]


def test_rewind_forgets_later_steps_and_half_lines(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        for step in range(1, 6):
            run.scalars(step, {"x": float(step), "y": 0.0})
        for name, half in (("metrics.jsonl", '{"step": 2, "x'), ("metrics.csv", "2,x")):
            with (tmp_path / name).open("a") as file:
                file.write(half)
        run.rewind(3)
        run.scalars(4, {"x": 40.0})
    steps = [json.loads(s)["step"] for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[-3:] == [
        "3,x,3.0",
        "3,y,0.0",
        "4,x,40.0",
    ]


def test_nothing_is_written_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Run(None) as run:
        run.scalars(1, {"x": 1.0})
        run.rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_plain_progress_is_rare_and_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(float(n) for n in range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    run = Run(None)
    with run.progress(100, "fit", start=20) as bar:
        for _ in range(80):
            bar.advance(loss=0.25)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 20
    shape = r"fit  \d+/100  \d+ %  eta \d+:\d\d  [\d.]+/s  peak \d+ MiB  loss 0\.25"
    assert all(re.fullmatch(shape, line) for line in lines[:-1])
    assert lines[-1].startswith("fit  100/100  100 %") and "eta" not in lines[-1]


def test_a_progress_that_ends_early_tells_where(capsys: pytest.CaptureFixture[str]) -> None:
    with Run(None).progress(10, "fit") as bar:
        bar.advance(3)
    assert capsys.readouterr().out.startswith("fit  3/10  30 %")


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(None)
    monkeypatch.setattr(run, "_console", Console(force_terminal=True, width=120))
    assert run.interactive
    with run.progress(4, "fit layers") as bar:
        bar.advance(4, loss=1.5)
    run.table("T", ["name", "x"], [["a", 1]])
    out = capsys.readouterr().out
    assert "fit layers" in out and "4/4" in out and "loss 1.5" in out and "MiB" in out


def test_a_plain_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Run(None).table("Sizes", ["codec", "bits"], [["none", 16.0], ["nuq4 [x]", 4.25]])
    assert capsys.readouterr().out == (
        "Sizes\ncodec     bits\n--------  ----\nnone      16.0\nnuq4 [x]  4.25\n"
    )


def test_say_takes_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold] a/b " + "word " * 60 + "end"
    Run(None).say(text)
    assert capsys.readouterr().out == text + "\n"


def test_peak_memory_is_a_plausible_number_of_bytes() -> None:
    before = peak_memory()
    assert 10 * 2**20 < before < 2**42
    block = bytearray(before + 2**26)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory() >= before + 2**25


def test_wandb_gets_options_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    class Session:
        def log(self, values: dict[str, float]) -> None:
            calls.append(values)

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    class Wandb:
        @staticmethod
        def init(**options: object) -> Session:
            calls.append(options)
            return Session()

    monkeypatch.setattr(importlib, "import_module", lambda name: Wandb)
    logger = WandbLogger(project="p", tags=("t",), mode="offline")
    with pytest.raises(RuntimeError), Run(tmp_path, logger, {"seed": 1}) as run:
        run.scalars(3, {"loss": 1.0})
        raise RuntimeError
    options, scalars, code = calls
    assert isinstance(options, dict)
    assert options["project"] == "p" and options["tags"] == ["t"] and options["mode"] == "offline"
    assert options["config"] == {"seed": 1} and options["dir"] == str(tmp_path)
    assert (scalars, code) == ({"step": 3, "loss": 1.0}, 1)


def test_wandb_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"installed for logger=wandb.*pip install kvsmith\[wandb"):
        Run(None, WandbLogger())
