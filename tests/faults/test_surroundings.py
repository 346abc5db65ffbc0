"""Clocks that go backwards, foreign locales, time zones and folder names, and a slow batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvsmith.pipeline import calibrate, export
from kvsmith.pipeline.config import check_names
from tests.faults.kills import composed, contents
from tests.micro_model import write_model, write_text

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("samples=4", "length=32", "batch_size=2", "codecs=[kvquant_nuq2]", "data=textfile")
SURROUNDINGS = {
    # Python takes UTF-8 for C by itself, for another locale of one byte a letter it does not.
    "zwei W\u00f6rter \u6587": {"LC_ALL": "C", "TZ": "Asia/Kathmandu"},
    "two words": {"LC_ALL": "tr_TR.ISO-8859-9", "PYTHONUTF8": "0", "TZ": "America/St_Johns"},
}


@pytest.mark.slow
def test_locale_time_zone_and_folder_name_change_no_byte(
    tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    found = []
    for name, variables in SURROUNDINGS.items():
        place = tmp_path / name
        place.mkdir()
        write_model(place / "micro", micro_llama)
        write_text(place / "text.txt", 20_000)
        folders = (f"folder='{place}/calibration'", f"data.path='{place}/text.txt'")
        bundles = (f"calibrations='{place}/calibration'", f"bundles='{place}/bundles'")
        script(place, variables, "calibrate.py", *SETTINGS, *folders)
        script(place, variables, "export.py", "codec=kvquant_nuq2", *bundles)
        found.append(contents(place))
    assert found[0] and found[0] == found[1]


def test_names_that_the_locale_cannot_spell_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_names()
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "folder=/w\udcc3\udcb6rter"])
    with pytest.raises(ValueError, match=r"encoding of file names must be UTF-8, got .* Set PYTHO"):
        check_names()


def script(place: Path, variables: dict[str, str], name: str, *given: str) -> None:
    taken = ("PYTHONUTF8", "PYTHONIOENCODING", "LANG")
    environment = {k: v for k, v in os.environ.items() if k not in taken} | variables
    model = "model.path=micro"
    log = f"hydra.run.dir='{place}/log'"
    command = [sys.executable, str(ROOT / name), model, log, *given]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-2000:]


@pytest.fixture
def place(tmp_path: Path, micro_llama: Callable[..., Any]) -> Path:
    write_model(tmp_path / "micro", micro_llama, layers=8)
    write_text(tmp_path / "text.txt", 20_000)
    return tmp_path


def test_a_clock_that_goes_backwards_changes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, clock in (("forward", None), ("backward", count(4e9, -5000.0))):
        work = place / name
        if clock is not None:
            monkeypatch.setattr(time, "time", lambda clock=clock: next(clock))
        cfg, exported = composed(place)
        calibrate.run(replace(cfg, folder=str(work / "calibration")), work / "log")
        for path in (work / "calibration").rglob("*"):
            if clock is not None:
                os.utime(path, (2**32, 2**32))  # in 2106
        exported = replace(exported, calibrations=str(work / "calibration"))
        export.run(replace(exported, bundles=str(work / "bundles")), work / "log")
    assert contents(place / "forward") == contents(place / "backward")


def test_sigterm_leaves_a_slow_batch_within_a_layer(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch takes 8 x 0.4 s and more; leaving takes one layer and the writing of a checkpoint."""
    pause = 0.4
    cfg = replace(composed(place)[0], folder=str(place / "calibration"), checkpoint_seconds=1e9)
    load_model = calibrate.load_model

    def slow(*args: Any) -> Any:
        model, tokenizer = load_model(*args)
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda *_: time.sleep(pause))
        return model, tokenizer

    monkeypatch.setattr(calibrate, "load_model", slow)
    asked: list[float] = []

    def ask() -> None:
        if not list(place.glob("calibration/*/*/.lock")):
            again()
            return
        time.sleep(1.5 * pause)
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def again() -> None:
        threading.Timer(0.02, ask).start()

    again()
    with pytest.raises(SystemExit) as leaving:
        calibrate.run(cfg, place / "log")
    took = time.monotonic() - asked[0]
    assert leaving.value.code == 143 and list(place.rglob("checkpoint.json"))
    assert took < 5 * pause, f"{took:.2f} s; the rest of the batch would have taken 2.4 s"
