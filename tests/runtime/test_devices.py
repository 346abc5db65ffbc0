"""A model whose layers lie on several devices: the cache of a layer lies where the layer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvsmith.eviction.policy import H2O, Eviction, KeepAll, Lambda
from kvsmith.hf import make_cache, share
from kvsmith.hf.shapes import model_facts
from kvsmith.planner import parts
from kvsmith.plans import Load
from kvsmith.spec import CacheSpec, CodecSpec, TensorCodec, TopK, Uniform
from tests.placed import Devices, Placed, spread

FOUR = TensorCodec(Uniform(bits=4))
CODECS = {
    "pre": CodecSpec(FOUR, FOUR, sinks=2, recent=4, block_size=4),
    "post": CodecSpec(FOUR, FOUR, sinks=2, recent=4, block_size=4, key_domain="post"),
    "outliers": CodecSpec(
        TensorCodec(Uniform(bits=4), outliers=TopK(0.05)), FOUR, sinks=2, recent=4, block_size=4
    ),
}
EVICTIONS: dict[str, Eviction] = {"all": KeepAll(), "lambda": Lambda(24), "h2o": H2O(24)}


CASES = [
    ("pre", "all", False),
    ("pre", "all", True),
    ("pre", "lambda", True),
    ("pre", "h2o", True),
    ("post", "all", True),
    ("outliers", "h2o", False),
]


@pytest.mark.parametrize(("codec", "eviction", "padded"), CASES)
@torch.no_grad()
def test_layers_keep_their_tokens_on_their_own_device(
    micro_llama: Callable[..., Any], codec: str, eviction: str, padded: bool
) -> None:
    ids = torch.randint(3, 97, (2, 48))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    spec = CacheSpec(CODECS[codec], EVICTIONS[eviction], page_size=16)
    model = micro_llama(layers=4)
    wanted, nbytes = steps(model, make_cache(model, spec), ids, mask)
    with Devices():
        devices = spread(model, list(model.model.layers), 2)
        cache = make_cache(model, spec)
        first = devices[0]
        found, spread_bytes = steps(model, cache, ids.to(first), mask.to(first))
    assert [d.index for d in devices] == [0, 0, 1, 1]
    assert isinstance(found, Placed)
    torch.testing.assert_close(found.inner, wanted, rtol=0, atol=1e-4)
    assert spread_bytes == nbytes
    facts = model_facts("micro", model.config)
    load = Load(48, batch=2, dtype=torch.float32, devices=2)
    planned = [p.nbytes(2, 48) - p.weights for p in parts(facts, spec, load)]
    held = [
        sum(
            t.nbytes
            for i, store in cache.stores.items()
            if devices[i].index == d
            for _, t in store.tensors()
        )
        for d in (0, 1)
    ]
    held[0] += cache.positions.nbytes
    assert held == planned or padded, "a plan's rows have one length"
    for layer, store in cache.stores.items():
        kinds = {t.device for _, t in store.tensors()}
        assert kinds == {devices[layer]}, f"layer {layer} on {kinds}"


def steps(
    model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Logits of a prompt and of four single tokens after it, and the cache's bytes."""
    found, start = [], 0
    for end in (44, *range(45, 49)):
        out = model(
            input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache
        )
        found.append(out.logits)
        start = end
    return torch.cat(found, 1), cache.nbytes()


def test_a_layer_that_reads_across_devices_is_refused(micro_llama: Callable[..., Any]) -> None:
    model = micro_llama(layers=4)
    share(model, [0, 0, 2, 2])
    with Devices():
        spread(model, list(model.model.layers), 4)
        with pytest.raises(ValueError, match=r"layer 1: device must be meta:0 as of layer 0, w"):
            make_cache(model, CacheSpec(CODECS["pre"]))
