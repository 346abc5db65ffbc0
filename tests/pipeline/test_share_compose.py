"""Models whose layers share, under codecs, evictions and states: numbers, bytes and bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.eviction.policy import H2O, KeepAll, Lambda
from kvsmith.hf import make_cache, share
from kvsmith.hf.geometry import geometry
from kvsmith.layout import less_parameters
from kvsmith.less.spec import Less
from kvsmith.pipeline import calibrate, evaluate, export
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.config import load
from kvsmith.pipeline.less.record import Layer, sweep
from kvsmith.pipeline.model import ModelConfig, load_model
from kvsmith.pipeline.train import TrainConfig
from kvsmith.pipeline.train import run as train
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec
from tests.golden import golden_parameters
from tests.micro_model import write_model, write_text

OWNER = (0, 0, 2, 2)
CODECS = ("nuq3_o1", "gear2", "kivi2")
POLICIES = [KeepAll(), Lambda(192), H2O(192)]


@pytest.fixture
def model(micro_llama: Callable[..., Any]) -> Any:
    net = micro_llama(layers=4, head_dim=64)
    share(net, OWNER)
    return net


@torch.no_grad()
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
def test_every_part_runs_and_bytes_are_those_of_owners(model: Any, codec: str, policy: Any) -> None:
    shape = geometry(model.config)
    states = (None,) if isinstance(policy, KeepAll) else (None, Less(rank=4))
    for less in states:
        spec = CacheSpec(load_codec(codec), policy, less=less)
        own = golden_parameters(CacheSpec(spec.codec, policy), shape)
        features = less_parameters(spec, shape).items()
        own |= {n: 0.1 * torch.randn(i.shape) for n, i in features}
        cache = make_cache(model, spec, own)
        ids = torch.randint(3, 97, (2, 230))
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert out.shape == (2, 234) and sorted(cache.stores) == [0, 2]
        length = cache.get_seq_length()
        rows = int(spec.codec.key_domain == "pre")
        want = cache_bytes(spec, shape, 2, length, torch.float32, rows, prompt=230)
        assert cache.bytes() == want
        logits = model(ids[:, :1], past_key_values=cache).logits
        assert logits.isfinite().all()


@torch.no_grad()
def test_scores_of_heavy_hitters_sum_over_the_readers(model: Any) -> None:
    plain = TensorCodec(Identity())
    spec = CacheSpec(CodecSpec(plain, plain, sinks=2, recent=8, block_size=8), H2O(96))
    cache, ids = make_cache(model, spec), torch.randint(3, 97, (2, 20))
    model(ids, past_key_values=cache)
    seen: list[Layer] = []
    sweep(model, ids, seen.append)
    assert [layer.index for layer in seen] == [0, 2]
    for layer in seen:
        k = layer.turn(layer.k, layer.rope)
        q = layer.q.unflatten(1, (2, -1))  # [B, H, readers * G, T, D]
        assert q.shape[2] == 2 * 2
        logits = torch.einsum("bhgtd,bhsd->bhgts", q, k) * layer.scores.scale
        future = torch.ones(20, 20, dtype=torch.bool).triu(1)
        want = logits.masked_fill(future, float("-inf")).softmax(-1).sum((2, 3))
        store: Any = cache.stores[layer.index]
        got = store.scores[:, :, store.count :][:, :, :18]
        torch.testing.assert_close(got, want[:, :, 2:], rtol=1e-4, atol=1e-4)


def test_from_a_shared_checkpoint_to_one_bundle_that_runs(
    tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    """calibrate.py, train.py less=..., export.py and evaluate.py; owners are observed once."""
    folder = write_model(tmp_path / "micro", micro_llama, layers=4)
    net, _ = load_model(ModelConfig(str(folder)))
    share(net, OWNER)
    net.save_pretrained(folder)
    write_text(tmp_path / "text.txt")
    text = [
        f"model.path={tmp_path}/micro",
        "data=textfile",
        f"data.path={tmp_path}/text.txt",
        "data.piece_chars=300",
    ]
    more = [
        "samples=4",
        "length=64",
        "batch_size=2",
        "codecs=[nuq3_o1]",
        f"folder={tmp_path}/calibration",
    ]
    calibrate.run(load(calibrate.CalibrateConfig, "calibrate", [*text, *more]), tmp_path / "c")
    layers = {p.stem for p in (tmp_path / "calibration").rglob("statistics/*.safetensors")}
    assert len(layers) == 2, layers
    options = "{rank: 4, trained_ranks: [4], samples: 2, batch_size: 2, steps: 4, held: 2}"
    stack = ["codec=nuq3_o1", "eviction=h2o_pct10", "eviction.budget=56", f"+less={options}"]
    plain = ["codec=none", *stack[1:]]
    cfg = load(
        TrainConfig,
        "train",
        [*text, *plain, "+less.length=128", f"output={tmp_path}/less", f"work={tmp_path}/work"],
    )
    train(cfg, tmp_path / "t")
    (trained,) = (tmp_path / "less").iterdir()
    made = [
        *stack,
        f"trained={trained}",
        f"calibrations={tmp_path}/calibration",
        f"bundles={tmp_path}/bundles",
    ]
    path = export.run(load(export.ExportConfig, "export", [text[0], *made]), tmp_path / "e")
    bundle = kvsmith.load(path)
    assert bundle.manifest.base_model.owner == OWNER
    assert {n.split(".")[1] for n in bundle.parameters} == {"0", "2"}
    asked = [
        *text,
        f"bundle={path}",
        "debug=smoke",
        f"results={tmp_path}/results",
        f"calibrations={tmp_path}/calibration",
    ]
    rows = evaluate.run(load(evaluate.EvaluateConfig, "evaluate", asked), tmp_path / "v")
    assert path.name.rsplit("-", 1)[0] in {row.name for row in rows}
    apart = write_model(tmp_path / "apart", micro_llama, layers=4)
    other, _ = load_model(ModelConfig(str(apart)))
    with pytest.raises(ValueError, match="layer owners") as error:
        bundle.cache(other)
    assert "\n" not in str(error.value)
