"""decode: packed codes, ranges and outliers -> dense tokens; the inverse of `encode_pack` up to its
error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.errors import explain
from kvsmith.kernels.decode import reference, tiles
from kvsmith.kernels.format import Format, Tables


def decode(
    tensors: Mapping[str, torch.Tensor], fmt: Format, tables: Tables, dim: int
) -> torch.Tensor:
    """Decode a block of tokens.

    Args:
        tensors: what `encode_pack` returned, or a slice of it along the tokens.
        fmt: the layout.
        tables: codebook and calibrated ranges, on the device of the tensors.
        dim: channels of a head D.

    Returns:
        [B, H, T, D] float32.

    Raises:
        ValueError: a tensor is missing.
    """
    _check(tensors, fmt)
    return reference.decode(tensors, fmt, tables, dim)


def decode_tiles(
    tensors: Mapping[str, torch.Tensor], fmt: Format, tables: Tables, dim: int
) -> torch.Tensor:
    """Decode a block of tokens with their channels in the order of `tile_order`; several times
    faster.

    Args:
        tensors, fmt, tables, dim: as in `decode`; `tile_order(fmt.bits, dim)` is not None.

    Returns:
        [B, H, T, D] float32; place i holds channel `tile_order(fmt.bits, dim)[i]`.

    Raises:
        ValueError: a tensor is missing.
    """
    _check(tensors, fmt)
    return tiles.decode_tiles(tensors, fmt, tables, dim)


def _check(tensors: Mapping[str, torch.Tensor], fmt: Format) -> None:
    missing = {"codes"} | ({"index", "value", "start"} if fmt.slots else set())
    if missing - set(tensors):
        raise ValueError(
            explain("decode", "tensors", ", ".join(sorted(missing)), ", ".join(sorted(tensors)))
        )
