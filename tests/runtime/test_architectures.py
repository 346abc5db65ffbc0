"""Every supported architecture: nothing compressed is not noticed; 4 bits calibrate and run."""

import pytest
import torch
from transformers import DynamicCache

from kvsmith.hf import geometry, make_cache
from kvsmith.pipeline.fit.codec import fit_codec
from kvsmith.pipeline.statistics.layer import LayerStatistics
from kvsmith.pipeline.statistics.plan import plan_for
from kvsmith.pipeline.taps import Taps, frozen
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, Identity, StaticThreshold, TensorCodec, TopK
from tests.runtime.models import FAMILIES, build, run

STEPS = (24, 1, 1, 30, 4)
NOTHING = CacheSpec(CodecSpec(TensorCodec(Identity()), TensorCodec(Identity())))


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 60))


@pytest.fixture
def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_equals_dynamic_cache(family, ids, padded, measured):
    model, spec = build(family, layers=4), NOTHING
    want = run(model, ids, DynamicCache(config=model.config), STEPS, padded)
    got = run(model, ids, make_cache(model, spec), STEPS, padded)
    scale = max(1.0, want[:, 17:].abs().max().item())
    off = (got - want)[:, 17:].abs().max().item() / scale
    assert off <= 1e-5
    shape = geometry(model.config)
    measured(
        family,
        name=type(model).__name__,
        way="deferred" if model._can_set_attn_implementation() else "dense",
        layers=f"{len(shape.owners)} of {len(shape.layers)}",
        heads=f"{shape.layers[0].query_heads}/{shape.layers[0].kv_heads}",
        dim=shape.layers[-1].k_dim,
        logits=off,
    )
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    prompt = {"input_ids": ids[:, :24], "attention_mask": padded[:, :24]}
    for beams in (1, 3):
        mine = model.generate(
            **prompt, past_key_values=make_cache(model, spec), num_beams=beams, **options
        )
        assert torch.equal(mine, model.generate(**prompt, num_beams=beams, **options))
    mine = model.generate(
        ids[:1, :24], past_key_values=make_cache(model, spec), prompt_lookup_num_tokens=3, **options
    )
    assert torch.equal(mine, model.generate(ids[:1, :24], **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_calibrate_run_and_free_memory(family, measured):
    model = build(family, layers=4)
    codec = CodecSpec(
        TensorCodec(NUQ(bits=4, axis="channel", range="calibrated"), StaticThreshold(0.05)),
        TensorCodec(NUQ(bits=4), TopK(0.05)),
    )
    shape = geometry(model.config)
    tokens = torch.randint(3, 97, (4, 64))
    plan = plan_for([codec], 4 * 60, 0.05, (), True)
    stats = {i: LayerStatistics(plan, shape.layers[i]) for i in shape.owners}
    with frozen(model):
        Taps(model, lambda i, n, x, f: stats[i].update(n, x, f), sinks=4, fisher=True).run(tokens)
    fitted = {i: fit_codec(s, codec) for i, s in stats.items()}
    parameters = {f"layers.{i}.{n}": t for i, f in fitted.items() for n, t in f.items()}
    ids = torch.randint(3, 97, (2, 300))
    dense = DynamicCache()  # of every token, as no window is known to it
    want = run(model, ids, dense, (300,), None)
    cache = make_cache(model, CacheSpec(codec), parameters)
    got = run(model, ids, cache, (200, 1, 99), None)
    assert got.isfinite().all()
    error = ((got - want).abs().mean() / want.std()).item()
    assert error < 0.5
    elements = 2 * 300 * shape.elements
    body = cache.bytes().body
    # Four bits, outliers, ranges and the slack of a page, against 32 bits.
    assert body < 0.35 * 4 * elements
    measured(family, bits=8 * body / elements, error=error)
