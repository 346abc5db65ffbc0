"""Calibration of a micro model: what is observed, what survives a kill, what is refused."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsmith.hf import make_cache
from kvsmith.pipeline import stage as stage_module
from kvsmith.pipeline.calibrate import CalibrateConfig, calibrate, check_context, run, smoke
from kvsmith.pipeline.calibration import (
    check_model,
    find_calibration,
    parameters_for,
    read_record,
    read_statistics,
)
from kvsmith.pipeline.codecs import codec_name, codec_names, load_codec
from kvsmith.pipeline.config import load
from kvsmith.pipeline.data import PydocsData, TextfileData
from kvsmith.pipeline.fit import fit_codec
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.stage import Stop, read_safetensors
from kvsmith.pipeline.taps import Taps, frozen
from kvsmith.pipeline.training.tokenizer import train_tokenizer
from kvsmith.spec import CacheSpec
from tests.oracles import kvquant as oracle

LAYERS, SAMPLES, LENGTH, SINKS = 2, 7, 24, 4
CODECS = ("kvquant_nuq3_o1", "kvquant_nuq2")


@pytest.fixture
def model(micro_llama: Callable[..., Any]) -> Any:
    return micro_llama(layers=LAYERS)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 97, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cfg(tmp_path: Path) -> CalibrateConfig:
    return CalibrateConfig(
        model=ModelConfig("owner/micro", name="micro"),
        data=PydocsData(),
        codecs=CODECS,
        samples=SAMPLES,
        length=LENGTH,
        batch_size=2,
        shards=2,
        sinks=SINKS,
        checkpoint_seconds=0.0,
        folder=str(tmp_path / "calibration"),
    )


def go(cfg: CalibrateConfig, model: Any, tokens: Tensor) -> Path:
    codecs = {name: load_codec(name) for name in cfg.codecs}
    with Run(None) as log, Stop() as stop:
        return calibrate(cfg, codecs, model, tokens, log, stop)


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def _keep(
    outputs: dict[tuple[int, str], Tensor], key: tuple[int, str], _m: Any, _a: Any, out: Tensor
) -> None:
    out.retain_grad()
    outputs[key] = out


def projections(model: Any, tokens: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Outputs of k_proj and v_proj and their gradients, a sequence at a time, by plain hooks."""
    held: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}
    for row in tokens:
        outputs: dict[tuple[int, str], Tensor] = {}
        hooks = []
        for i, layer in enumerate(model.model.layers):
            for name in ("k", "v"):
                module = getattr(layer.self_attn, f"{name}_proj")

                hooks.append(module.register_forward_hook(partial(_keep, outputs, (i, name))))
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        model.zero_grad()
        for hook in hooks:
            hook.remove()
        for key, out in outputs.items():
            assert out.grad is not None
            held.setdefault(key, []).append((out[0, SINKS:].detach(), out.grad[0, SINKS:] ** 2))
    return {
        k: (torch.cat([a for a, _ in v]), torch.cat([b for _, b in v])) for k, v in held.items()
    }


def test_taps_see_projections_and_their_squared_gradients(model: Any, tokens: Tensor) -> None:
    expected = projections(model, tokens)
    seen: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = {}

    def consume(layer: int, name: str, values: Tensor, fisher: Tensor | None) -> None:
        assert fisher is not None
        seen.setdefault((layer, name), []).append((values.flatten(1), fisher.flatten(1)))

    with frozen(model):
        taps = Taps(model, consume, SINKS, fisher=True)
        for batch in tokens.split(3):  # 3, 3 and 1: Fisher does not depend on the batch
            taps.run(batch)
    assert seen.keys() == expected.keys()
    for key, (values, fisher) in expected.items():
        torch.testing.assert_close(torch.cat([a for a, _ in seen[key]]), values)
        got = torch.cat([b for _, b in seen[key]])
        torch.testing.assert_close(got, fisher, rtol=1e-3, atol=1e-6 * float(fisher.max()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_statistics_and_parameters_are_those_of_the_published_method(
    cfg: CalibrateConfig, model: Any, tokens: Tensor
) -> None:
    expected = projections(model, tokens)
    folder = go(cfg, model, tokens)
    record = read_record(folder)
    assert record.source.tokens_hash and record.source.plan.total == SAMPLES * (LENGTH - SINKS)
    for layer in range(LAYERS):
        stored = read_safetensors(
            folder / "parameters" / "kvquant_nuq3_o1" / f"layer-{layer:03d}.safetensors"
        )
        keys = expected[layer, "k"][0].numpy()
        scale, zero = oracle.affine(*oracle.channel_range(keys, 0.01))
        torch.testing.assert_close(
            stored["k.scale"].flatten().double(), torch.from_numpy(scale), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            stored["k.zero"].flatten().double(), torch.from_numpy(zero), rtol=1e-4, atol=1e-5
        )
        assert stored["k.lut"].shape == stored["v.lut"].shape == (8,)
        stats = read_statistics(folder, record, layer)
        refitted = fit_codec(stats, load_codec("kvquant_nuq3_o1"))
        assert all(torch.equal(refitted[name], tensor) for name, tensor in stored.items())


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def kill_at_write(monkeypatch: pytest.MonkeyPatch, number: int, after: bool) -> None:
    """Die before or after the `number`-th file gets its name."""
    rename, calls = os.replace, iter(range(10_000))

    def replacement(source: Any, target: Any) -> None:
        dies = next(calls) == number
        if dies and not after:
            raise Killed
        rename(source, target)
        if dies:
            raise Killed

    monkeypatch.setattr(stage_module.os, "replace", replacement)


@pytest.mark.parametrize("seed", range(6))
def test_killed_anywhere_it_ends_in_the_same_bytes(
    cfg: CalibrateConfig,
    model: Any,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    seed: int,
) -> None:
    whole = files(go(replace(cfg, folder=str(tmp_path / "whole")), model, tokens))
    generator = random.Random(seed)
    kills = 0
    for _ in range(2):  # two kills one after another, then to the end
        with monkeypatch.context() as patch:
            kill_at_write(patch, generator.randrange(12), after=generator.random() < 0.5)
            try:
                go(cfg, model, tokens)
            except Killed:
                kills += 1
    folder = go(cfg, model, tokens)
    assert kills == 2
    assert files(folder) == whole


def test_sigterm_leaves_a_checkpoint_and_143(
    cfg: CalibrateConfig,
    model: Any,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = files(go(replace(cfg, folder=str(tmp_path / "whole")), model, tokens))
    patient = replace(cfg, checkpoint_seconds=1e9)
    ran: list[int] = []
    original = Taps.run

    def counted(self: Taps, batch: Tensor) -> float:
        ran.append(len(batch))
        if len(ran) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Taps, "run", counted)
    with pytest.raises(SystemExit) as leaving:
        go(patient, model, tokens)
    assert leaving.value.code == 143 and ran == [2, 2]
    assert files(go(patient, model, tokens)) == whole
    assert ran == [2, 2, 2, 2, 1], "the finished batch is not run again, the interrupted one is"
    go(patient, model, tokens)
    assert len(ran) == 5, "and nothing is, once all is finished"


def test_a_codec_that_was_not_listed_is_fitted_without_the_model(
    cfg: CalibrateConfig, model: Any, tokens: Tensor
) -> None:
    folder = go(cfg, model, tokens)
    for name in ("kvquant_nuq4_o1", "kvquant_int2_o1", "kvquant_nf3_o1", "kvquant_nuq2_o1_qnorm"):
        codec = load_codec(name)
        parameters = parameters_for(folder, codec)
        cache = make_cache(model, CacheSpec(codec), parameters)
        with torch.no_grad():
            logits = model(input_ids=tokens[:1].repeat(1, 3), past_key_values=cache).logits
        assert bool(logits.isfinite().all())
        again = parameters_for(folder, codec)
        assert all(torch.equal(tensor, again[key]) for key, tensor in parameters.items())
    assert parameters_for(folder, load_codec("int4_token")) == {}
    changed = replace(load_codec("kvquant_nuq3_o1"), sinks=0)
    assert codec_name(changed).startswith("custom-")
    with pytest.raises(ValueError, match=r"sinks: value must be 4 as calibrated, got 0\. Calib"):
        parameters_for(folder, changed)


def test_every_codec_of_conf_is_valid_and_knows_its_name() -> None:
    specs = {name: load_codec(name) for name in codec_names()}
    assert len(set(specs.values())) == len(specs), "two files describe the same codec"
    for name, spec in specs.items():
        CacheSpec(spec)
        assert codec_name(spec) == name
        loaded = load(CalibrateConfig, "calibrate", [f"codec={name}"])
        assert loaded.codec == spec
    with pytest.raises(ValueError, match="Did you mean kvquant_nuq4_o1 or"):
        load_codec("kvquant_nuq4_01")


def test_other_weights_are_another_calibration(
    cfg: CalibrateConfig, model: Any, tokens: Tensor, micro_llama: Callable[..., Any]
) -> None:
    folder = go(cfg, model, tokens)
    root = Path(str(cfg.folder))
    record = read_record(folder)
    check_model(record, cfg.model, model, folder)
    assert find_calibration(root, cfg.model, model) == folder
    other = micro_llama(layers=LAYERS, seed=5)
    with pytest.raises(ValueError, match="weights of the model must be .* as calibrated"):
        check_model(record, cfg.model, other, folder)
    with pytest.raises(FileNotFoundError, match="got 1 of other weights"):
        find_calibration(root, cfg.model, other)
    deeper = micro_llama(layers=LAYERS + 1)
    with pytest.raises(ValueError, match="layer count must be 2, got 3"):
        check_model(record, cfg.model, deeper, folder)
    assert go(cfg, other, tokens) != folder


@pytest.mark.parametrize(("part", "word"), [("k_proj", "keys"), ("v_proj", "values")])
def test_nan_activations_name_layer_and_tensor(
    cfg: CalibrateConfig, model: Any, tokens: Tensor, part: str, word: str
) -> None:
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, part).weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=rf"layer 1: activations of {word} \(.\) .*got NaN"):
        go(cfg, model, tokens)


def test_infinite_gradients_name_layer_and_tensor(
    cfg: CalibrateConfig, model: Any, tokens: Tensor
) -> None:
    def poison(_module: Any, _args: Any, out: Tensor) -> None:
        out.register_hook(lambda gradient: gradient * float("inf"))

    model.model.layers[0].self_attn.o_proj.register_forward_hook(poison)
    with pytest.raises(ValueError, match=r"layer 0: gradients of .*must be finite"):
        go(cfg, model, tokens)


def test_without_fisher_there_is_no_backward_pass(
    cfg: CalibrateConfig, model: Any, tokens: Tensor
) -> None:
    plain = replace(cfg, fisher=False, sensitivity="none")
    with_fisher = replace(cfg, sensitivity="none")
    stored = [
        parameters_for(go(c, model, tokens), load_codec("kvquant_nuq2"), sensitivity="none")
        for c in (plain, with_fisher)
    ]
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    with pytest.raises(ValueError, match="sensitivity: value must be none with fisher=false"):
        replace(cfg, fisher=False)


def test_bad_settings_are_one_line_each(cfg: CalibrateConfig, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length: tokens of a sequence must be at least"):
        replace(cfg, length=5)
    with pytest.raises(ValueError, match=r"max_fraction: share of elements must be in \[0, 0.5\)"):
        replace(cfg, max_fraction=0.5)
    with pytest.raises(ValueError, match=r"codecs\[0\]: codec must be one of .* got 'nuq9'"):
        run(replace(cfg, codecs=("nuq9",)), tmp_path)
    with pytest.raises(ValueError, match="at most the model's context of 512, got 513"):
        check_context(model, 513)
    low = replace(cfg, max_fraction=0.005)
    with pytest.raises(ValueError, match=r"at most max_fraction = 0\.005, got 0\.01"):
        go(low, model, torch.zeros(SAMPLES, LENGTH, dtype=torch.int64))
    with pytest.raises(FileNotFoundError, match=r"calibration\.json: file must be present"):
        parameters_for(tmp_path, load_codec("kvquant_nuq3"))


@pytest.fixture
def words(tmp_path: Path, micro_llama: Callable[..., Any]) -> CalibrateConfig:
    """A model folder with a tokenizer, and a file of text."""
    text = [f"line {i} of {i * 7919 % 1000} words, {'and so on ' * (i % 5)}" for i in range(400)]
    micro_llama(vocab=300).save_pretrained(tmp_path / "model")
    train_tokenizer(text, 300, 512).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(text))
    return CalibrateConfig(
        model=ModelConfig(str(tmp_path / "model"), device="cpu"),
        data=TextfileData(path=str(tmp_path / "text.txt"), piece_chars=60),
        codecs=CODECS,
        samples=3,
        length=32,
        folder=str(tmp_path / "out"),
    )


def test_run_goes_from_files_to_parameters(
    words: CalibrateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(words, tmp_path / "log")
    assert folder.parent == tmp_path / "out" / "model"
    record = read_record(folder)
    assert (record.source.dataset, record.source.samples) == ("text.txt", 3)
    assert record.source.base_model.id == "model" and record.loss > 0
    first, before = capsys.readouterr().out, files(folder)
    assert "kvquant_nuq3_o1 k" in first and "collected before" not in first
    assert run(words, tmp_path / "log") == folder and files(folder) == before
    assert "statistics of 96 tokens were collected before" in capsys.readouterr().out


def test_too_little_text_says_how_much_there_is(words: CalibrateConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"at least 51200 tokens \(400 x 128\), got \d+ in the cal"
    ):
        run(replace(words, samples=400, length=128), tmp_path / "log")


def test_smoke_is_small_and_stays_away_from_real_calibrations(tmp_path: Path) -> None:
    cfg = load(CalibrateConfig, "calibrate", ["debug=smoke"])
    assert cfg.debug.smoke and cfg.folder is None
    small = smoke(cfg, tmp_path)
    assert small.samples * small.length <= 512 and Path(str(small.folder)).parent == tmp_path
    assert smoke(replace(cfg, samples=1, folder="elsewhere"), tmp_path).folder == "elsewhere"
