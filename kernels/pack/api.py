"""pack/unpack: codes of `bits` bits in bytes, channels side by side.

A code is split into planes whose widths are powers of two (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 +
2 + 1), the low bits first. In a plane of width w a byte holds 8/w channels that lie D'/(8/w) apart
(D' the head dim, rounded up so that bytes are whole): byte j holds channels j, j + D'w/8, j +
2D'w/8, ... from its low bits up. One load therefore gives tiles of neighbouring channels, and at 4
and 2 bits the two halves that RoPE rotates together.
"""

from __future__ import annotations

import torch

from kvsmith.errors import explain
from kvsmith.kernels.pack import reference

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_bytes(dim: int, bits: int) -> int:
    """Bytes that `dim` codes of `bits` bits take; equal to dim * bits / 8 where dim is a multiple
    of 8.
    """
    return sum(-(-dim * width // 8) for width in PLANES[bits])


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: [..., D] uint8, values below 2^bits.
        bits: code width, 1 to 8.

    Returns:
        [..., packed_bytes(D, bits)] uint8.

    Raises:
        ValueError: bits out of range, or a dtype other than uint8.
    """
    _check(codes, bits)
    return reference.pack(codes, PLANES[bits])


def unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Undo `pack`.

    Args:
        packed: [..., packed_bytes(dim, bits)] uint8.
        bits: code width, 1 to 8.
        dim: number of codes D.

    Returns:
        [..., D] uint8.

    Raises:
        ValueError: bits out of range, a dtype other than uint8, or a last dimension that does not
            fit.
    """
    _check(packed, bits)
    if packed.shape[-1] != packed_bytes(dim, bits):
        raise ValueError(
            explain("unpack", "last dimension", str(packed_bytes(dim, bits)), packed.shape[-1])
        )
    return reference.unpack(packed, PLANES[bits], dim)


def _check(tensor: torch.Tensor, bits: int) -> None:
    if bits not in PLANES:
        raise ValueError(explain("pack", "bits", "between 1 and 8", bits))
    if tensor.dtype != torch.uint8:
        raise ValueError(explain("pack", "dtype", "torch.uint8", str(tensor.dtype)))
