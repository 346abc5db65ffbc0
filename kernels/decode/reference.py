"""Definition of decode in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.kernels.format import Format, Tables, unsigned
from kvsmith.kernels.pack.api import unpack


def decode(
    tensors: Mapping[str, torch.Tensor], fmt: Format, tables: Tables, dim: int
) -> torch.Tensor:
    """See `api.decode`."""
    codes = unpack(tensors["codes"], fmt.bits, dim)
    x = tables.lut[codes.int()]  # [B, H, T, D]
    if "scale" in tensors:
        x *= expand_range(tensors["scale"].float(), x.shape, fmt)
        x += expand_range(tensors["zero"].float(), x.shape, fmt)
    else:
        assert tables.scale is not None and tables.zero is not None
        x = torch.addcmul(tables.zero[:, None], x, tables.scale[:, None])
    if fmt.slots:
        flat = outlier_places(tensors, x.shape, fmt.block)
        x.view(x.shape[0], -1).scatter_add_(1, flat, tensors["value"].float().flatten(1))
    return x


def expand_range(values: torch.Tensor, shape: torch.Size, fmt: Format) -> torch.Tensor:
    """Broadcast stored ranges to [B, H, T, D]."""
    if fmt.axis == "channel":
        return values.repeat_interleave(fmt.group, dim=2)
    if fmt.group:
        return values.repeat_interleave(fmt.group, dim=3)
    return values[:, None, :, None]


def outlier_places(
    tensors: Mapping[str, torch.Tensor], shape: torch.Size, block: int
) -> torch.Tensor:
    """Positions of the corrections among the H * T * D elements of a row, [B, N * T] int64."""
    B, H, T, D = shape
    place, start = unsigned(tensors["index"]), unsigned(tensors["start"])
    # A correction belongs to the head whose start lies at or before it: count the starts passed.
    head = place.new_zeros((*place.shape[:2], place.shape[2] + 1))
    head.scatter_add_(2, start[..., 1:], torch.ones_like(start[..., 1:]))
    # Blocks that are not written yet hold zeros.
    place += head[..., :-1].cumsum(-1).clamp_(max=H - 1).mul_(T * D)
    place += torch.arange(place.shape[1], device=place.device)[:, None] * (block * D)
    return place.view(B, -1)
