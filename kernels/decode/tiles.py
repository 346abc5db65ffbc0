"""Decode through tables of whole bytes: one lookup gives the two or four values of a byte.

A byte of packed codes holds channels D/2 or D/4 apart (see `pack`), so the values of a byte lie
side by side and channels leave in tile order. Channels d and d + D/2, which half-split RoPE rotates
together, are neighbours there: a complex number each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from kvsmith.kernels.decode.reference import outlier_places
from kvsmith.kernels.format import Format, Tables

# Slots of a byte in the order in which they leave, by bits.
_SLOTS = {2: (0, 2, 1, 3), 3: (0, 2, 1, 3), 4: (0, 1)}


def tile_order(bits: int, dim: int) -> tuple[int, ...] | None:
    """Channel at each place of a decoded token.

    Args:
        bits: code width.
        dim: channels of a head D.

    Returns:
        A permutation of range(dim) with d + D/2 right after d; None where bytes hold no such pairs.
    """
    if bits not in _SLOTS or dim % 8:
        return None
    slots = _SLOTS[bits]
    size = dim // len(slots)
    return tuple(j + slot * size for j in range(size) for slot in slots)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # it outlives the call, and may meet gradients later
def order_tensors(bits: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`tile_order` and its inverse, [D] int64."""
    order = torch.tensor(tile_order(bits, dim), device=device)
    return order, order.argsort()


def decode_tiles(
    tensors: Mapping[str, torch.Tensor], fmt: Format, tables: Tables, dim: int
) -> torch.Tensor:
    """Decode a block of tokens; see `api.decode_tiles`."""
    codes = tensors["codes"]
    B, H, T = codes.shape[:3]
    table = tables.lut[_codes_of(fmt.bits, codes.device)]  # [entries, values of a byte]
    # As one wide element the values of a byte move together.
    wide = table.view(torch.complex64 if table.shape[1] == 2 else torch.complex128).view(-1)
    index = _index(codes, fmt.bits, dim)
    x = wide.index_select(0, index.view(-1)).view(torch.float32).view(B, H, T, dim)
    order, place = order_tensors(fmt.bits, dim, codes.device)
    _apply_range(x, tensors, fmt, tables, order)
    if fmt.slots:
        flat = outlier_places(tensors, x.shape, fmt.block)
        channel = flat % dim
        flat += place[channel] - channel
        x.view(B, -1).scatter_add_(1, flat, tensors["value"].float().view(B, -1))
    return x


@lru_cache(maxsize=16)
def _codes_of(bits: int, device: torch.device) -> torch.Tensor:
    """Codes that an index stands for, [entries, values of a byte] int64."""
    slots = torch.tensor(_SLOTS[bits], device=device)
    entries = torch.arange(4096 if bits == 3 else 256, device=device)[:, None]
    if bits == 3:
        return entries >> 2 * slots & 3 | (entries >> 8 + slots & 1) << 2
    return entries >> bits * slots & (1 << bits) - 1


def _index(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Table entries [B, H, T, D / values of a byte] int32."""
    if bits != 3:
        return codes.int()
    low, high = codes.split([dim // 4, dim // 8], dim=-1)
    # Byte j of the low plane holds channels j + s D/4; their high bits are bits 2s, or 2s + 1 in
    # the upper half of the bytes, of byte j mod D/8: gather every other bit into four.
    every = torch.stack([high & 0x55, high >> 1 & 0x55], dim=-2)
    every = (every | every >> 1) & 0x33
    every = (every | every >> 2) & 0x0F
    return every.flatten(-2).int().mul_(256).add_(low)


def _apply_range(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    fmt: Format,
    tables: Tables,
    order: torch.Tensor,
) -> None:
    """Undo the normalisation in place."""
    if "scale" not in tensors:
        assert tables.scale is not None and tables.zero is not None
        scale, zero = (t[:, None, order] for t in (tables.scale, tables.zero))
    else:
        scale, zero = tensors["scale"].float(), tensors["zero"].float()
        if fmt.axis == "channel":
            x = x.unflatten(2, (-1, fmt.group))
            scale, zero = scale[:, :, :, None, order], zero[:, :, :, None, order]
        elif fmt.group:
            scale, zero = (t[..., order // fmt.group] for t in (scale, zero))
        else:
            scale, zero = scale[:, None, :, None], zero[:, None, :, None]
    torch.addcmul(zero, x, scale, out=x)
