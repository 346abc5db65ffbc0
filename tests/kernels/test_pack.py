"""Packing is exact and as small as it says."""

import pytest
import torch

from kvsmith.kernels.pack.api import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 7, 8, 64, 65, 80, 96, 128, 256])
def test_round_trip_is_exact(bits, dim):
    codes = torch.randint(0, 2**bits, (2, 3, dim), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, packed_bytes(dim, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, dim), codes)
    if dim % 8 == 0:
        assert packed.shape[-1] * 8 == dim * bits


def test_the_documented_layout():
    """Four bits: byte j holds channel j below and channel j + D/2 above, a RoPE pair."""
    codes = torch.arange(8, dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [4 * 16 + 0, 5 * 16 + 1, 6 * 16 + 2, 7 * 16 + 3]
    # Three bits: the two low bits of all channels, then the third.
    assert pack(codes, 3).tolist() == [0b10_00_10_00, 0b11_01_11_01, 0b1111_0000]


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        pack(torch.zeros(8, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="dtype must be torch.uint8"):
        pack(torch.zeros(8), 4)
    with pytest.raises(ValueError, match="last dimension must be 4, got 5"):
        unpack(torch.zeros(5, dtype=torch.uint8), 4, 8)
