"""Files that were cut, changed or exchanged, and folders that cannot be written: one line each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvsmith
from kvsmith.pipeline.calibrate import CalibrateConfig
from kvsmith.pipeline.calibrate import run as calibrate
from kvsmith.pipeline.config import load, main_guard
from kvsmith.pipeline.export import ExportConfig
from kvsmith.pipeline.export import run as export
from kvsmith.pipeline.stage import locked
from tests.faults.kills import composed
from tests.micro_model import write_model, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    root = tmp_path_factory.mktemp("damage")
    write_model(root / "micro", micro_llama)
    write_text(root / "text.txt", 20_000)
    return root


@pytest.fixture(scope="module")
def calibration(place: Path) -> Path:
    """A finished calibration, which tests copy."""
    folder = str(place / "calibration")
    return calibrate(replace(composed(place)[0], folder=folder), place / "log")


@pytest.fixture
def own(calibration: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibration, tmp_path / "calibration" / "micro" / calibration.name))


def exporting(place: Path, own: Path) -> ExportConfig:
    root = own.parents[2]
    return replace(composed(place)[1], calibrations=str(own.parents[1]), bundles=str(root / "b"))


def refusal(call: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user would see."""
    capsys.readouterr()
    assert main_guard(call) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def exchange(a: Path, b: Path) -> None:
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def test_statistics_of_exchanged_layers_are_not_used(
    place: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [own / "statistics" / f"layer-00{i}.safetensors" for i in (0, 1)]
    whole = names[0].read_bytes()
    exchange(*names)
    shutil.rmtree(own / "parameters")
    said = refusal(lambda: export(exporting(place, own), own / "log"), capsys)
    assert f"{names[0]}: file must be as written, got changed. Run calibrate.py again" in said
    calibrate(replace(composed(place)[0], folder=str(own.parents[1])), own / "log")
    assert names[0].read_bytes() == whole, "and that mends it"


@pytest.mark.parametrize("name", ["calibration.json", "statistics/layer-001.safetensors"])
def test_a_cut_calibration_is_named_and_mended(
    place: Path, own: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole = (own / name).read_bytes()
    cut(own / name)
    shutil.rmtree(own / "parameters")
    assert name in refusal(lambda: export(exporting(place, own), own / "log"), capsys)
    calibrate(replace(composed(place)[0], folder=str(own.parents[1])), own / "log")
    assert (own / name).read_bytes() == whole


def test_cut_parameters_are_fitted_again(place: Path, calibration: Path, own: Path) -> None:
    name = "parameters/kvquant_nuq3_o1/layer-000.safetensors"
    cut(own / name)
    export(exporting(place, own), own / "log")
    assert (own / name).read_bytes() == (calibration / name).read_bytes()


def test_files_of_two_bundles_do_not_mix(
    place: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = export(exporting(place, own), own / "log")
    other = replace(
        exporting(place, own), codec=load(ExportConfig, "export", ["codec=kvquant_nuq2"]).codec
    )
    second = export(other, own / "log")
    exchange(first / "cache.safetensors", second / "cache.safetensors")
    for bundle in (first, second):
        assert "cache.safetensors" in refusal(lambda b=bundle: kvsmith.load(b), capsys)
    whole = export(exporting(place, own), own / "log")
    assert kvsmith.load(whole).spec.codec == exporting(place, own).codec, "export mends it"


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Without the rights of root, which no permission binds."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("target", ["calibration", "bundles"])
def test_a_folder_that_cannot_be_written_is_named(
    place: Path,
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    make = Path.mkdir

    def guarded(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.is_relative_to(closed):  # parents of it belong to the test's own user
            with ordinary_user():
                return make(path, *args, **kwargs)
        return make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", guarded)
    if target == "calibration":
        cfg = replace(composed(place)[0], folder=str(closed))
        said = refusal(lambda: calibrate(cfg, tmp_path / "log"), capsys)
    else:
        cfg = replace(exporting(place, own), bundles=str(closed))
        said = refusal(lambda: export(cfg, tmp_path / "log"), capsys)
    assert f"{closed}/micro" in said and "must be writable, got (Permission denied)" in said
    assert not os.listdir(closed)


def test_a_second_run_in_the_same_folder_is_told_so(
    place: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = replace(composed(place)[0], folder=str(own.parents[1]))
    with locked(own):
        said = refusal(lambda: calibrate(cfg, own / "log"), capsys)
        assert f"{own}: folder must be free, got in use by another run. Wait" in said
    calibrate(cfg, own / "log")


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_bad_weight_is_named_by_its_layer(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(place / "micro", tmp_path / "micro"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][3, 5] = float(number)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    cfg: CalibrateConfig = composed(place)[0]
    cfg = replace(cfg, folder=str(tmp_path), model=replace(cfg.model, path=str(folder)))
    said = refusal(lambda: calibrate(cfg, tmp_path / "log"), capsys)
    assert "layer 1: activations of values (v) must be finite, got" in said
    assert "got NaN" in said or "got infinity" in said  # infinities of both signs make NaN
