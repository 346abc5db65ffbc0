"""LESS states: all layers trained at once, and on modules that attend by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.hf import make_cache
from kvsmith.less.spec import Less
from kvsmith.pipeline.data import TextfileData
from kvsmith.pipeline.export import ExportConfig, make_bundle
from kvsmith.pipeline.less.joint import Joint
from kvsmith.pipeline.less.options import H2OChoice
from kvsmith.pipeline.less.result import RECORD, read_trained
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig, load_model
from tests.micro_model import write_model, write_text
from tests.pipeline.test_less import CODEC, FEATURES, SMALL, trained, world
from tests.runtime.models import run

__all__ = ["world"]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: f.kind)
def test_all_layers_at_once(
    features: Any,
    world: tuple[ModelConfig, TextfileData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss is the divergence of decoding token by token; steps lower it, and resume exactly."""
    more = {"trained_ranks": (4,), "steps": 2, "samples": 2, "joint_steps": 8, "joint_lr": 0.1}
    cfg = replace(SMALL, features=features, **more)
    losses: list[float] = []
    step = Joint._step

    def noted(self: Joint, number: int, ids: torch.Tensor) -> float:
        if number == 0:
            losses.append(_decoded_divergence(self, ids))
        if number == 4 and len(losses) == 5:
            losses.append(0.0)
            raise _Killed
        losses.append(step(self, number, ids))
        return losses[-1]

    monkeypatch.setattr(Joint, "_step", noted)
    with pytest.raises(_Killed):
        trained(world, tmp_path / "a", cfg)
    resumed = trained(world, tmp_path / "a", cfg)
    losses.remove(0.0)
    decoded, first, *_, last = losses
    assert first == pytest.approx(decoded, abs=1e-4) and last < 0.99 * first
    monkeypatch.undo()
    whole = trained(world, tmp_path / "b", cfg)
    for name in ("less.safetensors", RECORD):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def _decoded_divergence(joint: Any, ids: torch.Tensor) -> float:
    """KL of the features that a joint training begins with, through the runtime's cache."""
    training = joint.training
    less = Less(training.cfg.features, rank=4, store_dtype="float32")
    own = {n: t.detach().clone() for n, t in joint.values.items()}
    cache = make_cache(training.model, replace(training.spec, less=less), own)
    got = run(training.model, ids, cache, (1,) * ids.shape[1], None)[:, 24:].log_softmax(-1)
    with torch.no_grad():
        full = training.model(ids).logits[:, 24:].log_softmax(-1)
    return float((full.exp() * (full - got)).sum(-1).mean())


@pytest.mark.parametrize("alibi", [False, True], ids=["rope", "alibi"])
def test_falcon_trains_and_decodes(alibi: bool, tmp_path: Path) -> None:
    """Multi-query modules that attend by themselves; states lower their divergence in use."""
    from transformers import FalconConfig, FalconForCausalLM

    def micro_falcon(vocab: int, **more: Any) -> Any:
        torch.manual_seed(0)
        config = FalconConfig(
            vocab_size=vocab, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            multi_query=True, alibi=alibi, initializer_range=0.2, **more,
        )  # fmt: skip
        return FalconForCausalLM(config).eval()

    folder = write_model(tmp_path / "micro", micro_falcon, max_position_embeddings=96)
    model = ModelConfig(str(folder))
    world = (model, TextfileData(path=str(write_text(tmp_path / "text.txt"))))
    cfg = replace(SMALL, steps=16, lr=0.1)
    found = trained(world, tmp_path, cfg)
    record = read_trained(found)[0]
    assert all(by["4"] < 0.95 for by in record.left.values())
    none = str(tmp_path / "none")
    export = ExportConfig(
        model, CODEC, H2OChoice(budget=24), cfg, trained=str(found), trainings=none
    )
    bundle, _ = make_bundle(export, Run(None))
    loaded = bundle.save_pretrained(tmp_path / "bundle")
    falcon, _ = load_model(model)
    cache = kvsmith.load(loaded).cache(falcon)
    out = falcon.generate(
        torch.randint(0, 200, (2, 60)), past_key_values=cache, max_new_tokens=10, do_sample=False
    )
    assert out.shape == (2, 70) and cache.bytes().state == 2 * 2 * 4 * (4 + 2 * 16)
    with pytest.raises(ValueError, match="attention: call must be scaled_dot_product_attention"):
        falcon(out, past_key_values=kvsmith.load(loaded).cache(falcon), output_attentions=True)
