"""encode_pack: dense tokens -> packed codes, ranges and outliers.

    x_norm = (x - zero) / scale,  code = #{edges < x_norm},  x ~ lut[code] * scale + zero + S

S holds N corrections a token, `x - decoded`, at the outlier positions. The corrections of a block
of tokens stand together, those of head 0 first, within a head by token and channel, so that whoever
reads one head reads its own corrections alone: start[h] .. start[h + 1] - 1 are those of head h.
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
            ranges over tokens, and of `fmt.block` where there are outliers.
        fmt: the layout.
        tables: codebook and calibrated ranges, on the device of x.

    Returns:
        `codes` [B, H, T, bytes] uint8; `scale` and `zero` for online ranges, [B, T] | [B, H, T, D /
        group] | [B, H, T / group, D] store dtype; with outliers `index` [B, T / block, block * N]
        (token in the block * D + channel), `value` of the same shape, store dtype, and `start` [B,
        T / block, H + 1]. Index and start are uint8, or int16 read as unsigned.

    Raises:
        ValueError: the block does not fit the layout.
    """
    if fmt.axis == "channel" and fmt.group and x.shape[2] % fmt.group:
        raise ValueError(
            explain("encode_pack", "tokens", f"a multiple of group = {fmt.group}", x.shape[2])
        )
    if fmt.slots and x.shape[2] % fmt.block:
        raise ValueError(
            explain("encode_pack", "tokens", f"a multiple of block = {fmt.block}", x.shape[2])
        )
    return reference.encode_pack(x, fmt, tables)
