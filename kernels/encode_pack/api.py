"""encode_pack: dense tokens -> packed codes, ranges and outliers.

    x_norm = (x - zero) / scale,  code = #{edges < x_norm},  x ~ lut[code] * scale + zero + S

S holds N corrections a token, `x - decoded`, at the outlier positions.
"""

from __future__ import annotations

import torch

from kvsmith.errors import explain
from kvsmith.kernels.encode_pack import reference
from kvsmith.kernels.format import Format, Tables


def encode_pack(x: torch.Tensor, fmt: Format, tables: Tables) -> dict[str, torch.Tensor]:
    """Encode a block of tokens.

    Args:
        x: [B, H, T, D] float, keys or values; T a multiple of `fmt.group` where channels share
            ranges over tokens.
        fmt: the layout.
        tables: codebook and calibrated ranges, on the device of x.

    Returns:
        `codes` [B, H, T, bytes] uint8; `scale` and `zero` for online ranges, [B, T] | [B, H, T, D /
        group] | [B, H, T / group, D] store dtype; with outliers `index` [B, T, N] (uint8, or int16
        read as unsigned; head * D + channel) and `value` [B, T, N] store dtype.

    Raises:
        ValueError: the block does not fit the layout.
    """
    if fmt.axis == "channel" and fmt.group and x.shape[2] % fmt.group:
        raise ValueError(
            explain("encode_pack", "tokens", f"a multiple of group = {fmt.group}", x.shape[2])
        )
    return reference.encode_pack(x, fmt, tables)
