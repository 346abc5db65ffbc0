"""The scripts as users run them, one after the other, on a micro model; and the demo."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvsmith
from kvsmith.pipeline import demo
from kvsmith.pipeline.evaluation.footprint import nbytes
from kvsmith.pipeline.evaluation.measure import Measuring
from tests.micro_model import write_model, write_text

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

TEXT = ("data=textfile", "data.path=text.txt", "data.piece_chars=300")
SMALL = ("samples=4", "length=64", "batch_size=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    """A folder that is the user's: a model, a text, and what the scripts leave."""
    folder = tmp_path_factory.mktemp("user")
    write_model(folder / "micro", micro_llama, head_dim=32)
    write_text(folder / "text.txt")
    return folder


def script(place: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), "model.path=micro", *overrides]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)


def calibration(place: Path) -> tuple[str, ...]:
    return (*TEXT, *SMALL, f"folder={place}/calibration")


def evaluation(place: Path) -> tuple[str, ...]:
    folders = (f"bundles={place}/bundles", f"calibrations={place}/calibration")
    return (*TEXT, "debug=smoke", f"results={place}/results", *folders)


def export(place: Path) -> tuple[str, ...]:
    return (f"calibrations={place}/calibration", f"bundles={place}/bundles")


@pytest.fixture(scope="module")
def results(place: Path) -> dict[str, Any]:
    """What evaluate.py wrote after calibrate.py and export.py."""
    steps = [
        ("calibrate.py", calibration(place)),
        ("export.py", ("codec=kvquant_nuq4_o1", *export(place))),
        ("evaluate.py", evaluation(place)),
    ]
    for name, overrides in steps:
        done = script(place, name, *overrides)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
    (found,) = (place / "runs" / "evaluate").glob("*/results.json")
    data: dict[str, Any] = json.loads(found.read_text())
    names = {path.name for path in found.parent.iterdir()}
    assert {"table.md", "losses.png", "codebooks-kvquant_nuq4_o1.png"} <= names
    return data


def test_the_scripts_lead_to_a_table(results: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == {"full precision", "kvquant_nuq4_o1", "int4_token"}
    assert results["command"].startswith("python evaluate.py model.path=micro data=textfile")
    full, ours = rows["full precision"], rows["kvquant_nuq4_o1"]
    assert ours["role"] == "bundle" and full["role"] == "full"
    assert ours["footprint"]["nbytes"] < full["footprint"]["nbytes"]
    assert 0 < ours["fidelity"]["kld"] < 1


def test_a_bundle_generates_in_three_lines(place: Path, results: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "micro")
    tokenizer = AutoTokenizer.from_pretrained(place / "micro")
    (folder,) = (place / "bundles" / "micro").iterdir()
    inputs = tokenizer("apple bread copper delta " * 15, return_tensors="pt")

    cache = kvsmith.load(folder).cache(model)
    with torch.no_grad():
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)

    prompt = inputs["input_ids"].shape[1]
    assert out.shape[1] > prompt and cache.get_seq_length() >= prompt
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(out, past_key_values=dense)
    assert cache.nbytes() < nbytes(dense) / 2


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("evaluate.py", ("bundles=nowhere",), ("nowhere", "python calibrate.py", "export.py")),
        ("evaluate.py", ("measure.window.count=3",), ("measure.window", "measure.windows")),
    ],
)
def test_a_mistake_ends_in_one_line(
    place: Path, name: str, overrides: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = script(place, name, *TEXT, *overrides)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_goes_the_whole_way_once(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    own = place / "demo"
    small = demo.Demo(
        model=("model.path=micro",),
        calibrate=calibration(own)[len(TEXT) :] + TEXT,
        export=export(own),
        evaluate=evaluation(own),
        prompt_tokens=40,
        new_tokens=6,
    )
    demo.run(small, own / "first")
    text = capsys.readouterr().out
    assert all(f"== {step}/4 " in text for step in (1, 2, 3, 4))
    assert "$ python export.py model.path=micro codec=nuq3_o1" in text
    for name in (*demo.CODECS, "int4_token", "prompt, from held-out text:"):
        assert name in text
    assert (own / "first" / "evaluate" / "results.json").is_file()

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Measuring, "_measure", refuse)
    before = {p: p.stat().st_mtime_ns for p in (own / "bundles").rglob("*.safetensors")}
    began = time.monotonic()
    demo.run(small, own / "second")
    assert "unchanged:" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (own / "bundles").rglob("*.safetensors")} == before
    assert len(before) == len(demo.CODECS) and time.monotonic() - began < 60
