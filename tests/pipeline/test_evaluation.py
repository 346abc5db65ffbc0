"""Metrics against hand-made numbers and plain forward passes; evaluate.py on a micro model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvsmith.bundle import Bundle, base_model
from kvsmith.hf import geometry
from kvsmith.pipeline.data import TextfileData
from kvsmith.pipeline.evaluate import EvaluateConfig, gather, run
from kvsmith.pipeline.evaluation.candidate import FULL, Candidate, digest
from kvsmith.pipeline.evaluation.fidelity import paired, quantile, summarise
from kvsmith.pipeline.evaluation.find import baseline_candidates, bundle_candidates
from kvsmith.pipeline.evaluation.footprint import footprint
from kvsmith.pipeline.evaluation.forced import Losses, compare, losses, own_losses, reference
from kvsmith.pipeline.evaluation.greedy import agreement, generate
from kvsmith.pipeline.evaluation.measure import model_identity
from kvsmith.pipeline.evaluation.options import (
    GreedyOptions,
    Options,
    RecallOptions,
    SpeedOptions,
    WindowOptions,
    sizes,
)
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec
from tests.micro_model import write_model, write_text

Micro = Callable[..., Any]


def uniform(bits: int, **windows: int) -> Candidate:
    side = {"quantizer": {"kind": "uniform", "bits": bits}}
    spec = CacheSpec.parse({"codec": {"k": side, "v": side, **windows}})
    return Candidate(f"int{bits}", "baseline", "test", spec)


@pytest.fixture
def model(micro_llama: Micro) -> Any:
    return micro_llama()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 97, (3, 100))


def measured(model: Any, candidate: Candidate, ids: Tensor, prefill: int, chunk: int) -> Losses:
    full = reference(model, FULL.cache(model), ids, prefill, chunk)
    return losses(model, candidate.cache(model), ids, full, prefill, chunk)


# -- perplexity and divergence ---------------------------------------------------------------


def test_losses_of_full_precision_are_those_of_one_forward_pass(model: Any, ids: Tensor) -> None:
    found = measured(model, FULL, ids, prefill=20, chunk=7)
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[:, 20:-1]
    nll = -logp.gather(-1, ids[:, 21:, None])[..., 0]
    # Rounding of a softmax over 97 tokens, added up in another order.
    torch.testing.assert_close(found.nll, nll.double().mean(1), atol=1e-5, rtol=0)
    assert found.kld.shape == (3, 79) and found.same.tolist() == [1, 1, 1]
    own = own_losses(logp, ids, 20)
    torch.testing.assert_close(own.nll, found.nll, atol=1e-5, rtol=0)
    assert own.kld.shape == found.kld.shape and not own.kld.any()


def test_the_cache_that_stores_everything_loses_nothing(model: Any, ids: Tensor) -> None:
    (none,) = baseline_candidates(["none"], model)
    # First-order rounding of float32 log-probabilities, not a divergence.
    assert measured(model, none, ids, 20, 16).kld.max() < 1e-6


def test_fewer_bits_lose_more(model: Any, ids: Tensor) -> None:
    kld = [measured(model, uniform(bits), ids, 20, 16).kld.mean() for bits in (8, 4, 2)]
    assert 0 < 10 * kld[0] < kld[1] and 2 * kld[1] < kld[2]


def test_a_long_chunk_attends_to_nothing_but_itself_exactly(model: Any) -> None:
    # The prefill holds the sinks and whole blocks, and so do the chunks of 32 and, last, of 16.
    ids = torch.randint(2, 97, (3, 101))
    window, bare = uniform(3), uniform(3, recent=0)
    first, second = (measured(model, c, ids, 4 + 48, 32) for c in (window, bare))
    torch.testing.assert_close(first.nll, second.nll, atol=1e-5, rtol=0)
    by_token = measured(model, window, ids, 4 + 48, 1)
    assert by_token.kld.mean() < 0.9 * first.kld.mean()


def test_comparison_of_known_distributions() -> None:
    full = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    other = torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    nll, kld, same = compare(other, full, torch.tensor([[1]]))
    assert nll.item() == pytest.approx(math.log(2))
    assert kld.item() == pytest.approx(0.25 * math.log(2))
    assert not same.item()


def test_figures_of_known_losses() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    full = Losses(torch.tensor([1.0, 3.0]).double(), torch.zeros(2, 2), ones)
    mine = Losses(
        torch.tensor([1.1, 3.3]).double(), torch.tensor([[0.0, 0.2], [0.4, 0.6]]), ones / 2
    )
    found = summarise(mine, full)
    assert (found.windows, found.tokens, found.top1) == (2, 4, 0.5)
    assert found.perplexity == pytest.approx(math.exp(2.2))
    assert found.delta == pytest.approx(math.exp(0.2) - 1)
    assert found.delta_se == pytest.approx(math.exp(0.2) * 0.1)  # differences 0.1 and 0.3
    assert found.kld == pytest.approx(0.3) and found.kld_999 == pytest.approx(0.6)
    assert found.kld_se == pytest.approx(0.2)
    assert paired((1.0,), (0.5,)).se is None


def test_quantile_is_an_observed_value() -> None:
    values = torch.arange(1.0, 1001.0)
    assert quantile(values, 0.999) == 999 and quantile(values, 1.0) == 1000
    assert quantile(torch.tensor([5.0]), 0.999) == 5


# -- greedy agreement ------------------------------------------------------------------------


def test_agreement_of_known_texts() -> None:
    full = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = agreement(full, torch.tensor([[1, 2, 9, 4], [5, 6, 7, 8]]))
    assert (found.match, found.length, found.identical) == (7 / 8, 3.0, 1)


def test_generation_is_that_of_the_model(model: Any, ids: Tensor) -> None:
    found = generate(model, lambda: FULL.cache(model), ids[:, :10], 12, batch=2)
    expected = model.generate(
        ids[:, :10], attention_mask=torch.ones_like(ids[:, :10]), do_sample=False, max_new_tokens=12
    )
    assert found.equal(expected[:, 10:])


def test_generation_runs_past_the_end_of_text(micro_llama: Micro, ids: Tensor) -> None:
    model = micro_llama(eos_token_id=3)
    with torch.no_grad():
        model.lm_head.weight[3] = 5 * model.lm_head.weight.abs().max()  # often the likeliest
    assert generate(model, lambda: FULL.cache(model), ids[:, :10], 40, batch=4).shape == (3, 40)


# -- recall ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3])
def test_footprint_counts_what_the_layout_says(model: Any, ids: Tensor, bits: int) -> None:
    shape = geometry(model.config)
    candidate = uniform(bits)
    found = footprint(model, candidate.cache(model), ids[:1], shape.elements, 2, 3)
    assert candidate.spec is not None
    expected = cache_bytes(candidate.spec, shape, 1, 100, torch.float32)
    # Positions of keys stored before RoPE are counted by the cache as the layout does.
    assert found.nbytes == expected.total
    assert found.bits_per_element == 8 * expected.total / (100 * shape.elements)
    assert (found.length, found.repeats, found.timed_tokens) == (100, 2, 3)
    assert found.tokens_per_second > 0


def test_footprint_of_full_precision(model: Any, ids: Tensor) -> None:
    elements = geometry(model.config).elements
    found = footprint(model, DynamicCache(config=model.config), ids[:1], elements, 2, 3)
    assert found.nbytes == 4 * 100 * elements and found.bits_per_element == 32


# -- options, identity, candidates -----------------------------------------------------------


def test_options_that_do_not_fit_are_refused() -> None:
    fits = Options(WindowOptions(length=256), greedy=GreedyOptions(2, 100, 100))
    assert (sizes(fits, 512).length, sizes(fits, 512).prefill) == (256, 32)
    assert sizes(Options(), 8192).length == 4096
    for options, message in [
        (replace(fits, windows=WindowOptions(length=600)), r"windows.length.*at most 512"),
        (replace(fits, windows=WindowOptions(length=256, prefill=255)), "windows.prefill"),
        (replace(fits, greedy=GreedyOptions(2, 300, 300)), "greedy.*at most 512"),
        (replace(fits, recall=RecallOptions(key_tokens=80)), "recall.key_tokens"),
        (replace(fits, recall=RecallOptions(lengths=(64, 250))), "recall.lengths"),
        (replace(fits, speed=SpeedOptions(20, 20)), "speed"),
    ]:
        with pytest.raises(ValueError, match=message):
            sizes(options, 512)
    for wrong in (
        lambda: WindowOptions(count="some"),
        lambda: WindowOptions(chunk=0),
        lambda: RecallOptions(depths=(1.5,)),
        lambda: RecallOptions(texts=1, depths=(0.5,)),
        lambda: RecallOptions(key_tokens=8, cue_tokens=8),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_identity_follows_content_not_names(model: Any, micro_llama: Micro) -> None:
    a = Candidate("a", "bundle", "x", uniform(4).spec, {"t": torch.ones(2)})
    assert a.identity() == replace(a, name="b", source="y").identity()
    assert a.identity() != replace(a, spec=uniform(3).spec).identity()
    assert a.identity() != replace(a, parameters={"t": torch.tensor([1.0, 1.0001])}).identity()
    assert digest({"t": torch.ones(2)}) != digest({"t": torch.ones(1, 2)})
    before = model_identity(model)
    assert before == model_identity(micro_llama()) != model_identity(micro_llama(seed=1))


def test_baselines_are_found_by_name(model: Any) -> None:
    (found,) = baseline_candidates(["int8_token"], model)
    assert (found.name, found.role, found.source) == (
        "int8_token",
        "baseline",
        "conf/codec/int8_token.yaml",
    )
    with pytest.raises(
        ValueError, match="needs no calibration, got kvquant_nuq3_o1. Run calibrate.py"
    ):
        baseline_candidates(["kvquant_nuq3_o1"], model)
    with pytest.raises(ValueError, match="baselines: codec must be one of.*int4_token"):
        baseline_candidates(["int5"], model)


def write_bundle(folder: Path, model: Any, bits: int) -> Path:
    spec = uniform(bits).spec
    assert spec is not None
    base = base_model(model.config.to_dict(), geometry(model.config), "micro")
    return Bundle.create(spec, {}, base).save_pretrained(folder)


def test_the_newest_fitting_bundle_of_each_codec_is_taken(
    tmp_path: Path, model: Any, micro_llama: Micro
) -> None:
    root = tmp_path / "micro"
    old = write_bundle(root / "int4-00000001", model, 4)
    new = write_bundle(root / "int4-00000002", model, 4)
    other = write_bundle(root / "int4-00000003", micro_llama(layers=1), 4)
    three = write_bundle(root / "int3-00000004", model, 3)
    for second, folder in enumerate([old, new, other, three]):
        os.utime(folder / "manifest.json", (second, second))
    found = bundle_candidates(None, tmp_path, "micro", model)
    assert [(c.name, Path(c.source).name) for c in found] == [
        ("int3", "int3-00000004"),
        ("int4", "int4-00000002"),
    ]
    asked = bundle_candidates([str(old), str(new)], tmp_path, "micro", model)
    assert [c.name for c in asked] == ["int4-00000001", "int4-00000002"]
    with pytest.raises(ValueError, match="int4-00000003.*layer count must be 1, got 2"):
        bundle_candidates([str(other)], tmp_path, "micro", model)
    with pytest.raises(FileNotFoundError, match=r"python calibrate.py model=none.*export.py"):
        bundle_candidates(None, tmp_path, "none", model)
    with pytest.raises(FileNotFoundError, match="bundle: value must be the folder of a bundle"):
        bundle_candidates([str(tmp_path)], tmp_path, "micro", model)


# -- the whole of evaluate.py ----------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, micro_llama: Micro) -> EvaluateConfig:
    folder = write_model(tmp_path / "micro", micro_llama)
    write_bundle(tmp_path / "bundles" / "micro" / "int3-12345678", micro_llama(vocab=257), 3)
    return EvaluateConfig(
        model=ModelConfig(str(folder)),
        data=TextfileData(path=str(write_text(tmp_path / "text.txt")), piece_chars=300),
        bundles=str(tmp_path / "bundles"),
        baselines=("int4_token", "int2_token"),
        measure=Options(
            WindowOptions(count=3, length=96, batch=2),
            GreedyOptions(2, 64, 8),
            RecallOptions(2, (0.2, 0.8), (36, 48), 16, 6),
            SpeedOptions(2, 3),
        ),
        results=str(tmp_path / "results"),
    )


def test_evaluate_writes_table_and_results(
    tmp_path: Path, config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run(config, tmp_path / "first")
    assert [row.name for row in rows] == ["full precision", "int4_token", "int3", "int2_token"]
    assert [row.candidate.role for row in rows] == ["full", "baseline", "bundle", "baseline"]
    full, best = rows[0].found, rows[1].found
    assert full.fidelity.kld == full.fidelity.delta == 0 and full.agreement.match == 1
    assert full.fidelity.tokens == 3 * (96 - 12 - 1) and best.fidelity.kld > 0
    assert full.recall.keys == 8 and full.recall.tokens == 10
    assert full.recall.lengths == (36, 48) and len(full.recall.grid[0]) == 2
    assert full.together.keys == 4 and full.together.lengths == (48,)
    assert full.drift.kld < 1e-6 < best.drift.kld and best.drift.tokens == 8
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == [row.name for row in rows]
    assert results["seed"] == 0 and results["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("python ")
    text = (tmp_path / "first" / "table.md").read_text()
    assert text.count("\n| ") == 10 and "3 windows of 96 tokens" in text and "int3 at" in text
    assert (tmp_path / "first" / "losses.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Candidate, "cache", refuse)
    again = run(config, tmp_path / "second")
    assert [row.found for row in again] == [row.found for row in rows]
    with pytest.raises(AssertionError, match="measured again"):
        run(replace(config, measure=replace(config.measure, seed=1)), tmp_path / "third")


def test_a_baseline_that_the_shape_cannot_hold_is_left_out_and_named(
    config: EvaluateConfig, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = replace(config, bundle="none", baselines=("int4_token_g32", "int4_token"))
    with Run(None) as log:
        assert [c.name for c in gather(cfg, model, log)] == ["int4_token"]
    said = capsys.readouterr().out
    assert "without the baseline int4_token_g32" in said and "divisor of head dim 16" in said


def test_evaluate_refuses_too_little_text(tmp_path: Path, config: EvaluateConfig) -> None:
    windows = replace(config.measure.windows, count=1000)
    with pytest.raises(ValueError, match=r"data: text must be at least 96000 tokens"):
        run(replace(config, measure=replace(config.measure, windows=windows)), tmp_path / "run")
    greedy = replace(config.measure.greedy, prompts=4)
    with pytest.raises(ValueError, match="measure.greedy.prompts: value must be at most the 3"):
        run(replace(config, measure=replace(config.measure, greedy=greedy)), tmp_path / "run")


def test_bundle_is_a_folder_or_a_list(config: EvaluateConfig) -> None:
    assert config.asked is None
    assert replace(config, bundle="none").asked == []
    assert replace(config, bundle="a").asked == ["a"]
    assert replace(config, bundle=["a", "b"]).asked == ["a", "b"]
    with pytest.raises(TypeError, match="bundle: value must be a folder or a list"):
        replace(config, bundle=3)
