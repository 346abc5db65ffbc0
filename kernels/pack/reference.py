"""Definition of pack/unpack in plain torch; the layout is described in `api.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pack(codes: torch.Tensor, planes: tuple[int, ...]) -> torch.Tensor:
    """Pack [..., D] codes; `planes` are bit widths from the low bits up."""
    parts, low = [], 0
    for width in planes:
        part = codes if width == 8 else (codes >> low) & ((1 << width) - 1)
        parts.append(_pack_plane(part, width))
        low += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def unpack(packed: torch.Tensor, planes: tuple[int, ...], dim: int) -> torch.Tensor:
    """Unpack to [..., dim] codes."""
    sizes = [-(-dim * width // 8) for width in planes]
    low, codes = 0, None
    for part, width in zip(packed.split(sizes, dim=-1), planes, strict=True):
        plane = _unpack_plane(part, width)[..., :dim]
        codes = plane if codes is None else codes | (plane << low)
        low += width
    assert codes is not None
    return codes


def _pack_plane(part: torch.Tensor, width: int) -> torch.Tensor:
    per_byte = 8 // width
    size = -(-part.shape[-1] // per_byte)
    part = F.pad(part, (0, size * per_byte - part.shape[-1]))
    tiles = part.unflatten(-1, (per_byte, size)).unbind(-2)  # each [..., size]
    packed = tiles[0].clone()
    for i, tile in enumerate(tiles[1:], start=1):
        packed |= tile << (i * width)
    return packed


def _unpack_plane(part: torch.Tensor, width: int) -> torch.Tensor:
    if width == 8:
        return part
    mask = (1 << width) - 1
    return torch.cat([(part >> shift) & mask for shift in range(0, 8, width)], dim=-1)
