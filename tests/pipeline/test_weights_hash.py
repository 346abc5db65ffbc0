"""A calibration is found again by its model's weights, whatever dtype the model computes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvsmith.pipeline import calibrate, export
from kvsmith.pipeline.calibration import weights_hash
from kvsmith.pipeline.config import load
from kvsmith.pipeline.export import ExportConfig
from tests.micro_model import write_model, write_text

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(F32, (F32, BF16)), (BF16, (F32, BF16, F16)), (F16, (F32, BF16, F16))],
)
def test_the_hash_does_not_depend_on_the_dtype(
    stored: torch.dtype,
    computed: tuple[torch.dtype, ...],
    tmp_path: Path,
    micro_llama: Callable[..., Any],
) -> None:
    model = micro_llama()
    with torch.no_grad():
        model.lm_head.weight[:4] *= 1e-6  # below the normal range of float16
    model.to(stored).save_pretrained(tmp_path)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype) for dtype in computed]
    assert [m.dtype for m in loaded] == list(computed)
    assert len({weights_hash(m) for m in loaded}) == 1


@pytest.mark.parametrize("change", [1.01, 0.99, -1.0])
def test_other_weights_have_another_hash(change: float, micro_llama: Callable[..., Any]) -> None:
    model, other, same = micro_llama(), micro_llama(), micro_llama()
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight *= change
    assert weights_hash(model) == weights_hash(same) != weights_hash(other)
    assert weights_hash(model) != weights_hash(micro_llama(seed=1))


def test_export_finds_a_calibration_of_another_dtype(
    tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    write_model(tmp_path / "micro", micro_llama, head_dim=32)
    write_text(tmp_path / "text.txt")
    common = [f"model.path={tmp_path}/micro"]
    given = ["data=textfile", f"data.path={tmp_path}/text.txt", "samples=4", "length=64"]
    given += [f"folder={tmp_path}/calibration", "codecs=[kvquant_nuq4_o1]"]
    cfg = load(calibrate.CalibrateConfig, "calibrate", [*common, *given, "model.dtype=bfloat16"])
    calibrate.run(cfg, tmp_path / "logs")
    places = [f"calibrations={tmp_path}/calibration", f"bundles={tmp_path}/bundles"]
    wanted = [*common, *places, "codec=kvquant_nuq4_o1", "model.dtype=float32"]
    assert export.run(load(ExportConfig, "export", wanted), tmp_path / "logs").is_dir()
