"""What a dry run predicts, beside what the run then takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvsmith.pipeline.calibrate import CalibrateConfig, run
from kvsmith.pipeline.config import load
from kvsmith.pipeline.log import peak_memory
from tests.micro_model import write_model, write_text

FACTOR = 4.0  # of time: the machine may be busy with other things in one of the two runs
MEMORY = 1.5  # of memory: the interpreter's own part is most of it here


def test_a_dry_run_predicts_the_run_and_keeps_nothing(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: Any
) -> None:
    write_model(tmp_path / "micro", micro_llama, layers=4, head_dim=32)
    write_text(tmp_path / "text.txt")
    given = [f"model.path={tmp_path}/micro", "data=textfile", f"data.path={tmp_path}/text.txt"]
    given += ["samples=40", "length=128", "batch_size=4", f"folder={tmp_path}/calibration"]
    given += ["codecs=[kvquant_nuq3_o1]", "checkpoint_seconds=0.5"]
    cfg = load(CalibrateConfig, "calibrate", given)
    run(replace(cfg, dry_run=True), tmp_path / "dry")
    assert "predicted: 0:" in capsys.readouterr().out and not (tmp_path / "calibration").exists()
    predicted = json.loads((tmp_path / "dry" / "prediction.json").read_text())
    began = time.monotonic()
    folder = run(cfg, tmp_path / "log")
    seconds = time.monotonic() - began
    disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert abs(predicted["disk"] - disk) < 0.01 * disk
    assert 1 / FACTOR < predicted["seconds"] / seconds < FACTOR
    assert 1 / MEMORY < predicted["memory"] / peak_memory() < MEMORY
    assert predicted["disk_peak"] > predicted["disk"]
