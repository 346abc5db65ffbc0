"""decode reads what encode_pack wrote, and refuses half of it."""

import pytest
import torch

from kvsmith.kernels.decode.api import decode
from kvsmith.kernels.encode_pack.api import encode_pack
from kvsmith.kernels.format import Format, Tables

LUT = torch.linspace(-1, 1, 16)
TABLES = Tables(LUT, (LUT[1:] + LUT[:-1]) / 2)


def test_sixteen_bit_indices_are_unsigned():
    """A KV width of 65536: an outlier in the last channel has index 65535, stored as -1."""
    x = torch.randn(1, 512, 1, 128)
    x[0, 511, 0, 127], x[0, 300, 0, 5] = 99.0, -99.0
    fmt = Format(4, "token", 0, 2, "extremes", torch.float32)
    tensors = encode_pack(x, fmt, TABLES)
    assert tensors["index"].tolist() == [[[300 * 128 + 5 - 65536, -1]]]
    back = decode(tensors, fmt, TABLES, 128)
    assert back[0, 511, 0, 127] == 99.0 and back[0, 300, 0, 5] == -99.0
    # The rest: half a step of a range of about +-5.
    rest = (back - x).abs()
    assert rest.max() < 0.4


def test_a_slice_of_tokens_decodes_to_the_slice():
    x = torch.randn(2, 2, 24, 16)
    fmt = Format(4, "token", 0, 3, "extremes", torch.float16)
    tensors = encode_pack(x, fmt, TABLES)
    whole = decode(tensors, fmt, TABLES, 16)
    part = {n: t[:, :, 5:9] if n == "codes" else t[:, 5:9] for n, t in tensors.items()}
    assert torch.equal(decode(part, fmt, TABLES, 16), whole[:, :, 5:9])


def test_missing_tensors_are_named():
    fmt = Format(4, "token", 0, 1, "extremes", torch.float16)
    with pytest.raises(ValueError, match="decode: tensors must be codes, index, value, got codes"):
        decode({"codes": torch.zeros(1, 1, 1, 8, dtype=torch.uint8)}, fmt, TABLES, 16)
