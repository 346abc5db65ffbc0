"""RoPE whose frequencies change as the text grows, and layers that get copies of cos and sin."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from kvsmith.hf import make_cache
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec
from tests.runtime.models import _SHAPE, build, run

NOTHING = CacheSpec(CodecSpec(TensorCodec(Identity()), TensorCodec(Identity())))
SWITCH = 64
DYNAMIC = {
    "max_position_embeddings": SWITCH,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}
LONG = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": SWITCH,
        "factor": 8.0,
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [1.5 + 0.6 * i for i in range(8)],
    },
}
FALCON = {"num_key_value_heads": None, "new_decoder_architecture": False, "multi_query": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic": ("LlamaConfig", DYNAMIC),
    "phi3-longrope": ("Phi3Config", LONG),
    "falcon-dynamic": ("FalconConfig", {**FALCON, "alibi": False, **DYNAMIC}),
    "falcon-longrope": ("FalconConfig", {**FALCON, "alibi": False, **LONG}),
}


def model_of(name: str) -> Any:
    """A fresh model: a dynamic rotary module remembers the longest text that it has met."""
    family, options = MODELS[name]
    config = getattr(transformers, family)(**{**_SHAPE, "num_hidden_layers": 3, **options})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def ids(count: int) -> Tensor:
    return torch.randint(3, 97, (2, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", [0, 17])
@pytest.mark.parametrize("steps", [(40, 10, 10, 10, 1, 1, 20), (60, *[1] * 8), (100, 1, 10)])
@pytest.mark.parametrize("name", MODELS)
def test_frequencies_that_change_on_the_way_are_those_of_the_plain_cache(
    name: str, steps: tuple[int, ...], padding: int
) -> None:
    tokens = ids(sum(steps))
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    model = model_of(name)
    want = run(model, tokens, DynamicCache(config=model.config), steps, mask)[:, padding:]
    model = model_of(name)
    cache = make_cache(model, NOTHING)
    got = run(model, tokens, cache, steps, mask)[:, padding:]
    assert ((got - want).abs().max() / want.abs().max()).item() <= 1e-5
    assert len(cache.positions.epochs) > (steps[0] < SWITCH)
    before = cache.positions.nbytes
    cache.crop(-(sum(steps) - 30))
    assert len(cache.positions.epochs) == 1 and cache.positions.nbytes <= before


@pytest.mark.parametrize("beams", [1, 3])
def test_phi3_reads_again_into_the_same_cache_at_the_switch(beams: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    tokens = ids(SWITCH - 10)
    want = model_of("phi3-longrope").generate(tokens, num_beams=beams, **options)
    model = model_of("phi3-longrope")
    cache = make_cache(model, NOTHING)
    # A copy of a model has hooks of its own.
    assert copy.deepcopy(model).generate(tokens, num_beams=beams, **options).equal(want)
    got = model.generate(tokens, past_key_values=cache, num_beams=beams, **options)
    assert got.equal(want) and cache.get_seq_length() == got.shape[1] - 1


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_layers_may_get_copies_of_cos_and_sin(family: str) -> None:
    """As on several devices, where inputs are copied to that of the layer."""
    tokens = ids(60)
    model = build(family, layers=4)
    want = run(model, tokens, DynamicCache(config=model.config), (1, 40, 1, 18), None)

    def copied(_module: Any, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos.clone(), sin.clone())}

    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(copied, with_kwargs=True)
    got = run(model, tokens, make_cache(model, NOTHING), (1, 40, 1, 18), None)
    assert ((got - want).abs().max() / want.abs().max()).item() <= 1e-5
