"""Layers with codecs of their own: parsed, laid out, counted, run, bundled."""

import pytest
import torch

from kvsmith.bundle import Bundle, base_model, expected_tensors, load
from kvsmith.eviction.policy import H2O
from kvsmith.hf import geometry, make_cache
from kvsmith.layout import check_geometry
from kvsmith.pipeline.fit.codec import fit_codec
from kvsmith.pipeline.statistics.layer import LayerStatistics
from kvsmith.pipeline.statistics.plan import plan_for
from kvsmith.sizes import cache_bytes
from kvsmith.spec import (
    NUQ,
    CacheSpec,
    CodecSpec,
    Identity,
    LayerCodec,
    StaticThreshold,
    TensorCodec,
    TopK,
    Uniform,
)
from kvsmith.strict import from_dict, to_dict
from tests.runtime.models import run

WIDE = TensorCodec(Uniform(bits=8))
NARROW = TensorCodec(NUQ(bits=2, table="nf"), TopK(0.05))
KEYS = TensorCodec(NUQ(bits=3, axis="channel", range="calibrated"), StaticThreshold(0.02))
MIXED = CodecSpec(WIDE, WIDE, layers=(LayerCodec(1, NARROW, TensorCodec(Identity())),))


def test_plain_data_hold_layers_only_where_there_are_any():
    assert "layers" not in to_dict(CodecSpec(WIDE, WIDE))
    assert from_dict(CodecSpec, to_dict(MIXED), "codec") == MIXED
    assert MIXED.at(0) == CodecSpec(WIDE, WIDE)
    assert MIXED.at(1) == CodecSpec(NARROW, TensorCodec(Identity()))


def test_each_layer_stores_by_its_own_codec(micro_llama):
    model = micro_llama(layers=3)
    ids = torch.randint(3, 97, (2, 100))
    spec = CacheSpec(MIXED, page_size=16)
    cache = make_cache(model, spec)
    mixed = run(model, ids, cache, (60, 1, 39), None)
    assert cache.bytes() == cache_bytes(spec, geometry(model.config), 2, 100, torch.float32)
    names = [set(s.pages[0].sides[0]) | set(s.pages[0].sides[1]) for s in cache.stores.values()]
    assert names[0] == names[2] == {"codes", "scale", "zero"}
    assert names[1] == {"codes", "scale", "zero", "index", "value", "start", "dense"}
    # Layer 1 of the mixed cache is what a cache of that codec alone stores there, seen from the
    # same input: layer 0 differs between the two, so both keep it exact.
    exact = TensorCodec(Identity())
    only = CodecSpec(exact, exact, layers=(LayerCodec(1, NARROW, exact),))
    again = CodecSpec(
        NARROW, exact, layers=(LayerCodec(0, exact, exact), LayerCodec(2, exact, exact))
    )
    first, second = (
        run(model, ids, make_cache(model, CacheSpec(c, page_size=16)), (60, 1, 39), None)
        for c in (only, again)
    )
    assert torch.equal(first, second) and not torch.equal(first, mixed)


def test_a_bundle_holds_the_tensors_of_each_layer(micro_llama, tmp_path):
    model = micro_llama(layers=3)
    shape = geometry(model.config)
    codec = CodecSpec(WIDE, WIDE, layers=(LayerCodec(2, KEYS, TensorCodec(NUQ(bits=4))),))
    spec = CacheSpec(codec)
    expected = expected_tensors(spec, shape)
    assert {n.split(".")[1] for n in expected} == {"2"} and "layers.2.k.scale" in expected
    plan = plan_for([codec], 200, 0.05, (), False)
    assert plan.k.channels and plan.v.tokens  # the layer's needs are observed
    stats = LayerStatistics(plan, shape.layers[2])
    for name in ("k", "v"):
        stats.update(name, torch.randn(200, 2, 16), None)
    fitted = fit_codec(stats, codec.at(2), "none")
    parameters = {f"layers.2.{n}": t for n, t in fitted.items()}
    base = base_model(model.config.to_dict(), shape, "micro")
    bundle = Bundle.create(spec, parameters, base)
    found = load(bundle.save_pretrained(tmp_path / "b"))
    assert found.spec == spec and "| layer 2 | keys nuq 3 bits" in found.card
    run(model, torch.randint(3, 97, (1, 60)), found.cache(model), (60,), None)


def test_a_layer_keeps_a_dense_window_of_its_own(micro_llama, tmp_path):
    model = micro_llama(layers=3)
    layers = (LayerCodec(1, NARROW, NARROW, recent=40), LayerCodec(2, NARROW, NARROW, recent=0))
    codec = CodecSpec(NARROW, NARROW, recent=8, layers=layers)
    spec = CacheSpec(codec, page_size=16)
    assert codec.at(1).recent == 40 and codec.at(0).recent == 8 and codec.most_recent == 40
    assert "recent" not in to_dict(LayerCodec(0, WIDE, WIDE))
    assert from_dict(CodecSpec, to_dict(codec), "codec") == codec
    cache, ids = make_cache(model, spec), torch.randint(3, 97, (2, 120))
    run(model, ids, cache, (60, *(1,) * 20, 40), None)
    # 116 tokens follow the sinks; whole blocks of 16 of those that are not recent are encoded.
    assert [s.encoded for s in cache.stores.values()] == [96, 64, 112]
    assert cache.bytes() == cache_bytes(spec, geometry(model.config), 2, 120, torch.float32)
    # Named by each layer or once for all, it is the same cache.
    same = CodecSpec(NARROW, NARROW, recent=40)
    own = CodecSpec(
        NARROW, NARROW, layers=tuple(LayerCodec(i, NARROW, NARROW, 40) for i in range(3))
    )
    both = (
        run(model, ids, make_cache(model, CacheSpec(c, page_size=16)), (60, 60), None)
        for c in (own, same)
    )
    assert torch.equal(*both)
    base = base_model(model.config.to_dict(), geometry(model.config), "micro")
    found = load(Bundle.create(spec, {}, base).save_pretrained(tmp_path / "b"))
    assert found.spec == spec and "; the newest 40 to 55 dense |" in found.card
    with pytest.raises(ValueError, match=r"codec\.layers\[0\]\.recent: token count must be at"):
        CodecSpec(WIDE, WIDE, layers=(LayerCodec(0, WIDE, WIDE, recent=-1),))
    with pytest.raises(ValueError, match=r"at least sinks \+ recent \+ 2 blocks of the codec = 76"):
        CacheSpec(codec, H2O(budget=75))
    evicting = CacheSpec(codec, H2O(budget=80))
    cache = make_cache(model, evicting)
    run(model, ids, cache, (60, 60), None)
    assert cache.bytes() == cache_bytes(evicting, geometry(model.config), 2, 120, torch.float32)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"layer": 1}], r"codec\.layers\[0\]: key 'k' must be present"),
        ([{"layer": "1", "k": 0, "v": 0}], r"codec\.layers\[0\]\.layer: value must be of type int"),
        ([-1], r"codec\.layers\[0\]\.layer: index must be at least 0, got -1"),
        ([2, 2], r"codec\.layers\[1\]\.layer: index must be at least 3, got 2"),
        ([{"laier": 1}], r"codec\.layers\[0\]: key must be one of layer, k, v, recent, got"),
    ],
)
def test_mistakes_are_one_line(layers, message):
    side = to_dict(WIDE)
    whole = [{"layer": n, "k": side, "v": side} if isinstance(n, int) else n for n in layers]
    data = {"k": side, "v": side, "layers": whole}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        from_dict(CodecSpec, data, "codec")
    assert "\n" not in str(error.value)


def test_groups_and_indices_are_checked_in_each_layer(micro_llama):
    grouped = TensorCodec(Uniform(axis="channel", group_size=32))
    with pytest.raises(
        ValueError, match=r"codec\.layers\[0\]\.v\.quantizer\.group_size: .*divisor"
    ):
        CodecSpec(WIDE, WIDE, layers=(LayerCodec(0, WIDE, grouped),))
    spec = CacheSpec(CodecSpec(WIDE, WIDE, layers=(LayerCodec(2, WIDE, WIDE),)))
    with pytest.raises(ValueError, match="codec.layers: index must be below the model's 2 layers"):
        check_geometry(spec, geometry(micro_llama(layers=2).config))
