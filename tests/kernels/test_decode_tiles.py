"""decode_tiles gives what decode gives, in the order that it says."""

import pytest
import torch

from kvsmith.kernels.decode.api import decode, decode_tiles
from kvsmith.kernels.decode.tiles import order_tensors, tile_order
from kvsmith.kernels.encode_pack.api import encode_pack
from kvsmith.kernels.format import Format, Tables

CPU = torch.device("cpu")


def _tables(bits, heads, dim):
    lut = torch.rand(2**bits).mul(2).sub(1).sort().values
    return Tables(
        lut, (lut[1:] + lut[:-1]) / 2, torch.rand(heads, dim) + 2, torch.randn(heads, dim)
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [8, 40, 128])
@pytest.mark.parametrize(
    ("axis", "group", "slots", "rule"),
    [
        ("channel", 0, 0, "none"),
        ("channel", 0, 3, "error"),
        ("channel", 4, 0, "none"),
        ("token", 0, 0, "none"),
        ("token", 0, 5, "extremes"),
        ("token", 8, 0, "none"),
    ],
)
def test_equals_decode(bits, dim, axis, group, slots, rule):
    fmt = Format(bits, axis, group, slots, rule, torch.float16, block=8)
    tables = _tables(bits, 3, dim)
    tensors = encode_pack(torch.randn(2, 3, 24, dim), fmt, tables)
    order, place = order_tensors(bits, dim, CPU)
    got = decode_tiles(tensors, fmt, tables, dim)
    want = decode(tensors, fmt, tables, dim)
    # One fused rounding in place of two: an epsilon of the largest term.
    tolerance = torch.finfo(torch.float32).eps * 2 * want.abs().max().item()
    torch.testing.assert_close(got[..., place], want, rtol=0, atol=tolerance)
    torch.testing.assert_close(got, want[..., order], rtol=0, atol=tolerance)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_partners_of_a_rotation_are_neighbours(bits):
    order = tile_order(bits, 16)
    assert sorted(order) == list(range(16))
    assert all(order[i + 1] == order[i] + 8 for i in range(0, 16, 2))


def test_widths_without_pairs_in_a_byte_have_no_order():
    assert tile_order(8, 128) is None and tile_order(1, 128) is None and tile_order(4, 12) is None


def test_missing_tensors_are_named():
    fmt = Format(4, "token", 0, 1, "extremes", torch.float16)
    with pytest.raises(ValueError, match="decode: tensors must be codes, index, start, value"):
        codes = torch.zeros(1, 1, 1, 8, dtype=torch.uint8)
        decode_tiles({"codes": codes}, fmt, _tables(4, 1, 16), 16)


def test_the_order_of_channels_serves_gradients_after_inference() -> None:
    order_tensors.cache_clear()
    with torch.inference_mode():
        order_tensors(4, 16, torch.device("cpu"))
    x = torch.ones(16, requires_grad=True)
    x[order_tensors(4, 16, torch.device("cpu"))[0]].sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())
