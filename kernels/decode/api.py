"""decode: packed codes, ranges and outliers -> dense tokens; the inverse of `encode_pack` up to its
error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.errors import explain
from kvsmith.kernels.decode import reference
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
    missing = {"codes"} | ({"index", "value", "start"} if fmt.slots else set())
    if missing - set(tensors):
        raise ValueError(
            explain("decode", "tensors", ", ".join(sorted(missing)), ", ".join(sorted(tensors)))
        )
    return reference.decode(tensors, fmt, tables, dim)
