"""LayerStore: what goes in, comes out; in blocks, whatever the steps; in the bytes that the spec
says.
"""

import pytest
import torch

from kvsmith.codec import Codec
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.layout import DTYPES
from kvsmith.sizes import cache_bytes, held_pages
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, Identity, TensorCodec, TopK, Uniform
from kvsmith.store import LayerStore

GEOMETRY = LayerGeometry(2, 4, 16, 24)
CODECS = {
    "identity": (TensorCodec(Identity()), TensorCodec(Identity())),
    "nuq": (TensorCodec(NUQ(bits=3, table="nf"), TopK(0.05)), TensorCodec(NUQ(bits=4, table="nf"))),
    "kivi": (
        TensorCodec(Uniform(bits=4, axis="channel", group_size=4)),
        TensorCodec(Uniform(bits=2, group_size=8)),
    ),
}


def make(name, sinks=3, recent=5, block=8, page=16, window=None):
    k, v = CODECS[name]
    spec = CodecSpec(k, v, sinks=sinks, recent=recent, block_size=block)
    store = DTYPES[spec.store_dtype]
    shape = LayerGeometry(2, 4, 16, 24, window)
    codecs = (
        Codec(k, 2, 16, store, {}, "k", block),
        Codec(v, 2, 24, store, {}, "v", block),
    )
    return LayerStore(spec, shape, page, *codecs), CacheSpec(spec, page_size=page)


def tokens(count, batch=2):
    return torch.randn(batch, 2, count, 16), torch.randn(batch, 2, count, 24)


def fill(store, k, v, steps, padding=None):
    done = 0
    for step in steps:
        store.append(k[:, :, done : done + step], v[:, :, done : done + step], padding)
        done += step
    assert done == k.shape[2]


def read(store, stop=None):
    parts = list(store.segments(store.length if stop is None else stop, 32))
    return torch.cat([p.k for p in parts], 2), torch.cat([p.v for p in parts], 2), parts


@pytest.mark.parametrize("steps", [(70,), (1,) * 70, (2, 1, 40, 1, 1, 25), (5, 3, 62)])
def test_identity_returns_every_token_in_order(steps):
    store, _ = make("identity")
    k, v = tokens(70)
    fill(store, k, v, steps)
    got_k, got_v, parts = read(store)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)
    ends = [p.start for p in parts[1:]] + [70]
    assert [p.start + p.k.shape[2] for p in parts] == ends


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("length", [1, 3, 4, 15, 16, 17, 63, 100])
def test_steps_do_not_matter_and_bytes_are_as_specified(name, length):
    k, v = tokens(length)
    one, spec = make(name)
    fill(one, k, v, (length,))
    many, _ = make(name)
    fill(many, k, v, (1,) * length)
    for a, b in zip(read(one)[:2], read(many)[:2], strict=True):
        assert torch.equal(a, b)
    allocated = sum(t.nbytes for _, t in one.tensors())
    want = cache_bytes(spec, ModelGeometry((GEOMETRY,)), 2, length, torch.float32, position_rows=0)
    assert allocated == want.total == sum(t.nbytes for _, t in many.tensors())


@pytest.mark.parametrize("name", CODECS)
def test_windows_stay_exact_and_the_body_is_close(name):
    store, _ = make(name)
    k, v = tokens(60)
    fill(store, k, v, (30, 30))
    got_k, got_v, _ = read(store)
    dense = list(range(3)) + list(range(store.body_end, 60))
    assert store.body_end <= 60 - 5
    assert torch.equal(got_k[:, :, dense], k[:, :, dense])
    assert torch.equal(got_v[:, :, dense], v[:, :, dense])
    # Two bits over groups of eight normal values: half a step is a sixth of the range, about 0.5.
    assert (got_v - v).abs().mean() < 0.3
    assert (got_k - k).abs().mean() < 0.3


def test_reading_stops_at_a_column_inside_a_block():
    store, _ = make("kivi")
    k, v = tokens(60)
    fill(store, k, v, (60,))
    whole = read(store)[0]
    for stop in (1, 3, 4, 10, 19, 35, 51, 59):
        assert torch.equal(read(store, stop)[0], whole[:, :, :stop])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("keep", [0, 2, 3, 7, 11, 30, 52, 58, 60])
def test_crop_then_append_goes_on_from_there(name, keep):
    k, v = tokens(60)
    store, _ = make(name)
    fill(store, k, v, (60,))
    before = read(store)[0][:, :, :keep]
    store.crop(keep)
    assert store.length == keep
    if keep:
        assert torch.equal(read(store)[0], before)
    more_k, more_v = tokens(40)
    store.append(more_k, more_v)
    got = read(store)[0]
    assert got.shape[2] == keep + 40
    # Tokens that were dense are encoded now: half of the widest gap between levels, 0.21 * range 3.
    torch.testing.assert_close(got[:, :, :keep], before, rtol=0, atol=0.7)
    dense = keep + 40 - 5
    assert torch.equal(got[:, :, dense:], more_k[:, :, dense - keep :])


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_selected_and_repeated(name):
    k, v = tokens(50, batch=3)
    store, _ = make(name)
    fill(store, k, v, (50,))
    whole = read(store)[0]
    order = torch.tensor([2, 0, 0, 1])
    store.map_rows(lambda t: t.index_select(0, order))
    assert store.batch_size == 4
    assert torch.equal(read(store)[0], whole[order])


def test_padded_rows_keep_their_own_sinks():
    store, _ = make("kivi")
    k, v = tokens(40)
    padding = torch.tensor([0, 7])
    fill(store, k, v, (5, 35), padding)
    sinks = read_parts = next(iter(store.segments(40, 32)))
    assert sinks.start is None and read_parts.columns.tolist() == [[0, 1, 2], [7, 8, 9]]
    assert torch.equal(sinks.k[0], k[0, :, :3]) and torch.equal(sinks.k[1], k[1, :, 7:10])


def test_a_sliding_window_frees_pages():
    store, _ = make("nuq", window=20)
    k, v = tokens(200)
    fill(store, k, v, (1,) * 200)
    held = len(store.pages)
    assert store.freed > 0 and held * 16 < 60
    got = read(store)[2]
    assert got[1].start <= 200 - 20
    store.crop(195)
    with pytest.raises(ValueError, match="inside the sliding window"):
        store.crop(20)


@pytest.mark.parametrize("step", [1, 13, 200])
def test_a_sliding_window_shorter_than_the_dense_one(step):
    """All full pages are passed; the one that is being filled stays."""
    store, _ = make("nuq", recent=60, window=4)
    k, v = tokens(250)
    fill(store, k, v, [min(step, 250 - at) for at in range(0, 250, step)])
    assert store.encoded == 184 and len(store.pages) == 1 == held_pages(store.spec, 16, 250, 4)
    got = read(store)
    # Sinks, half a page, what is dense.
    assert got[0].shape[2] == 3 + 8 + 63 and torch.equal(got[1][:, :, -63:], v[:, :, -63:])


def test_other_shapes_are_refused():
    store, _ = make("nuq")
    store.append(*tokens(4))
    with pytest.raises(ValueError, match=r"batch, KV heads, head dim must be \(2, 2, 16\)"):
        store.append(*tokens(1, batch=3))
