"""GEAR in the cache: pages with factors, ranks of prompt and generated tokens, compositions."""

import pytest
import torch

from kvsmith.attention import Scores, attend_store
from kvsmith.bundle import Bundle, base_model, load
from kvsmith.codec import Codec
from kvsmith.eviction.policy import H2O, KeepAll
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.hf import geometry, make_cache
from kvsmith.kernels.low_rank.api import add_low_rank
from kvsmith.layout import DTYPES, parameter_tensors
from kvsmith.pipeline.codecs import codec_names, load_codec
from kvsmith.sizes import cache_bytes
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, LowRank, TensorCodec, TopK, Uniform
from kvsmith.store import LayerStore
from kvsmith.strict import to_dict

GEOMETRY = LayerGeometry(2, 4, 16, 24)
GEARS = {
    "gear": (
        TensorCodec(Uniform(2, "channel", 8), TopK(0.13), LowRank(2, prompt_rank=4)),
        TensorCodec(Uniform(2, "token", 8), TopK(0.05), LowRank(1, prompt_rank=3)),
    ),
    "gear-l": (
        TensorCodec(Uniform(4, "channel", 16), None, LowRank(2)),
        TensorCodec(Uniform(4), None, LowRank(3, bits=4)),
    ),
    "over nuq": (
        TensorCodec(NUQ(3, table="nf"), TopK(0.05), LowRank(4, prompt_rank=2, bits=8)),
        TensorCodec(NUQ(3, table="nf"), None, LowRank(2)),
    ),
}


def make(name, window=None):
    k, v = GEARS[name]
    spec = CodecSpec(k, v, key_domain="post", sinks=3, recent=5, block_size=16)
    store = DTYPES[spec.store_dtype]
    codecs = (Codec(k, 2, 16, store, {}, "k", 16), Codec(v, 2, 24, store, {}, "v", 16))
    shape = LayerGeometry(2, 4, 16, 24, window)
    return LayerStore(spec, shape, 32, *codecs), CacheSpec(spec, page_size=32)


def tokens(count, batch=2):
    return torch.randn(batch, 2, count, 16), torch.randn(batch, 2, count, 24)


def read(store, chunk=64):
    parts = list(store.segments(store.length, chunk))
    return [torch.cat([getattr(p, side) for p in parts], 2) for side in "kv"]


@pytest.mark.parametrize("name", GEARS)
@pytest.mark.parametrize("prompt", [1, 23, 24, 56, 57, 130])
def test_bytes_by_prompt_and_length(name, prompt):
    store, spec = make(name)
    k, v = tokens(130)
    store.append(k[:, :, :prompt], v[:, :, :prompt])
    for t in range(prompt, 130):
        store.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    allocated = sum(t.nbytes for _, t in store.tensors())
    model = ModelGeometry((GEOMETRY,))
    want = cache_bytes(spec, model, 2, 130, torch.float32, position_rows=0, prompt=prompt)
    assert allocated == want.total
    if prompt == 130:
        assert want == cache_bytes(spec, model, 2, 130, torch.float32, position_rows=0)


@pytest.mark.parametrize("prompt", [24, 100])
def test_the_prompt_has_its_own_rank(prompt):
    """The first step's pages hold its rank, later ones the other; a page keeps what it began."""
    store, _ = make("gear")
    k, v = tokens(200)
    store.append(k[:, :, :prompt], v[:, :, :prompt])
    store.append(k[:, :, prompt:], v[:, :, prompt:])
    first = -(-((prompt - 8) // 16 * 16) // 32)
    ranks = [(p.sides[0]["left"].shape[-2], p.sides[1]["left"].shape[-2]) for p in store.pages]
    assert ranks == [(4, 3)] * first + [(2, 1)] * (len(ranks) - first)
    off = (read(store)[0] - k).pow(2).mean((0, 1, 3))
    assert off[3 : 3 + 32 * first].mean() < off[3 + 32 * first : -21].mean()


@pytest.mark.parametrize("name", GEARS)
@pytest.mark.parametrize("keep", [0, 2, 30, 52, 70, 110])
def test_crop_then_append(name, keep):
    store, _ = make(name)
    k, v = tokens(120)
    store.append(k[:, :, :60], v[:, :, :60])
    store.append(k[:, :, 60:], v[:, :, 60:])
    before = [x[:, :, :keep] for x in read(store)]
    store.crop(keep)
    if keep:
        for got, want in zip(read(store), before, strict=True):
            torch.testing.assert_close(got, want)
    more = tokens(70)
    store.append(*more)
    got = read(store)
    assert got[0].shape[2] == keep + 70 and bool(got[0].isfinite().all())
    assert torch.equal(got[1][:, :, -5:], more[1][:, :, -5:])


@pytest.mark.parametrize("name", GEARS)
@pytest.mark.parametrize("stop", [30, 77, 125])
def test_terms_apart_are_what_is_missing(name, stop):
    store, _ = make(name)
    k, v = tokens(130)
    store.append(k[:, :, :70], v[:, :, :70])
    store.append(k[:, :, 70:], v[:, :, 70:])
    for tiles in (False, True):
        whole = store.segments(stop, 64, tiles, tiles)
        apart = store.segments(stop, 64, tiles, tiles, (True, True))
        for a, b in zip(whole, apart, strict=True):
            for side in "kv":
                want, x = getattr(a, side), getattr(b, side)
                low, count = getattr(b, f"{side}_low"), x.shape[2]
                if low is None:
                    assert torch.equal(want, x)
                    continue
                room = torch.zeros(*x.shape[:2], low[0].shape[2] * 16, x.shape[3])
                got = x + add_low_rank(room, *low)[:, :, :count]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                assert not torch.equal(want, x)


class Everything:
    """A mask that hides nothing, and a rotation that turns nothing."""

    padding = None
    is_causal = False
    reach = None
    pairs_halves = True

    def window(self, rows, columns):
        return None

    def tiles(self, k, start, columns, order):
        return k

    def __call__(self, k, start, columns):
        return k


@pytest.mark.parametrize("name", GEARS)
def test_few_queries_and_many_see_the_same(name):
    """Terms of few queries leave apart, those of many are added to keys and values."""
    store, _ = make(name)
    k, v = tokens(130)
    v = v[..., :16]
    codecs = (store.codecs[0], Codec(GEARS[name][1], 2, 16, torch.float16, {}, "v", 16))
    store = LayerStore(store.spec, LayerGeometry(2, 4, 16, 16), 32, *codecs)
    store.append(k, v)
    q, free = torch.randn(2, 4, 1, 16), Everything()
    one, many = (
        attend_store(q.expand(-1, -1, n, -1), k[:, :, :1], v[:, :, :1], store, 130, free, free, s)
        for n, s in ((1, Scores(0.25)), (20, Scores(0.25)))
    )
    # float32 sums of 131 terms of unit size, in another order.
    torch.testing.assert_close(many, one.expand(-1, 20, -1, -1), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", GEARS)
def test_chunks_windows_and_rows(name):
    store, _ = make(name, window=70)
    k, v = tokens(150, batch=3)
    store.append(k[:, :, :90], v[:, :, :90])
    for t in range(90, 150):
        store.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert store.freed > 0
    whole = read(store)
    for chunk in (1, 64, 1000):
        assert all(torch.equal(a, b) for a, b in zip(read(store, chunk), whole, strict=True))
    order = torch.tensor([2, 0, 1, 1])
    store.map_rows(lambda t: t.index_select(0, order))
    assert all(torch.equal(a, b[order]) for a, b in zip(read(store), whole, strict=True))


@pytest.mark.parametrize("eviction", [KeepAll(), H2O(64, recent=4)])
@pytest.mark.parametrize("name", GEARS)
def test_generates_in_the_bytes_that_were_planned(name, eviction, micro_llama):
    model = micro_llama(layers=2)
    k, v = GEARS[name]
    codec = CodecSpec(k, v, key_domain="pre", sinks=2, recent=4, block_size=16)
    spec = CacheSpec(codec, eviction, page_size=32)
    cache = make_cache(model, spec)
    ids = torch.randint(3, 97, (2, 100))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
        max_new_tokens=20, min_new_tokens=20,
    )  # fmt: skip
    assert out.shape == (2, 120)
    want = cache_bytes(spec, geometry(model.config), 2, 119, torch.float32, prompt=100)
    assert cache.bytes() == want


def test_a_bundle_carries_it_and_others_keep_their_bytes(tmp_path, micro_llama):
    model = micro_llama(layers=2)
    k, v = GEARS["gear"]
    spec = CacheSpec(CodecSpec(k, v, block_size=16), page_size=32)
    assert CacheSpec.parse(to_dict(spec)) == spec
    plain = to_dict(TensorCodec(Uniform()))
    assert set(plain) == {"quantizer", "outliers"}
    text = model.config.get_text_config(decoder=True).to_dict()
    base = base_model(text, geometry(model.config), "micro")
    folder = Bundle.create(spec, {}, base).save_pretrained(tmp_path / "gear")
    again = load(folder)
    assert again.spec == spec
    assert "low rank 2 (4 in the prompt), factors in" in (folder / "README.md").read_text()
    logits = model(torch.arange(3, 80)[None], past_key_values=again.cache(model)).logits
    assert bool(logits.isfinite().all())


def test_presets_compose_with_a_small_model(micro_llama):
    specs = {name: load_codec(name) for name in codec_names()}
    own = {n: s for n, s in specs.items() if s.k.low_rank and not expected_parameters(s)}
    assert {"gear4", "gear2", "gear_l4", "gear_l2", "gear_q2", "gear_lq2"} <= set(own)
    model = micro_llama(layers=1, heads=2, head_dim=64)
    for codec in own.values():
        cache = make_cache(model, CacheSpec(codec))
        for part in torch.randint(3, 97, (1, 300)).split([290, 1, 9], dim=1):
            assert bool(model(part, past_key_values=cache).logits.isfinite().all())


def expected_parameters(spec):
    return parameter_tensors(spec.k, 2, 16) | parameter_tensors(spec.v, 2, 16)


@pytest.mark.parametrize("name", ["gear2", "gear_o4", "kivi2_g64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_its_layer(name, bad, micro_llama):
    """Whatever the codec, in the prompt or a block later."""
    spec = CacheSpec(load_codec(name))
    model, ids = micro_llama(layers=1, head_dim=64), torch.randint(3, 97, (1, 200))
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[5] = bad
    ids[ids == 5] = 6
    model(ids[:, :130], past_key_values=(cache := make_cache(model, spec)))
    ids[0, [20, 140]] = 5
    with pytest.raises(ValueError, match=r"^layers\.0\.k: keys and values must be finite, got NaN"):
        model(ids[:, 130:], past_key_values=cache)
    with pytest.raises(ValueError, match=r"^layers\.0\.k: keys and values must be finite, got NaN"):
        model.generate(ids, past_key_values=make_cache(model, spec), max_new_tokens=2)
