"""Tokens against bits: with a trained state as many tokens as fit, and the best of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvsmith
from kvsmith.eviction.policy import H2O
from kvsmith.hf import geometry
from kvsmith.layout import less_parameters
from kvsmith.pipeline.budget import BudgetOptions, levels
from kvsmith.pipeline.budget.kept import DENSE, State, candidates
from kvsmith.pipeline.budget.run import request
from kvsmith.pipeline.calibrate import CalibrateConfig, run
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.config import load
from kvsmith.pipeline.export import describe
from kvsmith.pipeline.less.options import LessTraining
from kvsmith.pipeline.less.result import Source, write_trained
from kvsmith.pipeline.model import ModelConfig, load_config
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec
from tests.micro_model import write_model, write_text


@pytest.fixture
def trained(tmp_path: Path, micro_llama: Callable[..., Any]) -> Path:
    """A model in `m`, and random features as train.py would leave them."""
    path = write_model(tmp_path / "m", micro_llama)
    config = ModelConfig(path=str(path))
    base = describe(config, load_config(config))
    less = LessTraining(rank=2, trained_ranks=(2,), length=128)
    cache = CacheSpec(load_codec("nuq4_o1"), H2O(96, sinks=2))
    shapes = less_parameters(replace(cache, less=less.spec()), base.geometry)
    generator = torch.Generator().manual_seed(3)
    tensors = {n: 0.1 * torch.randn(i.shape, generator=generator) for n, i in shapes.items()}
    source = Source(base, "0" * 64, "float32", "t.txt", "0" * 64, 128, cache, less)
    write_trained(tmp_path / "less", source, {}, {}, (), tensors)
    return tmp_path / "less"


def test_each_level_keeps_as_many_tokens_as_fit(
    trained: Path, micro_llama: Callable[..., Any]
) -> None:
    shape = geometry(micro_llama().config)
    options = levels(load_codec("nuq4_o1"), (2, 4), (0.0,), shape)
    state = State.read(trained, shape)

    def price(spec: CacheSpec) -> int:
        return cache_bytes(spec, shape, 1, 1024, torch.bfloat16).total

    for budget in (30_000, 45_000, 60_000, 400_000):
        found = candidates(options, state, shape, 1024, budget, "fit.bytes")
        assert [k.name for k in found] == [DENSE, "2b", "4b"][3 - len(found) :]
        for one in found:
            codec = options.exact if one.level is None else options.codecs[one.level]
            assert one.nbytes == price(one.spec) <= budget and one.spec.codec == codec
            if one.tokens is None:
                assert one.spec == CacheSpec(codec)
                continue
            assert one.spec.eviction == H2O(one.tokens, sinks=2) and one.spec.less is not None
            assert price(state.cache(codec, one.tokens + 16)) > budget
        # The fewer the bits, the more tokens.
        kept = [1024 if one.tokens is None else one.tokens for one in found]
        assert kept[0] <= kept[-1] <= kept[len(kept) // 2]
    assert all(one.tokens is None for one in found)  # the last budget holds everything
    with pytest.raises(
        ValueError, match=r"fit\.bytes: budget must be at least .* bits \([\d,]+ by"
    ):
        candidates(options, state, shape, 1024, 9_000, "fit.bytes")


def test_the_best_of_equal_bytes_is_written(
    trained: Path, tmp_path: Path, micro_llama: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = [
        f"model.path={tmp_path / 'm'}",
        "data=textfile",
        f"data.path={write_text(tmp_path / 't.txt')}",
        "codecs=[]",
        f"folder={tmp_path / 'c'}",
        f"bundles={tmp_path / 'b'}",
        "samples=4",
        "length=128",
        "fit.windows=2",
        "fit.check=2",
        "fit.widths=[2,4]",
        "fit.fractions=[0.0]",
        "fit.context=128",
        "target_bits=12",
        f"fit.trained={trained}",
    ]
    run(load(CalibrateConfig, "calibrate", options), tmp_path)
    assert "tokens kept against their bits" in capsys.readouterr().out
    data = json.loads((tmp_path / "kept.json").read_text())["caches"]
    means = [sum(one["kld"]) for one in data]
    assert means == sorted(means) and len({one["name"] for one in data}) == len(data) >= 2
    bundle = kvsmith.load(next((tmp_path / "b" / "m").iterdir()))
    assert bundle.manifest.quality["kld_calibration"] == pytest.approx(means[0] / 2)
    kept = getattr(bundle.spec.eviction, "budget", None)
    assert kept == data[0]["tokens"] and (tmp_path / "report.html").is_file()
    model, ids = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "m"),
        torch.randint(3, 97, (1, 100)),
    )
    cache = bundle.cache(model)
    for piece in (ids[:, :70], ids[:, 70:]):
        assert bool(model(input_ids=piece, past_key_values=cache).logits.isfinite().all())


def test_mistakes_are_one_line(trained: Path, micro_llama: Callable[..., Any]) -> None:
    shape = geometry(micro_llama().config)
    options = BudgetOptions(trained=str(trained), context=256)
    with pytest.raises(ValueError, match="curve: value with fit.trained must be false, with a bud"):
        request(options, None, True, shape)
    with pytest.raises(ValueError, match="fit.context: tokens must be at most .* 128 where tokens"):
        options.window(128)
    with pytest.raises(FileNotFoundError, match=r"less\.json: file must be present"):
        request(replace(options, trained=str(trained / "no")), 9, False, shape)
    with pytest.raises(ValueError, match="fit.trained: state must be trained for this model, got"):
        request(options, 9, False, geometry(micro_llama(layers=3).config))
