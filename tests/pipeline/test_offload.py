"""A model whose weights accelerate keeps elsewhere: every step gives what it gives without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import DynamicCache

from kvsmith.pipeline.calibrate import CalibrateConfig, calibrate
from kvsmith.pipeline.calibration import weights_hash
from kvsmith.pipeline.calibration.amax import collect_amax
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.data import PydocsData
from kvsmith.pipeline.evaluation.find import baseline_candidates
from kvsmith.pipeline.evaluation.footprint import footprint
from kvsmith.pipeline.evaluation.forced import losses, reference
from kvsmith.pipeline.evaluation.greedy import generate
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig, input_device
from kvsmith.pipeline.stage import Stop


@pytest.fixture
def pair(micro_llama: Callable[..., Any]) -> tuple[Any, Any]:
    """The same model twice: in memory, and fetched module by module."""
    away = micro_llama(tie_word_embeddings=True)
    cpu_offload(away, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in away.parameters())
    return micro_llama(tie_word_embeddings=True), away


def test_weights_are_the_same_wherever_they_lie(pair: tuple[Any, Any]) -> None:
    here, away = pair
    assert weights_hash(away) == weights_hash(here)
    assert input_device(away) == input_device(here) == torch.device("cpu")
    assert all(p.is_meta for p in away.parameters())


def test_calibration_gives_the_same_bytes(pair: tuple[Any, Any], tmp_path: Path) -> None:
    codecs = {"nuq4_o1": load_codec("nuq4_o1")}
    tokens = torch.randint(3, 97, (4, 40))
    files = []
    for name, model in zip(("here", "away"), pair, strict=True):
        cfg = CalibrateConfig(
            ModelConfig("micro"),
            PydocsData(),
            samples=4,
            length=40,
            batch_size=2,
            folder=str(tmp_path / name),
        )
        with Run(None) as log, Stop() as stop:
            folder = calibrate(cfg, codecs, model, tokens, log, stop)
        found = sorted(p for p in folder.rglob("*.safetensors"))
        files.append({p.relative_to(folder): p.read_bytes() for p in found})
    assert len(files[0]) == 4 and files[0] == files[1]


@torch.no_grad()
def test_evaluation_gives_the_same_figures(pair: tuple[Any, Any]) -> None:
    ids = torch.randint(3, 97, (2, 60))
    found = []
    for model in pair:
        (four,) = baseline_candidates(["int4_token"], model)
        full = reference(model, DynamicCache(config=model.config), ids, 20, 16)
        lost = losses(model, four.cache(model), ids, full, 20, 16)
        text = generate(model, lambda m=model, c=four: c.cache(m), ids[:, :20], 8, 2)
        size = footprint(model, four.cache(model), ids[:1], 256, 2, 3).nbytes
        amax = collect_amax(model, ids, 1)
        found.append((full, lost.nll, lost.kld, text, torch.tensor(size), *amax.values()))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
