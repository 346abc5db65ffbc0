"""Layers that share: the same numbers with and without a cache, and bytes for owners alone."""

import pytest
import torch

from kvsmith.cla import Groups, Map
from kvsmith.hf import geometry, make_cache, share
from kvsmith.layout import check_geometry
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec, Uniform
from tests.runtime.models import build

PLAIN = TensorCodec(Identity())
EXACT = CacheSpec(CodecSpec(PLAIN, PLAIN), page_size=16)
FAMILIES = ["llama-mha", "llama", "llama-mqa", "qwen3", "phi", "gpt_neox", "gpt2", "falcon-alibi"]
FAMILIES += ["falcon-rope", "bloom", "mpt", "gptj"]


def shared(family, owner=(0, 0, 2, 2)):
    model = build(family, layers=4)
    share(model, owner)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_equals_no_cache_and_sharing_changes_the_model(family):
    model, ids = shared(family), torch.randint(2, 97, (2, 40))
    want = model(ids, use_cache=False).logits
    apart = build(family, layers=4)(ids, use_cache=False).logits
    assert (want - apart).abs().max() > 1e-2 * apart.abs().max()
    cache = make_cache(model, EXACT)
    got = torch.cat([model(p, past_key_values=cache).logits for p in ids.split([25, 14, 1], 1)], 1)
    # float32 rounding of another order of summation, as in the tests of the families
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert sorted(cache.stores) == [0, 2]


@torch.no_grad()
def test_reader_projections_do_not_matter_and_all_layers_sharing_is_one_store():
    model, ids = shared("llama", (0, 0, 0, 0)), torch.randint(2, 97, (1, 20))
    before = model(ids, use_cache=False).logits
    for layer in model.model.layers[1:]:
        layer.self_attn.k_proj.weight.zero_()
        layer.self_attn.v_proj.weight.fill_(float("inf"))
    # What the readers project is dropped, so infinities in it reach nothing.
    assert torch.equal(model(ids, use_cache=False).logits, before)
    cache = make_cache(model, EXACT)
    model(ids, past_key_values=cache)
    assert list(cache.stores) == [0]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_cache_equals_without(family, beams):
    model = shared(family)
    ids = torch.randint(2, 97, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5], ids[0, :5] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "attention_mask": mask}
    got = model.generate(ids, past_key_values=make_cache(model, EXACT), **options)
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("codec", [PLAIN, TensorCodec(Uniform(4, "token", None, "online"))])
def test_bytes_are_those_of_the_owners(factor, codec):
    spec, ids = CacheSpec(CodecSpec(codec, codec), page_size=16), torch.randint(2, 97, (2, 50))
    sizes = []
    for owner in (Groups(factor=1).resolve(4), Groups(factor=factor).resolve(4)):
        model = shared("llama", owner)
        cache = make_cache(model, spec)
        model(ids, past_key_values=cache)
        sizes.append((cache.nbytes() - cache.positions.nbytes, len(set(owner))))
    (whole, layers), (part, owners) = sizes
    assert part * layers == whole * owners


def test_gradients_reach_the_owner_through_its_readers_and_recomputation_agrees():
    ids = torch.randint(2, 97, (2, 16))
    grads = []
    for recompute in (False, True):
        model = shared("llama").train()
        if recompute:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        attention = [layer.self_attn for layer in model.model.layers]
        assert all(attention[i].k_proj.weight.grad is None for i in (1, 3))
        grads.append(attention[0].v_proj.weight.grad)
    assert torch.equal(*grads)


def test_the_map_survives_saving(tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = shared("llama"), torch.randint(2, 97, (1, 9))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    share(again)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert geometry(again.config).owner == (0, 0, 2, 2)
    check_geometry(EXACT, geometry(again.config))


@pytest.mark.parametrize(
    ("cla", "layers", "owner"),
    [
        (Groups(factor=2), 5, (0, 0, 2, 2, 4)),
        (Groups(factor=3, front=1), 6, (0, 1, 1, 1, 4, 4)),
        (Groups(factor=2, front=1, back=1), 6, (0, 1, 1, 3, 3, 5)),
        (Map(owner=(0, 1, 0)), 3, (0, 1, 0)),
    ],
)
def test_maps(cla, layers, owner):
    assert cla.resolve(layers) == owner


@pytest.mark.parametrize(
    ("cla", "words"),
    [
        (Groups(factor=5), "at most the 4 layers"),
        (Groups(factor=3, front=2), "at most the 2 layers"),
        (Map(owner=(0, 0)), "one entry a layer"),
        (Map(owner=(0, 2, 2, 2)), "earlier"),
        (Map(owner=(0, 0, 1, 1)), "that owns"),
    ],
)
def test_maps_that_do_not_fit(cla, words):
    with pytest.raises(ValueError, match=words) as caught:
        cla.resolve(4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["gemma3n", "gemma3"])
def test_models_that_cannot_share(family):
    model = build(family, layers=4)
    if family == "gemma3":  # a sliding layer and one that sees everything
        model.config.layer_types = ["sliding_attention", "full_attention"] * 2
    with pytest.raises(ValueError, match="kv_owner|reads layer"):
        share(model, (0, 0, 2, 2))
    assert getattr(model.config, "kv_owner", None) is None


def test_a_model_with_its_own_attention_refuses_other_caches():
    model = shared("bloom")
    with pytest.raises(ValueError, match=r"kvsmith\.make_cache"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2)
