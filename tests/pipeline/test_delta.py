"""export.py delta=...: a trained model as what it changed in the model that it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvsmith
from kvsmith.hf import geometry, share
from kvsmith.pipeline import export
from kvsmith.pipeline.calibration import weights_hash
from kvsmith.pipeline.config import load
from kvsmith.pipeline.export import ExportConfig
from kvsmith.pipeline.model import ModelConfig, load_config, load_model
from kvsmith.strict import to_dict
from tests.golden import contents
from tests.micro_model import write_model

OWNER = [0, 0, 2, 2]
CHANGED = ("model.layers.0.self_attn.v_proj.weight", "model.layers.3.self_attn.q_proj.weight")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    """A folder with a model in float32, and one trained from it as train.py leaves it."""
    root = tmp_path_factory.mktemp("delta")
    write_model(root / "base", micro_llama, layers=4)
    shutil.copytree(root / "base", root / "trained")
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    with torch.no_grad():
        for name in CHANGED:
            model.get_parameter(name).add_(0.25)
    share(model.to(torch.bfloat16), OWNER)
    model.save_pretrained(root / "trained")
    record = {"model": {"path": f"{root}/base", "name": "micro"}, "owner": OWNER}
    (root / "trained" / "training.json").write_text(json.dumps(record))
    return root


def exported(place: Path, *given: str, model: str = "trained") -> Path:
    common = [f"model.path={place}/{model}", "codec=none", f"bundles={place}/bundles"]
    return export.run(load(ExportConfig, "export", [*common, *given]), place / "logs")


def test_base_and_delta_are_the_trained_model(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(place, "delta=auto")
    assert "delta: 2 of" in capsys.readouterr().out
    bundle = kvsmith.load(path)
    assert tuple(bundle.weights) == CHANGED  # nothing of the readers' keys and values
    assert bundle.manifest.delta is not None and bundle.manifest.delta.id == "micro"
    before = contents(path)
    assert exported(place, "delta=auto") == path and contents(path) == before
    named = exported(place, f"delta={place}/base")
    assert kvsmith.load(named).manifest.delta.id == "base" and named != path  # type: ignore[union-attr]
    for dtype in (torch.float32, torch.bfloat16):
        base, trained = (
            AutoModelForCausalLM.from_pretrained(place / name, dtype=dtype)
            for name in ("base", "trained")
        )
        bundle.apply(base)
        assert base.config.kv_owner == OWNER
        for (name, a), (_, b) in zip(
            base.named_parameters(), trained.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), name


def test_scripts_take_base_and_delta_as_one_model(place: Path) -> None:
    path = exported(place, "delta=auto")
    cfg, whole = (
        ModelConfig(f"{place}/{name}", dtype="bfloat16", delta=delta)
        for name, delta in (("base", str(path)), ("trained", None))
    )
    model, want = load_model(cfg)[0], load_model(whole)[0]
    assert weights_hash(model) == weights_hash(want)
    assert geometry(load_config(cfg)) == geometry(model.config) == geometry(want.config)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, want(ids).logits)
    assert "delta" not in to_dict(whole) and to_dict(cfg)["delta"] == str(path)
    plain = exported(place, model="trained")
    with pytest.raises(ValueError, match=r"model\.delta"):
        load_config(replace(cfg, delta=str(plain)))


def test_refusals(place: Path, micro_llama: Callable[..., Any]) -> None:
    write_model(place / "other", micro_llama, layers=4, kv_heads=1)
    for given, words in (
        ([f"delta={place}/other"], "kv_heads"),
        ([f"delta={place}/trained"], "layer owners"),
        (["delta=nowhere/at all"], "nowhere"),
        (["delta=auto", "format=compressed-tensors"], "delta: value must be null"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            exported(place, *given)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="delta=FOLDER"):
        exported(place, "delta=auto", model="base")
    (place / "base" / "training.json").write_text("{}")
    with pytest.raises(ValueError, match="delta=FOLDER"):
        exported(place, "delta=auto", model="base")
