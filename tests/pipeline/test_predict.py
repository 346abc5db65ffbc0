"""What a dry run predicts, beside what the run then takes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvsmith.pipeline.calibrate import CalibrateConfig, run
from kvsmith.pipeline.config import load
from kvsmith.pipeline.evaluate import EvaluateConfig
from kvsmith.pipeline.evaluate import run as evaluate
from kvsmith.pipeline.evaluation.options import Options, RecallOptions, WindowOptions
from kvsmith.pipeline.evaluation.predict import factors, sample
from kvsmith.pipeline.log import peak_memory
from kvsmith.pipeline.train import TrainConfig
from kvsmith.pipeline.train import run as train
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


def test_an_evaluation_is_predicted_and_nothing_is_kept(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: Any
) -> None:
    write_model(tmp_path / "micro", micro_llama)
    write_text(tmp_path / "text.txt", 20_000)
    given = [f"model.path={tmp_path}/micro", "data=textfile", f"data.path={tmp_path}/text.txt"]
    given += ["bundle=none", "baselines=[int4_token]", f"results={tmp_path}/results"]
    sizes = ["windows.count=8", "windows.length=128", "windows.batch=4", "greedy.prompts=4"]
    sizes += ["greedy.prompt_tokens=32", "greedy.new_tokens=32", "recall.texts=4"]
    sizes += ["recall.key_tokens=12", "recall.cue_tokens=4", "speed.tokens=4"]
    cfg = load(EvaluateConfig, "evaluate", [*given, *(f"measure.{s}" for s in sizes)])
    assert evaluate(replace(cfg, dry_run=True), tmp_path / "dry") == []
    said = capsys.readouterr().out
    assert "predicted: 0:" in said and "int4_token" in said
    assert not (tmp_path / "results").exists() and len(list((tmp_path / "dry").iterdir())) <= 4
    predicted = json.loads((tmp_path / "dry" / "prediction.json").read_text())
    began = time.monotonic()
    evaluate(cfg, tmp_path / "log")
    seconds = time.monotonic() - began
    # Rows side by side cost less than one after the other.
    assert 1 / FACTOR < predicted["seconds"] / seconds < 2 * FACTOR
    assert 1 / MEMORY < predicted["memory"] / peak_memory() < MEMORY
    assert predicted["disk"] > 1000
    short = replace(cfg, measure=replace(cfg.measure, windows=WindowOptions(10**6, 128)))
    with pytest.raises(ValueError, match="at least 128000000 tokens"):
        evaluate(replace(short, dry_run=True), tmp_path / "dry")


def test_what_the_sample_leaves_out_is_multiplied() -> None:
    whole = Options(recall=RecallOptions(texts=3, depths=(0.1, 0.5, 0.9)))
    assert factors(whole, 16) == (1.0, 16.0, 64.0, 64.0, 4.5, 3.0, 1.0, 1.0)
    few = sample(whole)
    assert (few.windows.count, few.greedy.new_tokens, few.speed.repeats) == (1, 16, 1)
    assert factors(few, 1) == (1.0,) * 8


@pytest.mark.parametrize("kind", ["cla=factor2", "experiment=pretrain_tiny"])
def test_a_training_is_predicted_and_nothing_is_kept(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: Any, kind: str
) -> None:
    write_model(tmp_path / "micro", micro_llama)
    write_text(tmp_path / "text.txt", 30_000)
    given = [f"model.path={tmp_path}/micro", "data=textfile", f"data.path={tmp_path}/text.txt"]
    given += [kind, f"output={tmp_path}/out", f"work={tmp_path}/work", "data.piece_chars=100"]
    where = "uptrain" if kind.startswith("cla") else "pretrain"
    length = "[{share: 0.5, length: 32}, {share: 0.5, length: 64}]"
    sizes = ["tokens=12800", "batch_tokens=128", f"phases={length}", "compile=false"]
    sizes += ["warmup_steps=1", "checkpoint_steps=50", "eval_steps=50", "eval_windows=2"]
    given += [f"{where}.optim.{s}" for s in sizes]
    if where == "uptrain":
        given.append("uptrain.fit_windows=2")
    else:
        arch = ["vocab_size=300", "hidden_size=32", "layers=2", "heads=2", "kv_heads=1"]
        arch += ["head_dim=16", "mlp_size=64", "context=64"]
        given += [f"pretrain.arch.{s}" for s in arch]
    cfg = load(TrainConfig, "train", given)
    train(replace(cfg, dry_run=True), tmp_path / "dry")
    assert "predicted: 0:" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"micro", "text.txt", "dry"}
    predicted = json.loads((tmp_path / "dry" / "prediction.json").read_text())
    began = time.monotonic()
    train(cfg, tmp_path / "log")
    seconds = time.monotonic() - began
    assert 1 / FACTOR < predicted["seconds"] / seconds < FACTOR
    disk = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert 0.9 * disk < predicted["disk"] < 1.1 * disk < predicted["disk_peak"]
    assert 1 / MEMORY < predicted["memory"] / peak_memory() < MEMORY
