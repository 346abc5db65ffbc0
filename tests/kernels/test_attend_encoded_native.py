"""attend_encoded on the CPU, against its definition; and what happens without a compiler."""

from dataclasses import replace

import pytest
import torch

from kvsmith.kernels.attend_encoded import native
from kvsmith.kernels.attend_encoded.api import chosen
from tests.kernels.encoded_layers import make_layer
from tests.kernels.test_attend_encoded import CASES, _attend, _case

compiled = pytest.mark.skipif(native.library(64, 64) is None, reason="no C compiler")


FACTORS = [
    # Widths of factors that the GPU's kernel leaves out; several blocks a tile, several tiles one.
    ("gear_few", 3, 150, 2, {"block": 8, "rope": False}),
    ("gear_few", 5, 200, 8, {"block": 64, "rope": False, "heads": 1, "padding": [0, 30]}),
    ("gear_few", 7, 150, 2, {"block": 32, "rope": False, "dim": 80, "v_dim": 64, "queries": 3}),
    ("gear_few", 6, 300, 1, {"block": 128, "rope": False, "page": 128}),
]


@compiled
@pytest.mark.parametrize(("codec", "bits", "length", "group", "given"), CASES + FACTORS)
def test_equals_the_definition(codec, bits, length, group, given):
    layer, q = _case(codec, bits, length, group, given)
    got, want = _attend(layer, q, "native"), _attend(layer, q, "reference")
    # Sums of float32 products in another order, and angles that are advanced tile by tile.
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=2e-6 * want.out.abs().max().item())
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-6, atol=4e-6)


@compiled
@pytest.mark.parametrize(
    "given",
    [
        {"window": 50},
        {"softcap": 20.0},
        {"slopes": torch.tensor([0.5, 0.1, 0.03, 0.0])},
        {"window": 100, "softcap": 5.0},
    ],
)
def test_what_shapes_logits(given):
    layer, q = _case("nuq", 4, 257, 2, {"padding": [0, 40], "queries": 2})
    got, want = _attend(layer, q, "native", **given), _attend(layer, q, "reference", **given)
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, rtol=2e-6, atol=2e-5)


@compiled
def test_pages_that_a_window_freed_are_not_read():
    layer, q = _case("nuq", 4, 300, 2, {"freed": 2})
    got = _attend(layer, q, "native", window=100)
    want = _attend(layer, q, "reference", window=100)
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=1e-5)


@compiled
@pytest.mark.parametrize("stop", [1, 29, 32, 47, 140])
def test_factors_of_a_block_that_is_read_in_part(stop):
    layer, q = _case("gear_few", 4, 257, 2, {"block": 32, "rope": False})
    layer.body = replace(layer.body, stop=stop)
    got, want = (_attend(layer, q, i, window=240) for i in ("native", "reference"))
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=2e-6 * want.out.abs().max().item())
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-6, atol=4e-6)


@compiled
@pytest.mark.parametrize("codec", ["nuq", "gear"])
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_threads_share_rows_heads_and_pages(threads, codec):
    """16 threads for four pairs of row and head want four runs of the five pages each."""
    layer, q = _case(codec, 4, 340, 2, {"block": 32, "rope": codec == "nuq"})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = _attend(layer, q, "native")
    finally:
        torch.set_num_threads(before)
    want = _attend(layer, q, "reference")
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=2e-6 * want.out.abs().max().item())


@compiled
def test_stays_exact_far_out():
    """Angles are advanced by products in float64 over all of the tiles."""
    layer = make_layer("nuq_plain", 2, 20_000, heads=1, batch=1)
    q = torch.randn(1, 2, 1, 64)
    got, want = _attend(layer, q, "native"), _attend(layer, q.double(), "reference")
    torch.testing.assert_close(got.lse, want.lse.float(), rtol=1e-6, atol=4e-6)
    # Values are of order one, of which the mean over many is small.
    torch.testing.assert_close(got.out, want.out.float(), rtol=0, atol=2e-6)


@compiled
def test_says_what_it_cannot_do():
    layer, q = _case("nuq", 4, 63, 1, {"dim": 72})
    assert chosen(layer.body, q) == "reference"
    with pytest.raises(ValueError, match="impl must be one that supports this layer, got head dim"):
        _attend(layer, q, "native")
    layer, q = _case("gear_few", 4, 100, 1, {"rope": False})
    assert chosen(layer.body, q) == "native"
    layer.body = replace(layer.body, k=replace(layer.body.k, rank=65))
    with pytest.raises(ValueError, match="got rank 65 in blocks of 16"):
        _attend(layer, q, "native")
    layer, q = _case("nuq", 4, 63, 1, {})
    assert chosen(layer.body, q) == "native"
    assert chosen(layer.body, q.double()) == "reference"


@pytest.mark.parametrize("compiler", ["a-name-that-no-compiler-has", "false"])
def test_without_a_compiler_the_definition_runs(compiler, monkeypatch):
    layer, q = _case("nuq", 4, 63, 1, {})
    native.library.cache_clear()
    monkeypatch.setenv("CC", compiler)
    try:
        assert native.library(64, 64) is None
        assert chosen(layer.body, q) == "reference"
    finally:
        native.library.cache_clear()
