"""decode reads what encode_pack wrote, and refuses half of it."""

import itertools

import pytest
import torch

from kvsmith.kernels.decode.api import decode
from kvsmith.kernels.encode_pack.api import encode_pack
from kvsmith.kernels.format import Format, Tables

LUT = torch.linspace(-1, 1, 16)
TABLES = Tables(LUT, (LUT[1:] + LUT[:-1]) / 2)
TABLES_2 = Tables(torch.linspace(-1, 1, 4), torch.tensor([-2 / 3, 0, 2 / 3]))


def test_sixteen_bit_indices_are_unsigned():
    """A block of 512 x 128 elements: its last element has index 65535, stored as -1."""
    x = torch.randn(1, 2, 512, 128)
    x[0, 1, 511, 127], x[0, 0, 300, 5] = 99.0, -99.0
    fmt = Format(4, "token", 0, 1, "extremes", torch.float32, block=512)
    tensors = encode_pack(x, fmt, TABLES)
    index, start = tensors["index"][0, 0].tolist(), tensors["start"][0, 0].tolist()
    assert 300 * 128 + 5 - 65536 in index[: start[1]] and index[-1] == -1
    assert start[0] == 0 and start[2] == 512
    back = decode(tensors, fmt, TABLES, 128)
    assert back[0, 1, 511, 127] == 99.0 and back[0, 0, 300, 5] == -99.0
    # The rest: half a step of a range of about +-5.
    rest = (back - x).abs()
    assert rest.max() < 0.4


def test_a_slice_of_tokens_decodes_to_the_slice():
    x = torch.randn(2, 2, 24, 16)
    fmt = Format(4, "token", 0, 3, "extremes", torch.float16, block=4)
    tensors = encode_pack(x, fmt, TABLES)
    whole = decode(tensors, fmt, TABLES, 16)
    part = {n: t[:, 2:4] for n, t in tensors.items()}  # blocks
    part |= {"codes": tensors["codes"][:, :, 8:16]}
    part |= {n: tensors[n][:, 8:16] for n in ("scale", "zero")}
    assert torch.equal(decode(part, fmt, TABLES, 16), whole[:, :, 8:16])


def test_corrections_of_a_head_stand_together():
    x = torch.randn(2, 3, 8, 16)
    fmt = Format(2, "token", 0, 5, "extremes", torch.float32, block=4)
    tensors = encode_pack(x, fmt, TABLES_2)
    error = x - decode(tensors | {"value": torch.zeros_like(tensors["value"])}, fmt, TABLES_2, 16)
    for b, block, head in itertools.product(range(2), range(2), range(3)):
        first, last = tensors["start"][b, block, head : head + 2].tolist()
        index = tensors["index"][b, block, first:last].long()
        assert torch.equal(index, index.sort().values)
        own = error[b, head, 4 * block : 4 * block + 4].reshape(-1)
        torch.testing.assert_close(tensors["value"][b, block, first:last], own[index])


def test_missing_tensors_are_named():
    fmt = Format(4, "token", 0, 1, "extremes", torch.float16)
    with pytest.raises(
        ValueError, match="decode: tensors must be codes, index, start, value, got codes"
    ):
        decode({"codes": torch.zeros(1, 1, 1, 8, dtype=torch.uint8)}, fmt, TABLES, 16)
